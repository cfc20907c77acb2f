//! Limits of control groups while nothing is mounted that shows them: only the kernel's structures are left.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use crate::{checks::agent, machine::CGROUPS};

/// The argument with which this program is a process that always has work for a CPU.
pub const BUSY: &str = "busy";
/// The quota is set on the parent of the process's own group: 0.2 CPUs, in periods that are short beside the time between two samples.
const CPU_MAX: &str = "2000 10000";
const QUOTA_CPUS: f64 = 0.2;
/// The limit is set on the process's own group.
const MEMORY_MAX: u64 = 64 << 20;

/// The agent reports the quota, the throttling and the memory limit, and knows the stall times.
pub fn limits_are_read_without_mounts() -> Result<()> {
    let outer = Path::new(CGROUPS).join("outer");
    let inner = outer.join("inner");
    write(Path::new(CGROUPS), "cgroup.subtree_control", "+cpu +memory")?;
    fs::create_dir_all(&outer).context("create a control group")?;
    write(&outer, "cgroup.subtree_control", "+cpu +memory")?;
    fs::create_dir_all(&inner).context("create a control group")?;
    write(&outer, "cpu.max", CPU_MAX)?;
    write(&inner, "memory.max", &MEMORY_MAX.to_string())?;
    let process = Command::new("/proc/self/exe").arg(BUSY).spawn();
    let process = Busy(process.context("start a process")?);
    let pid = process.0.id().to_string();
    write(&inner, "cgroup.procs", &pid)?;
    unmount(CGROUPS, UnmountFlags::empty()).with_context(|| format!("unmount {CGROUPS}"))?;
    let lines = agent(&["sample", "--json", "--pid", &pid]);
    mount("cgroup2", CGROUPS, "cgroup2", MountFlags::empty(), None)
        .with_context(|| format!("mount {CGROUPS}"))?;
    let lines = lines?;
    let queues: Vec<Value> = lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let queue = |kind: &str| {
        let found = queues.iter().find(|queue| queue["kind"] == kind);
        found.with_context(|| format!("no queue {kind}: {lines}"))
    };
    let runqueue = queue("runqueue")?;
    ensure!(
        runqueue["quota_cpus"].as_f64() == Some(QUOTA_CPUS),
        "not {QUOTA_CPUS} CPUs: {runqueue}"
    );
    ensure!(
        runqueue["throttled_ns"].as_f64().is_some_and(|ns| ns > 0.0),
        "not throttled: {runqueue}"
    );
    let memory = queue("memory")?;
    ensure!(
        memory["limit"].as_u64() == Some(MEMORY_MAX),
        "not {MEMORY_MAX} bytes: {memory}"
    );
    ensure!(
        memory["depth"]
            .as_u64()
            .is_some_and(|used| (1..MEMORY_MAX).contains(&used)),
        "not the memory of a small process: {memory}"
    );
    Ok(())
}

fn write(group: &Path, file: &str, text: &str) -> Result<()> {
    let file = group.join(file);
    fs::write(&file, text).with_context(|| format!("write {text:?} to {}", file.display()))
}

struct Busy(Child);

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
