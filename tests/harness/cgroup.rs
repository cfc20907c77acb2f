//! Temporary cgroups.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::wait;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Period of a CPU limit, µs: a tenth of the kernel's default, so that short requests see little of it.
const CPU_PERIOD_US: u32 = 10_000;

/// File of a memory limit.
const MEMORY_LIMIT: &str = "memory.limit_in_bytes";

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

    /// Creates the group of a unit, as systemd does: in the unified hierarchy, or in systemd's own.
    pub fn below_system_slice(unit: &str) -> Result<Self> {
        let mount = Path::new("/sys/fs/cgroup");
        let places = [
            mount.to_owned(),
            mount.join("unified"),
            mount.join("systemd"),
        ];
        let place = places
            .iter()
            .find(|place| place.join("cgroup.procs").exists())
            .context("there is no hierarchy for units below /sys/fs/cgroup")?;
        let path = place.join("system.slice").join(unit);
        fs::create_dir_all(&path)
            .with_context(|| format!("create the cgroup {}", path.display()))?;
        Ok(Self(path))
    }

    /// Creates one whose processes together may use this many CPUs, in periods of `CPU_PERIOD_US`.
    pub fn with_cpus(cpus: f64) -> Result<Self> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mount = Path::new("/sys/fs/cgroup");
        let is_v2 = mount.join("cgroup.controllers").exists();
        let place = if is_v2 {
            let file = mount.join("cgroup.subtree_control");
            fs::write(&file, "+cpu").with_context(|| format!("write {}", file.display()))?;
            mount.to_owned()
        } else {
            mount.join("cpu")
        };
        let path = place.join(format!("tailback-test-{}-{count}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create the cgroup {}", path.display()))?;
        let cgroup = Self(path);
        let quota_us = (cpus * f64::from(CPU_PERIOD_US)).round();
        let write = |name: &str, text: String| {
            let file = cgroup.0.join(name);
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))
        };
        if is_v2 {
            write("cpu.max", format!("{quota_us} {CPU_PERIOD_US}"))?;
        } else {
            write("cpu.cfs_period_us", CPU_PERIOD_US.to_string())?;
            write("cpu.cfs_quota_us", quota_us.to_string())?;
        }
        Ok(cgroup)
    }

    /// Creates one with a memory limit, in MiB. Control groups version 1 only.
    pub fn with_memory(mib: u64) -> Result<Self> {
        let mount = Path::new("/sys/fs/cgroup/memory");
        ensure!(
            mount.join(MEMORY_LIMIT).exists(),
            "the memory controller of control groups version 1 is wanted at {}",
            mount.display()
        );
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = mount.join(format!("tailback-test-{}-{count}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create the cgroup {}", path.display()))?;
        let cgroup = Self(path);
        cgroup.set_memory(mib)?;
        Ok(cgroup)
    }

    /// Changes the limit of [`Cgroup::with_memory`].
    pub fn set_memory(&self, mib: u64) -> Result<()> {
        let file = self.0.join(MEMORY_LIMIT);
        let bytes = mib << 20;
        fs::write(&file, bytes.to_string())
            .with_context(|| format!("write {bytes} to {}", file.display()))
    }

    /// Command prefix that runs a program in it from the start.
    pub fn prefix(&self) -> Vec<String> {
        let enter = "echo $$ >\"$1\" && shift && exec \"$@\"";
        let mut words = ["sh", "-c", enter, "sh"].map(str::to_owned).to_vec();
        words.push(self.0.join("cgroup.procs").display().to_string());
        words
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
        // Of a unit: its parent, unless there are others.
        if let Some(slice) = self
            .0
            .parent()
            .filter(|parent| parent.ends_with("system.slice"))
        {
            let _ = fs::remove_dir(slice);
        }
    }
}
