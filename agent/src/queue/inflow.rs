//! Whether something keeps coming. What rests in a buffer that a service keeps to itself, and to which nothing is
//! added (the tokens of a jobserver, the byte of a self-pipe), is a store and not a queue.

/// A pause after which things no longer keep coming: no longer than a queue must stand to be called standing, or what
/// came once would look like a queue.
const PAUSE_NS: u64 = 1_000_000_000;

/// Remembers since when things have kept coming.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inflow {
    since_ns: Option<u64>,
    last_ns: u64,
}

impl Inflow {
    /// Takes in one look: whether something came since the previous one. Answers for how long things have kept
    /// coming, ns; `None` when nothing came of late.
    pub(super) fn look(&mut self, came: bool, now_ns: u64) -> Option<u64> {
        if now_ns.saturating_sub(self.last_ns) > PAUSE_NS {
            self.since_ns = None;
        }
        if came {
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
    fn what_keeps_coming_is_told_from_what_came_once() {
        let mut inflow = Inflow::default();
        assert_eq!(inflow.look(false, 100 * MS), None);
        assert_eq!(inflow.look(true, 200 * MS), Some(0));
        assert_eq!(inflow.look(false, 900 * MS), Some(700 * MS));
        assert_eq!(inflow.look(true, 1_100 * MS), Some(900 * MS));
        assert_eq!(inflow.look(false, 2_200 * MS), None);
        assert_eq!(inflow.look(true, 2_300 * MS), Some(0));
    }
}
