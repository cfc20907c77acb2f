//! A time series and quantiles in bounded memory.

/// At most [`Series::MAX`] values, evenly spaced. When it is full, neighbours are merged and each value covers twice the time.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    values: Vec<u64>,
    /// Samples that one value covers, as a power of two.
    stride: u32,
    pending: u32,
    largest: u64,
}

impl Series {
    pub(super) const MAX: usize = 60;

    /// Adds one sample. A value is the maximum of the samples that it covers.
    pub(super) fn add(&mut self, value: u64) {
        self.largest = self.largest.max(value);
        self.pending += 1;
        if self.pending < 1 << self.stride {
            return;
        }
        self.values.push(self.largest);
        self.pending = 0;
        self.largest = 0;
        if self.values.len() > Self::MAX {
            self.values = self
                .values
                .chunks(2)
                .map(|pair| pair.iter().copied().max().unwrap_or(0))
                .collect();
            self.stride += 1;
        }
    }

    pub(super) fn values(&self) -> Vec<u64> {
        let mut values = self.values.clone();
        if self.pending > 0 && values.len() < Self::MAX {
            values.push(self.largest);
        }
        values
    }
}

/// Quantiles of a stream: every n-th value is kept, and n doubles whenever [`Quantiles::MAX`] is reached.
#[derive(Clone, Debug, Default)]
pub(super) struct Quantiles {
    kept: Vec<u64>,
    /// Every 2^stride-th value is kept.
    stride: u32,
    seen: u64,
    max: Option<u64>,
}

impl Quantiles {
    const MAX: usize = 1024;

    pub(super) fn add(&mut self, value: u64) {
        self.max = self.max.max(Some(value));
        if self.seen.is_multiple_of(1 << self.stride) {
            self.kept.push(value);
            if self.kept.len() > Self::MAX {
                let mut index = 0;
                self.kept.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.stride += 1;
            }
        }
        self.seen += 1;
    }

    pub(super) fn max(&self) -> Option<u64> {
        self.max
    }

    /// The value at `quantile` (0 to 1); `None` without values.
    pub(super) fn at(&self, quantile: f64) -> Option<u64> {
        let mut sorted = self.kept.clone();
        sorted.sort_unstable();
        let rank = ((sorted.len() as f64 * quantile).ceil() as usize).clamp(1, sorted.len().max(1));
        sorted.get(rank - 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::{Quantiles, Series};

    #[test]
    fn a_long_series_keeps_its_shape_and_its_peak() {
        let mut series = Series::default();
        for sample in 0..10_000_u64 {
            series.add(if sample == 7_001 { 99_999 } else { sample });
        }
        let values = series.values();
        assert!(values.len() <= Series::MAX);
        assert_eq!(values.iter().max(), Some(&99_999));
        assert!(values[0] < values[20]);
    }

    #[test]
    fn quantiles_of_a_long_stream_are_close() {
        let mut quantiles = Quantiles::default();
        for value in 0..100_000 {
            quantiles.add(value);
        }
        let median = quantiles.at(0.5).unwrap();
        assert!((48_000..52_000).contains(&median), "{median}");
        assert_eq!(quantiles.max(), Some(99_999));
        assert_eq!(Quantiles::default().at(0.5), None);
    }
}
