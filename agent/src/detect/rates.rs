//! Rates of arrival and service, and what they usually are.

use std::collections::VecDeque;

const SECOND_NS: u64 = 1_000_000_000;
/// Seconds of quiet that the baseline is taken over.
const BASELINE_SECONDS: usize = 120;
/// Seconds of quiet without which there is no baseline.
const BASELINE_MIN_SECONDS: usize = 3;
/// The last seconds before an episode may already belong to it, and do not count.
const PENDING_SECONDS: usize = 2;

/// Arrivals and departures per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) arrivals: f64,
    pub(super) departures: f64,
}

/// Sums counts over the last second or so.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// (time, arrivals, departures) of each reading.
    counts: VecDeque<(u64, u64, u64)>,
    /// Wide: a recording may hold any counts at all.
    sums: (u128, u128),
    /// When the oldest count began.
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
        // Keep at least a second: drop the oldest only where what is left still spans one.
        while self.counts.len() > 1 && now_ns.saturating_sub(self.counts[0].0) >= SECOND_NS {
            if let Some((at, arrivals, departures)) = self.counts.pop_front() {
                self.since_ns = at;
                self.sums.0 -= u128::from(arrivals);
                self.sums.1 -= u128::from(departures);
            }
        }
    }

    /// `None` before anything was counted.
    pub(super) fn rates(&self) -> Option<Rates> {
        let (now_ns, ..) = *self.counts.back()?;
        let seconds = now_ns.saturating_sub(self.since_ns) as f64 / SECOND_NS as f64;
        (seconds > 0.0).then(|| Rates {
            arrivals: self.sums.0 as f64 / seconds,
            departures: self.sums.1 as f64 / seconds,
        })
    }
}

/// What the rates are while all is well: a median and a spread, which a few odd seconds cannot move.
#[derive(Debug, Default)]
pub(super) struct Baseline {
    seconds: VecDeque<Rates>,
    pending: VecDeque<Rates>,
    next_ns: u64,
}

/// A robust middle and its spread (median absolute deviation).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Usual {
    pub(super) median: f64,
    pub(super) spread: f64,
}

impl Baseline {
    /// Takes in the rates of a quiet queue, once a second.
    pub(super) fn quiet(&mut self, now_ns: u64, rates: Rates) {
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

    /// The queue is no longer quiet: the seconds just past are not to be trusted.
    pub(super) fn disturbed(&mut self) {
        self.pending.clear();
    }

    /// Arrivals and departures.
    pub(super) fn usual(&self) -> (Option<Usual>, Option<Usual>) {
        let of = |rate: fn(&Rates) -> f64| Usual::of(self.seconds.iter().map(rate).collect());
        (of(|rates| rates.arrivals), of(|rates| rates.departures))
    }
}

impl Usual {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.len() < BASELINE_MIN_SECONDS {
            return None;
        }
        let median = median(&mut values);
        let mut deviations: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        Some(Self {
            median,
            spread: self::median(&mut deviations),
        })
    }

    /// `count` in so many seconds is more than usual, by a margin that chance does not explain.
    pub(super) fn is_exceeded_by(self, count: f64, seconds: f64) -> bool {
        let rate = count / seconds;
        rate > self.median * 1.1 && rate - self.median > self.margin(seconds)
    }

    /// `count` in so many seconds is less than usual, by a margin that chance does not explain.
    pub(super) fn is_missed_by(self, count: f64, seconds: f64) -> bool {
        let rate = count / seconds;
        rate < self.median * 0.9 && self.median - rate > self.margin(seconds)
    }

    /// Three standard errors of a mean over so many seconds. A second's spread is at least that of random arrivals
    /// (the root of their number), however even the few that were seen.
    fn margin(self, seconds: f64) -> f64 {
        const MAD_TO_DEVIATION: f64 = 1.4826;
        let deviation = (self.spread * MAD_TO_DEVIATION).max(self.median.sqrt());
        3.0 * deviation / seconds.sqrt()
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
    use super::{Baseline, Rates, Recent};

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
    fn odd_seconds_do_not_move_the_usual() {
        let mut baseline = Baseline::default();
        for second in 0..40 {
            let arrivals = if second % 10 == 0 {
                5_000.0
            } else {
                100.0 + f64::from(second % 3)
            };
            baseline.quiet(
                second as u64 * SECOND,
                Rates {
                    arrivals,
                    departures: 100.0,
                },
            );
        }
        let usual = baseline.usual().0.unwrap();
        assert!((99.0..=103.0).contains(&usual.median), "{usual:?}");
        assert!(usual.is_exceeded_by(200.0, 1.0));
        assert!(!usual.is_exceeded_by(115.0, 1.0));
        assert!(usual.is_exceeded_by(1_150.0, 10.0));
        assert!(usual.is_missed_by(60.0, 1.0));
        assert!(!usual.is_missed_by(88.0, 1.0));
    }

    #[test]
    fn the_seconds_before_an_episode_do_not_count() {
        let mut baseline = Baseline::default();
        for second in 0..10 {
            let arrivals = if second < 8 { 100.0 } else { 900.0 };
            baseline.quiet(
                second * SECOND,
                Rates {
                    arrivals,
                    departures: 100.0,
                },
            );
        }
        baseline.disturbed();
        assert_eq!(baseline.usual().0.unwrap().median, 100.0);
        assert_eq!(baseline.usual().0.unwrap().spread, 0.0);
    }
}
