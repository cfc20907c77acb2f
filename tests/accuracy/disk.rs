//! Threads in direct writes to a disk that a cgroup throttles.

use std::{
    fs::{self, File, OpenOptions},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{fstat, major, minor};
use tailback_tests::{lines::unix_ns, temp::TempDir};

use crate::{
    control_group::{ControlGroup, write},
    course::{Course, meanwhile},
    report::Report,
    sampling::{self, compare_age, time_ns},
};

const WRITERS: usize = 3;
/// Bytes that each thread writes in one call.
const WRITE_BYTES: usize = 3 << 20;
/// Throttle for all of them together.
const LIMIT_BYTES_PER_S: usize = 2 << 20;

pub fn measure(report: &mut Report) -> Result<()> {
    let directory = TempDir::new("disk")?;
    let group = match throttle(&directory) {
        Ok(group) => group,
        Err(why) => {
            report.skip(&format!("cannot throttle a disk: {why:#}"), |_| true);
            return Ok(());
        }
    };
    let (done, ended) = channel();
    let watched = meanwhile(
        Duration::from_millis(5),
        || Ok([waiting()?]),
        || {
            sampling::during(Duration::from_millis(2200), || {
                let since_ns = unix_ns();
                for number in 0..WRITERS {
                    let path = directory.path().join(number.to_string());
                    let mut options = OpenOptions::new();
                    options
                        .write(true)
                        .create(true)
                        .custom_flags(libc::O_DIRECT);
                    let file = options
                        .open(&path)
                        .context("open a file for direct writes")?;
                    let done = done.clone();
                    thread::spawn(move || {
                        let written = write_once(&file);
                        let _ = done.send((unix_ns(), written));
                    });
                }
                Ok(since_ns)
            })
        },
    );
    drop(done);
    let ends: Vec<(u64, Result<()>)> = ended.iter().collect();
    drop(group);
    let ((samples, since_ns), [course]) = watched?;
    let mut until_ns = u64::MAX;
    for (end_ns, written) in ends {
        written.context("write directly")?;
        until_ns = until_ns.min(end_ns);
    }
    ensure!(
        until_ns > since_ns + 2 * sampling::SETTLED_NS,
        "the disk was not throttled: a write took {:.3} s",
        (until_ns - since_ns) as f64 / 1e9
    );
    let queue = samples.queue("disk", |_| true);
    let settled = sampling::within(&queue, since_ns + sampling::SETTLED_NS, until_ns);
    sampling::compare_each(
        report,
        &settled,
        "depth",
        |line| in_state_d(&course, time_ns(line), since_ns),
        "depth",
    );
    compare_age(report, &queue, (since_ns, until_ns), "oldest");
    Ok(())
}

/// Threads in state D at a sample, but no earlier than [`sampling::SETTLED_NS`] after the start.
fn in_state_d(course: &Course, at_ns: u64, since_ns: u64) -> f64 {
    course.at(at_ns.max(since_ns + sampling::SETTLED_NS))
}

/// Throttles our direct writes to the disk of this directory. Needs cgroup v1.
fn throttle(directory: &TempDir) -> Result<ControlGroup> {
    let device = fstat(File::open(directory.path())?)
        .context("fstat")?
        .st_dev;
    let (major, minor) = (major(device), minor(device));
    ensure!(
        major != 0,
        "{} is not on a block device",
        std::env::temp_dir().display()
    );
    let group = ControlGroup::enter("blkio")?;
    ensure!(group.is_v1, "cgroup v1 is required");
    let rule = format!("{major}:{minor} {LIMIT_BYTES_PER_S}");
    write(&group.file("blkio.throttle.write_bps_device"), &rule)?;
    Ok(group)
}

/// Our threads in uninterruptible sleep, state D of proc(5).
fn waiting() -> Result<f64> {
    let mut count = 0;
    for task in fs::read_dir("/proc/self/task").context("list our threads")? {
        // The thread may have exited since.
        let stat = fs::read_to_string(task.context("list our threads")?.path().join("stat"));
        let stat = stat.unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        count += u32::from(after_name.starts_with('D'));
    }
    Ok(f64::from(count))
}

/// One pwrite(2) from page-aligned memory, as O_DIRECT requires.
fn write_once(file: &File) -> Result<()> {
    const PAGE: usize = 4096;
    let memory = vec![1_u8; WRITE_BYTES + PAGE];
    let skip = memory.as_ptr().align_offset(PAGE);
    let aligned = memory
        .get(skip..skip + WRITE_BYTES)
        .context("align memory")?;
    // SAFETY: the kernel reads `WRITE_BYTES` bytes, the length of `aligned`.
    let written =
        unsafe { libc::pwrite(file.as_raw_fd(), aligned.as_ptr().cast(), WRITE_BYTES, 0) };
    ensure!(
        written == WRITE_BYTES as isize,
        "{}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
