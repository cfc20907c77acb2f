//! The interval of one background scan. Pure.
#![forbid(unsafe_code)]

/// Stretches an interval so that a scan costs no more than a given share of a core.
#[derive(Clone, Copy, Debug)]
pub(super) struct PollInterval {
    min_ns: u64,
    max_ns: u64,
    due_ns: u64,
    /// When the next scan is within its share again.
    affordable_ns: u64,
}

impl PollInterval {
    /// Due at once; then between `min_ns` and `max_ns` apart.
    pub(super) const fn new(min_ns: u64, max_ns: u64) -> Self {
        Self {
            min_ns,
            max_ns,
            due_ns: 0,
            affordable_ns: 0,
        }
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns
    }

    /// A scan was made now and cost `cost_ns` of CPU time. `share`: the share of a core that it may use.
    pub(super) fn polled(&mut self, now_ns: u64, cost_ns: u64, share: f64) {
        let affordable = (cost_ns as f64 / share) as u64;
        self.affordable_ns = now_ns.saturating_add(affordable.min(self.max_ns));
        self.due_ns = now_ns.saturating_add(affordable.clamp(self.min_ns, self.max_ns));
    }

    /// Makes the next scan due within `within_ns`, or as soon after that as it is affordable.
    pub(super) fn poll_within(&mut self, now_ns: u64, within_ns: u64) {
        let wanted = now_ns.saturating_add(within_ns).max(self.affordable_ns);
        self.due_ns = self.due_ns.min(wanted);
    }

    /// Makes the next scan due within `within_ns`, affordable or not; the interval after it makes up for the cost.
    pub(super) fn force(&mut self, now_ns: u64, within_ns: u64) {
        self.due_ns = self.due_ns.min(now_ns.saturating_add(within_ns));
    }
}

#[cfg(test)]
mod tests {
    use super::PollInterval;

    #[test]
    fn an_expensive_scan_stretches_its_interval_up_to_the_longest() {
        let mut interval = PollInterval::new(100, 1_000);
        assert!(interval.is_due(0));
        interval.polled(1_000, 1, 0.1);
        assert!(!interval.is_due(1_099) && interval.is_due(1_100));
        interval.polled(1_100, 50, 0.1);
        assert!(!interval.is_due(1_599) && interval.is_due(1_600));
        interval.polled(1_600, 1_000_000, 0.1);
        assert!(!interval.is_due(2_599) && interval.is_due(2_600));
    }

    #[test]
    fn a_scan_polled_sooner_waits_until_it_is_affordable_and_a_forced_one_does_not() {
        let mut interval = PollInterval::new(100, 1_000);
        interval.polled(1_600, 1_000_000, 0.1);
        interval.poll_within(1_700, 10);
        assert!(!interval.is_due(2_599));
        interval.polled(2_600, 1, 0.1);
        interval.poll_within(2_620, 10);
        assert!(interval.is_due(2_630));
        interval.polled(3_000, 50, 0.1);
        interval.force(3_000, 250);
        assert!(!interval.is_due(3_249) && interval.is_due(3_250));
    }
}
