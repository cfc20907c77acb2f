//! How much of what a service can do is asked of it: what balances and scales instances goes by that. Pure.

use std::{collections::HashMap, sync::Arc};

use crate::{
    detect::Gauge,
    ewma::Ewma,
    queue::{Kind, QueueKey},
};

/// Shares of time are looked at over about so long: a worker is busy or not at a look, nothing between.
const OVER_NS: f64 = 2e9;
/// And over so long where it has to be known soon.
const LATELY_NS: f64 = 1e8;

/// More than twice what a service can do is not told apart: how many of those who were turned away come again is not known.
const MOST: f64 = 2.0;

/// What is asked of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Of what it can do: 1 is all of it, 2 twice that or more.
    pub all: f64,
    /// Of the CPUs that it may use.
    pub cpu: f64,
}

/// The shares of all that works, evened out.
#[derive(Default)]
pub struct Loads {
    shares: HashMap<Arc<QueueKey>, Share>,
}

#[derive(Clone, Copy)]
struct Share {
    at_ns: u64,
    mean: Ewma,
    lately: Ewma,
}

impl Loads {
    /// Forgets what was looked at last before this time.
    pub fn forget_before(&mut self, ns: u64) {
        self.shares.retain(|_, share| share.at_ns >= ns);
    }

    /// Takes in the queues of one service, and how busy its workers are by the requests in service, where that is known: those are
    /// looked at more often. It says nothing of CPUs: one request alone may keep one busy. How busy the busiest of what works
    /// was lately; `None` where nothing is known.
    pub fn take_in(
        &mut self,
        queues: &[(Arc<QueueKey>, Gauge)],
        by_requests: Option<f64>,
    ) -> Option<f64> {
        let mut busiest: Option<f64> = None;
        for (key, gauge) in queues {
            let Some(busy) = gauge.utilization else {
                continue;
            };
            let share = self.shares.entry(Arc::clone(key)).or_insert(Share {
                at_ns: gauge.at_ns,
                mean: Ewma::new(busy, OVER_NS),
                lately: Ewma::new(busy, LATELY_NS),
            });
            share.add(gauge.at_ns, busy);
            let lately = match by_requests {
                Some(busy) if key.kind == Kind::Workers => busy.min(share.lately.value()),
                _ => share.lately.value(),
            };
            busiest = Some(busiest.unwrap_or(0.0).max(lately));
        }
        busiest
    }

    /// What is asked of a service whose queues were taken in, by them, by its score, and by what share of new work it is to take,
    /// or whether it is to take only so much at once, or what has not waited for long.
    pub fn of(
        &self,
        queues: &[(Arc<QueueKey>, Gauge)],
        score: f64,
        admit: f64,
        is_limited: bool,
    ) -> Load {
        let mut busiest = score;
        let mut cpu = 0.0;
        for (key, _) in queues {
            let Some(share) = self.shares.get(key) else {
                continue;
            };
            busiest = busiest.max(share.mean.value());
            if key.kind == Kind::Runqueue {
                cpu = share.mean.value();
            }
        }
        // Of a service that is to turn work away, it is known what share of all that comes is as much as it can do.
        let all = if admit < 1.0 {
            busiest.max(1.0 / admit.max(1.0 / MOST))
        } else {
            busiest
        };
        // And of one that is limited otherwise, that this is as much as it can do.
        let least = if is_limited { 1.0 } else { 0.0 };
        let all = all.clamp(least, MOST);
        Load { all, cpu }
    }
}

impl Share {
    fn add(&mut self, at_ns: u64, busy: f64) {
        let passed_ns = at_ns.saturating_sub(self.at_ns);
        self.mean.update(busy, passed_ns);
        self.lately.update(busy, passed_ns);
        self.at_ns = at_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(kind: Kind, at_ns: u64, busy: f64) -> (Arc<QueueKey>, Gauge) {
        let key = QueueKey::new(1, kind, "x".into());
        let gauge = Gauge {
            at_ns,
            utilization: Some(busy),
            ..Gauge::default()
        };
        (Arc::new(key), gauge)
    }

    #[test]
    fn the_busiest_of_what_works_counts_over_some_time() {
        let mut loads = Loads::default();
        let mut load = Load::default();
        for tick in 0..100 {
            let at_ns = tick * 100_000_000;
            // Three workers of four, on average.
            let busy = if tick % 4 == 0 { 0.0 } else { 1.0 };
            let queues = [
                queue(Kind::Workers, at_ns, busy),
                queue(Kind::Runqueue, at_ns, 0.25),
            ];
            let busiest = loads.take_in(&queues, None);
            let by_requests = loads.take_in(&queues, Some(0.1));
            assert!(busiest >= by_requests && by_requests >= Some(0.25));
            load = loads.of(&queues, 0.1, 1.0, false);
        }
        assert!((load.all - 0.75).abs() < 0.05, "{load:?}");
        assert!((load.cpu - 0.25).abs() < 1e-9, "{load:?}");
        loads.forget_before(u64::MAX);
        let none = loads.of(&[], 0.4, 1.0, false);
        assert_eq!((none.all, none.cpu), (0.4, 0.0), "the fullest queue then");
    }

    #[test]
    fn more_than_it_can_do_is_what_it_may_take_turned_round_and_no_more_than_twice() {
        let loads = Loads::default();
        for (admit, load) in [(1.0, 0.9), (0.8, 1.25), (0.5, 2.0), (0.05, 2.0)] {
            assert_eq!(loads.of(&[], 0.9, admit, false).all, load, "{admit}");
        }
        assert_eq!(loads.of(&[], 0.7, 1.0, true).all, 1.0);
    }
}
