//! The hooks of the tiers `auto` and `watch`: programs at scheduler tracepoints that measure waits of threads exactly.
//!
//! They are loaded with the other programs if the tier asks for it, and attached and detached while the agent runs. What they
//! measure stays in maps of the kernel, as histograms, which the agent reads; it gets no events. Links and maps are
//! descriptors of this process, so nothing is left when it ends, however it ends.

mod increase;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use bytemuck::Zeroable as _;
use increase::Known;
pub use increase::NewWaits;
use tailback_ebpf::{
    HookSettings, HookStats, HookTarget, MAX_CALLS, MAX_HOOK_TARGETS, MAX_KEYS_OF_PROCESS,
    MAX_WAIT_KEYS, NOT_IN_CALL, WAIT_PREEMPTED, WAIT_WOKEN, WaitKey, Waits,
};

use super::{iter::attach_tracepoint, scanner::Watched};

/// Name of each program, which is that of its tracepoint too.
pub(super) const PROGRAMS: [&str; 3] = ["sched_switch", "sched_wakeup", "sched_wakeup_new"];
/// Maps whose size depends on whether the hooks are wanted.
pub(super) const MAPS: [&str; 3] = ["HOOK_TARGETS", "HOOK_THREADS", WAITS_MAP];
/// The map of histograms.
pub(super) const WAITS_MAP: &str = "HOOK_WAITS";
/// The read-only global with the system calls whose first argument is kept.
pub(super) const OBJECT_CALLS_GLOBAL: &str = "OBJECT_CALLS";

/// Kernel memory for histograms at most, bytes. There is one per key and CPU, so with many CPUs there are fewer keys.
const MAX_HISTOGRAM_BYTES: usize = 16 << 20;
/// Histograms on a machine with very many CPUs.
const MIN_WAIT_KEYS: u32 = 32;

/// The number of histograms that fit into the memory bound.
pub(super) fn wait_keys(cpus: usize) -> u32 {
    let fitting = MAX_HISTOGRAM_BYTES / (size_of::<Waits>() * cpus.max(1));
    (fitting as u32).clamp(MIN_WAIT_KEYS, MAX_WAIT_KEYS)
}

/// Kinds of waits for which each process has a histogram from the start, so that others cannot leave it without.
const RUN_QUEUE_KINDS: [u16; 2] = [WAIT_WOKEN, WAIT_PREEMPTED];
/// Histograms that a process may have in any case, if there is room: those, and one more for each kind of blocked time.
const MIN_KEYS_OF_PROCESS: u32 = 4;
/// `BPF_NOEXIST`, include/uapi/linux/bpf.h
const BPF_NOEXIST: u64 = 1;

/// Histograms that each process may have while this number of processes is measured.
fn keys_of_each(wait_keys: u32, processes: usize) -> u32 {
    let processes = u32::try_from(processes).unwrap_or(u32::MAX).max(1);
    (wait_keys / processes).clamp(MIN_KEYS_OF_PROCESS, MAX_KEYS_OF_PROCESS)
}

/// epoll_pwait2(2), which the crate `libc` lacks on aarch64. The same number on all architectures.
const EPOLL_PWAIT2: libc::c_long = 441;

/// Calls whose first argument is a descriptor, or the address of a futex.
const OBJECT_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_connect,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_epoll_pwait,
    EPOLL_PWAIT2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_getdents64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_io_uring_enter,
    libc::SYS_futex,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// The same as a bit per number.
pub(super) fn object_calls() -> [u64; MAX_CALLS as usize / 64] {
    let mut bits = [0; MAX_CALLS as usize / 64];
    for call in OBJECT_CALLS {
        bits[*call as usize / 64] |= 1 << (call % 64);
    }
    bits
}

macro_rules! pod {
    ($($pod:ident($ty:ty);)*) => {$(
        #[derive(Clone, Copy)]
        #[repr(transparent)]
        struct $pod($ty);
        // SAFETY: plain old data (bytemuck checks it).
        unsafe impl aya::Pod for $pod {}
    )*};
}

pod! {
    TargetPod(HookTarget);
    KeyPod(WaitKey);
    WaitsPod(Waits);
    StatsPod(HookStats);
    SettingsPod(HookSettings);
}

/// The maps of the hooks.
pub(super) struct HookMaps {
    targets: HashMap<MapData, u32, TargetPod>,
    waits: PerCpuHashMap<MapData, KeyPod, WaitsPod>,
    stats: PerCpuArray<MapData, StatsPod>,
    settings: Array<MapData, SettingsPod>,
}

impl HookMaps {
    /// Takes the maps out of the object, by their names.
    pub(super) fn take(
        mut map: impl FnMut(&'static str) -> Result<aya::maps::Map>,
    ) -> Result<Self> {
        Ok(Self {
            targets: map("HOOK_TARGETS")?.try_into()?,
            waits: map(WAITS_MAP)?.try_into()?,
            stats: map("HOOK_STATS")?.try_into()?,
            settings: map("HOOK_SETTINGS")?.try_into()?,
        })
    }
}

/// The hooks, loaded.
pub struct Hooks {
    // Dropped first: a program without a link does not run.
    links: Vec<OwnedFd>,
    programs: Vec<OwnedFd>,
    maps: HookMaps,
    /// The measured processes, by tgid.
    measured: BTreeMap<u32, Measured>,
    /// Histograms in all, and at most of one process.
    wait_keys: u32,
    max_keys: u32,
    /// What the histograms held when they were last read.
    known: BTreeMap<WaitKey, Box<Known>>,
    interval: u64,
}

/// See [`HookTarget`].
#[derive(Clone, Copy)]
struct Measured {
    start_ns: u64,
    since_ns: u64,
}

impl Hooks {
    pub(super) fn new(programs: Vec<OwnedFd>, maps: HookMaps) -> Self {
        Self {
            links: Vec::new(),
            programs,
            maps,
            measured: BTreeMap::new(),
            wait_keys: wait_keys(nr_cpus().unwrap_or(1)),
            max_keys: MAX_KEYS_OF_PROCESS,
            known: BTreeMap::new(),
            interval: 0,
        }
    }

    /// Whether the first argument of a system call is kept: it is a descriptor, or the address of a futex.
    pub fn keeps_object(call: u16) -> bool {
        OBJECT_CALLS.contains(&libc::c_long::from(call))
    }

    /// Attaches all programs, or none.
    pub fn attach(&mut self) -> io::Result<()> {
        let links = self
            .programs
            .iter()
            .map(|program| attach_tracepoint(program.as_fd()));
        self.links = links.collect::<io::Result<_>>()?;
        Ok(())
    }

    /// Detaches all programs, and forgets what they measured.
    pub fn detach(&mut self) -> Result<()> {
        self.links.clear();
        self.measure(&[], 0).map(drop)
    }

    /// Attaches the hooks for a moment if they are not attached. Fails only if this process lacks a privilege for that.
    pub(super) fn check_access(&mut self) -> io::Result<()> {
        if self.is_attached() {
            return Ok(());
        }
        let attached = self.attach();
        self.links.clear();
        unless_permitted(attached)
    }

    pub fn is_attached(&self) -> bool {
        !self.links.is_empty()
    }

    /// Measures exactly these processes from now on (CLOCK_MONOTONIC). Returns how many did not fit.
    pub fn measure(&mut self, processes: &[Watched], now_ns: u64) -> Result<usize> {
        let wanted: BTreeMap<u32, u64> = processes
            .iter()
            .take(MAX_HOOK_TARGETS as usize)
            .map(|process| (process.tgid, process.start_ns))
            .collect();
        let targets = &mut self.maps.targets;
        self.measured.retain(|tgid, measured| {
            let stays = wanted.get(tgid) == Some(&measured.start_ns);
            if !stays {
                // An error means that the entry is gone already.
                let _ = targets.remove(tgid);
            }
            stays
        });
        // First, so that none takes the room that is made.
        self.max_keys = keys_of_each(self.wait_keys, wanted.len());
        self.write_settings()?;
        let keys = self.make_room()?;
        for (tgid, start_ns) in &wanted {
            let measured = match self.measured.get(tgid) {
                Some(measured) => *measured,
                None => {
                    self.add_run_queue_waits(*tgid)?;
                    Measured {
                        start_ns: *start_ns,
                        since_ns: now_ns,
                    }
                }
            };
            let target = HookTarget {
                start_ns: measured.start_ns,
                since_ns: measured.since_ns,
                keys: keys
                    .get(tgid)
                    .copied()
                    .unwrap_or(RUN_QUEUE_KINDS.len() as u32),
                reserved: 0,
            };
            self.maps
                .targets
                .insert(*tgid, TargetPod(target), 0)
                .with_context(|| format!("cannot measure process {tgid}"))?;
            self.measured.insert(*tgid, measured);
        }
        Ok(processes.len() - wanted.len())
    }

    /// Removes the histograms of processes that are not measured any more, and those of blocked time of processes that have more than
    /// they may have now: these begin anew. Returns how many each measured process has left.
    ///
    /// What is known of threads stays: it is obsolete by its time (see `known_thread` of the programs).
    fn make_room(&mut self) -> Result<BTreeMap<u32, u32>> {
        let all = self.keys()?;
        let mut before: BTreeMap<u32, u32> = BTreeMap::new();
        for key in &all {
            *before.entry(key.tgid).or_default() += 1;
        }
        let mut left: BTreeMap<u32, u32> = BTreeMap::new();
        for key in all {
            let is_over = before.get(&key.tgid) > Some(&self.max_keys);
            let is_measured = self.measured.contains_key(&key.tgid);
            if is_measured && (!is_over || RUN_QUEUE_KINDS.contains(&key.kind)) {
                *left.entry(key.tgid).or_default() += 1;
            } else {
                // An error means that it is gone already.
                let _ = self.maps.waits.remove(&KeyPod(key));
                self.known.remove(&key);
            }
        }
        Ok(left)
    }

    /// Adds the histograms that each process has. If there is no room, its waits are counted as lost.
    fn add_run_queue_waits(&mut self, tgid: u32) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        for kind in RUN_QUEUE_KINDS {
            let key = WaitKey {
                object: 0,
                tgid,
                kind,
                call: NOT_IN_CALL,
            };
            let empty = PerCpuValues::try_from(vec![WaitsPod(Waits::zeroed()); cpus])?;
            let _ = self.maps.waits.insert(KeyPod(key), empty, BPF_NOEXIST);
        }
        Ok(())
    }

    fn keys(&self) -> Result<Vec<WaitKey>> {
        let keys = self.maps.waits.keys().map(|key| key.map(|key| key.0));
        keys.collect::<Result<_, _>>()
            .context("cannot list the histograms of waits")
    }

    /// The counters of all CPUs together.
    pub fn stats(&self) -> Result<HookStats> {
        let of_cpus = self.maps.stats.get(&0, 0);
        let of_cpus = of_cpus.context("cannot read the counters of the hooks")?;
        let mut all = HookStats::default();
        let add = |sum: &mut u64, of_cpu: u64| *sum = sum.saturating_add(of_cpu);
        for StatsPod(of_cpu) in of_cpus.iter() {
            for hook in 0..all.runs.len() {
                add(&mut all.runs[hook], of_cpu.runs[hook]);
                add(&mut all.timed_runs[hook], of_cpu.timed_runs[hook]);
                add(&mut all.timed_ns[hook], of_cpu.timed_ns[hook]);
            }
            add(&mut all.lost_threads, of_cpu.lost_threads);
            add(&mut all.lost_waits, of_cpu.lost_waits);
            add(&mut all.unmatched, of_cpu.unmatched);
        }
        Ok(all)
    }

    /// The waits since the last call, and begins the next interval.
    pub fn read(&mut self) -> Result<Vec<NewWaits>> {
        let mut all = Vec::new();
        for key in self.keys()? {
            // A key that was removed meanwhile has nothing to report.
            if let Ok(of_cpus) = self.maps.waits.get(&KeyPod(key), 0) {
                let known = self
                    .known
                    .entry(key)
                    .or_insert_with(|| Box::new(Known::empty()));
                all.extend(known.update(key, of_cpus.iter().map(|WaitsPod(of_cpu)| of_cpu)));
            }
        }
        self.interval += 1;
        self.write_settings()?;
        Ok(all)
    }

    fn write_settings(&mut self) -> Result<()> {
        let settings = HookSettings {
            interval: self.interval,
            max_keys: self.max_keys,
            reserved: 0,
        };
        self.maps
            .settings
            .set(0, SettingsPod(settings), 0)
            .context("cannot write the settings of the hooks")
    }
}

/// An error that is due to a missing privilege. Any other one would occur with all privileges, too.
fn unless_permitted(attached: io::Result<()>) -> io::Result<()> {
    match attached {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tailback_ebpf::{WAIT_BUCKETS, bucket_middle_ns, bucket_of};

    use super::*;

    #[test]
    fn the_middle_of_a_bucket_is_off_by_less_than_two_percent() {
        let mut wait_ns: u64 = 1_000;
        while wait_ns < 1 << 35 {
            let middle_ns = bucket_middle_ns(bucket_of(wait_ns));
            let off = middle_ns.abs_diff(wait_ns) as f64 / wait_ns as f64;
            assert!(off < 0.0165, "{wait_ns} ns is counted as {middle_ns} ns");
            wait_ns += wait_ns / 97;
        }
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        let mut last = 0;
        for step in 0..2_000_000_u64 {
            let bucket = bucket_of(step * 32);
            assert!(bucket == last || bucket == last + 1, "{step}");
            last = bucket;
        }
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of((1 << 35) - 1), WAIT_BUCKETS as u32 - 1);
        assert_eq!(bucket_of(u64::MAX), WAIT_BUCKETS as u32 - 1);
    }

    #[test]
    fn histograms_stay_within_the_memory_bound_unless_there_are_very_many_cpus() {
        for cpus in [1, 2, 16, 128] {
            let bytes = wait_keys(cpus) as usize * cpus * size_of::<Waits>();
            assert!(bytes <= MAX_HISTOGRAM_BYTES, "{cpus} CPUs: {bytes}");
        }
        assert_eq!(wait_keys(4096), MIN_WAIT_KEYS);
    }

    #[test]
    fn each_process_has_its_share_of_the_histograms() {
        assert_eq!(keys_of_each(wait_keys(2), 1), MAX_KEYS_OF_PROCESS);
        // 76 histograms fit into the memory bound on 64 CPUs.
        for processes in [1, 2, 8, 19] {
            let each = keys_of_each(wait_keys(64), processes);
            assert!(each >= MIN_KEYS_OF_PROCESS, "{processes}: {each}");
            assert!(
                each * processes as u32 <= wait_keys(64),
                "{processes}: {each}"
            );
        }
        assert_eq!(keys_of_each(wait_keys(64), 4_096), MIN_KEYS_OF_PROCESS);
        assert_eq!(keys_of_each(32, 0), 32);
    }

    #[test]
    fn only_a_missing_privilege_prevents_that_privileges_are_dropped() {
        let attached = |errno| unless_permitted(Err(io::Error::from_raw_os_error(errno)));
        for errno in [libc::EPERM, libc::EACCES] {
            assert!(attached(errno).is_err());
        }
        for errno in [libc::EBUSY, libc::ENOMEM, libc::EEXIST] {
            assert!(attached(errno).is_ok());
        }
        assert!(unless_permitted(Ok(())).is_ok());
    }
}
