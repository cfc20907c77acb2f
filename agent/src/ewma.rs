//! Exponentially weighted moving averages (EWMA) with a time constant in nanoseconds.
//!
//! The weights follow the time between samples, not their number. A focused service is sampled more often than others, and that
//! must not shorten the memory of an average.
#![forbid(unsafe_code)]

/// The weight that a sample still has after `elapsed_ns`: `exp(-elapsed / time constant)`, from 1 down to 0.
pub fn decay(elapsed_ns: u64, time_constant_ns: f64) -> f64 {
    (-(elapsed_ns as f64) / time_constant_ns).exp()
}

/// An average that follows its samples, by 63% of the distance within one time constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ewma {
    value: f64,
    time_constant_ns: f64,
    /// Number of samples in a plain mean.
    samples: u32,
}

impl Ewma {
    /// An average that starts at `value`.
    pub fn new(value: f64, time_constant_ns: f64) -> Self {
        Self::mean_of(u32::MAX, value, time_constant_ns)
    }

    /// An average that starts as the plain mean `value` of this many samples. It stays a plain mean until the weights of its samples
    /// are smaller than those of the EWMA. With no samples yet, `value` holds until the first one.
    pub fn mean_of(samples: u32, value: f64, time_constant_ns: f64) -> Self {
        Self {
            value,
            time_constant_ns,
            samples,
        }
    }

    /// Adds a sample that was taken `elapsed_ns` after the previous one.
    pub fn update(&mut self, sample: f64, elapsed_ns: u64) {
        self.samples = self.samples.saturating_add(1);
        let weight = 1.0 - decay(elapsed_ns, self.time_constant_ns);
        let of_mean = match self.samples {
            u32::MAX => 0.0,
            samples => 1.0 / f64::from(samples),
        };
        self.value += (sample - self.value) * weight.max(of_mean);
    }

    /// Number of samples in a plain mean; the highest number for an average that began with a value.
    pub fn samples(self) -> u32 {
        self.samples
    }

    /// The average, in the unit of the samples.
    pub fn value(self) -> f64 {
        self.value
    }
}

/// An average, and how far its samples are from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    mean: Ewma,
    /// Mean absolute difference of the samples from the average.
    deviation: Ewma,
}

impl Spread {
    /// Starts at `value`, without a deviation.
    pub fn new(value: f64, time_constant_ns: f64) -> Self {
        Self::mean_of(u32::MAX, value, time_constant_ns)
    }

    /// Starts as [`Ewma::mean_of`], without a deviation.
    pub fn mean_of(samples: u32, value: f64, time_constant_ns: f64) -> Self {
        Self {
            mean: Ewma::mean_of(samples, value, time_constant_ns),
            deviation: Ewma::mean_of(samples, 0.0, time_constant_ns),
        }
    }

    /// Adds a sample that was taken `elapsed_ns` after the previous one.
    pub fn update(&mut self, sample: f64, elapsed_ns: u64) {
        let difference = match self.mean.samples() {
            0 => 0.0,
            _ => (sample - self.mean.value()).abs(),
        };
        self.mean.update(sample, elapsed_ns);
        self.deviation.update(difference, elapsed_ns);
    }

    /// As [`Ewma::samples`].
    pub fn samples(self) -> u32 {
        self.mean.samples()
    }

    /// The average, if samples differ from it by at most this fraction of it, on average.
    pub fn mean_within(self, max_deviation: f64) -> Option<f64> {
        let mean = self.mean.value();
        (self.deviation.value() <= max_deviation * mean).then_some(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_average_follows_its_samples_in_time() {
        let after = |elapsed_ns| {
            let mut average = Ewma::new(3.0, 1e9);
            average.update(9.0, elapsed_ns);
            average.value()
        };
        assert_eq!(after(0), 3.0);
        assert!((after(1_000_000_000) - 6.79).abs() < 0.01);
        assert!((after(u64::MAX) - 9.0).abs() < 1e-9);
    }

    #[test]
    fn a_mean_is_given_only_if_samples_are_close_to_it() {
        let after = |samples: [f64; 4]| {
            let mut spread = Spread::mean_of(0, 0.0, 1e12);
            for sample in samples {
                spread.update(sample, 1);
            }
            spread.mean_within(0.25)
        };
        assert_eq!(after([100.0; 4]), Some(100.0));
        assert_eq!(after([90.0, 110.0, 90.0, 110.0]), Some(100.0));
        assert_eq!(after([10.0, 190.0, 10.0, 190.0]), None);
        assert_eq!(Spread::new(5.0, 1e9).mean_within(0.0), Some(5.0));
    }

    #[test]
    fn the_first_samples_are_averaged() {
        let mut average = Ewma::mean_of(0, 7.0, 1e9);
        assert_eq!(average.value(), 7.0, "until the first one");
        for (sample, mean) in [(4.0, 4.0), (6.0, 5.0), (8.0, 6.0)] {
            average.update(sample, 1_000_000);
            assert!((average.value() - mean).abs() < 1e-9);
        }
        average.update(0.0, 1_000_000_000);
        assert!(
            (average.value() - 2.21).abs() < 0.01,
            "an EWMA from then on"
        );
    }

    #[test]
    fn the_sampling_interval_does_not_change_the_memory() {
        let after_a_second = |interval_ns: u64| {
            let mut average = Ewma::new(0.0, 1e9);
            for _ in 0..1_000_000_000 / interval_ns {
                average.update(1.0, interval_ns);
            }
            average.value()
        };
        assert!((after_a_second(100_000_000) - after_a_second(10_000_000)).abs() < 1e-9);
    }
}
