//! The clocks and meters of the world. Nothing else in the agent asks what time it is.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

/// See [`has_answered`].
static ANSWERING_NS: AtomicU64 = AtomicU64::new(0);

/// CLOCK_MONOTONIC, ns: the clock that the kernel stamps handshakes with.
pub fn mono_ns() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME, ns: goes on while the machine sleeps, and is never set.
pub fn boot_ns() -> u64 {
    read(libc::CLOCK_BOOTTIME)
}

/// Wall clock, ns since 1970.
pub fn unix_ns() -> u64 {
    read(libc::CLOCK_REALTIME)
}

/// CPU time of the calling thread, ns: what a look costs is no matter of what other threads do meanwhile.
pub fn cpu_time_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of the whole agent, ns.
pub fn process_cpu_ns() -> u64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// And without what answering took: whoever asks often must not slow the looks.
pub fn unasked_cpu_ns() -> u64 {
    process_cpu_ns().saturating_sub(ANSWERING_NS.load(Ordering::Relaxed))
}

/// Of the one thread that does nothing but answer, now and then: so much CPU time it has taken until now.
pub fn has_answered() {
    ANSWERING_NS.store(cpu_time_ns(), Ordering::Relaxed);
}

/// Resident memory of the agent, bytes; 0 where /proc does not say.
pub fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    pages * 4096
}

/// The kernel's timer tick, in which it keeps a connection's last sending and receiving, ns.
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
