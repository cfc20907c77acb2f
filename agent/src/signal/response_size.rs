//! The size of a service's responses at rest, and the rate of responses that follows from it. Pure.
//!
//! Responses are counted by segments, and a busy HTTP/2 server sends other segments too: it answers each waiting request with a
//! ping. An agent that starts at that moment would take the pings for responses. So the size is measured while the service is at
//! rest, and handed on to the next agent. Under overload, the bytes sent then bound the number of responses.

use std::{collections::HashMap, sync::Arc};

use super::constants::{
    MAX_SIZE_DEVIATION, MAX_SIZING_UTILIZATION, RESPONSE_SIZE_TIME_CONSTANT_NS,
};
use crate::{
    detect::Gauge,
    event::Level,
    ewma::Spread,
    queue::{Kind, QueueKey},
};

/// The size of the responses on each listener of each service.
#[derive(Default)]
pub(super) struct ResponseSizes {
    sizes: HashMap<Arc<QueueKey>, Size>,
}

#[derive(Clone, Copy)]
struct Size {
    at_ns: u64,
    bytes: Spread,
}

impl Size {
    fn new(at_ns: u64, bytes: f64) -> Self {
        Self {
            at_ns,
            bytes: Spread::new(bytes, RESPONSE_SIZE_TIME_CONSTANT_NS),
        }
    }

    /// The mean, bytes, if responses are about equally long.
    fn usual_bytes(&self) -> Option<f64> {
        self.bytes.mean_within(MAX_SIZE_DEVIATION)
    }
}

impl ResponseSizes {
    /// Drops services that were last observed before this time, ns.
    pub(super) fn forget_before(&mut self, ns: u64) {
        self.sizes.retain(|_, size| size.at_ns >= ns);
    }

    /// Continues with what a former agent measured.
    pub(super) fn resume(&mut self, key: &Arc<QueueKey>, at_ns: u64, bytes: f64) {
        self.sizes.insert(Arc::clone(key), Size::new(at_ns, bytes));
    }

    /// For a later agent, bytes.
    pub(super) fn learned(&self, key: &Arc<QueueKey>) -> Option<f64> {
        self.sizes.get(key)?.usual_bytes()
    }

    /// Adds the queues of a service. If responses are about equally long, lowers their rate to what the bytes sent allow.
    pub(super) fn bound(&mut self, queues: &mut [(Arc<QueueKey>, Gauge)]) {
        let is_at_rest = queues.iter().all(|(_, gauge)| {
            gauge.level == Level::Ok
                && gauge
                    .utilization
                    .is_none_or(|utilization| utilization <= MAX_SIZING_UTILIZATION)
        });
        for (key, gauge) in queues {
            let (Kind::Inflight, Some(rate), Some(bytes_per_s)) =
                (key.kind, gauge.responses_per_s, gauge.response_bytes_per_s)
            else {
                continue;
            };
            let bytes = bytes_per_s / rate;
            if is_at_rest && bytes.is_finite() && bytes >= 1.0 {
                self.sizes
                    .entry(Arc::clone(key))
                    .and_modify(|size| {
                        let elapsed_ns = gauge.at_ns.saturating_sub(size.at_ns);
                        size.bytes.update(bytes, elapsed_ns);
                    })
                    .or_insert_with(|| Size::new(gauge.at_ns, bytes));
            }
            if let Some(size) = self.sizes.get_mut(key) {
                size.at_ns = gauge.at_ns;
                if let Some(usual) = size.usual_bytes() {
                    gauge.responses_per_s = Some(rate.min(bytes_per_s / usual));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `rate` responses per second of `bytes` each, seen at `tick` tenths of a second; the workers are `utilization` busy.
    fn queues(tick: u64, rate: f64, bytes: f64, utilization: f64) -> [(Arc<QueueKey>, Gauge); 2] {
        let at_ns = tick * 100_000_000;
        let requests = Gauge {
            at_ns,
            responses_per_s: Some(rate),
            response_bytes_per_s: Some(rate * bytes),
            ..Gauge::default()
        };
        let workers = Gauge {
            at_ns,
            utilization: Some(utilization),
            ..Gauge::default()
        };
        let key = |kind| Arc::new(QueueKey::new(1, kind, ":80".into()));
        [
            (key(Kind::Inflight), requests),
            (key(Kind::Workers), workers),
        ]
    }

    fn bounded(sizes: &mut ResponseSizes, mut queues: [(Arc<QueueKey>, Gauge); 2]) -> f64 {
        sizes.bound(&mut queues);
        queues[0].1.responses_per_s.unwrap()
    }

    #[test]
    fn the_bytes_bound_the_responses_of_a_busy_service() {
        let mut sizes = ResponseSizes::default();
        assert_eq!(bounded(&mut sizes, queues(0, 90.0, 50.0, 1.0)), 90.0);
        for tick in 1..20 {
            assert_eq!(bounded(&mut sizes, queues(tick, 40.0, 100.0, 0.5)), 40.0);
        }
        // More than half of the segments are pings.
        for tick in 20..1_000 {
            assert_eq!(bounded(&mut sizes, queues(tick, 90.0, 50.0, 0.95)), 45.0);
        }
        // Never more than there are segments.
        assert_eq!(bounded(&mut sizes, queues(1_000, 40.0, 300.0, 1.0)), 40.0);
    }

    #[test]
    fn the_next_agent_continues_with_the_size() {
        let mut sizes = ResponseSizes::default();
        let [(key, _), _] = queues(0, 40.0, 100.0, 0.5);
        assert_eq!(sizes.learned(&key), None);
        bounded(&mut sizes, queues(0, 40.0, 100.0, 0.5));
        let mut next = ResponseSizes::default();
        next.resume(&key, 0, sizes.learned(&key).unwrap());
        assert_eq!(bounded(&mut next, queues(1, 90.0, 50.0, 1.0)), 45.0);
        next.forget_before(1);
        assert_eq!(next.learned(&key), Some(100.0));
        next.forget_before(u64::MAX);
        assert_eq!(next.learned(&key), None);
    }

    #[test]
    fn responses_of_different_lengths_are_counted_by_segments() {
        let mut sizes = ResponseSizes::default();
        for tick in 0..1_000 {
            let bytes = if tick % 2 == 0 { 100.0 } else { 900.0 };
            bounded(&mut sizes, queues(tick, 40.0, bytes, 0.5));
        }
        assert_eq!(bounded(&mut sizes, queues(1_000, 90.0, 50.0, 1.0)), 90.0);
    }

    #[test]
    fn the_size_follows_a_change_while_the_service_is_not_busy() {
        let mut sizes = ResponseSizes::default();
        bounded(&mut sizes, queues(0, 40.0, 100.0, 0.5));
        for tick in 1..3_000 {
            bounded(&mut sizes, queues(tick, 40.0, 50.0, 0.5));
        }
        let rate = bounded(&mut sizes, queues(3_000, 40.0, 50.0, 1.0));
        assert!((39.9..=40.0).contains(&rate), "{rate}");
    }
}
