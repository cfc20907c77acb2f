//! How long work waited, as one histogram for each queue.
//!
//! A tick tells how much was taken from a queue and how long that had waited on the mean: all of it counts at that wait.

use std::{collections::HashMap, sync::Arc};

use super::pressure::Pressure;
use crate::{detect::Gauge, queue::QueueKey};

/// Upper bounds, seconds.
pub const BOUNDS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Queues of which it is kept.
const MOST: usize = 2_000;
/// What was not seen for so long is gone.
const OLD_NS: u64 = 60_000_000_000;

#[derive(Debug, Default)]
pub struct WaitHistograms {
    of: HashMap<Arc<QueueKey>, Histogram>,
}

#[derive(Debug)]
pub struct Histogram {
    /// Within each bound and above the one before; the last is beyond all.
    counts: [u64; BOUNDS.len() + 1],
    sum_s: f64,
    /// Of the reading that was taken in last.
    at_ns: u64,
    departures: u64,
}

impl WaitHistograms {
    /// Takes in what left the queues since the last time.
    pub fn read(&mut self, pressures: &[Pressure]) {
        let queues = || pressures.iter().flat_map(|pressure| &pressure.queues);
        let newest_ns = queues().map(|(_, gauge)| gauge.at_ns).max().unwrap_or(0);
        for (key, gauge) in queues() {
            // Bytes do not wait each for itself.
            if !gauge.is_counted || key.kind.unit() == "bytes" {
                continue;
            }
            if let Some(known) = self.of.get_mut(key) {
                known.read(gauge);
            } else if self.of.len() < MOST {
                self.of.insert(Arc::clone(key), Histogram::new(gauge));
            }
        }
        self.of
            .retain(|_, known| newest_ns.saturating_sub(known.at_ns) <= OLD_NS);
    }

    pub fn of(&self, key: &QueueKey) -> Option<&Histogram> {
        self.of.get(key)
    }
}

impl Histogram {
    fn new(gauge: &Gauge) -> Self {
        Self {
            counts: [0; BOUNDS.len() + 1],
            sum_s: 0.0,
            at_ns: gauge.at_ns,
            departures: gauge.departures,
        }
    }

    fn read(&mut self, gauge: &Gauge) {
        let left = gauge.departures.saturating_sub(self.departures);
        self.departures = gauge.departures;
        self.at_ns = gauge.at_ns;
        // How long what left had waited may not be known; nothing is made up for it.
        let Some(wait_ns) = gauge.wait_ns.filter(|_| left > 0) else {
            return;
        };
        let seconds = wait_ns as f64 / 1e9;
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound);
        self.counts[bucket.unwrap_or(BOUNDS.len())] += left;
        self.sum_s += seconds * left as f64;
    }

    /// How many waited no longer than each bound, and all.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let bounds = BOUNDS.iter().copied().map(Some).chain([None]);
        bounds.zip(self.counts).scan(0, |sum, (bound, count)| {
            *sum += count;
            Some((bound, *sum))
        })
    }

    pub fn sum_s(&self) -> f64 {
        self.sum_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::Level, queue::Kind, sample::Target, signal::load::Load};

    fn pressure(kind: Kind, gauge: Gauge) -> Pressure {
        let key = QueueKey::new(1, kind, ":80".into());
        Pressure {
            target: Arc::new(Target::default()),
            level: Level::Ok,
            score: 0.0,
            admit_ratio: 1.0,
            load: Load::default(),
            concurrency_limit: None,
            max_queue_wait_ns: None,
            oldest_age_ns: 0,
            time_to_full_ns: None,
            retry_after_ms: 0,
            queues: vec![(Arc::new(key), gauge)],
        }
    }

    fn gauge(at_ns: u64, departures: u64, wait_ns: u64) -> Gauge {
        Gauge {
            at_ns,
            departures,
            wait_ns: Some(wait_ns),
            is_counted: true,
            ..Gauge::default()
        }
    }

    #[test]
    fn what_left_counts_at_how_long_it_had_waited() {
        let mut waits = WaitHistograms::default();
        let key = pressure(Kind::Accept, Gauge::default()).queues[0].0.clone();
        for (departures, wait_ns) in [
            (100, 9),
            (104, 2_000_000),
            (104, 2_000_000),
            (107, 20_000_000_000),
        ] {
            waits.read(&[pressure(Kind::Accept, gauge(1, departures, wait_ns))]);
        }
        let histogram = waits.of(&key).unwrap();
        let all: Vec<(Option<f64>, u64)> = histogram.cumulative().collect();
        assert_eq!(all[0], (Some(0.001), 0), "not those of before");
        assert_eq!(all[1], (Some(0.0025), 4));
        assert_eq!(all[BOUNDS.len()], (None, 7));
        assert!((histogram.sum_s() - 60.008).abs() < 1e-9);

        waits.read(&[pressure(Kind::Send, gauge(OLD_NS + 2, 9, 9))]);
        assert!(
            waits.of(&key).is_none(),
            "it is gone, and bytes are no work"
        );
        assert!(waits.of.is_empty());
    }
}
