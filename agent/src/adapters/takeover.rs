//! One adapter process per signal directory: a new one takes over from a running one.

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

/// Name of the lock file; it contains the pid of the holder.
const LOCK: &str = "adapters.lock";
/// How long the running process may take to exit. It first drains its clients (`DRAIN_TIME`, 2.5 s) and finishes file writes
/// (1 s).
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(6);
/// How often the lock is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Takes the lock, which is held until the file is dropped. Asks another adapter process that holds it to hand over, and waits
/// until it has exited and its ports are free.
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
        if let Some(pid) = pid.filter(|pid| asked != Some(*pid) && is_adapter_process(*pid)) {
            // An error means that it just exited: the next try gets the lock.
            let _ = kill_process(pid, Signal::USR1);
            asked = Some(pid);
        }
        if began.elapsed() > TAKEOVER_TIMEOUT {
            bail!(
                "another adapter process (pid {}) holds {} and does not exit: stop it",
                holder.trim(),
                path.display()
            );
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .context("cannot write to the lock file")?;
    write!(file, "{}", std::process::id()).context("cannot write to the lock file")?;
    Ok(file)
}

/// Whether the pid is that of an adapter process. The lock file may be stale, or its pid may belong to another pid
/// namespace.
fn is_adapter_process(pid: Pid) -> bool {
    let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    words.is_ok_and(|words| {
        words
            .split(|byte| *byte == 0)
            .any(|word| word == b"adapters")
    })
}
