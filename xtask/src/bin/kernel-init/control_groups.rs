//! Limits of control groups while nothing is mounted that shows them: only the kernel's structures are left.

use std::{
    fs, hint,
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use crate::{checks::agent, machine::CGROUPS};

/// The argument that makes this program use memory and keep a CPU busy. The next argument
/// is the directory of its control group.
pub const BUSY: &str = "busy";
/// The quota is set on the parent of the process's own group: 0.2 CPUs, in periods that are short compared with the time
/// between two samples.
const CPU_MAX: &str = "2000 10000";
const QUOTA_CPUS: f64 = 0.2;
/// The limit is set on the process's own group.
const MEMORY_MAX: u64 = 64 << 20;
/// Memory that the process uses.
const USED: u64 = 8 << 20;
/// Time limit for the process to use it; an emulated machine is slow.
const DEADLINE: Duration = Duration::from_secs(20);

/// The agent reports the quota, the throttling, the memory limit and the memory in use.
pub fn limits_are_read_without_mounts() -> Result<()> {
    let outer = Path::new(CGROUPS).join("outer");
    let inner = outer.join("inner");
    write(Path::new(CGROUPS), "cgroup.subtree_control", "+cpu +memory")?;
    fs::create_dir_all(&outer).context("create a control group")?;
    write(&outer, "cgroup.subtree_control", "+cpu +memory")?;
    fs::create_dir_all(&inner).context("create a control group")?;
    write(&outer, "cpu.max", CPU_MAX)?;
    write(&inner, "memory.max", &MEMORY_MAX.to_string())?;
    let mut process = Command::new("/proc/self/exe");
    let process = process.arg(BUSY).arg(&inner).spawn();
    let process = Busy(process.context("start a process")?);
    let pid = process.0.id().to_string();
    let end = Instant::now() + DEADLINE;
    while memory(&inner)? < USED {
        ensure!(
            Instant::now() < end,
            "the process does not use {USED} bytes within {DEADLINE:?}"
        );
        thread::sleep(Duration::from_millis(10));
    }
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
    // Besides this memory, the group is charged only for page tables and for what the kernel charges in advance.
    let memory = queue("memory")?;
    ensure!(
        memory["limit"].as_u64() == Some(MEMORY_MAX),
        "not {MEMORY_MAX} bytes: {memory}"
    );
    ensure!(
        memory["depth"]
            .as_u64()
            .is_some_and(|used| (USED..2 * USED).contains(&used)),
        "not {USED} bytes: {memory}"
    );
    Ok(())
}

/// What the process does, in the control group with this directory.
pub fn busy(group: &Path) -> Result<()> {
    write(group, "cgroup.procs", "0")?;
    // Not zero: untouched zero pages take no memory.
    let used = vec![1_u8; USED as usize];
    loop {
        hint::black_box(&used);
        hint::spin_loop();
    }
}

/// Bytes that the group uses, by its file.
fn memory(group: &Path) -> Result<u64> {
    let file = group.join("memory.current");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("read the number {text:?}"))
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
