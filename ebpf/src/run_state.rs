//! What the scheduler hooks share: the states of threads of measured processes, and the histograms of their waits.
//!
//! The maps are preallocated hash maps rather than task storage: they exist since 5.10, have a bound, and need no
//! allocation under the lock of a run queue. If there are too many threads, the least recently used entry is evicted
//! (LRU).

use core::mem::MaybeUninit;

use aya_ebpf::{
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap},
    helpers::generated::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_ktime_get_ns,
    },
    macros::btf_map,
};
use tailback_ebpf::{
    ANY_OBJECT, HookSettings, HookStats, HookTarget, MAX_CALLS, MAX_HOOK_TARGETS, MAX_HOOK_THREADS,
    MAX_WAIT_KEYS, TIMED_EVERY, ThreadWait, WAIT_BUCKETS, WaitKey, Waits, WorstWait, bucket_of,
};

use crate::kernel::load;

/// `BPF_NOEXIST`, include/uapi/linux/bpf.h
const BPF_NOEXIST: u64 = 1;
/// `E2BIG`, include/uapi/asm-generic/errno-base.h: what the kernel returns if a map is full.
const E2BIG: i32 = 7;
/// [`HookTarget::keys`] of a process for which there was no room: trying again at each wait would search the free lists of all CPUs,
/// under the lock of a run queue.
const NO_ROOM: u32 = u32::MAX;

/// System calls whose first argument is a descriptor or an address that identifies what they wait for: a bit per number.
/// Overridden and frozen like `LAYOUT`.
#[unsafe(no_mangle)]
static OBJECT_CALLS: [u64; MAX_CALLS as usize / 64] = [0; MAX_CALLS as usize / 64];

/// The measured processes.
#[btf_map]
static HOOK_TARGETS: HashMap<u32, HookTarget, { MAX_HOOK_TARGETS as usize }> = HashMap::new();

/// Threads of measured processes, by tid in the initial pid namespace.
#[btf_map]
pub static HOOK_THREADS: LruHashMap<u32, ThreadWait, { MAX_HOOK_THREADS as usize }> =
    LruHashMap::new();

#[btf_map]
static HOOK_WAITS: PerCpuHashMap<WaitKey, Waits, { MAX_WAIT_KEYS as usize }> = PerCpuHashMap::new();

/// An empty histogram, which new entries are copied from: the stack of a program is too small for one.
#[btf_map]
static NO_WAITS: Array<Waits, 1> = Array::new();

#[btf_map]
static HOOK_STATS: PerCpuArray<HookStats, 1> = PerCpuArray::new();

#[btf_map]
static HOOK_SETTINGS: Array<HookSettings, 1> = Array::new();

/// Sets the state of a thread: overwrites its entry `known`, or inserts an entry if `known` is `None`.
///
/// The stores are volatile, one per word: otherwise the compiler calls memset and memmove, which copy byte by byte in eBPF.
#[inline(always)]
pub fn set_thread(run: Run, tid: u32, known: Option<*mut ThreadWait>, thread: ThreadWait) {
    if let Some(known) = known {
        store_thread(known, thread);
        return;
    }
    let mut fresh = MaybeUninit::<ThreadWait>::uninit();
    store_thread(fresh.as_mut_ptr(), thread);
    // SAFETY: written just now.
    let fresh = unsafe { fresh.assume_init_ref() };
    if HOOK_THREADS.insert(tid, fresh, 0).is_err() {
        // SAFETY: as in `Run::end`.
        unsafe { (*run.stats).lost_threads += 1 };
    }
}

#[inline(always)]
fn store_thread(to: *mut ThreadWait, thread: ThreadWait) {
    let word = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let to = to.cast::<u64>();
    // SAFETY: `ThreadWait` has five words. An entry of a preallocated map, to which only the CPU that runs or wakes the thread
    // writes; or a local value.
    unsafe {
        to.write_volatile(thread.since_ns);
        to.add(1).write_volatile(thread.object);
        to.add(2).write_volatile(word(thread.tgid, thread.state));
        to.add(3).write_volatile(word(thread.call, thread.kind));
        to.add(4)
            .write_volatile(word(thread.waker_tgid, thread.waker_tid));
    }
}

/// One run of a hook.
#[derive(Clone, Copy)]
pub struct Run {
    pub stats: *mut HookStats,
    /// CLOCK_MONOTONIC at its begin, ns.
    pub now_ns: u64,
}

impl Run {
    #[inline(always)]
    pub fn begin() -> Option<Self> {
        Some(Self {
            stats: HOOK_STATS.get_ptr_mut(0)?,
            // SAFETY: no arguments.
            now_ns: unsafe { bpf_ktime_get_ns() },
        })
    }

    /// Time since another moment, ns. That may have been on another CPU, whose clock can be ahead by a few ns.
    #[inline(always)]
    pub fn since(self, then_ns: u64) -> u64 {
        self.now_ns.saturating_sub(then_ns)
    }

    /// Counts a wait whose begin was not seen.
    #[inline(always)]
    pub fn count_unmatched(self) {
        // SAFETY: as in `end`.
        unsafe { (*self.stats).unmatched += 1 };
    }

    /// Counts the run, and measures the time of some.
    #[inline(always)]
    pub fn end(self, hook: usize) {
        // SAFETY: the entry of this CPU. A thread that wakes itself does so with interrupts on: an interrupt may then run this hook
        // as well, where the kernel does not skip the nested run, and a count may be lost.
        unsafe {
            let runs = (*self.stats).runs[hook] + 1;
            (*self.stats).runs[hook] = runs;
            if runs.is_multiple_of(TIMED_EVERY) {
                (*self.stats).timed_runs[hook] += 1;
                // CLOCK_MONOTONIC as eBPF reads it may step back by some ns (kernel/time/timekeeping.c).
                (*self.stats).timed_ns[hook] += bpf_ktime_get_ns().saturating_sub(self.now_ns);
            }
        }
    }

    /// Adds a wait. Returns the exemplar to complete if it is the longest of this interval on this CPU.
    #[inline(always)]
    pub fn record(
        self,
        target: *mut HookTarget,
        key: WaitKey,
        tid: u32,
        wait_ns: u64,
    ) -> Option<*mut WorstWait> {
        let settings = HOOK_SETTINGS.get(0)?;
        let interval = settings.interval;
        let Some(waits) = histogram(target, key, settings.max_keys) else {
            // SAFETY: as in `end`.
            unsafe { (*self.stats).lost_waits += 1 };
            return None;
        };
        let bucket = bucket_of(wait_ns);
        // SAFETY: a live value; the volatile read hides its range from the compiler, which would otherwise remove the check
        // below that the verifier needs.
        let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) } as usize;
        if bucket >= WAIT_BUCKETS {
            return None;
        }
        // SAFETY: the entry of this CPU, and `bucket` is in bounds.
        unsafe {
            (*waits).count += 1;
            (*waits).total_ns += wait_ns;
            let buckets = (&raw mut (*waits).buckets).cast::<u32>();
            *buckets.add(bucket) += 1;
            let worst = &raw mut (*waits).worst;
            if (*worst).interval == interval && (*worst).wait_ns >= wait_ns {
                return None;
            }
            (*worst).interval = interval;
            (*worst).wait_ns = wait_ns;
            (*worst).at_ns = self.now_ns;
            (*worst).tid = tid;
            (*worst).cpu = bpf_get_smp_processor_id();
            Some(worst)
        }
    }
}

/// The measured process of a task, if it is one.
#[inline(always)]
pub fn target_of(task: *const u8, tgid: u32) -> Option<*mut HookTarget> {
    let target = HOOK_TARGETS.get_ptr_mut(tgid)?;
    let leader = load!(task, task_group_leader, *const u8);
    let start_ns = load!(leader, task_start_boottime, u64);
    // SAFETY: an entry of a preallocated map; at worst it is reused for another process.
    (unsafe { (*target).start_ns } == start_ns).then_some(target)
}

/// What is known of a thread of a measured process. An entry of an earlier process with this tid, or from before the measurement began,
/// is stale: the thread may have run since then without the hooks seeing it.
#[inline(always)]
pub fn known_thread(target: *const HookTarget, tid: u32, tgid: u32) -> Option<*mut ThreadWait> {
    let thread = HOOK_THREADS.get_ptr_mut(tid)?;
    // SAFETY: entries of preallocated maps; at worst they are reused.
    let is_stale = unsafe { (*thread).tgid != tgid || (*thread).since_ns < (*target).since_ns };
    (!is_stale).then_some(thread)
}

/// Whether the first argument of a system call identifies what it waits for.
#[inline(always)]
pub fn has_object(call: u32) -> bool {
    let word = (call / 64) as usize & (MAX_CALLS as usize / 64 - 1);
    let words = (&raw const OBJECT_CALLS).cast::<u64>();
    // SAFETY: `word` is in bounds; the read is volatile because the loader rewrites the static.
    let word = unsafe { core::ptr::read_volatile(words.add(word)) };
    word >> (call % 64) & 1 == 1
}

/// The thread that runs here: tgid and tid.
#[inline(always)]
pub fn current() -> (u32, u32) {
    // SAFETY: no arguments.
    let both = unsafe { bpf_get_current_pid_tgid() };
    ((both >> 32) as u32, both as u32)
}

/// Its name.
#[inline(always)]
pub fn current_comm(comm: *mut [u8; 16]) {
    // SAFETY: the helper writes 16 bytes at most.
    unsafe { bpf_get_current_comm(comm.cast(), 16) };
}

/// The histogram of a key on this CPU. If the process has too many, that of the same call without its object.
#[inline(always)]
fn histogram(target: *mut HookTarget, mut key: WaitKey, max_keys: u32) -> Option<*mut Waits> {
    if let Some(found) = HOOK_WAITS.get_ptr_mut(key) {
        return Some(found);
    }
    // SAFETY: as in `target_of`.
    let keys = unsafe { (*target).keys };
    if keys < max_keys / 2 && add(target, key) {
        return HOOK_WAITS.get_ptr_mut(key);
    }
    key.object = ANY_OBJECT;
    if let Some(found) = HOOK_WAITS.get_ptr_mut(key) {
        return Some(found);
    }
    // SAFETY: as in `target_of`. Read again: there may be no room.
    let keys = unsafe { core::ptr::read_volatile(&raw const (*target).keys) };
    if keys < max_keys && add(target, key) {
        return HOOK_WAITS.get_ptr_mut(key);
    }
    None
}

/// Adds an empty histogram. Returns whether there is one for the key now.
#[inline(always)]
fn add(target: *mut HookTarget, key: WaitKey) -> bool {
    let Some(empty) = NO_WAITS.get(0) else {
        return false;
    };
    // SAFETY: as in `target_of`. Not atomic: the bound may be exceeded by a few.
    let keys = unsafe { &raw mut (*target).keys };
    match HOOK_WAITS.insert(key, empty, BPF_NOEXIST) {
        Ok(()) => {
            // SAFETY: as above.
            unsafe { *keys = (*keys).saturating_add(1) };
            true
        }
        Err(error) => {
            if error == -E2BIG {
                // SAFETY: as above.
                unsafe { *keys = NO_ROOM };
            }
            // Another CPU may have added it meanwhile.
            HOOK_WAITS.get_ptr_mut(key).is_some()
        }
    }
}
