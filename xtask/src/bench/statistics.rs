//! Medians with confidence intervals or quartiles.

use tailback_tests::random::Random;

/// A median with the range around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    /// A single value without spread.
    pub fn exact(value: f64) -> Self {
        Self {
            median: value,
            low: value,
            high: value,
        }
    }

    pub fn map(self, change: impl Fn(f64) -> f64) -> Self {
        Self {
            low: change(self.low),
            median: change(self.median),
            high: change(self.high),
        }
    }
}

/// Median with minimum and maximum. `None` without values.
pub fn between(values: &[f64]) -> Option<Spread> {
    let sorted = sorted(values);
    Some(Spread {
        low: *sorted.first()?,
        median: quantile(&sorted, 0.5)?,
        high: *sorted.last()?,
    })
}

/// Median with quartiles. `None` without values.
pub fn quartiles(values: &[f64]) -> Option<Spread> {
    let sorted = sorted(values);
    Some(Spread {
        low: quantile(&sorted, 0.25)?,
        median: quantile(&sorted, 0.5)?,
        high: quantile(&sorted, 0.75)?,
    })
}

/// Median with its 95% confidence interval, by the percentile bootstrap: medians of many resamples of the values. The same
/// values give the same interval.
pub fn bootstrap(values: &[f64]) -> Option<Spread> {
    const RESAMPLES: usize = 10_000;
    let mut random = Random::new(1);
    let medians: Option<Vec<f64>> = (0..RESAMPLES)
        .map(|_| {
            let drawn: Option<Vec<f64>> = (0..values.len())
                .map(|_| values.get(random.below(values.len())).copied())
                .collect();
            quantile(&sorted(&drawn?), 0.5)
        })
        .collect();
    let medians = sorted(&medians?);
    Some(Spread {
        low: quantile(&medians, 0.025)?,
        median: quantile(&sorted(values), 0.5)?,
        high: quantile(&medians, 0.975)?,
    })
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

/// Quantile with linear interpolation.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_the_values() {
        let spread = quartiles(&[4.0, 1.0, 3.0, 2.0, 5.0]).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (2.0, 3.0, 4.0));
        assert_eq!(quartiles(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(quartiles(&[]), None);
    }

    #[test]
    fn the_interval_holds_the_median_and_narrows_with_more_values() {
        let values = |count: usize| -> Vec<f64> {
            let mut random = Random::new(3);
            (0..count).map(|_| random.fraction()).collect()
        };
        let width = |count| {
            let spread = bootstrap(&values(count)).unwrap();
            assert!(spread.low < spread.median && spread.median < spread.high);
            spread.high - spread.low
        };
        // For n uniform values the median's standard deviation is about 1 / (2 sqrt(n)).
        let (few, many) = (width(16), width(400));
        assert!((0.2..0.8).contains(&few), "{few}");
        assert!((0.06..0.15).contains(&many), "{many}");
        assert_eq!(bootstrap(&[]), None);
        assert_eq!(bootstrap(&[2.0]).unwrap().low, 2.0);
    }
}
