//! Means that forget. Pure.
#![forbid(unsafe_code)]

/// A mean over about so long, `passed_ns` after it was taken, with what is seen now.
pub fn ewma(mean: f64, now: f64, passed_ns: u64, over_ns: f64) -> f64 {
    mean + (now - mean) * (1.0 - (-(passed_ns as f64) / over_ns).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_for_long_is_the_mean_and_what_is_seen_for_no_time_changes_nothing() {
        assert_eq!(ewma(3.0, 9.0, 0, 1e9), 3.0);
        assert!((ewma(3.0, 9.0, 1_000_000_000, 1e9) - 6.79).abs() < 0.01);
        assert!((ewma(3.0, 9.0, u64::MAX, 1e9) - 9.0).abs() < 1e-9);
    }
}
