//! The hooks of the watch tier: programs at scheduler tracepoints that measure the waits of threads exactly.
//!
//! They are loaded with the other programs if the tier asks for it, and attached and detached while the agent runs. What they
//! measure stays in maps of the kernel, as histograms; the agent reads those, and no event crosses. Links and maps are
//! descriptors of this process, so nothing is left when it ends, however it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap};
use bytemuck::Zeroable as _;
use tailback_ebpf::{
    HookSettings, HookStats, HookTarget, MAX_CALLS, MAX_HOOK_TARGETS, MAX_HOOK_THREADS,
    MAX_WAIT_KEYS, ThreadWait, WAIT_BUCKETS, WaitKey, Waits, WorstWait,
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
    ThreadPod(ThreadWait);
    KeyPod(WaitKey);
    WaitsPod(Waits);
    StatsPod(HookStats);
    SettingsPod(HookSettings);
}

/// The maps of the hooks.
pub(super) struct HookMaps {
    targets: HashMap<MapData, u32, TargetPod>,
    threads: HashMap<MapData, u32, ThreadPod>,
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
            threads: map("HOOK_THREADS")?.try_into()?,
            waits: map(WAITS_MAP)?.try_into()?,
            stats: map("HOOK_STATS")?.try_into()?,
            settings: map("HOOK_SETTINGS")?.try_into()?,
        })
    }
}

/// The waits of one key since the last reading, on all CPUs.
#[derive(Clone, Debug)]
pub struct NewWaits {
    pub key: WaitKey,
    pub count: u64,
    pub total_ns: u64,
    /// Index and number of the buckets that are not empty.
    pub buckets: Vec<(u32, u32)>,
    /// The longest of them.
    pub worst: Option<WorstWait>,
}

/// The hooks, loaded.
pub struct Hooks {
    // Dropped first: a program without a link does not run.
    links: Vec<OwnedFd>,
    programs: Vec<OwnedFd>,
    maps: HookMaps,
    measured: BTreeMap<u32, u64>,
    /// What the histograms held when they were last read.
    known: BTreeMap<WaitKey, Box<Known>>,
    /// When they were last read, CLOCK_MONOTONIC, ns.
    read_ns: u64,
    interval: u64,
}

struct Known {
    count: u64,
    total_ns: u64,
    buckets: [u32; WAIT_BUCKETS],
}

impl Hooks {
    pub(super) fn new(programs: Vec<OwnedFd>, maps: HookMaps) -> Self {
        Self {
            links: Vec::new(),
            programs,
            maps,
            measured: BTreeMap::new(),
            known: BTreeMap::new(),
            read_ns: 0,
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
        self.measure(&[]).map(drop)
    }

    /// Attaches the hooks for a moment if they are not attached. Fails if this process has lost a privilege that it needs.
    pub(super) fn check_access(&mut self) -> Result<()> {
        if self.is_attached() {
            return Ok(());
        }
        self.attach().context("cannot attach the hooks")?;
        self.detach()
    }

    pub fn is_attached(&self) -> bool {
        !self.links.is_empty()
    }

    /// Measures exactly these processes from now on. Returns how many did not fit.
    pub fn measure(&mut self, processes: &[Watched]) -> Result<usize> {
        let wanted: BTreeMap<u32, u64> = processes
            .iter()
            .take(MAX_HOOK_TARGETS as usize)
            .map(|process| (process.tgid, process.start_ns))
            .collect();
        let is_gone = |(tgid, start_ns): &(&u32, &u64)| wanted.get(*tgid) != Some(*start_ns);
        let gone = self.measured.iter().filter(is_gone);
        let gone: BTreeSet<u32> = gone.map(|(tgid, _)| *tgid).collect();
        for tgid in &gone {
            // An error means that the entry is gone already.
            let _ = self.maps.targets.remove(tgid);
        }
        self.forget(&gone)?;
        for (tgid, start_ns) in &wanted {
            if gone.contains(tgid) || !self.measured.contains_key(tgid) {
                let target = HookTarget {
                    start_ns: *start_ns,
                    ..HookTarget::zeroed()
                };
                self.maps
                    .targets
                    .insert(*tgid, TargetPod(target), 0)
                    .with_context(|| format!("cannot measure process {tgid}"))?;
            }
        }
        let left_out = processes.len() - wanted.len();
        self.measured = wanted;
        Ok(left_out)
    }

    /// Removes the threads and histograms of these processes.
    fn forget(&mut self, tgids: &BTreeSet<u32>) -> Result<()> {
        if tgids.is_empty() {
            return Ok(());
        }
        for key in self.keys()? {
            if tgids.contains(&key.tgid) {
                let _ = self.maps.waits.remove(&KeyPod(key));
                self.known.remove(&key);
            }
        }
        let of_them = |entry: &(u32, ThreadPod)| tgids.contains(&entry.1.0.tgid);
        // The list may begin anew when an entry goes meanwhile.
        let threads = self.maps.threads.iter().take(2 * MAX_HOOK_THREADS as usize);
        let threads = threads.filter_map(Result::ok);
        let threads: Vec<u32> = threads.filter(of_them).map(|(tid, _)| tid).collect();
        for tid in threads {
            let _ = self.maps.threads.remove(&tid);
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
        for StatsPod(of_cpu) in of_cpus.iter() {
            for hook in 0..all.runs.len() {
                all.runs[hook] += of_cpu.runs[hook];
                all.timed_runs[hook] += of_cpu.timed_runs[hook];
                all.timed_ns[hook] += of_cpu.timed_ns[hook];
            }
            all.lost_threads += of_cpu.lost_threads;
            all.lost_waits += of_cpu.lost_waits;
            all.unmatched += of_cpu.unmatched;
        }
        Ok(all)
    }

    /// The waits since the last call, and begins the next interval. `now_ns`: CLOCK_MONOTONIC.
    pub fn read(&mut self, now_ns: u64) -> Result<Vec<NewWaits>> {
        let mut all = Vec::new();
        for key in self.keys()? {
            // A key that was removed meanwhile has nothing to report.
            if let Ok(of_cpus) = self.maps.waits.get(&KeyPod(key), 0) {
                all.extend(self.new_waits(key, &of_cpus));
            }
        }
        self.read_ns = now_ns;
        self.interval += 1;
        let settings = HookSettings {
            interval: self.interval,
        };
        self.maps
            .settings
            .set(0, SettingsPod(settings), 0)
            .context("cannot begin the next interval of the hooks")?;
        Ok(all)
    }

    /// What of these values is new.
    fn new_waits(&mut self, key: WaitKey, of_cpus: &[WaitsPod]) -> Option<NewWaits> {
        let mut now = Known::empty();
        let mut worst: Option<WorstWait> = None;
        for WaitsPod(of_cpu) in of_cpus {
            now.count += of_cpu.count;
            now.total_ns = now.total_ns.wrapping_add(of_cpu.total_ns);
            for (sum, count) in now.buckets.iter_mut().zip(of_cpu.buckets) {
                *sum = sum.wrapping_add(count);
            }
            // Not by its interval: the last wait may have ended after its histogram was read, and before the next interval
            // began.
            let is_new = of_cpu.worst.at_ns > self.read_ns;
            let is_worse = worst.is_none_or(|worst| worst.wait_ns < of_cpu.worst.wait_ns);
            if is_new && is_worse {
                worst = Some(of_cpu.worst);
            }
        }
        let before = self
            .known
            .entry(key)
            .or_insert_with(|| Box::new(Known::empty()));
        let counts = now.buckets.iter().zip(&before.buckets).zip(0..);
        let counts = counts.map(|((now, before), index)| (index, now.wrapping_sub(*before)));
        let new = NewWaits {
            key,
            count: now.count.saturating_sub(before.count),
            total_ns: now.total_ns.wrapping_sub(before.total_ns),
            buckets: counts.filter(|(_, count)| *count > 0).collect(),
            worst,
        };
        **before = now;
        (new.count > 0).then_some(new)
    }
}

impl Known {
    fn empty() -> Self {
        Self {
            count: 0,
            total_ns: 0,
            buckets: [0; WAIT_BUCKETS],
        }
    }
}

#[cfg(test)]
mod tests {
    use tailback_ebpf::{bucket_middle_ns, bucket_of};

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
}
