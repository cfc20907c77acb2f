//! What was seen in each of the last seconds: enough for every window that a verdict is made from, in bounded memory.

use std::collections::VecDeque;

const SECOND_NS: u64 = 1_000_000_000;
/// Number of seconds kept: the 20 s that a verdict is made from (`WINDOW_NS`), and a few more.
const MAX_SECONDS: usize = 25;

/// Each second with the time of its first sample, CLOCK_MONOTONIC, ns.
#[derive(Debug, Default)]
pub(super) struct Seconds<T>(VecDeque<(u64, T)>);

impl<T: Default> Seconds<T> {
    /// The second that `now_ns` belongs to, a new one if the last is over.
    pub(super) fn at(&mut self, now_ns: u64) -> &mut T {
        let is_over = |(from_ns, _): &(u64, T)| now_ns.saturating_sub(*from_ns) >= SECOND_NS;
        if self.0.back().is_none_or(is_over) {
            if self.0.len() >= MAX_SECONDS {
                self.0.pop_front();
            }
            self.0.push_back((now_ns, T::default()));
        }
        let last = self.0.len() - 1;
        &mut self.0[last].1
    }

    /// All seconds that overlap with this time.
    pub(super) fn within(&self, from_ns: u64, to_ns: u64) -> impl Iterator<Item = &T> {
        let overlap =
            move |began_ns: u64| began_ns <= to_ns && began_ns.saturating_add(SECOND_NS) > from_ns;
        self.0
            .iter()
            .filter(move |(began_ns, _)| overlap(*began_ns))
            .map(|(_, second)| second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_grouped_by_the_second_and_old_ones_are_dropped() {
        let mut seconds: Seconds<u32> = Seconds::default();
        for tick in 0..1_000 {
            *seconds.at(tick * SECOND_NS / 10) += 1;
        }
        let counts = |from_s: u64, to_s: u64| -> Vec<u32> {
            let within = seconds.within(from_s * SECOND_NS, to_s * SECOND_NS);
            within.copied().collect()
        };
        assert_eq!(counts(0, 100), [10; MAX_SECONDS]);
        assert_eq!(
            counts(90, 91),
            [10; 2],
            "that begins at 90 s, and that at 91 s"
        );
        assert!(counts(0, 70).is_empty());
    }
}
