//! The acceptable waits of requests, which follow from their service time. Pure.
//!
//! Under overload a worker takes the next request that has not waited longer than the max queue wait. With random arrivals there
//! is sometimes none, although the mean arrival rate exceeds capacity, and the worker idles. This is rare if the max queue wait is
//! long enough to answer several requests, because under overload even more arrive in that time.

use super::constants::{
    CLOCK_TICK_NS, MAX_DERIVED_TARGET_NS, MAX_QUEUE_WAIT_SERVICE_TIMES, MAX_QUEUE_WAIT_TARGETS,
    MIN_DERIVED_TARGET_NS, RESPONSES_WITHIN_MAX_QUEUE_WAIT, TARGET_SERVICE_TIMES,
};

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
    /// For a queue whose own target delay is `target_delay_ns`, which is used if the service time is unknown.
    pub(super) fn of(target_delay_ns: u64, known: Option<Known>) -> Self {
        let (mut target_delay_ns, mut max_queue_wait_ns) = (target_delay_ns, 0.0);
        if let Some(Known {
            service_time_ns,
            in_service,
        }) = known
        {
            target_delay_ns = derived_target_ns(service_time_ns);
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

    /// The max queue wait to publish, ns. Page readers measure a wait in whole ticks of the kernel's clock, so they notice half a
    /// tick late on average that a request has waited longer.
    pub(super) fn published_max_queue_wait_ns(self) -> u64 {
        (self.max_queue_wait_ns - CLOCK_TICK_NS / 2).max(CLOCK_TICK_NS)
    }
}

/// The target delay of a service with this service time, ns.
pub(super) fn derived_target_ns(service_time_ns: f64) -> u64 {
    ((TARGET_SERVICE_TIMES * service_time_ns) as u64)
        .clamp(MIN_DERIVED_TARGET_NS, MAX_DERIVED_TARGET_NS)
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
            // The target delay follows from the service time, if that is known.
            (5, known(40.0, None), 20, 15),
            (40, known(10.0, Some(1.0)), 5, 13),
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
    fn readers_reject_after_the_max_queue_wait_on_average() {
        const STEPS: u64 = 1000;
        for max_queue_wait_ms in [6, 7, 12, 15, 40] {
            let waits = Waits {
                target_delay_ns: 5 * MS,
                max_queue_wait_ns: max_queue_wait_ms * MS,
            };
            let published_ns = waits.published_max_queue_wait_ns();
            // The wait from which a reader rejects, for requests that arrive at any moment within a tick.
            let rejected_from_ns = |phase_ns: u64| {
                let ticks = published_ns / CLOCK_TICK_NS + 1;
                ticks * CLOCK_TICK_NS - phase_ns
            };
            let sum_ns: u64 = (0..STEPS)
                .map(|step| rejected_from_ns(step * CLOCK_TICK_NS / STEPS))
                .sum();
            let off_ns = (sum_ns / STEPS).abs_diff(waits.max_queue_wait_ns);
            assert!(
                off_ns <= CLOCK_TICK_NS / 2 + MS / 10,
                "{max_queue_wait_ms} ms: off by {off_ns} ns"
            );
        }
    }
}
