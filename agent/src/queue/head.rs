//! The age of the item at the head of a queue, from two samples of a counter: a head that has not moved is that old.

/// Tracks when the head of a queue last changed: its position, such as the consumer's counter, or its identity, such as
/// the address of the first buffer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Head {
    position: u64,
    since_ns: u64,
    waiting: bool,
}

impl Head {
    /// Records one sample and returns the age of the head, ns, or `None` if nothing waits. The age is a lower bound: an
    /// item that arrived between two samples counts from the second, so the true age is up to one interval more.
    pub(super) fn observe(
        &mut self,
        position: impl Into<u64>,
        waiting: bool,
        now_ns: u64,
    ) -> Option<u64> {
        let position = position.into();
        if !waiting || !self.waiting || position != self.position {
            self.since_ns = now_ns;
        }
        self.position = position;
        self.waiting = waiting;
        waiting.then(|| self.age_ns(now_ns))
    }

    /// Records that an item was taken although the position does not show it: the age starts again.
    pub(super) fn moved(&mut self) {
        self.waiting = false;
    }

    /// Time since the head last moved, ns.
    pub(super) fn age_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.since_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::Head;

    #[test]
    fn a_head_that_does_not_move_ages() {
        let mut head = Head::default();
        assert_eq!(head.observe(5_u32, true, 1_000), Some(0));
        assert_eq!(head.observe(5_u32, true, 1_100), Some(100));
        assert_eq!(head.observe(5_u32, true, 1_250), Some(250));
    }

    #[test]
    fn a_read_or_an_empty_queue_resets_the_age() {
        let mut head = Head::default();
        head.observe(5_u32, true, 1_000);
        assert_eq!(head.observe(6_u32, true, 1_100), Some(0));
        assert_eq!(head.observe(7_u32, false, 1_200), None);
        assert_eq!(head.observe(7_u32, true, 1_300), Some(0));
    }
}
