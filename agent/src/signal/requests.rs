//! How long requests take by themselves, and how long one may therefore have waited where there is too much. Pure.
//!
//! Who has answered takes the next request that has not waited for too long. Requests come by chance: now and then there is
//! none, though too much comes on the mean, and who could work is idle. That is rare where some are answered within the time
//! that one may wait: then, where there is too much, more than those come in it.

use std::{collections::HashMap, sync::Arc};

use crate::{
    detect::Gauge,
    ewma::decay,
    queue::{Kind, QueueKey},
    sample::TargetId,
};

/// Of the delay that is fine, a request may have waited so much: whoever is not turned away has waited nearly as long, and is to be
/// answered in time still.
const OF_FINE: f64 = 0.75;
/// Of the time that a request takes, so much is fine in a queue that does not tell by itself.
const OF_TIME: f64 = 0.5;
const FINE_MOST_NS: u64 = 500_000_000;
/// So many are answered within the time that one may have waited.
const ANSWERED_WITHIN: f64 = 2.0;
/// But that is never longer than a request takes, times this.
const TIMES_MOST: f64 = 1.3;
/// A tick of the kernel's clock, by which readers know it: less is not told apart.
const CLOCK_TICK_NS: u64 = 4_000_000;
/// How long requests take is the mean over about so long, of so many looks at least at which there were some.
const OVER_NS: f64 = 1e10;
const ENOUGH: u32 = 10;

/// The requests of all services.
#[derive(Default)]
pub(super) struct Requests {
    services: HashMap<TargetId, Service>,
}

/// How requests fare just now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// None waits for long before it is taken.
    pub(super) are_taken: bool,
    /// Some are turned away.
    pub(super) are_shed: bool,
}

struct Service {
    at_ns: u64,
    /// Of requests in flight, on the mean; and looks that tell so.
    age_ns: f64,
    looks: u32,
}

/// What is known of a service's requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Known {
    /// One takes so long by itself.
    pub(super) time_ns: f64,
    /// So many are in service at once while others wait.
    pub(super) at_once: Option<f64>,
}

/// What may be waited in a queue, ns: how long is fine, and how long a request may have waited when it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) fine_ns: u64,
    pub(super) most_ns: u64,
}

impl Wait {
    /// Of a queue whose delay that is fine is `fine_ns` by itself.
    pub(super) fn of(fine_ns: u64, known: Option<Known>) -> Self {
        let (mut fine_ns, mut most_ns) = (fine_ns, 0.0);
        if let Some(Known { time_ns, at_once }) = known {
            fine_ns = fine_ns.max(((OF_TIME * time_ns) as u64).min(FINE_MOST_NS));
            if let Some(at_once) = at_once {
                most_ns = time_ns * (ANSWERED_WITHIN / at_once.max(1.0)).min(TIMES_MOST);
            }
        }
        let most_ns = most_ns.max(OF_FINE * fine_ns as f64) as u64;
        Self {
            fine_ns,
            most_ns: most_ns.max(CLOCK_TICK_NS),
        }
    }
}

impl Requests {
    /// Forgets what was looked at last before this time.
    pub(super) fn forget_before(&mut self, ns: u64) {
        self.services.retain(|_, service| service.at_ns >= ns);
    }

    /// Takes in the queues of a service. How long a request takes, ns; `None` where that was not seen often enough.
    pub(super) fn take_in(
        &mut self,
        target: TargetId,
        queues: &[(Arc<QueueKey>, Gauge)],
        now: Now,
    ) -> Option<f64> {
        let of_requests = queues.iter().filter(|(key, _)| key.kind == Kind::Inflight);
        let busiest = of_requests.max_by_key(|(_, gauge)| (gauge.depth, gauge.at_ns));
        let (_, gauge) = busiest?;
        let service = self.services.entry(target).or_insert(Service {
            at_ns: 0,
            age_ns: 0.0,
            looks: 0,
        });
        let passed_ns = gauge.at_ns.saturating_sub(service.at_ns);
        service.at_ns = gauge.at_ns;
        if let Some(age_ns) = gauge.median_age_ns
            && passed_ns > 0
            && service.is_told_by(now)
        {
            // The mean of all so far, until they are old.
            service.looks = service.looks.saturating_add(1);
            let of_all = 1.0 / f64::from(service.looks);
            let fading = 1.0 - decay(passed_ns, OVER_NS);
            service.age_ns += of_all.max(fading) * (age_ns as f64 - service.age_ns);
        }
        // A look comes at any moment of it: in the middle, on the mean.
        (service.looks >= ENOUGH).then_some(2.0 * service.age_ns)
    }
}

impl Service {
    /// What is in flight has waited before, perhaps: not where none waits. Where some are turned away the others wait for as long as
    /// they may, which is not to be taken for the time of a request, and make it longer; but better than nothing.
    fn is_told_by(&self, now: Now) -> bool {
        now.are_taken && (!now.are_shed || self.looks < ENOUGH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn known(time_ms: f64, at_once: Option<f64>) -> Option<Known> {
        Some(Known {
            time_ns: time_ms * 1e6,
            at_once,
        })
    }

    #[test]
    fn one_may_wait_for_as_long_as_is_fine_or_until_some_are_answered_and_not_for_much_longer_than_it_takes()
     {
        for (fine_ms, known, fine, most) in [
            (20, None, 20, 15),
            (20, known(40.0, Some(16.0)), 20, 15),
            (20, known(40.0, Some(4.0)), 20, 20),
            (20, known(40.0, Some(2.0)), 20, 40),
            (20, known(40.0, Some(0.8)), 20, 52),
            // The queue does not tell what is fine.
            (5, known(40.0, None), 20, 15),
            (5, known(4000.0, Some(100.0)), 500, 375),
            (5, known(1.0, Some(4.0)), 5, 4),
        ] {
            let wait = Wait::of(fine_ms * MS, known);
            let expected = Wait {
                fine_ns: fine * MS,
                most_ns: most * MS,
            };
            assert_eq!(wait, expected, "{fine_ms} ms, {known:?}");
        }
    }

    #[test]
    fn how_long_a_request_takes_is_what_it_took_at_rest() {
        let look = |tick: u64, age_ns: Option<u64>| {
            let key = QueueKey::new(1, Kind::Inflight, ":80".into());
            let gauge = Gauge {
                at_ns: tick * 100 * MS,
                depth: u64::from(age_ns.is_some()),
                median_age_ns: age_ns,
                ..Gauge::default()
            };
            [(Arc::new(key), gauge)]
        };
        let now = |are_taken, are_shed| Now {
            are_taken,
            are_shed,
        };
        let mut requests = Requests::default();
        let mut last = None;
        for tick in 1..200 {
            // Of 40 ms, seen at any moment of it, at every other look; some are turned away at first.
            let age_ns = (tick % 2 == 0).then_some(tick * 7 % 40 * MS);
            last = requests.take_in(1, &look(tick, age_ns), now(true, tick < 20));
            assert_eq!(last.is_some(), tick >= 20, "{tick}");
        }
        let time_ns = last.unwrap();
        assert!((35e6..45e6).contains(&time_ns), "{time_ns}");
        for tick in 200..300 {
            let now = now(tick % 2 == 0, tick % 2 == 0);
            assert_eq!(requests.take_in(1, &look(tick, Some(400 * MS)), now), last);
        }
        requests.forget_before(300 * 100 * MS);
        let young = look(300, Some(MS));
        assert_eq!(requests.take_in(1, &young, now(true, false)), None);
    }
}
