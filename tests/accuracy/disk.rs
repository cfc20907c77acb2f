//! Threads that write to a disk that is made slow.

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
    look::{self, age, time_ns},
    report::Report,
};

const WRITERS: usize = 3;
/// What each writes with one call, and what all together may write in a second.
const BYTES: usize = 3 << 20;
const BYTES_PER_S: usize = 2 << 20;

pub fn measure(report: &mut Report) -> Result<()> {
    let folder = TempDir::new("disk")?;
    let group = match slow_down(&folder) {
        Ok(group) => group,
        Err(why) => {
            report.skip(&format!("no disk can be made slow: {why:#}"), |_| true);
            return Ok(());
        }
    };
    let (done, ended) = channel();
    let watched = meanwhile(
        Duration::from_millis(5),
        || Ok([waiting()?]),
        || {
            look::during(Duration::from_millis(2200), || {
                let since_ns = unix_ns();
                for number in 0..WRITERS {
                    let path = folder.path().join(number.to_string());
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
                        let written = write_at_once(&file);
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
    let ((looks, since_ns), [course]) = watched?;
    let mut until_ns = u64::MAX;
    for (end_ns, written) in ends {
        written.context("write directly")?;
        until_ns = until_ns.min(end_ns);
    }
    ensure!(
        until_ns > since_ns + 2 * look::SETTLED_NS,
        "the disk was not slow: a write took {:.3} s",
        (until_ns - since_ns) as f64 / 1e9
    );
    let queue = looks.queue("disk", |_| true);
    let settled = look::within(&queue, since_ns + look::SETTLED_NS, until_ns);
    look::each(
        report,
        &settled,
        "depth",
        |line| in_state_d(&course, time_ns(line), since_ns),
        "depth",
    );
    age(report, &queue, (since_ns, until_ns), "oldest");
    Ok(())
}

/// At a look; without one, half a second after the beginning.
fn in_state_d(course: &Course, at_ns: u64, since_ns: u64) -> f64 {
    course.at(at_ns.max(since_ns + look::SETTLED_NS))
}

/// Limits what we write to the disk that this folder lies on (version 1 throttles direct writes).
fn slow_down(folder: &TempDir) -> Result<ControlGroup> {
    let device = fstat(File::open(folder.path())?).context("fstat")?.st_dev;
    let (major, minor) = (major(device), minor(device));
    ensure!(
        major != 0,
        "{} is on no block device",
        std::env::temp_dir().display()
    );
    let group = ControlGroup::enter("blkio")?;
    ensure!(group.is_v1, "control groups of version 1 are wanted");
    let rule = format!("{major}:{minor} {BYTES_PER_S}");
    write(&group.file("blkio.throttle.write_bps_device"), &rule)?;
    Ok(group)
}

/// Of our threads those in uninterruptible sleep (proc(5)).
fn waiting() -> Result<f64> {
    let mut count = 0;
    for task in fs::read_dir("/proc/self/task").context("list our threads")? {
        // It may have ended meanwhile.
        let stat = fs::read_to_string(task.context("list our threads")?.path().join("stat"));
        let stat = stat.unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        count += u32::from(after_name.starts_with('D'));
    }
    Ok(f64::from(count))
}

/// One call, from memory that direct writes may come from.
fn write_at_once(file: &File) -> Result<()> {
    const PAGE: usize = 4096;
    let memory = vec![1_u8; BYTES + PAGE];
    let skip = memory.as_ptr().align_offset(PAGE);
    let aligned = memory.get(skip..skip + BYTES).context("align memory")?;
    // SAFETY: the kernel reads as many bytes as `aligned` has.
    let written = unsafe { libc::pwrite(file.as_raw_fd(), aligned.as_ptr().cast(), BYTES, 0) };
    ensure!(
        written == BYTES as isize,
        "{}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
