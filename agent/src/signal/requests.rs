//! The service time of requests, and the max queue wait that follows from it. Pure.
//!
//! Under overload a worker takes the next request that has not waited longer than the max queue wait. With random arrivals there
//! is sometimes none, although the mean arrival rate exceeds capacity, and the worker idles. This is rare if the max queue wait is
//! long enough to answer several requests, because under overload even more arrive in that time.

use std::{collections::HashMap, sync::Arc};

use super::constants::{
    CLOCK_TICK_NS, MAX_DERIVED_TARGET_NS, MAX_QUEUE_WAIT_SERVICE_TIMES, MAX_QUEUE_WAIT_TARGETS,
    RESPONSES_WITHIN_MAX_QUEUE_WAIT, SERVICE_TIME_CONSTANT_NS, SERVICE_TIME_MIN_SAMPLES,
    TARGET_SERVICE_TIMES,
};
use crate::{
    detect::Gauge,
    ewma::decay,
    queue::{Kind, QueueKey},
    sample::TargetId,
};

/// The requests of all services.
#[derive(Default)]
pub(super) struct Requests {
    services: HashMap<TargetId, Service>,
}

/// The current state of a service's requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct DispatchState {
    /// No queue in front of the service is above its target delay.
    pub(super) are_dequeued_soon: bool,
    /// Some requests are rejected.
    pub(super) are_shed: bool,
}

struct Service {
    at_ns: u64,
    /// Mean age of the requests in service, ns, and the samples in it.
    mean_age_ns: f64,
    samples: u32,
}

/// What is known about a service's requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Known {
    /// Mean service time, ns.
    pub(super) service_time_ns: f64,
    /// Requests in service under overload.
    pub(super) in_service: Option<f64>,
}

/// Acceptable waits in a queue, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waits {
    pub(super) target_delay_ns: u64,
    /// Under overload, requests that waited longer are rejected at dequeue.
    pub(super) max_queue_wait_ns: u64,
}

impl Waits {
    /// For a queue whose own target delay is `target_delay_ns`.
    pub(super) fn of(target_delay_ns: u64, known: Option<Known>) -> Self {
        let (mut target_delay_ns, mut max_queue_wait_ns) = (target_delay_ns, 0.0);
        if let Some(Known {
            service_time_ns,
            in_service,
        }) = known
        {
            let derived_ns = (TARGET_SERVICE_TIMES * service_time_ns) as u64;
            target_delay_ns = target_delay_ns.max(derived_ns.min(MAX_DERIVED_TARGET_NS));
            if let Some(in_service) = in_service {
                let service_times = RESPONSES_WITHIN_MAX_QUEUE_WAIT / in_service.max(1.0);
                max_queue_wait_ns =
                    service_time_ns * service_times.min(MAX_QUEUE_WAIT_SERVICE_TIMES);
            }
        }
        let by_target_ns = MAX_QUEUE_WAIT_TARGETS * target_delay_ns as f64;
        Self {
            target_delay_ns,
            max_queue_wait_ns: (max_queue_wait_ns.max(by_target_ns) as u64).max(CLOCK_TICK_NS),
        }
    }
}

impl Requests {
    /// Drops services that were last observed before this time, ns.
    pub(super) fn forget_before(&mut self, ns: u64) {
        self.services.retain(|_, service| service.at_ns >= ns);
    }

    /// Adds the queues of a service. Returns its mean service time, ns; `None` before enough samples.
    pub(super) fn add(
        &mut self,
        target: TargetId,
        queues: &[(Arc<QueueKey>, Gauge)],
        now: DispatchState,
    ) -> Option<f64> {
        let (_, gauge) = queues
            .iter()
            .filter(|(key, _)| key.kind == Kind::Inflight)
            .max_by_key(|(_, gauge)| (gauge.depth, gauge.at_ns))?;
        let service = self.services.entry(target).or_insert(Service {
            at_ns: 0,
            mean_age_ns: 0.0,
            samples: 0,
        });
        let elapsed_ns = gauge.at_ns.saturating_sub(service.at_ns);
        service.at_ns = gauge.at_ns;
        if let Some(age_ns) = gauge.median_age_ns
            && elapsed_ns > 0
            && service.can_be_measured(now)
        {
            // A plain mean at first, until its weights are smaller than those of the EWMA.
            service.samples = service.samples.saturating_add(1);
            let of_mean = 1.0 / f64::from(service.samples);
            let of_ewma = 1.0 - decay(elapsed_ns, SERVICE_TIME_CONSTANT_NS);
            service.mean_age_ns += of_mean.max(of_ewma) * (age_ns as f64 - service.mean_age_ns);
        }
        // A sample sees a request at a random moment of its service: on average halfway through.
        (service.samples >= SERVICE_TIME_MIN_SAMPLES).then_some(2.0 * service.mean_age_ns)
    }
}

impl Service {
    /// The age of a request in service includes its queue wait, so it counts only if requests are dequeued soon. While some are
    /// rejected, the others wait up to the max queue wait. That would lengthen the service time, so it counts only if nothing better
    /// is known.
    fn can_be_measured(&self, now: DispatchState) -> bool {
        now.are_dequeued_soon && (!now.are_shed || self.samples < SERVICE_TIME_MIN_SAMPLES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn known(time_ms: f64, in_service: Option<f64>) -> Option<Known> {
        Some(Known {
            service_time_ns: time_ms * 1e6,
            in_service,
        })
    }

    #[test]
    fn the_max_queue_wait_follows_from_the_target_delay_and_the_service_time() {
        for (target_ms, known, target, max_queue_wait) in [
            (20, None, 20, 15),
            (20, known(40.0, Some(16.0)), 20, 15),
            (20, known(40.0, Some(4.0)), 20, 20),
            (20, known(40.0, Some(2.0)), 20, 40),
            (20, known(40.0, Some(0.8)), 20, 52),
            // The target delay follows from the service time.
            (5, known(40.0, None), 20, 15),
            (5, known(4000.0, Some(100.0)), 500, 375),
            (5, known(1.0, Some(4.0)), 5, 4),
        ] {
            let waits = Waits::of(target_ms * MS, known);
            let expected = Waits {
                target_delay_ns: target * MS,
                max_queue_wait_ns: max_queue_wait * MS,
            };
            assert_eq!(waits, expected, "{target_ms} ms, {known:?}");
        }
    }

    #[test]
    fn the_service_time_is_measured_while_nothing_is_shed() {
        let queues = |tick: u64, age_ns: Option<u64>| {
            let key = QueueKey::new(1, Kind::Inflight, ":80".into());
            let gauge = Gauge {
                at_ns: tick * 100 * MS,
                depth: u64::from(age_ns.is_some()),
                median_age_ns: age_ns,
                ..Gauge::default()
            };
            [(Arc::new(key), gauge)]
        };
        let now = |are_dequeued_soon, are_shed| DispatchState {
            are_dequeued_soon,
            are_shed,
        };
        let mut requests = Requests::default();
        let mut last = None;
        for tick in 1..200 {
            // Requests of 40 ms, sampled at any moment of their service, in every other sample; some are rejected at first.
            let age_ns = (tick % 2 == 0).then_some(tick * 7 % 40 * MS);
            last = requests.add(1, &queues(tick, age_ns), now(true, tick < 20));
            assert_eq!(last.is_some(), tick >= 20, "{tick}");
        }
        let service_time_ns = last.unwrap();
        assert!((35e6..45e6).contains(&service_time_ns), "{service_time_ns}");
        for tick in 200..300 {
            let now = now(tick % 2 == 0, tick % 2 == 0);
            assert_eq!(requests.add(1, &queues(tick, Some(400 * MS)), now), last);
        }
        requests.forget_before(300 * 100 * MS);
        let young = queues(300, Some(MS));
        assert_eq!(requests.add(1, &young, now(true, false)), None);
    }
}
