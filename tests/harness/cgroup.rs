//! Temporary cgroups.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::wait;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A cgroup that is removed on drop. Its processes must have exited by then.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates an empty cgroup.
    pub fn new() -> Result<Self> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mount = Path::new("/sys/fs/cgroup");
        // The unified hierarchy; with cgroup v1, any hierarchy that accepts processes.
        let places = [
            mount.to_owned(),
            mount.join("unified"),
            mount.join("pids"),
            mount.join("cpu"),
        ];
        let mut why = None;
        for place in places
            .iter()
            .filter(|place| place.join("cgroup.procs").exists())
        {
            let path = place.join(format!("tailback-test-{}-{count}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) => why = Some(error),
            }
        }
        Err(anyhow::anyhow!("cannot create a cgroup: {why:?}"))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Moves a process into it.
    pub fn add_process(&self, pid: u32) -> Result<()> {
        let procs = self.0.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).with_context(|| format!("write {}", procs.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = wait::until("the cgroup to be empty", DEADLINE, || {
            Ok(fs::remove_dir(&self.0).ok())
        });
        if let Err(error) = removed {
            eprintln!("warning: {error}");
        }
    }
}
