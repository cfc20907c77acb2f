//! How often something is looked at that need not be looked at on every tick. Pure.
#![forbid(unsafe_code)]

/// Stretches an interval so that the looks cost no more than a given share of a core.
#[derive(Clone, Copy, Debug)]
pub(super) struct PollInterval {
    min_ns: u64,
    max_ns: u64,
    due_ns: u64,
    /// When the next look is paid for.
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

    /// A look was made now, which cost so much CPU; `share` of a core is for such looks.
    pub(super) fn looked(&mut self, now_ns: u64, cost_ns: u64, share: f64) {
        let affordable = (cost_ns as f64 / share) as u64;
        self.affordable_ns = now_ns.saturating_add(affordable.min(self.max_ns));
        self.due_ns = now_ns.saturating_add(affordable.clamp(self.min_ns, self.max_ns));
    }

    /// The next look comes no later than this after now, if it is paid for by then.
    pub(super) fn hurry(&mut self, now_ns: u64, within_ns: u64) {
        let wanted = now_ns.saturating_add(within_ns).max(self.affordable_ns);
        self.due_ns = self.due_ns.min(wanted);
    }

    /// As [`PollInterval::hurry`], paid for or not; what it costs is made up for afterwards.
    pub(super) fn demand(&mut self, now_ns: u64, within_ns: u64) {
        self.due_ns = self.due_ns.min(now_ns.saturating_add(within_ns));
    }
}

#[cfg(test)]
mod tests {
    use super::PollInterval;

    #[test]
    fn dear_looks_are_made_less_often() {
        let mut pace = PollInterval::new(100, 1_000);
        assert!(pace.is_due(0));
        pace.looked(1_000, 1, 0.1);
        assert!(!pace.is_due(1_099) && pace.is_due(1_100));
        pace.looked(1_100, 50, 0.1);
        assert!(!pace.is_due(1_599) && pace.is_due(1_600));
        pace.looked(1_600, 1_000_000, 0.1);
        assert!(!pace.is_due(2_599) && pace.is_due(2_600));
        // Not before it is paid for.
        pace.hurry(1_700, 10);
        assert!(!pace.is_due(2_599));
        pace.looked(2_600, 1, 0.1);
        pace.hurry(2_620, 10);
        assert!(pace.is_due(2_630));
        // Unless it must be.
        pace.looked(3_000, 50, 0.1);
        pace.demand(3_000, 250);
        assert!(!pace.is_due(3_249) && pace.is_due(3_250));
    }
}
