//! How long the head of a queue has not moved: the age that can be had from two looks at a counter.

/// Remembers when the consumer's counter last moved, or when what stands at the head of the queue last had another name.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Head {
    position: u64,
    since_ns: u64,
    waiting: bool,
}

impl Head {
    /// Takes in one look; answers the age of the head, ns: at least this long has something waited here. `None` when
    /// nothing waits. What came after the last look counts from this look, so the true age is up to one tick more.
    pub(super) fn look(
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

    /// Something was taken, which the position does not show: the head is young again.
    pub(super) fn moved(&mut self) {
        self.waiting = false;
    }

    /// Since the head last moved, ns.
    pub(super) fn age_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.since_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::Head;

    #[test]
    fn a_head_that_does_not_move_grows_old() {
        let mut head = Head::default();
        assert_eq!(head.look(5_u32, true, 1_000), Some(0));
        assert_eq!(head.look(5_u32, true, 1_100), Some(100));
        assert_eq!(head.look(5_u32, true, 1_250), Some(250));
    }

    #[test]
    fn a_read_or_an_empty_queue_makes_it_young_again() {
        let mut head = Head::default();
        head.look(5_u32, true, 1_000);
        assert_eq!(head.look(6_u32, true, 1_100), Some(0));
        assert_eq!(head.look(7_u32, false, 1_200), None);
        assert_eq!(head.look(7_u32, true, 1_300), Some(0));
    }
}
