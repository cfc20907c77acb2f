//! The concurrency limit of a service: how many requests in service keep it busy under overload. Pure.
//!
//! The limit is the number of requests in service while others wait, plus those that leave within a fraction of the target delay
//! (Little's law). So a worker that has responded finds its next request, and the excess waits where the limit is enforced.
//!
//! A proxy with a concurrency limit needs to know neither the arrival rate nor that the service became faster or slower. But while
//! the limit holds, nothing waits in the service, so nothing shows that it could do more. The limit is therefore probed upward by
//! one now and then.

use std::{collections::HashMap, sync::Arc};

use super::constants::{
    IN_SERVICE_QUEUE_TARGETS, IN_SERVICE_TIME_CONSTANT_NS, MIN_OCCUPANCY,
    OCCUPANCY_TIME_CONSTANT_NS, PROBE_DURATION_NS, PROBE_INTERVAL_NS,
};
use crate::{
    detect::Gauge,
    ewma::Ewma,
    queue::{Kind, QueueKey},
    sample::TargetId,
};

/// The concurrency of all services under overload.
#[derive(Default)]
pub struct Concurrency {
    services: HashMap<TargetId, Service>,
}

/// The concurrency of one service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConcurrencyLimit {
    /// Maximum number of requests in service at once.
    pub limit: u32,
    /// Requests in service in the last two samples, as a fraction of those under overload.
    pub utilization: f64,
    /// Mean requests in service under overload.
    pub in_service: f64,
}

struct Service {
    at_ns: u64,
    target_delay_ns: u64,
    /// Requests waiting or in service, up to the number in service under overload.
    occupancy: Ewma,
    /// Requests in service in the last two samples. One sample alone may fall between two requests.
    last: [u64; 2],
    /// Requests in service, and responses per second, while others wait.
    in_service: Ewma,
    responses_per_s: Ewma,
    /// Others waited in the last sample.
    did_wait: bool,
    /// Start of the current probe, ns.
    probing_since_ns: Option<u64>,
    next_probe_ns: u64,
}

/// The queues of a service in one sample.
struct Observation {
    at_ns: u64,
    waiting: u64,
    in_service: u64,
    responses_per_s: f64,
}

impl Concurrency {
    /// Drops services that were last observed before this time, ns.
    pub fn forget_before(&mut self, ns: u64) {
        self.services.retain(|_, service| service.at_ns >= ns);
    }

    /// Adds the queues of a service. `shed_target_ns` is the target delay of its accept queue while that is shed, else `None`.
    ///
    /// Returns its limit until the occupancy falls, or until there are more requests than it allows although none waits long (so no
    /// proxy enforces it). `None` without overload, and if the requests in service are unknown.
    pub fn add(
        &mut self,
        target: TargetId,
        queues: &[(Arc<QueueKey>, Gauge)],
        shed_target_ns: Option<u64>,
    ) -> Option<ConcurrencyLimit> {
        if shed_target_ns.is_none() && !self.services.contains_key(&target) {
            return None;
        }
        let observation = Observation::of(queues)?;
        let service = self
            .services
            .entry(target)
            .or_insert_with(|| Service::new(&observation));
        service.target_delay_ns = shed_target_ns.unwrap_or(service.target_delay_ns);
        let published = service.limit().limit;
        service.add(&observation);
        let requests = observation.waiting + observation.in_service;
        let is_enforced = requests <= u64::from(published) + 1;
        let is_occupied = service.occupancy.value() >= MIN_OCCUPANCY * service.in_service.value();
        if shed_target_ns.is_none() && !(is_enforced && is_occupied) {
            self.services.remove(&target);
            return None;
        }
        Some(service.limit())
    }
}

impl Observation {
    fn of(queues: &[(Arc<QueueKey>, Gauge)]) -> Option<Self> {
        let mut observation = None;
        let mut waiting = 0;
        for (key, gauge) in queues {
            if key.kind == Kind::Accept {
                waiting += gauge.depth;
            }
            if key.kind == Kind::Inflight {
                let sum = observation.get_or_insert(Self {
                    at_ns: 0,
                    waiting: 0,
                    in_service: 0,
                    responses_per_s: 0.0,
                });
                sum.at_ns = sum.at_ns.max(gauge.at_ns);
                sum.in_service += gauge.depth;
                sum.responses_per_s += gauge
                    .responses_per_s
                    .or(gauge.departures_per_s)
                    .unwrap_or(0.0);
            }
        }
        observation.map(|observation| Self {
            waiting,
            ..observation
        })
    }
}

impl Service {
    fn new(observation: &Observation) -> Self {
        let in_service = observation.in_service as f64;
        Self {
            at_ns: observation.at_ns,
            target_delay_ns: 0,
            occupancy: Ewma::new(in_service, OCCUPANCY_TIME_CONSTANT_NS),
            last: [observation.in_service; 2],
            in_service: Ewma::new(in_service, IN_SERVICE_TIME_CONSTANT_NS),
            responses_per_s: Ewma::new(observation.responses_per_s, IN_SERVICE_TIME_CONSTANT_NS),
            did_wait: observation.waiting > 0,
            probing_since_ns: None,
            next_probe_ns: observation.at_ns + PROBE_INTERVAL_NS,
        }
    }

    fn add(&mut self, observation: &Observation) {
        let elapsed_ns = observation.at_ns.saturating_sub(self.at_ns);
        if elapsed_ns > 0 {
            self.last = [self.last[1], observation.in_service];
        }
        let there = (observation.waiting + observation.in_service) as f64;
        self.occupancy
            .update(there.min(self.in_service.value()), elapsed_ns);
        // A sample counts as overload only if requests wait in it and in the one before: a request that waits in only one
        // sample may be on its way to a worker. Without overload there may be too little work, so the number in service
        // can only raise the estimate.
        let in_service = observation.in_service as f64;
        if observation.waiting > 0 && self.did_wait {
            self.in_service.update(in_service, elapsed_ns);
            self.responses_per_s
                .update(observation.responses_per_s, elapsed_ns);
        } else if in_service > self.established() {
            self.in_service = Ewma::new(in_service, IN_SERVICE_TIME_CONSTANT_NS);
            let occupancy = self.occupancy.value().max(in_service);
            self.occupancy = Ewma::new(occupancy, OCCUPANCY_TIME_CONSTANT_NS);
            // The probe succeeded, so another one follows at once.
            self.probing_since_ns = Some(observation.at_ns);
        } else if in_service > self.in_service.value() {
            self.in_service.update(in_service, elapsed_ns);
        }
        self.did_wait = observation.waiting > 0;
        match self.probing_since_ns {
            Some(since_ns) if observation.at_ns >= since_ns + PROBE_DURATION_NS => {
                self.probing_since_ns = None;
                self.next_probe_ns = observation.at_ns + PROBE_INTERVAL_NS;
            }
            None if observation.at_ns >= self.next_probe_ns => {
                self.probing_since_ns = Some(observation.at_ns);
            }
            _ => {}
        }
        self.at_ns = observation.at_ns;
    }

    /// The limit without a probe.
    fn established(&self) -> f64 {
        let target_s = self.target_delay_ns as f64 / 1e9;
        let queued = self.responses_per_s.value() * IN_SERVICE_QUEUE_TARGETS * target_s;
        (self.in_service.value() + queued).round().max(1.0)
    }

    fn limit(&self) -> ConcurrencyLimit {
        let in_service = self.in_service.value();
        let last = self.last[0].max(self.last[1]) as f64;
        ConcurrencyLimit {
            limit: self.established() as u32 + u32::from(self.probing_since_ns.is_some()),
            utilization: last / in_service.max(1.0),
            in_service,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK_NS: u64 = 100_000_000;
    const TARGET_NS: u64 = 20_000_000;

    /// The queues of a service at a tick.
    fn queues(tick: u64, waiting: u64, in_service: u64, per_s: f64) -> [(Arc<QueueKey>, Gauge); 2] {
        [(Kind::Accept, waiting), (Kind::Inflight, in_service)].map(|(kind, depth)| {
            let key = QueueKey::new(1, kind, ":80".into());
            let gauge = Gauge {
                at_ns: tick * TICK_NS,
                depth,
                departures_per_s: Some(per_s),
                ..Gauge::default()
            };
            (Arc::new(key), gauge)
        })
    }

    fn read(all: &mut Concurrency, queues: &[(Arc<QueueKey>, Gauge)], shed: bool) -> Option<u32> {
        let limit = all.add(1, queues, shed.then_some(TARGET_NS));
        limit.map(|limit| limit.limit)
    }

    #[test]
    fn the_limit_is_the_number_in_service_until_the_occupancy_falls() {
        let mut all = Concurrency::default();
        assert_eq!(read(&mut all, &queues(1, 0, 4, 100.0), false), None);
        let mut most = None;
        for tick in 2..50 {
            // Four workers, one of them between two requests now and then. Soon only requests on their way to a worker wait.
            let (waiting, in_service) = if tick % 5 == 0 { (0, 3) } else { (1, 4) };
            let waiting = if tick < 10 { 90 } else { waiting };
            let queues = queues(tick, waiting, in_service, 100.0);
            most = read(&mut all, &queues, tick < 10);
        }
        assert_eq!(most, Some(4));
        for tick in 50..90 {
            most = read(&mut all, &queues(tick, 0, 2, 50.0), false);
        }
        assert_eq!(most, None);
    }

    #[test]
    fn the_limit_is_at_least_one() {
        for (in_service, most) in [(1, 1), (0, 1)] {
            let queues = queues(1, 9, in_service, 0.5);
            assert_eq!(read(&mut Concurrency::default(), &queues, true), Some(most));
        }
    }

    #[test]
    fn the_limit_follows_a_service_that_becomes_slower() {
        let mut all = Concurrency::default();
        let mut most = [None; 2];
        for tick in 1..=40 {
            let per_s = if tick <= 20 { 400.0 } else { 100.0 };
            let queues = queues(tick, 5, 4, per_s);
            most[usize::from(tick > 20)] = read(&mut all, &queues, true);
        }
        assert_eq!(most, [Some(6), Some(5)]);
    }

    #[test]
    fn the_utilization_is_the_fraction_of_the_requests_in_service_under_overload() {
        let mut all = Concurrency::default();
        let mut utilization = Vec::new();
        for tick in 1..=23 {
            let queues = queues(tick, 0, if tick <= 20 { 4 } else { 2 }, 100.0);
            let limit = all.add(1, &queues, Some(TARGET_NS)).unwrap();
            utilization.push((limit.utilization * 100.0).round());
        }
        assert_eq!(utilization[18..], [100.0, 100.0, 100.0, 50.0, 50.0]);
    }

    /// Requests wait during the first nine ticks, with `in_service` others in service.
    fn overloaded(in_service: u64) -> Concurrency {
        let mut all = Concurrency::default();
        for tick in 1..10 {
            assert!(read(&mut all, &queues(tick, 9, in_service, 10.0), true).is_some());
        }
        all
    }

    /// The limits at each tick of a service with `workers`, while a proxy enforces the previous limit.
    fn held(all: &mut Concurrency, workers: u64, ticks: std::ops::Range<u64>) -> Vec<u32> {
        let mut limits = Vec::new();
        let mut most = all.services[&1].limit().limit;
        for tick in ticks {
            let in_service = u64::from(most).min(workers);
            let queues = queues(tick, u64::from(most) - in_service, in_service, 10.0);
            most = read(all, &queues, false).unwrap();
            limits.push(most);
        }
        limits
    }

    #[test]
    fn the_limit_is_probed_upward_by_one_once_a_minute() {
        let mut all = overloaded(4);
        let limits = held(&mut all, 4, 10..6010);
        let more = limits.iter().filter(|most| **most == 5).count();
        assert!((40..=60).contains(&more), "{more} of 6000 ticks");
        assert!(limits.iter().all(|most| (4..=5).contains(most)));
    }

    #[test]
    fn a_limit_that_became_too_low_rises_at_once_after_a_successful_probe() {
        let mut all = overloaded(2);
        let limits = held(&mut all, 8, 10..1000);
        let reached = limits.iter().position(|most| *most == 8).unwrap();
        assert!(reached < 620, "8 after {reached} ticks");
        assert!(limits[reached..].iter().all(|most| (8..=9).contains(most)));
    }

    #[test]
    fn a_limit_that_is_a_fraction_of_a_worker_too_low_rises() {
        let mut all = Concurrency::default();
        for tick in 1..200 {
            // One of ten workers is between two requests in most samples.
            let in_service = if tick % 10 == 0 { 10 } else { 9 };
            read(&mut all, &queues(tick, 9, in_service, 0.5), true);
        }
        assert_eq!(all.services[&1].limit().limit, 9);
        assert_eq!(held(&mut all, 10, 200..2000).last(), Some(&10));
    }

    #[test]
    fn a_long_sampling_interval_probes_too() {
        for ticks in [2, 5, 7, 10, 15, 30] {
            let mut all = Concurrency::default();
            let mut probed = 0;
            for sample in 1..2000 {
                let most = read(&mut all, &queues(sample * ticks, 0, 4, 1.0), sample < 3);
                probed += u32::from(most == Some(5));
            }
            assert!(probed > 2, "{probed} at {ticks} ticks");
        }
    }

    #[test]
    fn a_limit_that_no_proxy_enforces_ends_when_no_request_waits_long() {
        let mut all = overloaded(4);
        // Poisson arrivals near capacity: sometimes many, sometimes few.
        let waiting = [0, 1, 3, 0];
        let last = (10..14).map(|tick| {
            let queues = queues(tick, waiting[tick as usize % 4], 4, 10.0);
            read(&mut all, &queues, false)
        });
        assert_eq!(last.last().unwrap(), None);
    }

    #[test]
    fn a_request_on_its_way_to_a_worker_does_not_lower_the_limit() {
        let mut all = overloaded(4);
        let mut most = None;
        for tick in 10..110 {
            let (waiting, in_service) = if tick % 3 == 0 { (1, 3) } else { (0, 4) };
            most = read(&mut all, &queues(tick, waiting, in_service, 10.0), false);
        }
        assert_eq!(most, Some(4));
    }

    #[test]
    fn without_requests_in_flight_there_is_no_limit() {
        let [accept, _] = queues(1, 90, 4, 100.0);
        assert_eq!(read(&mut Concurrency::default(), &[accept], true), None);
    }
}
