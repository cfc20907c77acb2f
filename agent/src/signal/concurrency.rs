//! How many requests at once keep a service busy, while more come than it can do. Pure.
//!
//! Those that are in service while others wait to be taken, and as many more as are answered within a part of the delay that is
//! fine (Little's law): whoever has answered finds the next, and what is above it waits better where the limit is held. Whoever
//! admits no more than that need not know how much comes, nor be told when the service becomes faster or slower: that is why
//! proxies limit by such a number. Where the limit holds nobody waits in the service, and so nothing shows that it could do more:
//! now and then it is one more for a moment.

use std::{collections::HashMap, sync::Arc};

use crate::{
    detect::Gauge,
    ewma::Ewma,
    queue::{Kind, QueueKey},
    sample::TargetId,
};

/// A look sees by chance a little more or less: the mean over about so long.
const OVER_NS: f64 = 1e9;
/// That there is less than it can do is no chance over about so long.
const LESS_OVER_NS: f64 = 4e9;
/// Of the delay that is fine, so much is waited in the service.
const OF_TARGET: f64 = 0.25;
/// One more is tried so often, for so long: proxies ask five or ten times a second. Less than one request in a hundred is later
/// for it.
const TRY_EVERY_NS: u64 = 60_000_000_000;
const TRY_NS: u64 = 500_000_000;
/// There is no more than the service can do when so much of what it had in service while work waited is there at all.
const ENOUGH: f64 = 0.85;

/// What the services do at once when there is enough to do.
#[derive(Default)]
pub struct Concurrency {
    services: HashMap<TargetId, Service>,
}

/// What a service can do at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtOnce {
    /// So many requests keep it busy, and let it answer in time.
    pub most: u32,
    /// What was in service at the last look or the one before, of what is while others wait.
    pub busy: f64,
    /// So many are in service while others wait.
    pub in_service: f64,
}

struct Service {
    at_ns: u64,
    /// The delay that is fine.
    target_delay_ns: u64,
    /// Requests that are there, taken or not, of as many as can be in service.
    there: Ewma,
    /// In service at the last looks. It takes two to tell that there is little: one may come between two requests.
    last: [u64; 2],
    /// In service, and answered per second, while others wait.
    in_service: Ewma,
    per_s: Ewma,
    /// Others waited at the last look.
    waited: bool,
    /// Since when one more is tried; else when it is the next time.
    tried_since_ns: Option<u64>,
    next_try_ns: u64,
}

/// What one look sees.
struct Look {
    at_ns: u64,
    waiting: u64,
    in_service: u64,
    per_s: f64,
}

impl Concurrency {
    /// Forgets what was looked at last before this time.
    pub fn forget_before(&mut self, ns: u64) {
        self.services.retain(|_, service| service.at_ns >= ns);
    }

    /// Takes in the queues of a service; `shed_ns`, where there are more connections that nobody has taken than is fine, is the
    /// delay that would be. What it can do at once, until less is there than that, or more though nobody waits for long, so that
    /// no proxy holds to it; `None` where there was not too much, or where nothing is known.
    pub fn take_in(
        &mut self,
        target: TargetId,
        queues: &[(Arc<QueueKey>, Gauge)],
        shed_ns: Option<u64>,
    ) -> Option<AtOnce> {
        if shed_ns.is_none() && !self.services.contains_key(&target) {
            return None;
        }
        let look = Look::at(queues)?;
        let service = self
            .services
            .entry(target)
            .or_insert_with(|| Service::new(&look));
        service.target_delay_ns = shed_ns.unwrap_or(service.target_delay_ns);
        let said = service.at_once().most;
        service.take_in(&look);
        let is_held = look.waiting + look.in_service <= u64::from(said) + 1;
        let is_enough = service.there.value() >= ENOUGH * service.in_service.value();
        if shed_ns.is_none() && !(is_held && is_enough) {
            self.services.remove(&target);
            return None;
        }
        Some(service.at_once())
    }
}

impl Look {
    fn at(queues: &[(Arc<QueueKey>, Gauge)]) -> Option<Self> {
        let mut look = None;
        let mut waiting = 0;
        for (key, gauge) in queues {
            if key.kind == Kind::Accept {
                waiting += gauge.depth;
            }
            if key.kind == Kind::Inflight {
                let look = look.get_or_insert(Self {
                    at_ns: 0,
                    waiting: 0,
                    in_service: 0,
                    per_s: 0.0,
                });
                look.at_ns = look.at_ns.max(gauge.at_ns);
                look.in_service += gauge.depth;
                look.per_s += gauge
                    .responses_per_s
                    .or(gauge.departures_per_s)
                    .unwrap_or(0.0);
            }
        }
        look.map(|look| Self { waiting, ..look })
    }
}

impl Service {
    fn new(look: &Look) -> Self {
        Self {
            at_ns: look.at_ns,
            target_delay_ns: 0,
            there: Ewma::new(look.in_service as f64, LESS_OVER_NS),
            last: [look.in_service; 2],
            in_service: Ewma::new(look.in_service as f64, OVER_NS),
            per_s: Ewma::new(look.per_s, OVER_NS),
            waited: look.waiting > 0,
            tried_since_ns: None,
            next_try_ns: look.at_ns + TRY_EVERY_NS,
        }
    }

    fn take_in(&mut self, look: &Look) {
        let passed_ns = look.at_ns.saturating_sub(self.at_ns);
        if passed_ns > 0 {
            self.last = [self.last[1], look.in_service];
        }
        let there = (look.waiting + look.in_service) as f64;
        let there = there.min(self.in_service.value());
        self.there.update(there, passed_ns);
        // With nobody waiting there may be too little to do, and who waits at one look alone may be on the way to a worker. But
        // what is in service can be.
        let in_service = look.in_service as f64;
        if look.waiting > 0 && self.waited {
            self.in_service.update(in_service, passed_ns);
            self.per_s.update(look.per_s, passed_ns);
        } else if in_service > self.most() {
            self.in_service = Ewma::new(in_service, OVER_NS);
            self.there = Ewma::new(self.there.value().max(in_service), LESS_OVER_NS);
            // Perhaps another one, too.
            self.tried_since_ns = Some(look.at_ns);
        } else if in_service > self.in_service.value() {
            self.in_service.update(in_service, passed_ns);
        }
        self.waited = look.waiting > 0;
        match self.tried_since_ns {
            Some(since_ns) if look.at_ns >= since_ns + TRY_NS => {
                self.tried_since_ns = None;
                self.next_try_ns = look.at_ns + TRY_EVERY_NS;
            }
            None if look.at_ns >= self.next_try_ns => self.tried_since_ns = Some(look.at_ns),
            _ => {}
        }
        self.at_ns = look.at_ns;
    }

    /// What is known to keep it busy.
    fn most(&self) -> f64 {
        let waiting = self.per_s.value() * OF_TARGET * self.target_delay_ns as f64 / 1e9;
        (self.in_service.value() + waiting).round().max(1.0)
    }

    fn at_once(&self) -> AtOnce {
        AtOnce {
            most: self.most() as u32 + u32::from(self.tried_since_ns.is_some()),
            busy: self.last[0].max(self.last[1]) as f64 / self.in_service.value().max(1.0),
            in_service: self.in_service.value(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK_NS: u64 = 100_000_000;
    const TARGET_NS: u64 = 20_000_000;

    /// A service, as it looks at a tick.
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
        let at_once = all.take_in(1, queues, shed.then_some(TARGET_NS));
        at_once.map(|at_once| at_once.most)
    }

    #[test]
    fn it_is_what_is_in_service_and_what_may_wait_until_there_is_less() {
        let mut all = Concurrency::default();
        assert_eq!(read(&mut all, &queues(1, 0, 4, 100.0), false), None);
        let mut most = None;
        for tick in 2..50 {
            // Four workers, one of them between two requests now and then. Soon only what is on its way to them waits.
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
    fn it_is_one_at_least() {
        for (in_service, most) in [(1, 1), (0, 1)] {
            let queues = queues(1, 9, in_service, 0.5);
            assert_eq!(read(&mut Concurrency::default(), &queues, true), Some(most));
        }
    }

    #[test]
    fn a_service_that_becomes_slower_is_followed() {
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
    fn how_busy_it_is_is_what_is_in_service_of_what_was() {
        let mut all = Concurrency::default();
        let mut busy = Vec::new();
        for tick in 1..=23 {
            let queues = queues(tick, 0, if tick <= 20 { 4 } else { 2 }, 100.0);
            let at_once = all.take_in(1, &queues, Some(TARGET_NS)).unwrap();
            busy.push((at_once.busy * 100.0).round());
        }
        assert_eq!(busy[18..], [100.0, 100.0, 100.0, 50.0, 50.0]);
    }

    /// Others wait for the first nine ticks, with so many in service.
    fn overloaded(in_service: u64) -> Concurrency {
        let mut all = Concurrency::default();
        for tick in 1..10 {
            assert!(read(&mut all, &queues(tick, 9, in_service, 10.0), true).is_some());
        }
        all
    }

    /// What is said of a service with so many workers, while a proxy holds it to what was said before: at each tick.
    fn held(all: &mut Concurrency, workers: u64, ticks: std::ops::Range<u64>) -> Vec<u32> {
        let mut said = Vec::new();
        let mut most = all.services[&1].at_once().most;
        for tick in ticks {
            let in_service = u64::from(most).min(workers);
            let queues = queues(tick, u64::from(most) - in_service, in_service, 10.0);
            most = read(all, &queues, false).unwrap();
            said.push(most);
        }
        said
    }

    #[test]
    fn now_and_then_one_more_is_tried_for_a_moment() {
        let mut all = overloaded(4);
        let said = held(&mut all, 4, 10..6010);
        let more = said.iter().filter(|most| **most == 5).count();
        assert!((40..=60).contains(&more), "{more} of 6000 ticks");
        assert!(said.iter().all(|most| (4..=5).contains(most)));
    }

    #[test]
    fn a_limit_that_became_too_low_rises_at_once_when_that_is_found() {
        let mut all = overloaded(2);
        let said = held(&mut all, 8, 10..1000);
        let reached = said.iter().position(|most| *most == 8).unwrap();
        assert!(reached < 620, "8 after {reached} ticks");
        assert!(said[reached..].iter().all(|most| (8..=9).contains(most)));
    }

    #[test]
    fn one_that_is_a_part_of_a_worker_too_low_rises() {
        let mut all = Concurrency::default();
        for tick in 1..200 {
            // Of ten workers one is between two requests at most looks.
            let in_service = if tick % 10 == 0 { 10 } else { 9 };
            read(&mut all, &queues(tick, 9, in_service, 0.5), true);
        }
        assert_eq!(all.services[&1].at_once().most, 9);
        assert_eq!(held(&mut all, 10, 200..2000).last(), Some(&10));
    }

    #[test]
    fn slow_looks_try_one_more_too() {
        for ticks in [2, 5, 7, 10, 15, 30] {
            let mut all = Concurrency::default();
            let mut tried = 0;
            for look in 1..2000 {
                let most = read(&mut all, &queues(look * ticks, 0, 4, 1.0), look < 3);
                tried += u32::from(most == Some(5));
            }
            assert!(tried > 2, "{tried} at {ticks} ticks");
        }
    }

    #[test]
    fn a_limit_that_no_proxy_holds_ends_when_nobody_waits_for_long() {
        let mut all = overloaded(4);
        // Nearly all that it can do comes, by chance: now many, now few.
        let waiting = [0, 1, 3, 0];
        let last = (10..14).map(|tick| {
            let queues = queues(tick, waiting[tick as usize % 4], 4, 10.0);
            read(&mut all, &queues, false)
        });
        assert_eq!(last.last().unwrap(), None);
    }

    #[test]
    fn one_that_waits_on_its_way_to_a_worker_does_not_lower_it() {
        let mut all = overloaded(4);
        let mut most = None;
        for tick in 10..110 {
            let (waiting, in_service) = if tick % 3 == 0 { (1, 3) } else { (0, 4) };
            most = read(&mut all, &queues(tick, waiting, in_service, 10.0), false);
        }
        assert_eq!(most, Some(4));
    }

    #[test]
    fn where_requests_in_flight_are_not_seen_nothing_is_said() {
        let [accept, _] = queues(1, 90, 4, 100.0);
        assert_eq!(read(&mut Concurrency::default(), &[accept], true), None);
    }
}
