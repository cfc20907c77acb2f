//! A histogram of waits as Prometheus knows it: in buckets with fixed bounds, and in those of a native histogram.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::exposition::{self, Bucket, BucketSpan, Exemplar};
use crate::sample::Distribution;

/// Each power of two is split into 2 to the power of this many buckets, each 2.2% wide: as fine as the histograms of the
/// hooks, whose buckets are 1.6% to 3.1% wide.
const SCHEMA: i32 = 5;
/// Buckets at most. With more, each two are merged: the schema is one lower, which Prometheus accepts at any time. 320 are enough
/// for waits within a factor of 1,000.
const MAX_BUCKETS: usize = 320;
/// Waits up to this many seconds count as zero.
const ZERO_S: f64 = 1e-9;

#[derive(Clone, Debug)]
pub struct Histogram {
    /// Upper bounds of the classic buckets, seconds.
    bounds: &'static [f64],
    /// Waits per bucket; the last one is beyond all bounds.
    counts: Vec<u64>,
    sum_s: f64,
    schema: i32,
    zero: u64,
    /// By index: that of the bucket which ends at 2 to the power of `index / 2^schema` seconds.
    native: BTreeMap<i32, u64>,
    /// One of the longest waits of late.
    exemplar: Option<Exemplar>,
}

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum_s: 0.0,
            schema: SCHEMA,
            zero: 0,
            native: BTreeMap::new(),
            exemplar: None,
        }
    }

    /// Adds waits of this length, but not to the sum.
    pub fn count(&mut self, seconds: f64, count: u64) {
        let bucket = self.bucket_of(seconds);
        self.counts[bucket] = self.counts[bucket].saturating_add(count);
        if seconds <= ZERO_S {
            self.zero = self.zero.saturating_add(count);
            return;
        }
        let buckets_per_octave = f64::from(1 << self.schema);
        let index = (seconds.log2() * buckets_per_octave).ceil() as i32;
        let known = self.native.entry(index).or_default();
        *known = known.saturating_add(count);
        while self.native.len() > MAX_BUCKETS && self.schema > 0 {
            self.merge();
        }
    }

    /// Adds waits that hooks have measured.
    pub fn add(&mut self, waits: &Distribution) {
        for (wait_ns, count) in &waits.waits {
            self.count(*wait_ns as f64 / 1e9, *count);
        }
        self.add_to_sum(waits.total_ns as f64 / 1e9);
    }

    pub fn add_to_sum(&mut self, seconds: f64) {
        self.sum_s += seconds;
    }

    pub fn exemplar(&self) -> Option<&Exemplar> {
        self.exemplar.as_ref()
    }

    pub fn set_exemplar(&mut self, exemplar: Option<Exemplar>) {
        self.exemplar = exemplar;
    }

    fn bucket_of(&self, seconds: f64) -> usize {
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound);
        bucket.unwrap_or(self.bounds.len())
    }

    /// Halves the resolution.
    fn merge(&mut self) {
        let fine = std::mem::take(&mut self.native);
        for (index, count) in fine {
            let known = self.native.entry((index + 1) >> 1).or_default();
            *known = known.saturating_add(count);
        }
        self.schema -= 1;
    }

    pub fn exposed(&self) -> exposition::Histogram {
        let mut all = 0_u64;
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let mut bucket: Vec<Bucket> = bounds
            .zip(&self.counts)
            .map(|(upper_bound, count)| {
                all = all.saturating_add(*count);
                Bucket {
                    cumulative_count: all,
                    upper_bound,
                    exemplar: None,
                }
            })
            .collect();
        if let Some(exemplar) = &self.exemplar {
            bucket[self.bucket_of(exemplar.value)].exemplar = Some(exemplar.clone());
        }
        let (positive_span, positive_delta) = spans(&self.native);
        exposition::Histogram {
            sample_count: all,
            sample_sum: self.sum_s,
            bucket,
            schema: self.schema,
            zero_threshold: ZERO_S,
            zero_count: self.zero,
            positive_span,
            positive_delta,
        }
    }
}

fn spans(buckets: &BTreeMap<i32, u64>) -> (Vec<BucketSpan>, Vec<i64>) {
    let mut spans: Vec<BucketSpan> = Vec::new();
    let mut deltas = Vec::new();
    // The index after the last bucket, and the count of that one.
    let (mut next, mut before) = (0, 0);
    for (index, count) in buckets {
        match spans.last_mut() {
            Some(span) if *index == next => span.length += 1,
            _ => spans.push(BucketSpan {
                offset: index - next,
                length: 1,
            }),
        }
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        deltas.push(count - before);
        (next, before) = (index + 1, count);
    }
    (spans, deltas)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: [f64; 2] = [0.001, 1.0];

    /// Upper bounds and counts of the native buckets.
    fn native(histogram: &exposition::Histogram) -> Vec<(f64, u64)> {
        let mut buckets = Vec::new();
        let (mut index, mut count) = (0, 0);
        let mut deltas = histogram.positive_delta.iter();
        for span in &histogram.positive_span {
            index += span.offset;
            for _ in 0..span.length {
                count += deltas.next().unwrap();
                let bound = 2_f64.powf(f64::from(index) / 2_f64.powi(histogram.schema));
                buckets.push((bound, u64::try_from(count).unwrap()));
                index += 1;
            }
        }
        assert_eq!(deltas.next(), None);
        buckets
    }

    #[test]
    fn each_wait_is_in_a_classic_and_in_a_native_bucket_that_is_close_to_it() {
        let mut histogram = Histogram::new(&BOUNDS);
        let waits = [
            (0.0, 2),
            (0.000_9, 3),
            (0.001, 1),
            (0.25, 4),
            (0.251, 5),
            (7.0, 1),
        ];
        for (seconds, count) in waits {
            histogram.count(seconds, count);
            histogram.add_to_sum(seconds * count as f64);
        }
        let exposed = histogram.exposed();
        let classic: Vec<u64> = exposed
            .bucket
            .iter()
            .map(|it| it.cumulative_count)
            .collect();
        assert_eq!(classic, [6, 15, 16]);
        assert_eq!((exposed.sample_count, exposed.zero_count), (16, 2));
        let buckets = native(&exposed);
        for (seconds, count) in &waits[1..] {
            let growth = 2_f64.powf(1.0 / 32.0);
            let holds = |(bound, _): &&(f64, u64)| {
                *seconds <= *bound * (1.0 + 1e-12) && *seconds > *bound / growth
            };
            let bucket = buckets.iter().find(holds);
            assert_eq!(
                bucket.map(|it| it.1),
                Some(*count),
                "{seconds} in {buckets:?}"
            );
        }
        // A bound is within its bucket.
        assert!(
            buckets
                .iter()
                .any(|(bound, _)| (bound - 0.25).abs() < 1e-12)
        );
    }

    #[test]
    fn with_too_many_buckets_the_resolution_is_lower_and_nothing_is_lost() {
        let mut histogram = Histogram::new(&BOUNDS);
        let mut ns = 1.5_f64;
        let mut count = 0;
        while ns < 3e10 {
            histogram.count(ns / 1e9, 1);
            ns *= 1.005;
            count += 1;
        }
        let exposed = histogram.exposed();
        let buckets = native(&exposed);
        assert!(buckets.len() <= MAX_BUCKETS, "{}", buckets.len());
        assert_eq!(exposed.schema, 3);
        assert_eq!(buckets.iter().map(|it| it.1).sum::<u64>(), count);
        // All that is up to a bound is below it, within a step of 0.5% of the waits.
        let mut below = 0;
        for (bound, in_bucket) in &buckets[..buckets.len() - 1] {
            below += in_bucket;
            let expected = (bound * 1e9 / 1.5).ln() / 1.005_f64.ln();
            assert!(
                (below as f64 - expected).abs() <= 1.01,
                "{bound}: {below} of {expected}"
            );
        }
    }

    #[test]
    fn an_exemplar_is_in_the_bucket_of_its_value() {
        let mut histogram = Histogram::new(&BOUNDS);
        histogram.count(0.5, 1);
        histogram.set_exemplar(Some(Exemplar {
            value: 0.5,
            ..Exemplar::default()
        }));
        let exposed = histogram.exposed();
        let has: Vec<bool> = exposed
            .bucket
            .iter()
            .map(|it| it.exemplar.is_some())
            .collect();
        assert_eq!(has, [false, true, false]);
    }
}
