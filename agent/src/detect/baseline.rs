//! What the wait in a queue usually is, where only that can tell whether it is long: work in progress takes the time
//! that it takes.

use std::collections::VecDeque;

use crate::queue::Reading;

const SECOND_NS: u64 = 1_000_000_000;
/// Seconds of quiet that it is taken over.
const SECONDS: usize = 120;
/// Seconds of quiet without which nothing is usual.
const MIN_SECONDS: usize = 3;
/// The last seconds before an episode may already belong to it, and do not count.
const PENDING: usize = 2;
/// Longer than so many times the usual wait is long.
const FACTOR: u64 = 2;
/// Deeper than so many times the usual depth, and so many pieces of work more, is deep.
const DEPTH: (f64, f64) = (1.5, 2.0);
/// A queue that is so much deeper than a second before grows: such a second is not a usual one.
const GROWS: (f64, f64) = (1.1, 1.0);
/// A queue that has grown ever since it was first seen is measured by how it began, after so long, ns.
const FROM_THE_FIRST_NS: u64 = 5 * SECOND_NS;
/// A wait below that is not long, whatever is usual, ns.
const LEAST_NS: u64 = 250_000_000;

/// Remembers quiet seconds.
#[derive(Default)]
pub(super) struct BaselineWait {
    seconds: VecDeque<Second>,
    pending: VecDeque<Second>,
    now: Second,
    next_ns: u64,
    before: Option<f64>,
    /// The first second with work in it, and when that was.
    first: Option<(u64, Second)>,
    seen_ns: u64,
}

/// Means over a second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    wait_ns: f64,
    waits: u32,
    /// Work was done, seen or not: what is done between two looks does not wait at any.
    worked: bool,
    depth: f64,
    looks: u32,
}

impl BaselineWait {
    /// How long the work has waited, if there is more of it than usual: 0 where nothing is usual yet.
    pub(super) fn delay_ns(&self, reading: &Reading) -> u64 {
        let deep = self.depth().is_some_and(|usual| {
            let (times, more) = DEPTH;
            reading.depth as f64 > (usual * times).max(usual + more)
        });
        let wait_ns = reading.wait_ns.filter(|_| deep && self.wait_ns().is_some());
        wait_ns.unwrap_or(0)
    }

    /// Whether enough quiet seconds were seen.
    pub(super) fn is_known(&self) -> bool {
        self.seconds.len() >= MIN_SECONDS
    }

    /// The delay that is fine, ns.
    pub(super) fn target_delay_ns(&self) -> u64 {
        self.wait_ns()
            .map_or(LEAST_NS, |usual| (usual as u64).saturating_mul(FACTOR))
            .max(LEAST_NS)
    }

    /// Takes in a reading of a quiet queue.
    pub(super) fn quiet(&mut self, now_ns: u64, reading: &Reading) {
        if now_ns >= self.next_ns {
            self.next_ns = now_ns + SECOND_NS;
            let second = std::mem::take(&mut self.now);
            if second.looks > 0 {
                if self.first.is_none() && second.waits > 0 {
                    self.first = Some((now_ns, second));
                }
                let depth = second.mean_depth();
                let (times, more) = GROWS;
                let grows = self
                    .before
                    .is_some_and(|before| depth > before * times + more);
                self.before = Some(depth);
                if !grows {
                    self.pending.push_back(second);
                }
            }
            if self.pending.len() > PENDING
                && let Some(settled) = self.pending.pop_front()
            {
                self.seconds.push_back(settled);
                if self.seconds.len() > SECONDS {
                    self.seconds.pop_front();
                }
            }
        }
        self.seen_ns = now_ns;
        let second = &mut self.now;
        second.looks += 1;
        second.depth += reading.depth as f64;
        second.worked |= reading.depth > 0 || reading.departures.is_some_and(|count| count > 0);
        if let Some(wait_ns) = reading.wait_ns.filter(|_| reading.depth > 0) {
            second.waits += 1;
            second.wait_ns += wait_ns as f64;
        }
    }

    /// The queue is no longer quiet: the seconds just past are not to be trusted.
    pub(super) fn disturbed(&mut self) {
        self.pending.clear();
        self.now = Second::default();
        self.before = None;
    }

    fn wait_ns(&self) -> Option<f64> {
        let worked = self.seconds.iter().filter(|second| second.worked);
        median(worked.map(Second::mean_wait_ns)).or_else(|| self.first().map(Second::mean_wait_ns))
    }

    fn depth(&self) -> Option<f64> {
        median(self.seconds.iter().map(Second::mean_depth))
            .or_else(|| self.first().map(Second::mean_depth))
    }

    /// How it began, where it has not been quiet since.
    fn first(&self) -> Option<&Second> {
        let (at_ns, first) = self.first.as_ref()?;
        let long = self.seen_ns.saturating_sub(*at_ns) >= FROM_THE_FIRST_NS;
        (long && self.seconds.len() < MIN_SECONDS).then_some(first)
    }
}

impl Second {
    fn mean_wait_ns(&self) -> f64 {
        self.wait_ns / f64::from(self.waits.max(1))
    }

    fn mean_depth(&self) -> f64 {
        self.depth / f64::from(self.looks.max(1))
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    if values.len() < MIN_SECONDS {
        return None;
    }
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 100_000_000;

    fn reading(depth: u64, wait_ms: u64) -> Reading {
        Reading {
            depth,
            wait_ns: Some(wait_ms * 1_000_000),
            ..Reading::default()
        }
    }

    fn after_quiet(depth: u64, wait_ms: u64) -> BaselineWait {
        let mut usual = BaselineWait::default();
        for tick in 0..80 {
            usual.quiet(tick * TICK, &reading(depth, wait_ms));
        }
        usual
    }

    #[test]
    fn before_anything_is_usual_nothing_is_long() {
        assert_eq!(BaselineWait::default().delay_ns(&reading(100, 60_000)), 0);
    }

    #[test]
    fn a_slow_service_is_as_it_always_is() {
        let usual = after_quiet(10, 2_000);
        assert_eq!(usual.target_delay_ns(), 4_000_000_000);
        assert_eq!(usual.delay_ns(&reading(10, 2_000)), 0);
        assert_eq!(usual.delay_ns(&reading(40, 9_000)), 9_000_000_000);
    }

    #[test]
    fn a_queue_that_only_ever_grows_is_measured_by_how_it_began() {
        let mut usual = BaselineWait::default();
        for tick in 0..100 {
            usual.quiet(tick * TICK, &reading(4 + tick, 300 + 30 * tick));
        }
        assert!(
            usual.target_delay_ns() < 1_000_000_000,
            "{}",
            usual.target_delay_ns()
        );
        assert_eq!(usual.delay_ns(&reading(104, 3_300)), 3_300_000_000);
    }

    #[test]
    fn one_slow_request_is_not_a_deep_queue() {
        let usual = after_quiet(1, 10);
        assert_eq!(usual.delay_ns(&reading(2, 30_000)), 0);
    }
}
