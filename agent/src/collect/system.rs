//! Control groups of the targets, and the machine: from files that the kernel keeps, v1 and v2 and both side by side.
//!
//! What a file does not say, or what cannot be read, is not known; nothing in here ends the agent. A quota and a limit
//! count wherever they stand between a group and the root, so parents are read as well.
#![forbid(unsafe_code)]

mod mounts;

use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use mounts::{Mounts, Place};

use crate::sample::{Cgroup, Machine, Stall, Target};

/// Control groups read at most.
const MAX_GROUPS: usize = 256;
/// Files kept open at most; further ones are opened for each look.
const MAX_OPEN: usize = 256;
/// A file of these is shorter.
const MAX_BYTES: usize = 64 * 1024;
/// cgroup v1 writes "no limit" as the largest number of whole pages.
const UNLIMITED: u64 = 1 << 60;
/// Ticks in which /proc/stat counts, per second: the same on all architectures (USER_HZ).
const USER_HZ: u64 = 100;

/// Reads the control groups of targets, and the machine.
pub(super) struct System {
    mounts: Mounts,
    files: Files,
    left_out: usize,
    cpus: u32,
}

/// CPU time that a group may use in a period, µs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quota {
    quota_us: u64,
    period_us: u64,
}

/// Files that are read again and again.
#[derive(Default)]
struct Files {
    open: HashMap<PathBuf, Kept>,
    round: u64,
    buffer: Vec<u8>,
}

struct Kept {
    file: File,
    round: u64,
}

impl Default for System {
    /// Finds out where the hierarchies are mounted.
    fn default() -> Self {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self {
            mounts: Mounts::parse(&mountinfo),
            files: Files::default(),
            left_out: 0,
            cpus: 0,
        }
    }
}

impl System {
    /// The groups of the targets, each once, and the machine.
    pub(super) fn read(&mut self, targets: &[Target]) -> (Vec<Cgroup>, Machine) {
        self.files.round += 1;
        self.left_out = 0;
        let mut groups: Vec<Cgroup> = Vec::new();
        for target in targets {
            let Some(path) = &target.cgroup else {
                continue;
            };
            if groups.iter().any(|group| group.path == *path) {
                continue;
            }
            if groups.len() >= MAX_GROUPS {
                self.left_out += 1;
                continue;
            }
            // A process may be moved from one group to another at any time.
            let membership = self
                .files
                .text(&PathBuf::from(format!("/proc/{}/cgroup", target.pid)));
            if let Some(membership) = membership {
                groups.push(self.group(path, &membership));
            }
        }
        let machine = self.machine();
        self.files.forget_unused();
        (groups, machine)
    }

    /// Targets whose groups the last look left out, for there are more than it reads.
    pub(super) fn left_out(&self) -> usize {
        self.left_out
    }

    fn group(&mut self, path: &str, membership: &str) -> Cgroup {
        let mut group = Cgroup {
            path: path.to_owned(),
            ..Cgroup::default()
        };
        if let Some(place) = self.mounts.place("cpu", membership) {
            self.read_cpu(&place, &mut group);
        }
        if group.cpu_ns.is_none()
            && let Some(dir) = self
                .mounts
                .place("cpuacct", membership)
                .and_then(Place::own)
        {
            group.cpu_ns = self.number(&dir, "cpuacct.usage");
        }
        if let Some(place) = self.mounts.place("memory", membership) {
            self.read_memory(&place, &mut group);
        }
        // Pressure is counted in the unified hierarchy alone, also where it has no controllers.
        if let Some(dir) = self.mounts.unified_place(membership).and_then(Place::own) {
            group.cpu_stall = self.stall(&dir.join("cpu.pressure"));
            group.memory_stall = self.stall(&dir.join("memory.pressure"));
            group.io_stall = self.stall(&dir.join("io.pressure"));
        }
        group
    }

    fn read_cpu(&mut self, place: &Place, group: &mut Cgroup) {
        let mut tightest: Option<Quota> = None;
        let (mut periods, mut throttled_ns) = (None, None);
        for (level, dir) in place.dirs.iter().enumerate() {
            let quota = if place.unified {
                self.text(dir, "cpu.max").as_deref().and_then(cpu_max)
            } else {
                self.v1_quota(dir)
            };
            let stat = (level == 0 || quota.is_some())
                .then(|| self.text(dir, "cpu.stat"))
                .flatten()
                .unwrap_or_default();
            if level == 0 && place.unified {
                group.cpu_ns = keyed(&stat, "usage_usec").map(micros);
            }
            let Some(quota) = quota else {
                continue;
            };
            if tightest.is_none_or(|before| quota.millicpus() < before.millicpus()) {
                tightest = Some(quota);
            }
            let ns = keyed(&stat, "throttled_usec")
                .map(micros)
                .or_else(|| keyed(&stat, "throttled_time"));
            throttled_ns = sum(throttled_ns, ns);
            periods = sum(periods, keyed(&stat, "nr_throttled"));
        }
        group.quota_millicpus = tightest.map(Quota::millicpus);
        group.throttled_periods = periods;
        group.throttled_ns = throttled_ns;
    }

    fn v1_quota(&mut self, dir: &Path) -> Option<Quota> {
        // -1: none.
        let quota_us = self.number(dir, "cpu.cfs_quota_us")?;
        let period_us = self.number(dir, "cpu.cfs_period_us")?;
        Some(Quota {
            quota_us,
            period_us,
        })
    }

    /// Memory is that of the level whose limit is tightest, for that is where it runs out; killed are the group's own.
    fn read_memory(&mut self, place: &Place, group: &mut Cgroup) {
        let names = if place.unified {
            ["memory.current", "memory.max", "inactive_file"]
        } else {
            [
                "memory.usage_in_bytes",
                "memory.limit_in_bytes",
                "total_inactive_file",
            ]
        };
        let [usage, limit, inactive] = names;
        let mut tightest: Option<(u64, &PathBuf)> = None;
        for dir in &place.dirs {
            // "max" is no number.
            let limit = self.number(dir, limit).filter(|limit| *limit < UNLIMITED);
            if let Some(limit) = limit
                && tightest.is_none_or(|(before, _)| limit < before)
            {
                tightest = Some((limit, dir));
            }
        }
        let Some(own) = place.dirs.first() else {
            return;
        };
        let dir = tightest.map_or(own, |(_, dir)| dir);
        group.memory_limit = tightest.map(|(limit, _)| limit);
        group.memory = self.number(dir, usage);
        group.reclaimable = self.keyed(dir, "memory.stat", inactive);
        if place.unified {
            group.limit_hits = self.keyed(dir, "memory.events", "max");
            group.oom_kills = self.keyed(own, "memory.events", "oom_kill");
        } else {
            group.limit_hits = self.number(dir, "memory.failcnt");
            group.oom_kills = self.keyed(own, "memory.oom_control", "oom_kill");
        }
    }

    fn machine(&mut self) -> Machine {
        let proc = Path::new("/proc");
        let mut machine = Machine::default();
        if let Some(stat) = self.text(proc, "stat") {
            if let Some([busy, idle, steal]) = cpu_line(&stat) {
                (machine.busy_ns, machine.idle_ns, machine.steal_ns) = (busy, idle, steal);
            }
            let cpus = stat.lines().filter(|line| is_one_cpu(line)).count();
            self.cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        }
        machine.cpus = self.cpus;
        if let Some(meminfo) = self.text(proc, "meminfo") {
            machine.memory = kibibytes(&meminfo, "MemTotal:").unwrap_or(0);
            machine.memory_available = kibibytes(&meminfo, "MemAvailable:").unwrap_or(0);
        }
        machine.oom_kills = self.keyed(proc, "vmstat", "oom_kill").unwrap_or(0);
        machine.cpu_stall = self.stall(Path::new("/proc/pressure/cpu"));
        machine.memory_stall = self.stall(Path::new("/proc/pressure/memory"));
        machine.io_stall = self.stall(Path::new("/proc/pressure/io"));
        machine
    }

    fn text(&mut self, dir: &Path, name: &str) -> Option<String> {
        self.files.text(&dir.join(name))
    }

    fn number(&mut self, dir: &Path, name: &str) -> Option<u64> {
        self.text(dir, name)?.trim().parse().ok()
    }

    fn keyed(&mut self, dir: &Path, name: &str, key: &str) -> Option<u64> {
        keyed(&self.text(dir, name)?, key)
    }

    fn stall(&mut self, path: &Path) -> Option<Stall> {
        stall(&self.files.text(path)?)
    }
}

impl Files {
    /// The whole of a file, from its beginning. A handle of a group that is gone fails: the path may be a new one's.
    fn text(&mut self, path: &Path) -> Option<String> {
        if let Some(kept) = self.open.get_mut(path) {
            kept.round = self.round;
            if let Some(text) = read(&kept.file, &mut self.buffer) {
                return Some(text);
            }
            self.open.remove(path);
        }
        let file = File::open(path).ok()?;
        let text = read(&file, &mut self.buffer)?;
        if self.open.len() < MAX_OPEN {
            let round = self.round;
            self.open.insert(path.to_owned(), Kept { file, round });
        }
        Some(text)
    }

    fn forget_unused(&mut self) {
        self.open.retain(|_, kept| kept.round == self.round);
    }
}

/// At most [`MAX_BYTES`] of a file.
fn read(file: &File, buffer: &mut Vec<u8>) -> Option<String> {
    buffer.resize(MAX_BYTES, 0);
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(_) => return None,
        }
    }
    Some(String::from_utf8_lossy(buffer.get(..len)?).into_owned())
}

impl Quota {
    fn millicpus(self) -> u64 {
        self.quota_us
            .saturating_mul(1000)
            .checked_div(self.period_us)
            .unwrap_or(u64::MAX)
    }
}

/// The number after a key at the beginning of a line.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix(' ')?;
        value.trim().parse().ok()
    })
}

/// cpu.max: `50000 100000`, or `max 100000` for none.
fn cpu_max(text: &str) -> Option<Quota> {
    let mut fields = text.split_whitespace();
    Some(Quota {
        quota_us: fields.next()?.parse().ok()?,
        period_us: fields.next()?.parse().ok()?,
    })
}

/// A pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=123`, µs. A machine's file for CPUs had no line `full` before 5.13.
fn stall(text: &str) -> Option<Stall> {
    let total = |line: &str| {
        let line = text.lines().find_map(|found| found.strip_prefix(line))?;
        let total = line
            .split(' ')
            .find_map(|field| field.strip_prefix("total="))?;
        total.parse().ok().map(micros)
    };
    Some(Stall {
        some_ns: total("some ")?,
        full_ns: total("full ").unwrap_or(0),
    })
}

/// Busy, idle, and stolen time of all CPUs, ns: from the first line of /proc/stat (user nice system idle iowait irq softirq
/// steal guest guest_nice; guest time is in user time, too).
fn cpu_line(text: &str) -> Option<[u64; 3]> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
        return None;
    };
    let ns = |ticks: &[u64]| {
        let sum = ticks
            .iter()
            .fold(0_u64, |sum, more| sum.saturating_add(*more));
        sum.saturating_mul(1_000_000_000 / USER_HZ)
    };
    Some([
        ns(&[user, nice, system, irq, softirq]),
        ns(&[idle, iowait]),
        ns(&[steal]),
    ])
}

/// `cpu0 …`, not the sum `cpu …`.
fn is_one_cpu(line: &str) -> bool {
    line.strip_prefix("cpu")
        .is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()))
}

/// `MemTotal:       16384 kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

fn micros(us: u64) -> u64 {
    us.saturating_mul(1000)
}

fn sum(before: Option<u64>, more: Option<u64>) -> Option<u64> {
    match (before, more) {
        (Some(before), Some(more)) => Some(before.saturating_add(more)),
        (before, more) => before.or(more),
    }
}

#[cfg(test)]
mod tests;
