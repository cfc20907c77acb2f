//! One guard per directory: a new one takes over from the one that is there.

use std::{
    fs::File,
    io::{Seek as _, Write as _},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, openat},
    process::{Pid, Signal, kill_process},
};

const LOCK: &str = "guard.lock";
/// The one that is there first says to all who ask it that there is no pressure.
const PATIENCE: Duration = Duration::from_secs(6);

/// Held for as long as the file lives. Another guard that holds it is told to hand over, and waited for: its
/// ports are ours then.
pub fn take(directory: &OwnedFd, path: &Path) -> Result<File> {
    let path = path.join(LOCK);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, LOCK, flags, Mode::from_raw_mode(0o644))
        .with_context(|| format!("cannot open {}", path.display()))?;
    let mut file = File::from(file);
    let began = Instant::now();
    let mut asked = None;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let holder = std::fs::read_to_string(&path).unwrap_or_default();
        let pid = holder.trim().parse().ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|pid| asked != Some(*pid) && is_guard(*pid)) {
            // It may have ended just now: then the lock is free at the next try.
            let _ = kill_process(pid, Signal::USR1);
            asked = Some(pid);
        }
        if began.elapsed() > PATIENCE {
            bail!(
                "another guard (process {}) holds {} and does not end: stop it",
                holder.trim(),
                path.display()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .context("cannot write to the lock")?;
    write!(file, "{}", std::process::id()).context("cannot write to the lock")?;
    Ok(file)
}

/// What the lock says may be old, or a number of another pid namespace.
fn is_guard(pid: Pid) -> bool {
    let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    words.is_ok_and(|words| {
        words
            .split(|byte| *byte == 0)
            .any(|word| word == b"adapters")
    })
}
