//! Arrival and service rates, and their baselines.

use std::collections::VecDeque;

use crate::queue::Hidden;

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
    /// Upper bound of what arrived and departed beyond both; `None` if unknown.
    pub(super) hidden: Option<f64>,
}

/// Counts over the last second, or a little more.
#[derive(Debug, Default)]
pub(super) struct Recent {
    counts: VecDeque<Counts>,
    sums: Sums,
    /// When the oldest count began, ns.
    since_ns: u64,
}

/// The counts of one reading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) at_ns: u64,
    pub(super) arrivals: u64,
    pub(super) departures: u64,
    pub(super) hidden: Hidden,
}

/// Sums of counts. 128 bits, because a damaged recording may hold any counts.
#[derive(Debug, Default)]
struct Sums {
    arrivals: u128,
    departures: u128,
    hidden: u128,
    /// Number of counts for which it is not known how much they hide.
    unknown: usize,
}

impl Sums {
    fn add(&mut self, counts: &Counts) {
        self.arrivals += u128::from(counts.arrivals);
        self.departures += u128::from(counts.departures);
        match counts.hidden {
            Hidden::Nothing => {}
            Hidden::AtMost(count) => self.hidden += u128::from(count),
            Hidden::Unknown => self.unknown += 1,
        }
    }

    fn remove(&mut self, counts: &Counts) {
        self.arrivals -= u128::from(counts.arrivals);
        self.departures -= u128::from(counts.departures);
        match counts.hidden {
            Hidden::Nothing => {}
            Hidden::AtMost(count) => self.hidden -= u128::from(count),
            Hidden::Unknown => self.unknown -= 1,
        }
    }
}

impl Recent {
    /// Adds the counts of a reading, which began `elapsed_ns` before it.
    pub(super) fn add(&mut self, counts: Counts, elapsed_ns: u64) {
        let now_ns = counts.at_ns;
        if self.counts.is_empty() {
            self.since_ns = now_ns.saturating_sub(elapsed_ns);
        }
        self.sums.add(&counts);
        self.counts.push_back(counts);
        // Keep at least a second: drop the oldest counts only if the others still span one.
        while self.counts.len() > 1 && now_ns.saturating_sub(self.counts[0].at_ns) >= SECOND_NS {
            if let Some(oldest) = self.counts.pop_front() {
                self.since_ns = oldest.at_ns;
                self.sums.remove(&oldest);
            }
        }
    }

    /// `None` before the first count.
    pub(super) fn rates(&self) -> Option<Rates> {
        let now_ns = self.counts.back()?.at_ns;
        let seconds = now_ns.saturating_sub(self.since_ns) as f64 / SECOND_NS as f64;
        (seconds > 0.0).then(|| Rates {
            arrivals: self.sums.arrivals as f64 / seconds,
            departures: self.sums.departures as f64 / seconds,
            hidden: (self.sums.unknown == 0).then(|| self.sums.hidden as f64 / seconds),
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

    pub(super) fn rates(&self) -> Baselines {
        let of = |rate: fn(&Rates) -> Option<f64>| {
            BaselineRate::of(self.seconds.iter().filter_map(rate).collect())
        };
        Baselines {
            max_arrivals: of(|rates| Some(rates.arrivals + rates.hidden?)),
            departures: of(|rates| Some(rates.departures)),
            max_departures: of(|rates| Some(rates.departures + rates.hidden?)),
        }
    }
}

/// The baselines of a queue's rates. Work may come and go between two readings, so there are two bounds: whatever exceeds an upper
/// bound, or is below a lower one, differs from the baseline.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Baselines {
    /// Upper bound of the arrival rate.
    pub(super) max_arrivals: Option<BaselineRate>,
    /// Lower bound of the departure rate.
    pub(super) departures: Option<BaselineRate>,
    /// Upper bound of the departure rate.
    pub(super) max_departures: Option<BaselineRate>,
}

impl BaselineRate {
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
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
    use super::{Counts, RateBaseline, Rates, Recent};
    use crate::queue::Hidden;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn rates_are_per_second_whatever_the_interval() {
        let mut recent = Recent::default();
        assert_eq!(recent.rates(), None);
        for tick in 1..=20 {
            let counts = Counts {
                at_ns: tick * SECOND / 10,
                arrivals: 4,
                departures: 2,
                hidden: Hidden::Nothing,
            };
            recent.add(counts, SECOND / 10);
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
                    hidden: Some(0.0),
                },
            );
        }
        let arrivals = baseline.rates().max_arrivals.unwrap();
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
                    hidden: Some(0.0),
                },
            );
        }
        baseline.discard_recent();
        let arrivals = baseline.rates().max_arrivals.unwrap();
        assert_eq!((arrivals.median, arrivals.deviation), (100.0, 0.0));
    }
    #[test]
    fn work_that_comes_and_goes_between_readings_raises_only_the_upper_bounds() {
        let learned = |hidden| {
            let mut baseline = RateBaseline::default();
            for second in 0..10 {
                let rates = Rates {
                    arrivals: 3.0,
                    departures: 3.0,
                    hidden,
                };
                baseline.learn(second * SECOND, rates);
            }
            baseline.rates()
        };
        let known = learned(Some(57.0));
        assert!(!known.max_arrivals.unwrap().is_exceeded_by(600.0, 10.0));
        assert!(known.departures.unwrap().is_undercut_by(0.0, 10.0));
        assert_eq!(known.max_departures.unwrap().median, 60.0);
        let unknown = learned(None);
        assert_eq!((unknown.max_arrivals, unknown.max_departures), (None, None));
        assert_eq!(unknown.departures, known.departures);
    }
}
