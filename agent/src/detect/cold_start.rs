//! Judges requests in flight before they have a baseline: by steady growth since the queue was first observed, or by an exhausted
//! connection pool.
//!
//! This matters if sampling starts in the middle of an incident. A queue that neither grows nor shrinks is not judged, however
//! deep it is: a service that is slow by design looks the same.

use super::baseline::OTHER_KIND_RATIO;
use crate::queue::Reading;

/// Length of one step of the history, ns.
const STEP_NS: u64 = 500_000_000;

/// Steps in the history (30 s). A queue that starts to grow later has a baseline by then.
const MAX_STEPS: usize = 60;

/// Steps needed to judge growth (4 s).
const MIN_STEPS: usize = 8;

/// Growth is significant above this many standard deviations of Poisson noise: σ = √(arrivals + departures).
const GROWTH_SIGMAS: f64 = 3.0;

/// Growth below this many items is never significant.
const MIN_GROWTH: f64 = 2.0;

/// Growth is steady if, from each quarter of the history to the next, it is at least this fraction of an even share (a third of
/// the total). A burst grows within one quarter.
const MIN_SHARE_PER_QUARTER: f64 = 0.4;

/// Growth counts only if responses take more than this many times as long in the second half of the history as in the first. If
/// more work arrives but takes no longer, the queue grows too, but only to a new steady depth.
const SLOWDOWN_RATIO: f64 = 1.1;

/// Growth does not count if responses take more than this many times as long in the last quarter of the history as in the one
/// before. Where long requests begin beside short ones, the mean jumps once the first long ones end, and then the queue stops
/// growing. In a service that becomes slower it rises all the time: on a line from zero, by 7 to 5.
const JUMP_RATIO: f64 = 1.7;

/// The target delay of a growing queue, as a multiple of the median age in the first quarter of its history. The score is
/// delay / (2 × target), so it reaches 0.7 (warn) at about the initial age, and 1 at 1.5 times that age.
const GROWTH_TARGET_AGES: f64 = 0.75;

/// An exhausted pool is held responsible if there are more requests in flight than this per connection: a new request then waits
/// for that many holding times. With fewer requests it is not, however long the oldest have waited.
const MIN_REQUESTS_PER_CONNECTION: f64 = 4.0;

/// The target delay behind an exhausted pool, in mean holding times of a connection.
const POOL_TARGET_HOLDS: f64 = 2.0;

/// Lower bound of the target delay, ns.
const MIN_TARGET_DELAY_NS: u64 = 250_000_000;

/// The history of a queue since it was first observed.
#[derive(Default)]
pub(super) struct ColdStart {
    steps: Vec<Step>,
    now: Step,
    next_ns: Option<u64>,
    /// The state at the beginning, once growth is established.
    grown_from: Option<Beginning>,
    last: Option<Waiting>,
}

/// The waiting items in one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub depth: u64,
    /// At least half of the items are this old, ns.
    pub median_age_ns: u64,
    pub oldest_age_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Beginning {
    depth: f64,
    median_age_ns: f64,
}

/// The current delay and the acceptable one, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Measure {
    pub(super) delay_ns: u64,
    pub(super) target_delay_ns: u64,
}

/// Sums over one step of the history.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    samples: u32,
    depth: f64,
    age_ns: f64,
    ns: u64,
    arrivals: u64,
    departures: u64,
    /// Responses whose duration is known, and the sum of these durations, ns.
    responses: f64,
    response_times_ns: f64,
}

impl ColdStart {
    /// Adds a reading. Returns true once, when it establishes that the queue has grown since it was first observed. With
    /// `may_grow` false this is not tested: the queue is compared with its baseline already.
    pub(super) fn read(&mut self, now_ns: u64, reading: &Reading, may_grow: bool) -> bool {
        self.last = waiting(reading);
        if self.steps.len() >= MAX_STEPS {
            return false;
        }
        let next_ns = *self.next_ns.get_or_insert(now_ns.saturating_add(STEP_NS));
        let has_ended = now_ns >= next_ns && self.now.samples > 0;
        if has_ended {
            self.next_ns = Some(now_ns.saturating_add(STEP_NS));
            self.steps.push(std::mem::take(&mut self.now));
        }
        self.now.add(reading, self.last);
        if !has_ended || !may_grow || self.grown_from.is_some() {
            return false;
        }
        self.grown_from = grown_from(&self.steps);
        self.grown_from.is_some()
    }

    /// The current and the acceptable delay; `None` if neither growth nor an exhausted pool shows what is acceptable.
    /// `exhausted_pool`: the number of connections of the pool that some of the requests wait for.
    pub(super) fn measure(&self, exhausted_pool: Option<u64>) -> Option<Measure> {
        let Waiting {
            depth,
            median_age_ns,
            ..
        } = self.last?;
        let depth = depth as f64;
        let by_growth = self
            .grown_from
            .filter(|from| depth > from.depth)
            .map(|from| from.median_age_ns * GROWTH_TARGET_AGES);
        let by_pool = exhausted_pool
            .filter(|connections| depth > *connections as f64 * MIN_REQUESTS_PER_CONNECTION)
            .and_then(|connections| self.hold_ns(connections))
            .map(|hold_ns| hold_ns * POOL_TARGET_HOLDS);
        let target_delay_ns = match (by_growth, by_pool) {
            (Some(growth), Some(pool)) => growth.min(pool),
            (growth, pool) => growth.or(pool)?,
        };
        Some(Measure {
            delay_ns: median_age_ns,
            target_delay_ns: (target_delay_ns as u64).max(MIN_TARGET_DELAY_NS),
        })
    }

    /// The waiting items as of the last sample.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.last
    }

    /// How long a request holds a connection of a fully used pool, by Little's law, ns.
    fn hold_ns(&self, connections: u64) -> Option<f64> {
        let all = self.steps.iter().chain([&self.now]);
        let (ns, departures) = all.fold((0_u64, 0_u64), |(ns, departures), step| {
            (
                ns.saturating_add(step.ns),
                departures.saturating_add(step.departures),
            )
        });
        (departures > 0).then(|| connections as f64 * ns as f64 / departures as f64)
    }
}

/// The waiting items, if their ages are known.
fn waiting(reading: &Reading) -> Option<Waiting> {
    let ages = &reading.ages_ns;
    // If there are many items, a reading lists only the ages of the oldest.
    let middle = usize::try_from(reading.depth / 2).unwrap_or(usize::MAX);
    Some(Waiting {
        depth: reading.depth,
        median_age_ns: *ages.get(middle.min(ages.len().saturating_sub(1)))?,
        oldest_age_ns: *ages.first()?,
    })
}

/// The state at the beginning of the history, if the queue has grown steadily and significantly since, and both ages and response
/// times have increased.
fn grown_from(steps: &[Step]) -> Option<Beginning> {
    if steps.len() < MIN_STEPS {
        return None;
    }
    let quarter = steps.len() / 4;
    // The first steps are left out if their number does not divide by four.
    let steps = steps.get(steps.len() - 4 * quarter..)?;
    let quarters: Vec<Step> = steps.chunks(quarter).map(Step::sum).collect();
    let [first, second, third, last] = quarters.as_slice() else {
        return None;
    };
    let growth = last.mean_depth() - first.mean_depth();
    let is_steady = quarters
        .windows(2)
        .map(|pair| pair[1].mean_depth() - pair[0].mean_depth())
        .all(|step| step > 0.0 && step >= MIN_SHARE_PER_QUARTER * growth / 3.0);
    let all = Step::sum(steps);
    let sigma = ((all.arrivals.saturating_add(all.departures)) as f64).sqrt();
    let ages_grow = last.mean_age_ns() > first.mean_age_ns();
    let before = Step::sum(&[*first, *second]).mean_response_time_ns();
    let now = Step::sum(&[*third, *last]).mean_response_time_ns();
    let is_slower = match before.zip(now) {
        Some((before, now)) => {
            let quarters = third
                .mean_response_time_ns()
                .zip(last.mean_response_time_ns());
            let has_jumped = quarters.is_some_and(|(third, last)| last > third * JUMP_RATIO);
            now > before * SLOWDOWN_RATIO && !has_jumped
        }
        // One of the halves has no responses.
        None => true,
    };
    let recent = now.or(before);
    // If nothing is answered any more, all requests wait, whatever their kind.
    let are_answered = third.departures.saturating_add(last.departures) > 0;
    let are_of_a_kind =
        !are_answered || recent.is_none_or(|took| last.mean_age_ns() <= took * OTHER_KIND_RATIO);
    let is_significant = growth > GROWTH_SIGMAS * sigma && growth >= MIN_GROWTH;
    (is_steady && is_significant && ages_grow && is_slower && are_of_a_kind).then(|| Beginning {
        depth: first.mean_depth(),
        median_age_ns: first.mean_age_ns(),
    })
}

impl Step {
    fn add(&mut self, reading: &Reading, waiting: Option<Waiting>) {
        self.samples += 1;
        self.depth += reading.depth as f64;
        self.age_ns += waiting.map_or(0.0, |waiting| waiting.median_age_ns as f64);
        self.ns = self.ns.saturating_add(reading.elapsed_ns.unwrap_or(0));
        self.arrivals = self.arrivals.saturating_add(reading.arrivals.unwrap_or(0));
        let departures = reading.departures.unwrap_or(0);
        self.departures = self.departures.saturating_add(departures);
        if let Some(response_time_ns) = reading.extra("response_time_ns") {
            self.responses += departures as f64;
            self.response_times_ns += departures as f64 * response_time_ns;
        }
    }

    fn sum(steps: &[Self]) -> Self {
        steps.iter().fold(Self::default(), |sum, step| Self {
            samples: sum.samples.saturating_add(step.samples),
            depth: sum.depth + step.depth,
            age_ns: sum.age_ns + step.age_ns,
            ns: sum.ns.saturating_add(step.ns),
            arrivals: sum.arrivals.saturating_add(step.arrivals),
            departures: sum.departures.saturating_add(step.departures),
            responses: sum.responses + step.responses,
            response_times_ns: sum.response_times_ns + step.response_times_ns,
        })
    }

    fn mean_depth(&self) -> f64 {
        self.depth / f64::from(self.samples.max(1))
    }

    fn mean_age_ns(&self) -> f64 {
        self.age_ns / f64::from(self.samples.max(1))
    }

    fn mean_response_time_ns(&self) -> Option<f64> {
        (self.responses > 0.0).then(|| self.response_times_ns / self.responses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 100_000_000;

    fn reading(depth: u64, age_ms: u64, (arrivals, departures): (u64, u64)) -> Reading {
        Reading {
            depth,
            arrivals: Some(arrivals),
            departures: Some(departures),
            elapsed_ns: Some(TICK),
            ages_ns: vec![age_ms * 1_000_000; usize::try_from(depth).unwrap()],
            ..Reading::default()
        }
    }

    fn responding_in(response_ms: u64, reading: Reading) -> Reading {
        Reading {
            extra: vec![("response_time_ns", response_ms as f64 * 1e6)],
            ..reading
        }
    }

    /// The history after ten seconds.
    fn after(mut at: impl FnMut(u64) -> Reading) -> ColdStart {
        let mut history = ColdStart::default();
        for tick in 0..100 {
            history.read(tick * TICK, &at(tick), true);
        }
        history
    }

    #[test]
    fn steady_growth_with_rising_ages_is_measured() {
        let growing = |tick| {
            let reading = reading(100 + tick, 5_000 + 50 * tick, (2, 1));
            responding_in(9_000 + 60 * tick, reading)
        };
        let measure = after(growing).measure(None).unwrap();
        assert_eq!(measure.delay_ns, 9_950_000_000);
        assert!(
            measure.delay_ns > measure.target_delay_ns * 14 / 10,
            "{measure:?}"
        );
    }

    #[test]
    fn a_queue_of_constant_depth_is_not_judged_however_long_it_waits() {
        let slow = |tick| reading(60 + tick % 3, 12_000 + 10 * (tick % 7), (2, 2));
        let history = after(slow);
        assert_eq!(history.measure(None), None);
        assert_eq!(history.waiting().unwrap().depth, 60);
    }

    #[test]
    fn a_burst_is_not_growth() {
        let burst = |tick| match tick {
            0..50 => reading(10, 300, (1, 1)),
            50 => reading(90, 300, (80, 0)),
            _ => reading(90, 300 + 50 * (tick - 50), (1, 1)),
        };
        assert_eq!(after(burst).measure(None), None);
    }

    #[test]
    fn more_work_of_unchanged_duration_is_not_growth() {
        let more = |tick| responding_in(2_000, reading(20 + tick, 900 + tick, (3, 2)));
        assert_eq!(after(more).measure(None), None);
    }

    #[test]
    fn long_requests_that_begin_to_end_beside_quick_ones_are_not_growth() {
        // Four long ones begin in each tick, and end after 4.5 s. A quick one is answered in each tick, too.
        let polls = |tick: u64| {
            let ending = if tick >= 45 { 4 } else { 0 };
            let mean_ms = (1 + ending * 4_500) / (1 + ending);
            let reading = reading(4 * tick.min(45), 50 * tick.min(45), (5, 1 + ending));
            responding_in(mean_ms, reading)
        };
        // Wherever in a step of the history the first of them end.
        for start in 0..20 {
            let mut history = ColdStart::default();
            for tick in start..200 {
                history.read(tick * TICK, &polls(tick), true);
                assert_eq!(history.measure(None), None, "{start}, {tick}");
            }
        }
    }

    #[test]
    fn long_requests_that_are_not_answered_yet_are_not_growth_however_the_quick_ones_vary() {
        let polls = |tick: u64| {
            let reading = reading(4 * tick, 50 * tick, (5, 1));
            responding_in(1 + tick / 10, reading)
        };
        assert_eq!(after(polls).measure(None), None);
    }

    #[test]
    fn a_quick_service_that_hangs_before_it_has_a_baseline_is_growth() {
        let hangs = |tick: u64| match tick {
            0..30 => responding_in(2, reading(1 + tick / 10, 2, (5, 5))),
            _ => reading(4 * tick, 50 * tick, (4, 0)),
        };
        assert!(after(hangs).measure(None).is_some());
    }

    #[test]
    fn quick_responses_that_are_seldom_timed_do_not_make_long_requests_slow() {
        let polls = |tick: u64| {
            let reading = reading(4 * tick, 50 * tick, (5, 1));
            if tick == 30 {
                responding_in(2, reading)
            } else {
                reading
            }
        };
        let mut history = ColdStart::default();
        for tick in 0..100 {
            history.read(tick * TICK, &polls(tick), true);
            assert!(tick < 40 || history.measure(None).is_none(), "{tick}");
        }
    }

    #[test]
    fn requests_that_become_slower_beside_quick_ones_are_growth() {
        // Half of the responses are quick. The others take as long as requests have waited by now.
        let brownout = |tick: u64| {
            let reading = reading(20 + 2 * tick, 500 + 50 * tick, (4, 2));
            responding_in((1 + 500 + 50 * tick) / 2, reading)
        };
        assert!(after(brownout).measure(None).is_some());
    }

    #[test]
    fn growth_within_poisson_noise_is_not_significant() {
        let noise = |tick| reading(100 + tick / 10, 5_000 + 5 * tick, (50, 50));
        assert_eq!(after(noise).measure(None), None);
    }

    #[test]
    fn behind_an_exhausted_pool_the_target_is_two_holding_times() {
        // 10 departures per second over 4 connections: 0.4 s each.
        let history = after(|_| reading(40, 2_000, (1, 1)));
        let measure = history.measure(Some(4)).unwrap();
        assert_eq!(measure.delay_ns, 2_000_000_000);
        assert_eq!(measure.target_delay_ns, 800_000_000);
        assert_eq!(history.measure(Some(10)), None);
        assert_eq!(after(|_| reading(40, 2_000, (1, 0))).measure(Some(4)), None);
    }
}
