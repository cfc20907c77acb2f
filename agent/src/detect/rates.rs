//! Arrival and service rates, and their baselines.

use std::collections::VecDeque;

const SECOND_NS: u64 = 1_000_000_000;

/// Maximum number of healthy seconds in a baseline: long enough to be steady, short enough to follow a daily load
/// curve.
const BASELINE_SECONDS: usize = 120;

/// Minimum number of healthy seconds in a baseline.
const BASELINE_MIN_SECONDS: usize = 3;

/// The last seconds before an episode may belong to it, and are left out of the baseline.
const PENDING_SECONDS: usize = 2;

/// A rate has to differ from its baseline by this fraction, besides being significant.
const MIN_DIFFERENCE: f64 = 0.1;

/// Number of standard errors by which a rate has to differ from its baseline to be significant (3σ).
const SIGNIFICANCE_SIGMAS: f64 = 3.0;

/// Standard deviations per median absolute deviation of a normal distribution.
const DEVIATIONS_PER_MAD: f64 = 1.4826;

/// Arrivals and departures per second, in the unit of the depth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) arrivals: f64,
    pub(super) departures: f64,
}

/// Counts over the last second, or a little more.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// (time, arrivals, departures) of each reading.
    counts: VecDeque<(u64, u64, u64)>,
    /// 128 bits, because a damaged recording may hold any counts.
    sums: (u128, u128),
    /// When the oldest count began, ns.
    since_ns: u64,
}

impl Recent {
    pub(super) fn add(&mut self, now_ns: u64, elapsed_ns: u64, arrivals: u64, departures: u64) {
        if self.counts.is_empty() {
            self.since_ns = now_ns.saturating_sub(elapsed_ns);
        }
        self.counts.push_back((now_ns, arrivals, departures));
        self.sums.0 += u128::from(arrivals);
        self.sums.1 += u128::from(departures);
        // Keep at least a second: drop the oldest count only if the others still span one.
        while self.counts.len() > 1 && now_ns.saturating_sub(self.counts[0].0) >= SECOND_NS {
            if let Some((at, arrivals, departures)) = self.counts.pop_front() {
                self.since_ns = at;
                self.sums.0 -= u128::from(arrivals);
                self.sums.1 -= u128::from(departures);
            }
        }
    }

    /// `None` before the first count.
    pub(super) fn rates(&self) -> Option<Rates> {
        let (now_ns, ..) = *self.counts.back()?;
        let seconds = now_ns.saturating_sub(self.since_ns) as f64 / SECOND_NS as f64;
        (seconds > 0.0).then(|| Rates {
            arrivals: self.sums.0 as f64 / seconds,
            departures: self.sums.1 as f64 / seconds,
        })
    }
}

/// The rates of a healthy queue, as robust statistics: a few odd seconds do not move them.
#[derive(Debug, Default)]
pub(super) struct RateBaseline {
    seconds: VecDeque<Rates>,
    pending: VecDeque<Rates>,
    next_ns: u64,
}

/// Median and median absolute deviation of a rate, per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BaselineRate {
    pub(super) median: f64,
    pub(super) deviation: f64,
}

impl RateBaseline {
    /// Adds the rates of a healthy queue, once a second.
    pub(super) fn learn(&mut self, now_ns: u64, rates: Rates) {
        if now_ns < self.next_ns {
            return;
        }
        self.next_ns = now_ns + SECOND_NS;
        self.pending.push_back(rates);
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
    }

    /// The baselines of the arrival and the departure rate.
    pub(super) fn rates(&self) -> (Option<BaselineRate>, Option<BaselineRate>) {
        let of =
            |rate: fn(&Rates) -> f64| BaselineRate::of(self.seconds.iter().map(rate).collect());
        (of(|rates| rates.arrivals), of(|rates| rates.departures))
    }
}

impl BaselineRate {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.len() < BASELINE_MIN_SECONDS {
            return None;
        }
        let median = median(&mut values);
        let mut deviations: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        Some(Self {
            median,
            deviation: self::median(&mut deviations),
        })
    }

    /// Whether `count` in `seconds` is significantly above the baseline.
    pub(super) fn is_exceeded_by(self, count: f64, seconds: f64) -> bool {
        let rate = count / seconds;
        rate > self.median * (1.0 + MIN_DIFFERENCE) && rate - self.median > self.margin(seconds)
    }

    /// Whether `count` in `seconds` is significantly below the baseline.
    pub(super) fn is_undercut_by(self, count: f64, seconds: f64) -> bool {
        let rate = count / seconds;
        rate < self.median * (1.0 - MIN_DIFFERENCE) && self.median - rate > self.margin(seconds)
    }

    /// The significant difference of a mean over `seconds`, per second. The deviation is at least that of Poisson arrivals (the
    /// root of their number), however even the observed seconds were.
    fn margin(self, seconds: f64) -> f64 {
        let deviation = (self.deviation * DEVIATIONS_PER_MAD).max(self.median.sqrt());
        SIGNIFICANCE_SIGMAS * deviation / seconds.sqrt()
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::{RateBaseline, Rates, Recent};

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn rates_are_per_second_whatever_the_interval() {
        let mut recent = Recent::default();
        assert_eq!(recent.rates(), None);
        for tick in 1..=20 {
            recent.add(tick * SECOND / 10, SECOND / 10, 4, 2);
        }
        let rates = recent.rates().unwrap();
        assert!((rates.arrivals - 40.0).abs() < 1e-9, "{rates:?}");
        assert!((rates.departures - 20.0).abs() < 1e-9, "{rates:?}");
    }

    #[test]
    fn odd_seconds_do_not_move_the_baseline() {
        let mut baseline = RateBaseline::default();
        for second in 0..40 {
            let arrivals = if second % 10 == 0 {
                5_000.0
            } else {
                100.0 + f64::from(second % 3)
            };
            baseline.learn(
                second as u64 * SECOND,
                Rates {
                    arrivals,
                    departures: 100.0,
                },
            );
        }
        let arrivals = baseline.rates().0.unwrap();
        assert!((99.0..=103.0).contains(&arrivals.median), "{arrivals:?}");
        assert!(arrivals.is_exceeded_by(200.0, 1.0));
        assert!(!arrivals.is_exceeded_by(115.0, 1.0));
        assert!(arrivals.is_exceeded_by(1_150.0, 10.0));
        assert!(arrivals.is_undercut_by(60.0, 1.0));
        assert!(!arrivals.is_undercut_by(88.0, 1.0));
    }

    #[test]
    fn the_seconds_before_an_episode_are_left_out() {
        let mut baseline = RateBaseline::default();
        for second in 0..10 {
            let arrivals = if second < 8 { 100.0 } else { 900.0 };
            baseline.learn(
                second * SECOND,
                Rates {
                    arrivals,
                    departures: 100.0,
                },
            );
        }
        baseline.discard_recent();
        assert_eq!(baseline.rates().0.unwrap().median, 100.0);
        assert_eq!(baseline.rates().0.unwrap().deviation, 0.0);
    }
}
