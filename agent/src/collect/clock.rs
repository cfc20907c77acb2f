//! The only place in the agent that reads clocks, CPU time and its own memory use.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

/// CPU time of the serving thread, ns; see [`record_serving_cpu_time`].
static SERVING_NS: AtomicU64 = AtomicU64::new(0);

/// CLOCK_MONOTONIC, ns: the clock of the kernel's handshake timestamps.
pub fn mono_ns() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME, ns: like CLOCK_MONOTONIC, but also counts time in suspend.
pub fn boot_ns() -> u64 {
    read(libc::CLOCK_BOOTTIME)
}

/// Wall clock, ns since 1970.
pub fn unix_ns() -> u64 {
    read(libc::CLOCK_REALTIME)
}

/// CPU time of the calling thread, ns: a scan's cost must not include what other threads do meanwhile.
pub fn cpu_time_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of the whole agent, ns.
pub fn process_cpu_ns() -> u64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of the agent that counts against the budget, ns: without serving status and metrics, so that frequent requests
/// do not slow the scans.
pub fn budgeted_cpu_ns() -> u64 {
    process_cpu_ns().saturating_sub(SERVING_NS.load(Ordering::Relaxed))
}

/// Called from time to time by the one thread that only serves requests: excludes its CPU time from [`budgeted_cpu_ns`].
pub fn record_serving_cpu_time() {
    SERVING_NS.store(cpu_time_ns(), Ordering::Relaxed);
}

/// Measures CPU time of the calling thread.
#[derive(Clone, Copy)]
pub(super) struct CpuTimer {
    start_ns: u64,
}

impl CpuTimer {
    pub(super) fn start() -> Self {
        Self {
            start_ns: cpu_time_ns(),
        }
    }

    /// CPU time since the start, ns.
    pub(super) fn elapsed_ns(self) -> u64 {
        cpu_time_ns().saturating_sub(self.start_ns)
    }
}

/// Resident memory of the agent, bytes; 0 if /proc/self/statm cannot be read.
pub fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// The kernel's timer tick, ns: the unit of the times at which a connection last sent and received.
pub(super) fn jiffy_ns() -> u64 {
    let mut tick = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `tick` is a live timespec. A coarse clock advances with the tick (hrtimer_resolution aside), since 2.6.32.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    tick.tv_nsec as u64
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a live timespec; these clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
