//! Histograms of queue waits, one per queue.
//!
//! A sample gives the number of departures and their mean wait, so all of them count at that mean.

use std::{collections::HashMap, sync::Arc};

use super::{constants::EXPIRE_AFTER_NS, pressure::Pressure};
use crate::{detect::Gauge, queue::QueueKey};

/// Upper bounds of the buckets, seconds.
pub const BOUNDS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Bound on the number of histograms.
const MAX_QUEUES: usize = 2_000;

#[derive(Debug, Default)]
pub struct WaitHistograms {
    of: HashMap<Arc<QueueKey>, Histogram>,
}

#[derive(Debug)]
pub struct Histogram {
    /// Departures per bucket; the last one is beyond all bounds.
    counts: [u64; BOUNDS.len() + 1],
    sum_s: f64,
    /// Time and departures of the last gauge.
    at_ns: u64,
    departures: u64,
}

impl WaitHistograms {
    /// Adds the departures since the last call.
    pub fn read(&mut self, pressures: &[Pressure]) {
        let queues = || pressures.iter().flat_map(|pressure| &pressure.queues);
        let newest_ns = queues().map(|(_, gauge)| gauge.at_ns).max().unwrap_or(0);
        for (key, gauge) in queues() {
            // A byte is not a piece of work.
            if !gauge.is_counted || key.kind.unit() == "bytes" {
                continue;
            }
            if let Some(known) = self.of.get_mut(key) {
                known.read(gauge);
            } else if self.of.len() < MAX_QUEUES {
                self.of.insert(Arc::clone(key), Histogram::new(gauge));
            }
        }
        self.of
            .retain(|_, known| newest_ns.saturating_sub(known.at_ns) <= EXPIRE_AFTER_NS);
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
        // Departures with an unknown wait are left out.
        let Some(wait_ns) = gauge.wait_ns.filter(|_| left > 0) else {
            return;
        };
        let seconds = wait_ns as f64 / 1e9;
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound);
        self.counts[bucket.unwrap_or(BOUNDS.len())] += left;
        self.sum_s += seconds * left as f64;
    }

    /// Departures up to each bound, and all of them.
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
            utilization: None,
            concurrency_limit: None,
            max_queue_wait_ns: None,
            oldest_age_ns: 0,
            time_to_full_ns: None,
            retry_after_ms: 0,
            queues: vec![(Arc::new(key), gauge)],
            controllers: Vec::new(),
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
    fn departures_count_at_their_mean_wait() {
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
        assert_eq!(all[0], (Some(0.001), 0), "earlier departures do not count");
        assert_eq!(all[1], (Some(0.0025), 4));
        assert_eq!(all[BOUNDS.len()], (None, 7));
        assert!((histogram.sum_s() - 60.008).abs() < 1e-9);

        waits.read(&[pressure(Kind::Send, gauge(EXPIRE_AFTER_NS + 2, 9, 9))]);
        assert!(
            waits.of(&key).is_none(),
            "the queue has expired, and bytes are not counted"
        );
        assert!(waits.of.is_empty());
    }
}
