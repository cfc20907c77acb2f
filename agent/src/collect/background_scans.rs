//! Scans that not every sample needs. Each has its own interval, which stretches so that its cost stays within a fixed
//! part of the CPU budget.
#![forbid(unsafe_code)]

use super::{DISCOVERY_INTERVAL_NS, MS, poll_interval::PollInterval};

/// Part of the allowed CPU time that each background scan may use: 64% for the eight scans below together.
const BUDGET_PART: f64 = 0.08;
/// The same while a target is focused: the profile needs more of the budget then.
const BUDGET_PART_FOCUSED: f64 = 0.05;

/// When each background scan is due. Intervals are from shortest to longest; the longest bounds how old a reading may get
/// when the scan is expensive.
pub(super) struct BackgroundScans {
    /// Listening processes and holders of the other ends: every open file of the machine.
    pub(super) holders: PollInterval,
    /// What threads of all targets wait for. While a target is focused, in every base sample that can afford it.
    pub(super) waits: PollInterval,
    /// Cgroups and the machine.
    pub(super) system: PollInterval,
    /// CPU time of all threads of the machine.
    pub(super) cpu_accounting: PollInterval,
    /// Process titles in the focus scope.
    pub(super) titles: PollInterval,
    /// Holders of the locks that processes in the focus scope share.
    pub(super) lock_waits: PollInterval,
    /// Local ports in use in the network namespaces of the focus scope.
    pub(super) local_ports: PollInterval,
    /// Counters of the JVMs in the focus scope.
    pub(super) jvm_counters: PollInterval,
}

impl Default for BackgroundScans {
    fn default() -> Self {
        Self {
            holders: PollInterval::new(DISCOVERY_INTERVAL_NS / 2, 5_000 * MS),
            waits: PollInterval::new(250 * MS, 5_000 * MS),
            system: PollInterval::new(500 * MS, 5_000 * MS),
            cpu_accounting: PollInterval::new(1_000 * MS, 10_000 * MS),
            titles: PollInterval::new(250 * MS, 5_000 * MS),
            lock_waits: PollInterval::new(200 * MS, 5_000 * MS),
            local_ports: PollInterval::new(1_000 * MS, 10_000 * MS),
            jvm_counters: PollInterval::new(1_000 * MS, 5_000 * MS),
        }
    }
}

/// Part of the CPU budget that each background scan may use, 0 to 1.
pub(super) fn share_of_each(is_focused: bool) -> f64 {
    if is_focused {
        BUDGET_PART_FOCUSED
    } else {
        BUDGET_PART
    }
}
