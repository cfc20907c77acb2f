//! Debug lines of the programs, for `--log-bpf`.
//!
//! `AYA_LOG_LEVEL` is read-only data, and 0 unless the flag is given: the verifier then prunes each call below, so that the
//! loaded programs neither read the clock nor touch a map for it.

use aya_ebpf::{btf_maps::Array, helpers::generated::bpf_ktime_get_ns, macros::btf_map};
use aya_log_ebpf::macro_support::{Level, level_enabled};
use tailback_ebpf::{LOG_LINES_PER_SECOND, LogLimit};

/// The rate limit, and a count of suppressed lines for the agent.
#[btf_map]
pub static LOG_LIMIT: Array<LogLimit, 1> = Array::new();

/// Writes a line through aya-log if `--log-bpf` was given and the rate limit permits.
///
/// Not for loops that the verifier unrolls: each line costs it several hundred instructions.
macro_rules! debug {
    ($($args:tt)+) => {
        if $crate::log::permitted() {
            aya_log_ebpf::debug!((), $($args)+);
        }
    };
}

pub(crate) use debug;

/// Takes one line out of this second's budget.
#[inline(always)]
pub fn permitted() -> bool {
    const NS_PER_SECOND: u64 = 1_000_000_000;
    if !level_enabled(Level::Debug) {
        return false;
    }
    let Some(limit) = LOG_LIMIT.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: no arguments.
    let second = unsafe { bpf_ktime_get_ns() } / NS_PER_SECOND;
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    unsafe {
        if (*limit).second != second {
            (*limit).second = second;
            (*limit).lines = 0;
        }
        if (*limit).lines >= LOG_LINES_PER_SECOND {
            (*limit).suppressed += 1;
            return false;
        }
        (*limit).lines += 1;
    }
    true
}
