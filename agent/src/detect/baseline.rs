//! The baseline of a queue that cannot be judged by itself. Having requests in service is normal, so only a comparison with the
//! past shows whether they take too long.

use std::collections::VecDeque;

use super::rates::BaselineRate;
use crate::queue::Reading;

const SECOND_NS: u64 = 1_000_000_000;

/// Maximum number of healthy seconds in a baseline.
const BASELINE_SECONDS: usize = 120;

/// Minimum number of healthy seconds in a baseline.
const MIN_SECONDS: usize = 3;

/// The last seconds before an episode may belong to it, and are left out of the baseline.
const PENDING_SECONDS: usize = 2;

/// The target delay, in baseline waits.
const TARGET_WAITS: u64 = 2;

/// A queue is deep if its depth is above this multiple of the baseline, and above the baseline by this many items.
const DEEP_RATIO: f64 = 1.5;
const DEEP_MIN_MORE: f64 = 2.0;

/// A second is left out of the baseline if the queue was deeper than in the second before: by this ratio, and by this many items
/// more.
const GROWTH_RATIO: f64 = 1.1;
const GROWTH_MIN_MORE: f64 = 1.0;

/// If a queue has grown since it was first observed, its first second serves as the baseline after this time, ns.
const FIRST_SECOND_AFTER_NS: u64 = 5 * SECOND_NS;

/// Requests in flight whose age exceeds this multiple of the response time are of another kind than those answered: long polls
/// beside quick requests, for example. Whether they are slow, or long by design, is unknown until they are answered. For
/// comparison: if all requests take equally long, the median age of those in flight is half the response time.
pub(super) const OTHER_KIND_RATIO: f64 = 10.0;

/// The first second is no baseline for requests of another kind while the response rate is at least this fraction of its own.
const STEADY_RATE: f64 = 0.7;

/// Lower bound of the target delay, ns: a shorter wait does not matter, whatever the baseline.
const MIN_TARGET_DELAY_NS: u64 = 250_000_000;

/// The healthy seconds of one queue.
#[derive(Default)]
pub(super) struct BaselineWait {
    seconds: VecDeque<Second>,
    pending: VecDeque<Second>,
    now: Second,
    next_ns: u64,
    /// Mean depth of the second before.
    depth_before: Option<f64>,
    /// The first second in which work waited, and when it ended.
    first: Option<(u64, Second)>,
    /// The last whole second, and the last of those in which connections were counted.
    last: Second,
    last_counted: Second,
    /// Mean duration of the last responses whose duration is known, ns.
    response_time_ns: Option<f64>,
    seen_ns: u64,
}

/// Sums over one second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    wait_ns: f64,
    waits: u32,
    /// Work was done, even if no sample saw any waiting: a short request is served between two samples.
    worked: bool,
    depth: f64,
    samples: u32,
    ns: u64,
    responses: u64,
    /// Upper bound of the work that no sample saw.
    unseen: u64,
}

impl BaselineWait {
    /// How long the work has waited, ns, if the queue is deeper than its baseline. 0 otherwise, or without a baseline.
    pub(super) fn delay_ns(&self, reading: &Reading) -> u64 {
        let is_deep = self
            .depth()
            .is_some_and(|baseline| is_deep(reading.depth as f64, baseline));
        let has_baseline = is_deep && self.wait_ns().is_some();
        reading.wait_ns.filter(|_| has_baseline).unwrap_or(0)
    }

    /// Whether enough healthy seconds were observed.
    pub(super) fn is_known(&self) -> bool {
        self.seconds.len() >= MIN_SECONDS
    }

    /// The acceptable delay, ns.
    pub(super) fn target_delay_ns(&self) -> u64 {
        self.wait_ns()
            .map_or(MIN_TARGET_DELAY_NS, |baseline| {
                (baseline as u64).saturating_mul(TARGET_WAITS)
            })
            .max(MIN_TARGET_DELAY_NS)
    }

    /// Adds a reading of a healthy queue.
    pub(super) fn learn(&mut self, now_ns: u64, reading: &Reading) {
        if now_ns >= self.next_ns {
            self.next_ns = now_ns + SECOND_NS;
            let second = std::mem::take(&mut self.now);
            if second.samples > 0 {
                self.end_second(now_ns, second);
            }
            self.settle();
        }
        self.seen_ns = now_ns;
        let second = &mut self.now;
        second.samples += 1;
        second.depth += reading.depth as f64;
        second.worked |= reading.depth > 0 || reading.departures.is_some_and(|count| count > 0);
        second.unseen = second.unseen.saturating_add(reading.unseen_at_most);
        let responses = reading.departures.unwrap_or(0);
        second.ns = second.ns.saturating_add(reading.elapsed_ns.unwrap_or(0));
        second.responses = second.responses.saturating_add(responses);
        let response_time_ns = reading.extra("response_time_ns");
        self.response_time_ns = response_time_ns.or(self.response_time_ns);
        if let Some(wait_ns) = reading.wait_ns.filter(|_| reading.depth > 0) {
            second.waits += 1;
            second.wait_ns += wait_ns as f64;
        }
    }

    fn end_second(&mut self, now_ns: u64, second: Second) {
        self.last = second;
        if second.ns > 0 {
            self.last_counted = second;
        }
        if self.first.is_none() && second.waits > 0 {
            self.first = Some((now_ns, second));
        }
        let depth = second.mean_depth();
        let has_grown = self
            .depth_before
            .is_some_and(|before| depth > before * GROWTH_RATIO + GROWTH_MIN_MORE);
        self.depth_before = Some(depth);
        if !has_grown {
            self.pending.push_back(second);
        }
    }

    /// Moves the oldest pending second into the baseline, once it is far enough from any episode.
    fn settle(&mut self) {
        if self.pending.len() > PENDING_SECONDS
            && let Some(settled) = self.pending.pop_front()
        {
            self.seconds.push_back(settled);
            if self.seconds.len() > BASELINE_SECONDS {
                self.seconds.pop_front();
            }
        }
    }

    /// The queue is no longer healthy: the last seconds may belong to the episode already.
    pub(super) fn discard_recent(&mut self) {
        self.pending.clear();
        self.now = Second::default();
        self.depth_before = None;
    }

    fn wait_ns(&self) -> Option<f64> {
        let worked = self.seconds.iter().filter(|second| second.worked);
        median(worked.map(Second::mean_wait_ns))
            .or_else(|| self.unseen_work_was_its_own().then_some(0.0))
            .or_else(|| self.first().map(Second::mean_wait_ns))
    }

    /// Connections came and went between two samples, and now significantly fewer do: these were this queue's, and their requests
    /// took no time. If as many still come, they are those of other services in the network namespace.
    fn unseen_work_was_its_own(&self) -> bool {
        let counted = self.seconds.iter().filter(|second| second.ns > 0);
        let before = BaselineRate::of(counted.map(Second::unseen_per_s).collect());
        before.is_some_and(|before| {
            let now = &self.last_counted;
            before.is_undercut_by(now.unseen as f64, now.ns as f64 / SECOND_NS as f64)
        })
    }

    fn depth(&self) -> Option<f64> {
        median(self.seconds.iter().map(Second::mean_depth))
            .or_else(|| self.first().map(Second::mean_depth))
    }

    /// The first second, if the queue has not been healthy for long enough since.
    fn first(&self) -> Option<&Second> {
        let (at_ns, first) = self.first.as_ref()?;
        let is_old = self.seen_ns.saturating_sub(*at_ns) >= FIRST_SECOND_AFTER_NS;
        let is_used = is_old && self.seconds.len() < MIN_SECONDS;
        (is_used && !self.others_are_answered_as_in(first)).then_some(first)
    }

    /// Whether the response rate is still about that of `before`, while the requests that wait are of another kind.
    fn others_are_answered_as_in(&self, before: &Second) -> bool {
        let (last_ns, took_ns) = (self.last.mean_wait_ns(), self.response_time_ns);
        took_ns.is_some_and(|took_ns| took_ns * OTHER_KIND_RATIO < last_ns)
            && self.last.responses > 0
            && self.last.responses_per_ns() >= before.responses_per_ns() * STEADY_RATE
    }
}

/// Whether a queue is deep compared with its baseline depth.
pub fn is_deep(depth: f64, baseline: f64) -> bool {
    depth > (baseline * DEEP_RATIO).max(baseline + DEEP_MIN_MORE)
}

impl Second {
    fn mean_wait_ns(&self) -> f64 {
        self.wait_ns / f64::from(self.waits.max(1))
    }

    fn mean_depth(&self) -> f64 {
        self.depth / f64::from(self.samples.max(1))
    }

    fn unseen_per_s(&self) -> f64 {
        self.unseen as f64 * SECOND_NS as f64 / self.ns.max(1) as f64
    }

    fn responses_per_ns(&self) -> f64 {
        self.responses as f64 / self.ns.max(1) as f64
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

    fn after_healthy(depth: u64, wait_ms: u64) -> BaselineWait {
        let mut baseline = BaselineWait::default();
        for tick in 0..80 {
            baseline.learn(tick * TICK, &reading(depth, wait_ms));
        }
        baseline
    }

    #[test]
    fn without_a_baseline_no_wait_is_long() {
        assert_eq!(BaselineWait::default().delay_ns(&reading(100, 60_000)), 0);
    }

    #[test]
    fn a_slow_service_is_compared_with_its_own_past() {
        let baseline = after_healthy(10, 2_000);
        assert_eq!(baseline.target_delay_ns(), 4_000_000_000);
        assert_eq!(baseline.delay_ns(&reading(10, 2_000)), 0);
        assert_eq!(baseline.delay_ns(&reading(40, 9_000)), 9_000_000_000);
    }

    #[test]
    fn the_first_second_is_the_baseline_of_a_queue_that_only_grows() {
        let mut baseline = BaselineWait::default();
        for tick in 0..100 {
            baseline.learn(tick * TICK, &reading(4 + tick, 300 + 30 * tick));
        }
        assert!(
            baseline.target_delay_ns() < 1_000_000_000,
            "{}",
            baseline.target_delay_ns()
        );
        assert_eq!(baseline.delay_ns(&reading(104, 3_300)), 3_300_000_000);
    }

    #[test]
    fn the_first_second_is_no_baseline_while_others_are_answered_as_before() {
        let after = |responses: fn(u64) -> (u64, u64)| {
            let mut baseline = BaselineWait::default();
            for tick in 0..100 {
                let (departures, response_ms) = responses(tick);
                let response_ns = response_ms as f64 * 1e6;
                let reading = Reading {
                    departures: Some(departures),
                    elapsed_ns: Some(TICK),
                    extra: vec![("response_time_ns", response_ns)],
                    ..reading(4 + tick, 300 + 30 * tick)
                };
                baseline.learn(tick * TICK, &reading);
            }
            baseline.delay_ns(&reading(104, 3_300))
        };
        assert_eq!(after(|_| (4, 2)), 0);
        assert!(after(|tick| (4, 2 + 4 * tick)) > 0, "they take longer");
        assert!(after(|tick| (4 - tick / 25, 2)) > 0, "they become fewer");
        assert!(after(|_| (0, 2)) > 0, "nothing is answered");
    }

    #[test]
    fn work_that_no_sample_saw_is_a_baseline_once_it_no_longer_comes() {
        let delay_after = |unseen: fn(u64) -> u64| {
            let mut baseline = BaselineWait::default();
            for tick in 0..100 {
                let reading = Reading {
                    departures: Some(0),
                    elapsed_ns: Some(TICK),
                    unseen_at_most: unseen(tick),
                    ..reading(0, 0)
                };
                baseline.learn(tick * TICK, &reading);
            }
            baseline.delay_ns(&reading(60, 1_000))
        };
        assert_eq!(
            delay_after(|tick| if tick < 80 { 6 } else { 0 }),
            1_000_000_000
        );
        assert_eq!(delay_after(|_| 6), 0, "they are those of other services");
        assert_eq!(
            delay_after(|_| 0),
            0,
            "an idle service that is slow by design"
        );
    }

    #[test]
    fn one_slow_request_does_not_make_a_queue_deep() {
        let baseline = after_healthy(1, 10);
        assert_eq!(baseline.delay_ns(&reading(2, 30_000)), 0);
    }
}
