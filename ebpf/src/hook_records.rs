//! What the scheduler hooks share with the agent: exact waits of threads, as histograms.

/// Processes that the hooks measure at the same time. Further ones are not measured, and the agent says so.
pub const MAX_HOOK_TARGETS: u32 = 4096;
/// Threads of measured processes whose state is kept. Beyond that, the least recently used entry is evicted (LRU). If
/// its thread was waiting, the wait is counted in [`HookStats::unmatched`] when it ends.
pub const MAX_HOOK_THREADS: u32 = 16_384;
/// Maximum number of histograms (fewer on machines with many CPUs: the agent lowers it there).
pub const MAX_WAIT_KEYS: u32 = 1024;
/// Maximum number of histograms of one process. The limit in force, [`HookSettings::max_keys`], may be lower.
pub const MAX_KEYS_OF_PROCESS: u32 = 128;

/// From a wake-up until the thread runs.
pub const WAIT_WOKEN: u16 = 1;
/// From losing the CPU while runnable until the thread runs again.
pub const WAIT_PREEMPTED: u16 = 2;
/// From blocking until the wake-up.
pub const WAIT_BLOCKED: u16 = 3;
/// The same, where the kernel counts the wait as I/O (`task_struct.in_iowait`).
pub const WAIT_BLOCKED_IO: u16 = 4;

/// [`WaitKey::call`] if the thread did not block in a known system call: it blocked in a page fault, for example, or
/// waited for a CPU.
pub const NOT_IN_CALL: u16 = u16::MAX;
/// [`WaitKey::object`] where a process has too many of them.
pub const ANY_OBJECT: u64 = u64::MAX;
/// System call numbers that are distinguished. The highest on x86-64 and on arm64 is below 480.
pub const MAX_CALLS: u32 = 512;

/// A thread's state, [`ThreadWait::state`].
pub const THREAD_RUNNING: u32 = 0;
/// See [`WAIT_WOKEN`].
pub const THREAD_WOKEN: u32 = 1;
/// See [`WAIT_PREEMPTED`].
pub const THREAD_PREEMPTED: u32 = 2;
/// See [`WAIT_BLOCKED`].
pub const THREAD_BLOCKED: u32 = 3;

/// Indices into the arrays of [`HookStats`].
pub const HOOK_SWITCH: usize = 0;
/// See [`HOOK_SWITCH`]. Both wake-up hooks.
pub const HOOK_WAKEUP: usize = 1;
/// A hook times one of this many runs. A power of two.
pub const TIMED_EVERY: u64 = 64;

/// Waits below this many ns fall into buckets of equal width.
const LINEAR_NS: u64 = 1 << (UNIT_BITS + SUB_BITS);
/// Width of the smallest buckets, as a power of two: 32 ns.
const UNIT_BITS: u32 = 5;
/// Buckets per octave, as a power of two. With 32, the middle of a bucket is off by 1.6% at most.
const SUB_BITS: u32 = 5;
/// Waits from 2 to the power of this many ns (34 s) on fall into the last bucket.
const MAX_BITS: u32 = 35;
/// Buckets of a histogram.
pub const WAIT_BUCKETS: usize = ((MAX_BITS - UNIT_BITS - SUB_BITS + 1) << SUB_BITS) as usize;

/// A measured process, by tgid in the initial pid namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct HookTarget {
    /// CLOCK_BOOTTIME at its start, ns: another process with the same tgid is not measured.
    pub start_ns: u64,
    /// CLOCK_MONOTONIC at which its measurement began, ns. Thread states from before this are stale.
    pub since_ns: u64,
    /// Histograms that it has; `u32::MAX` once there was no room for another one.
    pub keys: u32,
    pub reserved: u32,
}

/// Settings of the hooks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct HookSettings {
    /// The report interval. The agent increments it, and the worst wait begins anew.
    pub interval: u64,
    /// Maximum number of histograms of one process, so that it cannot use up those of the others. Once it has half of
    /// them, a wait with a new key is counted under [`ANY_OBJECT`]. Once it has all of them, a wait that has no
    /// histogram there either is counted in [`HookStats::lost_waits`].
    pub max_keys: u32,
    pub reserved: u32,
}

/// What a thread of a measured process does.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ThreadWait {
    /// CLOCK_MONOTONIC at which this state began, ns.
    pub since_ns: u64,
    /// See [`WaitKey::object`].
    pub object: u64,
    pub tgid: u32,
    /// One of the `THREAD_` constants.
    pub state: u32,
    /// See [`WaitKey::call`].
    pub call: u32,
    /// The kind of wait if it is blocked.
    pub kind: u32,
    pub waker_tgid: u32,
    pub waker_tid: u32,
}

/// What a histogram is about.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct WaitKey {
    /// First argument of the system call if that is a descriptor or an address; else 0.
    pub object: u64,
    pub tgid: u32,
    /// One of the `WAIT_` constants.
    pub kind: u16,
    /// System call number, or [`NOT_IN_CALL`].
    pub call: u16,
}

/// The longest wait of an interval, and who caused it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct WorstWait {
    /// The interval it belongs to; see [`HookSettings::interval`].
    pub interval: u64,
    pub wait_ns: u64,
    /// CLOCK_MONOTONIC at its end, ns.
    pub at_ns: u64,
    /// The thread that waited.
    pub tid: u32,
    pub cpu: u32,
    /// The thread that had the CPU until the wait ended, and for how long during the wait. 0 unless it was a wait for a
    /// CPU.
    pub culprit_tgid: u32,
    pub culprit_tid: u32,
    pub culprit_ns: u64,
    pub culprit_comm: [u8; 16],
    /// The thread that was running where the wake-up took effect; 0: the idle task, or unknown.
    pub waker_tgid: u32,
    pub waker_tid: u32,
    /// Its name; empty for a wait for a CPU.
    pub waker_comm: [u8; 16],
}

/// The waits of one key on one CPU, since the hooks were attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Waits {
    pub count: u64,
    pub total_ns: u64,
    pub worst: WorstWait,
    /// See [`bucket_of`]. They wrap; the agent reads them every second.
    pub buckets: [u32; WAIT_BUCKETS],
}

/// Counters of the hooks on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct HookStats {
    /// Runs by hook ([`HOOK_SWITCH`], [`HOOK_WAKEUP`]).
    pub runs: [u64; 2],
    /// Runs that measured their own time, and the sum, ns.
    pub timed_runs: [u64; 2],
    pub timed_ns: [u64; 2],
    /// Threads that did not fit into the map, waits without a histogram, and waits whose begin was not seen.
    pub lost_threads: u64,
    pub lost_waits: u64,
    pub unmatched: u64,
    /// CLOCK_MONOTONIC of the last switch on this CPU, ns.
    pub last_switch_ns: u64,
}

const _: () = assert!(size_of::<WaitKey>() == 16);
const _: () = assert!(size_of::<ThreadWait>() == 40);
const _: () = assert!(size_of::<WorstWait>() == 88);
const _: () = assert!(size_of::<Waits>() == 104 + 4 * WAIT_BUCKETS);

/// The bucket of a wait.
#[inline(always)]
pub fn bucket_of(wait_ns: u64) -> u32 {
    if wait_ns < LINEAR_NS {
        return (wait_ns >> UNIT_BITS) as u32;
    }
    if wait_ns >= 1 << MAX_BITS {
        return WAIT_BUCKETS as u32 - 1;
    }
    let units = (wait_ns >> UNIT_BITS) as u32;
    let octave = 31 - units.leading_zeros() - SUB_BITS;
    (octave << SUB_BITS) + (units >> octave)
}

/// The middle of a bucket, ns.
pub fn bucket_middle_ns(bucket: u32) -> u64 {
    let sub = 1 << SUB_BITS;
    let octave = (bucket >> SUB_BITS).saturating_sub(1);
    let units = u64::from(bucket - (octave << SUB_BITS)) << octave;
    debug_assert!(bucket < sub || units >= u64::from(sub));
    (units << UNIT_BITS) + ((1 << (octave + UNIT_BITS)) / 2)
}
