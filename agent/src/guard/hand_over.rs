//! One guard per directory: a new one takes over from the one that is there.

use std::{
    fs::{File, OpenOptions},
    io::{Seek as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, kill_process},
};

const LOCK: &str = "guard.lock";
const PATIENCE: Duration = Duration::from_secs(5);

/// Held for as long as the file lives. Another guard that holds it is told to hand over, and waited for: its
/// ports are ours then.
pub fn take(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let began = Instant::now();
    let mut asked = None;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let holder = std::fs::read_to_string(&path).unwrap_or_default();
        let pid = holder.trim().parse().ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|pid| asked != Some(*pid)) {
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
