//! The CPU time of each part of a sample, for the schedule.

use super::{clock::CpuTimer, schedule::SampleCost};

/// CPU time of the scans of the current sample, ns.
#[derive(Default)]
pub(super) struct ScanCosts {
    /// Discovery and background scans.
    background_ns: u64,
    /// The same, since the previous discovery.
    since_discovery_ns: u64,
    threads_ns: u64,
    profile_ns: u64,
}

impl ScanCosts {
    /// Adds what a background scan cost since `timer` started; returns it, ns.
    pub(super) fn add_background(&mut self, timer: CpuTimer) -> u64 {
        let cost_ns = timer.elapsed_ns();
        self.background_ns += cost_ns;
        self.since_discovery_ns += cost_ns;
        cost_ns
    }

    pub(super) fn set_threads(&mut self, timer: CpuTimer) {
        self.threads_ns = timer.elapsed_ns();
    }

    pub(super) fn set_profile(&mut self, timer: CpuTimer) {
        self.profile_ns = timer.elapsed_ns();
    }

    /// Cost of all background scans since this was last called, ns.
    pub(super) fn take_since_discovery(&mut self) -> u64 {
        std::mem::take(&mut self.since_discovery_ns)
    }

    /// Cost of the sample that ends now, background scans excluded. `cpu_ns`: all CPU time that it took.
    pub(super) fn take_sample(&mut self, cpu_ns: u64) -> SampleCost {
        let background_ns = std::mem::take(&mut self.background_ns);
        SampleCost {
            cpu_ns: cpu_ns.saturating_sub(background_ns),
            threads_ns: std::mem::take(&mut self.threads_ns),
            profile_ns: std::mem::take(&mut self.profile_ns),
        }
    }
}
