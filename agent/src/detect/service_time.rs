//! The service time of a queue, estimated from its throughput while work is waiting.

use crate::{ewma::decay, queue::Reading};

/// Minimum number of pieces of work in one estimate: fewer would be mostly noise.
const MIN_BATCH: f64 = 8.0;

/// Time constant of the service rate, ns: a batch that took 100 ms, the default sampling interval, has a weight of 0.3.
const RATE_TIME_CONSTANT_NS: f64 = 280e6;

/// Highest weight of one batch, however long it took: at a slow service a batch of eight is still noisy.
const MAX_BATCH_WEIGHT: f64 = 0.3;

/// The service time of one piece of work.
#[derive(Default)]
pub(super) struct ServiceTime {
    rate: ServiceRate,
    /// The service time when the queue was last at rest, or a lower one measured since, ns.
    ns: Option<u64>,
}

impl ServiceTime {
    /// Adds a reading; returns the service time, ns. Away from rest it only falls: a service that became slower is what detection
    /// has to notice, so it must not raise its own target.
    pub(super) fn read(&mut self, reading: &Reading, is_at_rest: bool) -> Option<u64> {
        self.rate.add(reading);
        let now = self.rate.service_time_ns(reading.servers);
        self.ns = match (now, self.ns) {
            (Some(now), Some(before)) if !is_at_rest => Some(now.min(before)),
            (now, before) => now.or(before),
        };
        self.ns
    }
}

/// Throughput while work waits: pieces of work taken per nanosecond.
#[derive(Default)]
struct ServiceRate {
    per_ns: Option<f64>,
    /// The current batch.
    taken: f64,
    time_ns: f64,
}

impl ServiceRate {
    fn add(&mut self, reading: &Reading) {
        let (Some(served), Some(elapsed_ns)) = (reading.served, reading.elapsed_ns) else {
            return;
        };
        if reading.depth == 0 {
            return;
        }
        self.taken += served as f64;
        self.time_ns += elapsed_ns as f64;
        if self.taken >= MIN_BATCH {
            let now = self.taken / self.time_ns.max(1.0);
            let weight =
                (1.0 - decay(self.time_ns as u64, RATE_TIME_CONSTANT_NS)).min(MAX_BATCH_WEIGHT);
            self.per_ns = Some(
                self.per_ns
                    .map_or(now, |before| before + (now - before) * weight),
            );
            self.taken = 0.0;
            self.time_ns = 0.0;
        }
    }

    /// How long one piece of work occupies one server, at most: `servers` together take `per_ns`.
    fn service_time_ns(&self, servers: u32) -> Option<u64> {
        self.per_ns
            .map(|per_ns| (f64::from(servers) / per_ns) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(
        samples: u64,
        interval_ns: u64,
        served: u64,
        mut time: ServiceTime,
    ) -> (u64, ServiceTime) {
        let mut last = None;
        for _ in 0..samples {
            let reading = Reading {
                depth: 1,
                served: Some(served),
                servers: 1,
                elapsed_ns: Some(interval_ns),
                ..Reading::default()
            };
            last = time.read(&reading, true);
        }
        (last.unwrap(), time)
    }

    #[test]
    fn the_memory_does_not_depend_on_the_sampling_interval() {
        let slow = || after(20, 100_000_000, 100, ServiceTime::default()).1;
        let coarse = after(1, 100_000_000, 1_000, slow()).0;
        let fine = after(10, 10_000_000, 100, slow()).0;
        assert!(coarse.abs_diff(fine) < coarse / 20, "{coarse} {fine}");
    }

    #[test]
    fn a_service_that_becomes_slower_keeps_its_service_time_until_it_is_at_rest() {
        let (fast, mut time) = after(20, 100_000_000, 100, ServiceTime::default());
        let slow = Reading {
            depth: 1,
            served: Some(10),
            servers: 1,
            elapsed_ns: Some(100_000_000),
            ..Reading::default()
        };
        assert_eq!(time.read(&slow, false), Some(fast));
        assert!(time.read(&slow, true) > Some(fast));
    }
}
