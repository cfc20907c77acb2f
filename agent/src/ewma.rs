//! Exponentially weighted moving averages by time, not by sample: their memory is the same at every poll interval.
#![forbid(unsafe_code)]

/// An EWMA with time constant `over_ns`: `mean`, which is `passed_ns` old, moved towards the `value` that held since.
pub fn ewma(mean: f64, passed_ns: u64, over_ns: f64, value: f64) -> f64 {
    mean + (value - mean) * (1.0 - decay(passed_ns, over_ns))
}

/// The weight that something seen `passed_ns` ago keeps with time constant `over_ns`: 1 now, 1/e after `over_ns`. For
/// sums and counts that fade, such as numerator and denominator of a ratio.
pub fn decay(passed_ns: u64, over_ns: f64) -> f64 {
    (-(passed_ns as f64) / over_ns).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_value_that_lasts_becomes_the_mean_and_one_that_takes_no_time_changes_nothing() {
        assert_eq!(ewma(3.0, 0, 1e9, 9.0), 3.0);
        assert!((ewma(3.0, SECOND, 1e9, 9.0) - 6.79).abs() < 0.01);
        assert!((ewma(3.0, u64::MAX, 1e9, 9.0) - 9.0).abs() < 1e-9);
    }

    #[test]
    fn the_memory_does_not_depend_on_how_often_samples_come() {
        let over =
            |samples: u64| (0..samples).fold(3.0, |mean, _| ewma(mean, SECOND / samples, 1e9, 9.0));
        assert!((over(1) - over(100)).abs() < 1e-6);
        assert!((decay(SECOND, 1e9) - 0.368).abs() < 0.001);
    }
}
