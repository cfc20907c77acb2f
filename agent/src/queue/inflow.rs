//! Distinguishes a queue from a store, by whether arrivals continue. A buffer that a service uses internally and adds
//! nothing to is a store: the tokens of a jobserver, or the byte of a self-pipe.

/// Arrivals have stopped after a pause this long, ns. It must not exceed the time for which a delay has to persist to be a standing
/// delay (`detect`'s window, 1 s). Otherwise a single arrival would look like a standing queue.
const MAX_PAUSE_NS: u64 = 1_000_000_000;

/// Tracks since when arrivals have continued.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inflow {
    since_ns: Option<u64>,
    last_ns: u64,
}

impl Inflow {
    /// Records one sample, with whether anything arrived since the previous one. Returns for how long arrivals have
    /// continued, ns, or `None` if nothing arrived recently.
    pub(super) fn observe(&mut self, arrived: bool, now_ns: u64) -> Option<u64> {
        if now_ns.saturating_sub(self.last_ns) > MAX_PAUSE_NS {
            self.since_ns = None;
        }
        if arrived {
            self.since_ns.get_or_insert(now_ns);
            self.last_ns = now_ns;
        }
        self.since_ns.map(|since| now_ns.saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use super::Inflow;

    const MS: u64 = 1_000_000;

    #[test]
    fn continuing_arrivals_are_distinguished_from_a_single_one() {
        let mut inflow = Inflow::default();
        assert_eq!(inflow.observe(false, 100 * MS), None);
        assert_eq!(inflow.observe(true, 200 * MS), Some(0));
        assert_eq!(inflow.observe(false, 900 * MS), Some(700 * MS));
        assert_eq!(inflow.observe(true, 1_100 * MS), Some(900 * MS));
        assert_eq!(inflow.observe(false, 2_200 * MS), None);
        assert_eq!(inflow.observe(true, 2_300 * MS), Some(0));
    }
}
