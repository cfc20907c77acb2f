//! Pipes and FIFOs, filled in whole pages: one page per pipe buffer.

use std::{
    fs::OpenOptions,
    io::{self, PipeReader, PipeWriter, Read as _, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{CWD, FileType, Mode, fstat, mknodat},
    param::page_size,
    pipe::fcntl_getpipe_size,
};
use tailback_tests::{lines::unix_ns, temp::TempDir};

use crate::{
    course::Course,
    holder::Holder,
    report::Report,
    sampling::{self, SETTLED_NS, Sampled, compare_age, compare_steady},
    sys,
};

const PAGES: usize = 3;
const SAMPLED_FOR: Duration = Duration::from_millis(1800);

pub fn measure(report: &mut Report) -> Result<()> {
    anonymous(report)?;
    rates(report)?;
    fifo(report)
}

/// Another process holds the read end.
fn anonymous(report: &mut Report) -> Result<()> {
    let (reader, mut writer) = io::pipe().context("make a pipe")?;
    let holder = Holder::of(OwnedFd::from(reader))?;
    let (samples, since_ns) = sampling::during(SAMPLED_FOR, || fill(&mut writer))?;
    let name = name(&writer)?;
    let queue = samples.queue("pipe", |queue| queue == name);
    let limit = fcntl_getpipe_size(&writer).context("F_GETPIPE_SZ")? / page_size();
    let keys = [
        ("depth", "depth", depth(&writer)?),
        ("limit", "limit", limit as f64),
    ];
    compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "oldest");
    compare_holder(
        report,
        "holder",
        &queue,
        since_ns + SETTLED_NS,
        &holder.pid().to_string(),
    );
    Ok(())
}

/// Checks that each sample since then names this process or thread as the holder, in `worst`.
pub fn compare_holder(
    report: &mut Report,
    quantity: &str,
    queue: &Sampled<'_>,
    since_ns: u64,
    number: &str,
) {
    let samples = match sampling::within(queue, since_ns, unix_ns()) {
        Ok(samples) => samples,
        Err(reason) => return report.compare(quantity, 1.0, None, &reason),
    };
    for line in samples {
        let worst = line["worst"].as_str().unwrap_or_default();
        let words = worst.split(|c: char| !c.is_ascii_alphanumeric());
        let named = words.into_iter().any(|word| word == number);
        let note = format!("{number} is not named: {line}");
        report.compare(quantity, 1.0, named.then_some(1.0), &note);
    }
}

fn fill(writer: &mut impl io::Write) -> Result<u64> {
    let since_ns = unix_ns();
    for _ in 0..PAGES {
        writer.write_all(&vec![0; page_size()]).context("write")?;
    }
    Ok(since_ns)
}

fn depth(end: &impl AsFd) -> Result<f64> {
    Ok(sys::readable(end)? / page_size() as f64)
}

/// The name that the agent gives it.
fn name(end: &impl AsFd) -> Result<String> {
    Ok(format!("pipe:[{}]", fstat(end).context("fstat")?.st_ino))
}

fn rates(report: &mut Report) -> Result<()> {
    let (mut reader, mut writer): (PipeReader, PipeWriter) = io::pipe().context("make a pipe")?;
    let duration = Duration::from_millis(3000);
    let (samples, (written, read)) = sampling::during(duration, || {
        let (mut written, mut read) = (Course::default(), Course::default());
        let end = Instant::now() + duration;
        let mut page = vec![0; page_size()];
        let mut pages = 0.0;
        while Instant::now() < end {
            writer.write_all(&page).context("write")?;
            pages += 1.0;
            written.note(pages);
            // Paces the load.
            thread::sleep(Duration::from_millis(3));
            reader.read_exact(&mut page).context("read")?;
            read.note(pages);
        }
        Ok((written, read))
    })?;
    let name = name(&writer)?;
    let queue = samples.queue("pipe", |queue| queue == name);
    sampling::compare_rate(report, &queue, &written, ("arrivals", "arrivals_per_s"));
    sampling::compare_rate(report, &queue, &read, ("departures", "departures_per_s"));
    Ok(())
}

fn fifo(report: &mut Report) -> Result<()> {
    let directory = TempDir::new("fifo")?;
    let path = directory.path().join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).context("create a FIFO")?;
    let mut options = OpenOptions::new();
    // O_NONBLOCK: opening a FIFO for reading would wait for a writer.
    let reader = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path);
    let reader = reader.context("open the FIFO to read")?;
    let writer = OpenOptions::new().write(true).open(&path);
    let mut writer = writer.context("open the FIFO to write")?;
    let _holder = Holder::of(OwnedFd::from(reader))?;
    let since_ns = fill(&mut writer)?;
    let samples = sampling::steady(Duration::from_millis(600))?;
    let (path, number) = (path.display().to_string(), name(&writer)?);
    let queue = samples.queue("pipe", |queue| queue == path || queue == number);
    compare_steady(
        report,
        &queue,
        since_ns,
        &[("fifo depth", "depth", depth(&writer)?)],
    );
    Ok(())
}
