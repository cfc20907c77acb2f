//! The service time of requests, and how long requests wait inside a service. Pure.
//!
//! A service that takes every request immediately (Go, tokio, a large thread pool) has no queue in front: the excess waits inside, and
//! requests in flight take longer than the service time. If they still do when no more are in flight than usual, nothing waits, and
//! the service itself has become slower. The service time is then measured again.

use std::{collections::HashMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    constants::{
        CONCURRENCY_TIME_CONSTANT_NS, DEQUEUE_WAIT_MEMORY_NS, GROWTH_SIGMAS,
        SERVICE_TIME_CONSTANT_NS, SERVICE_TIME_MIN_SAMPLES, SLOWER_AFTER_SAMPLES,
    },
    learned::is_sane,
    waits::derived_target_ns,
};
use crate::{
    detect::{Gauge, is_deep},
    ewma::{Ewma, decay},
    queue::{Kind, QueueKey},
};

/// The requests of all services, by their queue of requests in flight.
#[derive(Default)]
pub(super) struct Requests {
    services: HashMap<Arc<QueueKey>, Service>,
}

/// How the requests of a service are dequeued, at the time of a sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct DispatchState {
    /// The longest wait before dequeue now, ns.
    pub(super) dequeue_wait_ns: u64,
    /// No queue in front of the service is above its target delay.
    pub(super) are_dequeued_soon: bool,
    /// Requests that wait before dequeue are shed.
    pub(super) are_shed_at_dequeue: bool,
    /// Some requests are rejected.
    pub(super) are_shed: bool,
}

/// How long requests wait inside a service.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct InsideWait {
    pub(super) delay_ns: u64,
    pub(super) target_delay_ns: u64,
    /// Requests in flight as a fraction of those in service under overload, 0 to 1; `None` before an overload.
    pub(super) utilization: Option<f64>,
    /// The service itself has become slower: decisions based on its former service time are void.
    pub(super) is_slower: bool,
}

/// What a later agent can use of this.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LearnedRequests {
    pub(super) service_time_ns: f64,
    /// Mean number of requests in flight.
    pub(super) usual_depth: f64,
    /// Requests in service under overload; `None` before one.
    pub(super) concurrency: Option<f64>,
}

impl LearnedRequests {
    pub(super) fn is_valid(&self) -> bool {
        let concurrency = self.concurrency.unwrap_or(0.0);
        [self.service_time_ns, self.usual_depth, concurrency]
            .into_iter()
            .all(is_sane)
    }
}

/// The requests in flight of one listener.
struct Service {
    at_ns: u64,
    /// Mean age of the requests in service, ns.
    mean_age_ns: Ewma,
    /// Mean number of requests in flight, samples without any request included.
    usual_depth: Ewma,
    /// The longest wait before dequeue, ns, decaying: the ages of requests in flight include it.
    dequeue_wait_ns: f64,
    /// Requests in service under overload.
    concurrency: Option<Ewma>,
    /// Consecutive samples with long service times and no more requests in flight than usual.
    slower_samples: u32,
    inside: Option<InsideWait>,
}

impl Requests {
    /// Drops services that were last observed before this time, ns.
    pub(super) fn forget_before(&mut self, ns: u64) {
        self.services.retain(|_, service| service.at_ns >= ns);
    }

    /// Adds the queues of a service. `is_shed` says whether the work of a queue is shed. Returns the mean service time at its
    /// busiest listener, ns; `None` before enough samples.
    pub(super) fn add(
        &mut self,
        queues: &[(Arc<QueueKey>, Gauge)],
        now: DispatchState,
        is_shed: impl Fn(&Arc<QueueKey>) -> bool,
    ) -> Option<f64> {
        let mut busiest = None;
        for (key, gauge) in queues {
            if key.kind != Kind::Inflight {
                continue;
            }
            let service = self.services.entry(Arc::clone(key)).or_default();
            if gauge.at_ns > service.at_ns {
                service.read(gauge, now, is_shed(key));
            }
            let rank = (gauge.depth, gauge.at_ns);
            if busiest.is_none_or(|(highest, _)| rank > highest) {
                busiest = Some((rank, service.service_time_ns()));
            }
        }
        busiest?.1
    }

    /// Whether the requests of this queue were added before.
    pub(super) fn knows(&self, key: &Arc<QueueKey>) -> bool {
        self.services.contains_key(key)
    }

    /// Continues with what a former agent learned.
    pub(super) fn resume(&mut self, key: &Arc<QueueKey>, learned: LearnedRequests) {
        let service = Service {
            mean_age_ns: mean_of(SERVICE_TIME_MIN_SAMPLES, learned.service_time_ns / 2.0),
            usual_depth: mean_of(SERVICE_TIME_MIN_SAMPLES, learned.usual_depth),
            concurrency: learned
                .concurrency
                .map(|concurrency| Ewma::new(concurrency, CONCURRENCY_TIME_CONSTANT_NS)),
            ..Service::default()
        };
        self.services.insert(Arc::clone(key), service);
    }

    /// For a later agent.
    pub(super) fn learned(&self, key: &Arc<QueueKey>) -> Option<LearnedRequests> {
        let service = self.services.get(key)?;
        Some(LearnedRequests {
            service_time_ns: service.service_time_ns()?,
            usual_depth: service.usual_depth.value(),
            concurrency: service.concurrency.map(Ewma::value),
        })
    }

    /// How long requests wait inside, as of the last sample; `None` if the service time is unknown.
    pub(super) fn inside(&self, key: &Arc<QueueKey>) -> Option<InsideWait> {
        self.services.get(key)?.inside
    }
}

/// A mean over the service time's time constant, which has this many samples so far.
fn mean_of(samples: u32, value: f64) -> Ewma {
    Ewma::mean_of(samples, value, SERVICE_TIME_CONSTANT_NS)
}

impl Default for Service {
    fn default() -> Self {
        Self {
            at_ns: 0,
            mean_age_ns: mean_of(0, 0.0),
            usual_depth: mean_of(0, 0.0),
            dequeue_wait_ns: 0.0,
            concurrency: None,
            slower_samples: 0,
            inside: None,
        }
    }
}

impl Service {
    /// Adds a new reading. `is_shed`: requests are rejected because others wait inside.
    fn read(&mut self, gauge: &Gauge, now: DispatchState, is_shed: bool) {
        let elapsed_ns = gauge.at_ns.saturating_sub(self.at_ns);
        self.at_ns = gauge.at_ns;
        let remembered = self.dequeue_wait_ns * decay(elapsed_ns, DEQUEUE_WAIT_MEMORY_NS);
        self.dequeue_wait_ns = remembered.max(now.dequeue_wait_ns as f64);
        self.inside = self.inside_wait(gauge, now, is_shed, elapsed_ns);
        let is_above_target = self
            .inside
            .is_some_and(|inside| inside.delay_ns > inside.target_delay_ns);
        let is_few = self.mean_age_ns.samples() < SERVICE_TIME_MIN_SAMPLES;
        // The age of a request in service includes its waits, so it counts only if requests are dequeued soon and none wait inside.
        // While some are rejected, the others wait up to the max queue wait. That would lengthen the service time, so it counts
        // only if nothing better is known.
        if now.are_dequeued_soon
            && !is_above_target
            && !is_growing(gauge)
            && (!now.are_shed || is_few)
        {
            self.learn(gauge, elapsed_ns);
        }
    }

    fn learn(&mut self, gauge: &Gauge, elapsed_ns: u64) {
        self.usual_depth.update(gauge.depth as f64, elapsed_ns);
        if let Some(age_ns) = gauge.median_age_ns {
            self.mean_age_ns.update(age_ns as f64, elapsed_ns);
        }
    }

    /// A sample sees a request at a random moment of its service: on average halfway through.
    fn service_time_ns(&self) -> Option<f64> {
        let is_known = self.mean_age_ns.samples() >= SERVICE_TIME_MIN_SAMPLES;
        is_known.then_some(2.0 * self.mean_age_ns.value())
    }

    fn inside_wait(
        &mut self,
        gauge: &Gauge,
        now: DispatchState,
        is_shed: bool,
        elapsed_ns: u64,
    ) -> Option<InsideWait> {
        let service_time_ns = self.service_time_ns()?;
        let target_delay_ns = derived_target_ns(service_time_ns);
        let depth = gauge.depth as f64;
        let rate = gauge.responses_per_s.or(gauge.departures_per_s)?;
        let inside_ns = self.time_inside_ns(gauge, rate);
        let delay_ns = (inside_ns - service_time_ns).max(0.0) as u64;
        // Where requests queue before the service takes them, the excess does not wait inside.
        let is_queued_outside = now.are_shed_at_dequeue || !now.are_dequeued_soon;
        let may_count = is_shed || (is_deep(depth, self.usual_depth.value()) && !is_queued_outside);
        // A short wait is indistinguishable from the noise of a few ages.
        let counted_ns = if may_count && delay_ns >= target_delay_ns / 2 {
            delay_ns
        } else {
            0
        };
        if is_shed && counted_ns > 0 {
            // Little's law: the requests that are served at this throughput; the others wait.
            let in_service = depth * service_time_ns / inside_ns;
            self.concurrency
                .get_or_insert(Ewma::new(in_service, CONCURRENCY_TIME_CONSTANT_NS))
                .update(in_service, elapsed_ns);
        }
        let is_unusual = depth > self.usual_depth.value() + 0.5;
        self.slower_samples = if is_shed && counted_ns > target_delay_ns && !is_unusual {
            self.slower_samples + 1
        } else {
            0
        };
        let is_slower = self.slower_samples >= SLOWER_AFTER_SAMPLES;
        if is_slower {
            *self = Self {
                at_ns: self.at_ns,
                dequeue_wait_ns: self.dequeue_wait_ns,
                ..Self::default()
            };
        }
        Some(InsideWait {
            delay_ns: counted_ns,
            target_delay_ns,
            utilization: self
                .concurrency
                .map(|concurrency| (depth / concurrency.value().max(1.0)).min(1.0)),
            is_slower,
        })
    }

    /// Mean time from dequeue to response, ns: by the ages of the requests in flight or by Little's law, whichever is less. Ages
    /// overestimate it while few new requests are admitted. Little's law overestimates it if responses take less than a sampling
    /// interval, because some of them are then not counted.
    fn time_inside_ns(&self, gauge: &Gauge, rate_per_s: f64) -> f64 {
        let median_ns = gauge.median_age_ns.unwrap_or(0) as f64;
        let by_ages_ns = 2.0 * (median_ns - self.dequeue_wait_ns).max(0.0);
        let by_littles_law_ns = gauge.depth as f64 * 1e9 / rate_per_s.max(f64::MIN_POSITIVE);
        by_ages_ns.min(by_littles_law_ns)
    }
}

/// Significantly more requests arrived in the last second than were answered.
fn is_growing(gauge: &Gauge) -> bool {
    let (Some(arrivals), Some(departures)) = (gauge.arrivals_per_s, gauge.departures_per_s) else {
        return false;
    };
    arrivals - departures > GROWTH_SIGMAS * (arrivals + departures).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Nothing waits before dequeue, and nothing is shed.
    const AT_REST: DispatchState = DispatchState {
        dequeue_wait_ns: 0,
        are_dequeued_soon: true,
        are_shed_at_dequeue: false,
        are_shed: false,
    };

    /// `depth` requests in flight, which take `inside_ms` each, at `rate` responses per second.
    fn in_flight(tick: u64, depth: u64, inside_ms: u64, rate: f64) -> [(Arc<QueueKey>, Gauge); 1] {
        let key = QueueKey::new(1, Kind::Inflight, ":80".into());
        let gauge = Gauge {
            at_ns: tick * 100 * MS,
            depth,
            median_age_ns: (depth > 0).then_some(inside_ms / 2 * MS),
            responses_per_s: Some(rate),
            ..Gauge::default()
        };
        [(Arc::new(key), gauge)]
    }

    /// A service that has worked on 2 requests at once for 40 ms each, on average, for 4 s.
    fn rested() -> Requests {
        let mut requests = Requests::default();
        for tick in 1..=40 {
            requests.add(&in_flight(tick, 2, 40, 50.0), AT_REST, |_| false);
        }
        requests
    }

    fn inside(
        requests: &mut Requests,
        queues: &[(Arc<QueueKey>, Gauge); 1],
        shed: bool,
    ) -> InsideWait {
        let now = DispatchState {
            are_shed: shed,
            ..AT_REST
        };
        requests.add(queues, now, |_| shed);
        requests.inside(&queues[0].0).unwrap()
    }

    #[test]
    fn the_service_time_is_measured_while_nothing_is_shed() {
        let now = |are_dequeued_soon, are_shed| DispatchState {
            are_dequeued_soon,
            are_shed,
            ..AT_REST
        };
        let mut requests = Requests::default();
        let mut last = None;
        for tick in 1..200 {
            // Requests of 40 ms, sampled at any moment of their service, in every other sample; some are rejected at first.
            let age_ms = tick * 7 % 40;
            let queues = in_flight(tick, (tick + 1) % 2, 2 * age_ms, 10.0);
            last = requests.add(&queues, now(true, tick < 20), |_| false);
            assert_eq!(last.is_some(), tick >= 20, "{tick}");
        }
        let service_time_ns = last.unwrap();
        assert!((35e6..45e6).contains(&service_time_ns), "{service_time_ns}");
        for tick in 200..300 {
            let now = now(tick % 2 == 0, tick % 2 == 0);
            let queues = in_flight(tick, 1, 800, 10.0);
            assert_eq!(requests.add(&queues, now, |_| false), last);
        }
        requests.forget_before(300 * 100 * MS);
        let young = in_flight(300, 1, 2, 10.0);
        assert_eq!(requests.add(&young, AT_REST, |_| false), None);
    }

    #[test]
    fn the_service_time_is_not_measured_while_requests_pile_up() {
        let mut requests = Requests::default();
        for tick in 1..=100 {
            let mut queues = in_flight(tick, 4 + 10 * tick, 100 * tick, 100.0);
            let gauge = &mut queues[0].1;
            gauge.arrivals_per_s = Some(200.0);
            gauge.departures_per_s = Some(100.0);
            assert_eq!(requests.add(&queues, AT_REST, |_| false), None);
        }
    }

    #[test]
    fn requests_wait_inside_if_more_are_in_flight_and_take_longer() {
        for (depth, inside_ms, rate, delay_ms) in [
            (2, 40, 50.0, 0),
            // More at once, and each as fast as before.
            (8, 40, 200.0, 0),
            // One slow request.
            (3, 400, 50.0, 0),
            // All wait for 4 workers.
            (20, 200, 100.0, 160),
            // Few are admitted, so the ages are high: 10 will have left in 100 ms.
            (10, 900, 100.0, 60),
        ] {
            let queues = in_flight(41, depth, inside_ms, rate);
            let inside = inside(&mut rested(), &queues, false);
            assert_eq!(
                (inside.delay_ns, inside.target_delay_ns),
                (delay_ms * MS, 20 * MS),
                "{depth} {inside_ms}"
            );
        }
    }

    #[test]
    fn requests_that_wait_outside_do_not_wait_inside() {
        let queues = in_flight(41, 20, 200, 100.0);
        let outside = DispatchState {
            dequeue_wait_ns: 80 * MS,
            ..AT_REST
        };
        let mut requests = rested();
        requests.add(&queues, outside, |_| false);
        let inside = requests.inside(&queues[0].0).unwrap();
        assert_eq!(inside.delay_ns, 0, "the ages include the wait outside");
        let shed = DispatchState {
            are_shed_at_dequeue: true,
            ..AT_REST
        };
        let mut requests = rested();
        requests.add(&queues, shed, |_| false);
        assert_eq!(requests.inside(&queues[0].0).unwrap().delay_ns, 0);
    }

    #[test]
    fn a_service_that_became_slower_is_measured_again() {
        let mut requests = rested();
        let mut slower = Vec::new();
        for tick in 41..60 {
            // Requests take 400 ms now, whether 20 or 2 are in flight.
            let depth = if tick < 45 { 20 } else { 2 };
            let queues = in_flight(tick, depth, 400, depth as f64 / 0.4);
            slower.push(inside(&mut requests, &queues, true).is_slower);
            if slower.last() == Some(&true) {
                break;
            }
        }
        assert_eq!(slower.len(), 9, "four deep samples and five others");
        assert_eq!(slower.last(), Some(&true));
        for tick in 60..80 {
            requests.add(&in_flight(tick, 20, 400, 50.0), AT_REST, |_| false);
        }
        let key = &in_flight(80, 0, 0, 0.0)[0].0;
        let inside = requests.inside(key).unwrap();
        assert_eq!((inside.delay_ns, inside.target_delay_ns), (0, 200 * MS));
    }

    #[test]
    fn the_utilization_is_relative_to_the_requests_in_service_under_overload() {
        let mut requests = rested();
        let queues = in_flight(41, 20, 200, 100.0);
        assert_eq!(inside(&mut requests, &queues, false).utilization, None);
        for (tick, depth, inside_ms, utilization) in [(42, 20, 200, 1.0), (43, 2, 40, 0.5)] {
            let queues = in_flight(tick, depth, inside_ms, 100.0);
            let now = inside(&mut requests, &queues, true).utilization.unwrap();
            assert!((now - utilization).abs() < 0.02, "{now}");
        }
    }
}
