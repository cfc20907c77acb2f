//! CPU, memory and pressure of the targets' cgroups (v1, v2 and hybrid) and of the machine.
//!
//! A value that is missing or cannot be read is unknown, not an error. A quota or limit anywhere between a
//! cgroup and the root applies, so the parents are read as well. Quotas and memory limits come from the kernel's structures,
//! which are the same in every container; what these lack is read from files, through any mount that leads to them. A limit
//! that can be read in neither way is reported as hidden: it is not the same as none.
//!
//! The parsers in this file and in `mounts`, `networks` and `target::facts` are our own rather than the `procfs` crate's
//! (0.18). That crate:
//!
//! - rejects a whole file for one unexpected or non-UTF-8 line (a cgroup or process can have any name);
//! - does not decode `\040` in mountinfo;
//! - requires the `full` line of pressure files, which is missing before 5.13;
//! - allocates a map of all lines where two values are wanted;
//! - has no cgroup files.
#![forbid(unsafe_code)]

mod kernel_groups;
mod mounts;
mod reach;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use kernel_groups::{Controller, KernelGroups};
use mounts::{CgroupDirs, Mounts};
use reach::Reach;
use rustix::param::page_size;

use super::{notices::Notices, paths::block_device, processes::Processes};
use crate::{
    kernel::scanner::{Record, Scanner},
    sample::{Cgroup, Hidden, HiddenFact, IoLimit, Machine, Refaults, Sample, Stall, Target},
    target::namespaces::{self, is_initial},
};

/// Maximum number of cgroups that are read.
const MAX_GROUPS: usize = 256;
/// Maximum number of files kept open; further ones are opened for each poll.
const MAX_OPEN: usize = 256;
/// Maximum number of bytes of a file that are read; all these files are shorter.
const MAX_BYTES: usize = 64 * 1024;
/// A memory limit of this or more is none: cgroup v1 writes "no limit" as the largest number of whole pages.
const UNLIMITED: u64 = 1 << 60;
/// Maximum number of block devices whose I/O limits are kept for a cgroup.
const MAX_DEVICES: usize = 16;
/// Ticks per second in the times of /proc/stat: the same on all architectures.
const USER_HZ: u64 = 100;

/// Reads the targets' cgroups and the machine.
pub(super) struct System {
    mounts: Mounts,
    /// The agent's /proc/self/mountinfo shows whole hierarchies, not only the part that a container sees.
    sees_roots: bool,
    /// The agent sees the processes of all containers.
    sees_processes: bool,
    files: Files,
    reach: Reach,
    /// Cgroups beyond [`MAX_GROUPS`] in the last poll.
    left_out: usize,
    cpus: u32,
}

/// What is read of the targets' cgroups.
#[derive(Default)]
struct Groups {
    cgroups: Vec<Cgroup>,
    io_limits: Vec<IoLimit>,
    refaults: Vec<Refaults>,
    hidden: Vec<Hidden>,
}

/// A target's cgroup, and where it is.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// As in `Target::cgroup`.
    path: &'a str,
    pid: u32,
    /// The process's /proc/PID/cgroup.
    membership: &'a str,
    /// What the kernel's structures say. `None`: they could not be read.
    kernel: Option<&'a KernelGroups>,
}

/// CPU time that a cgroup may use in each period, µs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quota {
    quota_us: u64,
    period_us: u64,
}

/// Files that are kept open between polls.
#[derive(Default)]
struct Files {
    open: HashMap<PathBuf, OpenFile>,
    /// Number of the current poll.
    poll: u64,
    buffer: Vec<u8>,
}

struct OpenFile {
    file: File,
    /// The last poll that read it.
    poll: u64,
}

impl Default for System {
    /// Finds where the cgroup hierarchies are mounted.
    fn default() -> Self {
        // Not necessarily UTF-8: mount points can have any name.
        let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
        Self {
            mounts: Mounts::parse(&String::from_utf8_lossy(&mountinfo)),
            sees_roots: is_initial(namespaces::CGROUP).unwrap_or(false),
            sees_processes: is_initial(namespaces::PID).unwrap_or(false),
            reach: Reach::default(),
            files: Files::default(),
            left_out: 0,
            cpus: 0,
        }
    }
}

impl System {
    /// Puts the targets' cgroups and the machine into the sample.
    pub(super) fn poll(
        &mut self,
        scanner: &mut Scanner,
        processes: &Processes,
        sample: &mut Sample,
        notices: &mut Notices,
    ) -> Result<()> {
        let targets = processes.targets();
        let kernel = kernel_groups(scanner, processes)?;
        let (mut groups, machine) = self.read(targets, &kernel);
        if !self.sees_processes {
            groups.hidden.push(Hidden {
                cgroup: String::new(),
                fact: HiddenFact::Processes,
            });
        }
        sample.cgroups = groups.cgroups;
        sample.io_limits = groups.io_limits;
        sample.refaults = groups.refaults;
        sample.hidden = groups.hidden;
        sample.machine = Some(machine);
        sample.scans.system = true;
        let left_out = self.left_out;
        if left_out > 0 {
            notices.report_once("too_many_cgroups", || {
                format!(
                    "limit of {MAX_GROUPS} cgroups reached: {left_out} are not read, so their quotas, memory and pressure are \
                     unknown"
                )
            });
        }
        Ok(())
    }

    /// The targets' cgroups, each once, and the machine. `kernel`: what the kernel's structures say, by pid.
    fn read(
        &mut self,
        targets: &[Target],
        kernel: &HashMap<u32, KernelGroups>,
    ) -> (Groups, Machine) {
        self.files.poll += 1;
        if self.reach.begin_poll() {
            // Their paths may contain the number of a descriptor that was closed.
            self.files.open.clear();
        }
        let mut left_out = BTreeSet::new();
        let mut read = HashSet::new();
        let mut groups = Groups::default();
        for target in targets {
            let Some(path) = &target.cgroup else {
                continue;
            };
            if read.contains(path) {
                continue;
            }
            if groups.cgroups.len() >= MAX_GROUPS {
                left_out.insert(path);
                continue;
            }
            // Read each time, because a process may be moved to another cgroup.
            let membership = self
                .files
                .text(&PathBuf::from(format!("/proc/{}/cgroup", target.pid)));
            if let Some(membership) = membership {
                read.insert(path);
                let kernel = kernel.get(&target.pid).filter(|kernel| kernel.is_known());
                let place = Place {
                    path,
                    pid: target.pid,
                    membership: &membership,
                    kernel,
                };
                self.group(place, &mut groups);
                self.io_limits(place, &mut groups);
            }
        }
        self.left_out = left_out.len();
        for path in left_out {
            for fact in [
                HiddenFact::CpuQuota,
                HiddenFact::MemoryLimit,
                HiddenFact::IoLimits,
            ] {
                groups.hide(path, fact);
            }
        }
        let machine = self.machine();
        self.files.close_unused();
        (groups, machine)
    }

    /// The directories of a controller, and whether all its levels are in sight.
    fn dirs(&mut self, place: Place<'_>, controller: Controller) -> Option<(CgroupDirs, bool)> {
        if let Some(kernel) = place.kernel {
            let chain = kernel.chain(controller);
            let dirs = self.reach.dirs(place.pid, controller, chain)?;
            // The root has no limits.
            let is_whole = kernel_groups::is_whole(chain) && dirs.dirs.len() + 1 >= chain.len();
            return Some((dirs, is_whole));
        }
        let dirs = match controller {
            Controller::Unified => self.mounts.unified_dirs(place.membership),
            _ => self.mounts.cgroup_dirs(controller.name(), place.membership),
        }?;
        dirs.dirs.first().filter(|own| own.is_dir())?;
        Some((dirs, self.sees_roots))
    }

    fn group(&mut self, place: Place<'_>, groups: &mut Groups) {
        let mut group = Cgroup {
            path: place.path.to_owned(),
            ..Cgroup::default()
        };
        let cpu_dirs = self.dirs(place, Controller::Cpu);
        let is_read = place
            .kernel
            .is_some_and(|kernel| kernel.read_cpu(&mut group));
        if let Some((dirs, is_whole)) = &cpu_dirs {
            if !is_read {
                self.read_cpu(dirs, &mut group);
            }
            group.cpu_ns = if dirs.unified {
                // The process's own group counts its CPU time even without the controller.
                let own = self.dirs(place, Controller::Unified);
                own.and_then(|(own, _)| self.cpu_time(&own))
            } else {
                self.cpu_time(dirs)
            };
            if !is_read && !is_whole && group.quota_millicpus.is_none() {
                groups.hide(place.path, HiddenFact::CpuQuota);
            }
        } else if !is_read && place.may_have(Controller::Cpu) {
            groups.hide(place.path, HiddenFact::CpuQuota);
        }
        if group.cpu_ns.is_none()
            && let Some(dir) = self
                .mounts
                .cgroup_dirs("cpuacct", place.membership)
                .and_then(CgroupDirs::own)
        {
            group.cpu_ns = self.number(&dir, "cpuacct.usage");
        }
        self.memory(place, &mut group, groups);
        // Pressure files exist only in the unified hierarchy, even if it has no controllers. They are preferred
        // to the kernel's structures: reading one makes the kernel update its counters, which otherwise lag by up to 2 s.
        if let Some(dir) = self
            .dirs(place, Controller::Unified)
            .and_then(|(dirs, _)| dirs.own())
        {
            group.cpu_stall = self.stall(&dir.join("cpu.pressure"));
            group.memory_stall = self.stall(&dir.join("memory.pressure"));
            group.io_stall = self.stall(&dir.join("io.pressure"));
        }
        if let Some([cpu, memory, io]) = place.kernel.and_then(KernelGroups::stalls) {
            group.cpu_stall = group.cpu_stall.or(Some(cpu));
            group.memory_stall = group.memory_stall.or(Some(memory));
            group.io_stall = group.io_stall.or(Some(io));
        }
        groups.cgroups.push(group);
    }

    fn memory(&mut self, place: Place<'_>, group: &mut Cgroup, groups: &mut Groups) {
        let page = page_size() as u64;
        let dirs = self.dirs(place, Controller::Memory);
        if place
            .kernel
            .is_some_and(|kernel| kernel.read_memory(group, page))
        {
            // The level that has the limit, if its files are in sight.
            let level = place.kernel.and_then(|kernel| kernel.memory_level(page));
            if let Some((dirs, _)) = &dirs
                && let Some(dir) = dirs.dirs.get(level.unwrap_or(0))
            {
                let refaults = self.read_memory_stat(dir, dirs.unified, group);
                groups.refaults.extend(refaults.filter(|_| level.is_some()));
            }
            return;
        }
        match dirs {
            Some((dirs, is_whole)) => {
                let refaults = self.read_memory(&dirs, group);
                groups.refaults.extend(refaults);
                if !is_whole && group.memory_limit.is_none() {
                    groups.hide(place.path, HiddenFact::MemoryLimit);
                }
            }
            None if place.may_have(Controller::Memory) => {
                groups.hide(place.path, HiddenFact::MemoryLimit);
            }
            None => {}
        }
    }

    /// CPU time of all processes of a group, ns, where the group's own files have it.
    fn cpu_time(&mut self, dirs: &CgroupDirs) -> Option<u64> {
        let own = dirs.dirs.first()?;
        if dirs.unified {
            self.keyed(own, "cpu.stat", "usage_usec").map(micros)
        } else {
            self.number(own, "cpuacct.usage")
        }
    }

    fn read_cpu(&mut self, cgroup_dirs: &CgroupDirs, group: &mut Cgroup) {
        let mut tightest: Option<Quota> = None;
        let (mut periods, mut throttled_ns) = (None, None);
        for (level, dir) in cgroup_dirs.dirs.iter().enumerate() {
            let quota = if cgroup_dirs.unified {
                self.text(dir, "cpu.max").as_deref().and_then(cpu_max)
            } else {
                self.v1_quota(dir)
            };
            let stat = (level == 0 || quota.is_some())
                .then(|| self.text(dir, "cpu.stat"))
                .flatten()
                .unwrap_or_default();
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
        // "-1", no quota, does not parse as unsigned.
        let quota_us = self.number(dir, "cpu.cfs_quota_us")?;
        let period_us = self.number(dir, "cpu.cfs_period_us")?;
        Some(Quota {
            quota_us,
            period_us,
        })
    }

    /// The level with the lowest memory limit, that limit, and the event that counts how often it was hit.
    fn tightest<'a>(
        &mut self,
        cgroup_dirs: &'a CgroupDirs,
    ) -> Option<(&'a PathBuf, u64, &'static str)> {
        // Each with the event that counts how often it was hit. Above memory.high, tasks are slowed down; above the others,
        // they reclaim, or one is killed.
        let limits: &[(&str, &'static str)] = if cgroup_dirs.unified {
            &[("memory.max", "max"), ("memory.high", "high")]
        } else {
            &[("memory.limit_in_bytes", "")]
        };
        let mut tightest: Option<(&PathBuf, u64, &'static str)> = None;
        for dir in &cgroup_dirs.dirs {
            for (limit, hits) in limits {
                // "max", no limit, does not parse.
                let limit = self.number(dir, limit).filter(|limit| *limit < UNLIMITED);
                if let Some(limit) = limit
                    && tightest.is_none_or(|(_, before, _)| limit < before)
                {
                    tightest = Some((dir, limit, hits));
                }
            }
        }
        tightest
    }

    /// Memory is that of the cgroup or parent with the lowest limit, where it runs out first; OOM kills are the cgroup's own.
    /// Returns the refaults there (pages evicted and read again); `None` without a limit or without these counters.
    fn read_memory(&mut self, cgroup_dirs: &CgroupDirs, group: &mut Cgroup) -> Option<Refaults> {
        let usage = if cgroup_dirs.unified {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let tightest = self.tightest(cgroup_dirs);
        let own = cgroup_dirs.dirs.first()?;
        let (dir, hits) = tightest.map_or((own, "max"), |(dir, _, hits)| (dir, hits));
        group.memory_limit = tightest.map(|(_, limit, _)| limit);
        group.memory = self.number(dir, usage);
        if cgroup_dirs.unified {
            group.limit_hits = self.keyed(dir, "memory.events", hits);
            group.oom_kills = self.keyed(own, "memory.events", "oom_kill");
        } else {
            group.limit_hits = self.number(dir, "memory.failcnt");
            group.oom_kills = self.keyed(own, "memory.oom_control", "oom_kill");
        }
        let refaults = self.read_memory_stat(dir, cgroup_dirs.unified, group);
        tightest?;
        refaults
    }

    /// What only the statistics of a group have: the memory that can be reclaimed, and the pages that were read again.
    fn read_memory_stat(
        &mut self,
        dir: &Path,
        unified: bool,
        group: &mut Cgroup,
    ) -> Option<Refaults> {
        let [inactive, refaults, pages] = if unified {
            ["inactive_file", "workingset_refault_file", "pgsteal"]
        } else {
            [
                "total_inactive_file",
                "total_workingset_refault_file",
                "total_pgpgin",
            ]
        };
        let stat = self.text(dir, "memory.stat")?;
        group.reclaimable = keyed(&stat, inactive);
        Some(Refaults {
            cgroup: group.path.clone(),
            refaults: keyed(&stat, refaults)?,
            pages: keyed(&stat, pages)?,
        })
    }

    /// The I/O limits of a cgroup and its parents: one `IoLimit` per device, with the lowest limit of each kind.
    fn io_limits(&mut self, place: Place<'_>, groups: &mut Groups) {
        let Some((dirs, is_whole)) = self.dirs(place, Controller::Io) else {
            if place.may_have(Controller::Io) {
                groups.hide(place.path, HiddenFact::IoLimits);
            }
            return;
        };
        let (limits, is_readable) = self.io_limits_in(place.path, &dirs);
        if !is_readable {
            groups.hide(place.path, HiddenFact::IoLimits);
        } else if !is_whole && limits.is_empty() {
            groups.hide(place.path, HiddenFact::OuterIoLimits);
        }
        groups.io_limits.extend(limits);
    }

    /// The limits, and whether every file that may contain one could be read.
    fn io_limits_in(&mut self, path: &str, dirs: &CgroupDirs) -> (Vec<IoLimit>, bool) {
        /// Key in io.max (v2), and file of the same limit (v1).
        const LIMITS: [(&str, &str); 4] = [
            ("riops", "blkio.throttle.read_iops_device"),
            ("wiops", "blkio.throttle.write_iops_device"),
            ("rbps", "blkio.throttle.read_bps_device"),
            ("wbps", "blkio.throttle.write_bps_device"),
        ];
        let mut by_device: BTreeMap<String, [Option<u64>; 4]> = BTreeMap::new();
        let mut add = |device: &str, limit: usize, value: u64| {
            if by_device.contains_key(device) || by_device.len() < MAX_DEVICES {
                let limits = by_device.entry(device.to_owned()).or_default();
                limits[limit] = Some(limits[limit].map_or(value, |known| known.min(value)));
            }
        };
        let mut is_readable = true;
        for dir in &dirs.dirs {
            if dirs.unified {
                let text = self.files.text_or_empty(&dir.join("io.max"));
                is_readable &= text.is_some();
                for (device, values) in text.iter().flat_map(|text| io_max(text)) {
                    for (key, value) in values {
                        if let Some(limit) = LIMITS.iter().position(|(name, _)| *name == key) {
                            add(&device, limit, value);
                        }
                    }
                }
                continue;
            }
            for (limit, (_, file)) in LIMITS.iter().enumerate() {
                let text = self.files.text_or_empty(&dir.join(file));
                is_readable &= text.is_some();
                // A line per device: `8:0 1048576`.
                for line in text.iter().flat_map(|text| text.lines()) {
                    if let Some((device, value)) = line.split_once(' ')
                        && let Ok(value) = value.trim().parse()
                    {
                        add(device, limit, value);
                    }
                }
            }
        }
        let limit = |(device, limits): (String, [Option<u64>; 4])| {
            let [
                reads_per_s,
                writes_per_s,
                read_bytes_per_s,
                written_bytes_per_s,
            ] = limits;
            IoLimit {
                cgroup: path.to_owned(),
                device: device_name(&device).unwrap_or(device),
                reads_per_s,
                writes_per_s,
                read_bytes_per_s,
                written_bytes_per_s,
            }
        };
        (by_device.into_iter().map(limit).collect(), is_readable)
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

impl Groups {
    fn hide(&mut self, cgroup: &str, fact: HiddenFact) {
        self.hidden.push(Hidden {
            cgroup: cgroup.to_owned(),
            fact,
        });
    }
}

impl Place<'_> {
    /// Whether the process can have limits of this controller.
    fn may_have(self, controller: Controller) -> bool {
        self.kernel
            .is_none_or(|kernel| kernel.may_limit(controller))
    }
}

/// The control groups of the first process of each target, from the kernel's structures, by pid.
fn kernel_groups(
    scanner: &mut Scanner,
    processes: &Processes,
) -> Result<HashMap<u32, KernelGroups>> {
    let mut groups = BTreeSet::new();
    // Each group once, as in `System::read`.
    let targets = processes.targets().iter();
    let pids: BTreeSet<u32> = targets
        .filter_map(|target| Some((target.cgroup.as_deref()?, target.pid)))
        .filter_map(|(group, pid)| groups.insert(group).then_some(pid))
        .take(MAX_GROUPS)
        .collect();
    let mut found: HashMap<u32, KernelGroups> = HashMap::new();
    let all: Vec<u32> = pids.iter().copied().collect();
    scanner.scan_cgroups(&all, &mut |record| {
        if let Record::Cgroup(record) = record
            && let Some(pid) = processes.watched_pid(record.header.tgid)
            && pids.contains(&pid)
        {
            found.entry(pid).or_default().add(record);
        }
    })?;
    Ok(found)
}

impl Files {
    /// The text of a file. If reading an open file fails, its cgroup is gone, and the path is opened again: it may be that of a
    /// new cgroup.
    fn text(&mut self, path: &Path) -> Option<String> {
        if let Some(open) = self.open.get_mut(path) {
            open.poll = self.poll;
            if let Some(text) = read(&open.file, &mut self.buffer) {
                return Some(text);
            }
            self.open.remove(path);
        }
        let file = reach::open(path).ok()?;
        let text = read(&file, &mut self.buffer)?;
        if self.open.len() < MAX_OPEN {
            let poll = self.poll;
            self.open.insert(path.to_owned(), OpenFile { file, poll });
        }
        Some(text)
    }

    /// Like [`Self::text`], but an empty text if there is no such file. `None`: it is there, but cannot be read.
    fn text_or_empty(&mut self, path: &Path) -> Option<String> {
        let is_absent =
            || reach::open(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        self.text(path).or_else(|| is_absent().then(String::new))
    }

    fn close_unused(&mut self) {
        self.open.retain(|_, open| open.poll == self.poll);
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

/// The number after a key, in a file of lines `key number`.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix(' ')?;
        value.trim().parse().ok()
    })
}

/// cpu.max: `50000 100000`, or `max 100000` for no quota.
fn cpu_max(text: &str) -> Option<Quota> {
    let mut fields = text.split_whitespace();
    Some(Quota {
        quota_us: fields.next()?.parse().ok()?,
        period_us: fields.next()?.parse().ok()?,
    })
}

/// io.max: `8:16 rbps=max wbps=1048576 riops=max wiops=120`, a line per device. Without the limits that are `max`.
fn io_max(text: &str) -> impl Iterator<Item = (String, Vec<(&str, u64)>)> {
    text.lines().filter_map(|line| {
        let (device, values) = line.split_once(' ')?;
        let values = values.split_whitespace().filter_map(|word| {
            let (key, value) = word.split_once('=')?;
            Some((key, value.parse().ok()?))
        });
        Some((device.to_owned(), values.collect()))
    })
}

/// The name of a block device, by its numbers.
fn device_name(numbers: &str) -> Option<String> {
    let (major, minor) = numbers.split_once(':')?;
    block_device(major.parse().ok()?, minor.parse().ok()?)
}

/// A pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=123`, µs. /proc/pressure/cpu has no line `full` before
/// Linux 5.13.
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

/// Busy, idle and stolen time of all CPUs, ns, from the first line of /proc/stat: user nice system idle iowait irq softirq
/// steal guest guest_nice. Guest time is part of user time.
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

/// The line of one CPU, `cpu0 …`, not the sum `cpu …`.
fn is_one_cpu(line: &str) -> bool {
    line.strip_prefix("cpu")
        .is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()))
}

/// A value of /proc/meminfo, `MemTotal:       16384 kB`, in bytes.
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
