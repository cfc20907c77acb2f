//! The load of a service: demand as a fraction of its capacity, for load balancers and autoscalers. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::constants::{
    MAX_LOAD, MIN_BUSY_WHEN_FULL, MIN_FULL_BY_REQUESTS, RECENT_UTILIZATION_TIME_CONSTANT_NS,
    UTILIZATION_TIME_CONSTANT_NS, WHEN_FULL_TIME_CONSTANT_NS,
};
use crate::{
    detect::Gauge,
    ewma::Ewma,
    queue::{Kind, QueueKey},
    sample::TargetId,
};

/// Demand on a service.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// As a fraction of capacity: 1 is all of it, 2 twice that or more.
    pub all: f64,
    /// CPU utilization, as a fraction of the CPUs that the service may use.
    pub cpu: f64,
}

/// The averaged utilization of every worker group, event loop and CPU set.
#[derive(Default)]
pub struct Loads {
    utilizations: HashMap<Arc<QueueKey>, Utilization>,
    /// For each service that sheds: how much of its capacity the admitted work uses, and the time of the last sample, ns.
    used: BTreeMap<TargetId, (Ewma, u64)>,
}

/// What a service rejects.
#[derive(Clone, Copy, Debug)]
pub struct Shedding {
    pub admit_ratio: f64,
    /// It sheds by a concurrency limit or by queue wait.
    pub is_limited: bool,
    /// Utilization as a fraction of the one under overload, 0 to 1; `None` if either is unknown.
    pub used: Option<f64>,
}

#[derive(Clone, Copy)]
struct Utilization {
    at_ns: u64,
    /// Without the first sample, which has no time span and shows an idle service.
    mean: Ewma,
    recent: Ewma,
    /// The mean while about as many requests are in service as under overload.
    when_full: Ewma,
}

impl Loads {
    /// Drops the queues that were last observed before this time, ns.
    pub fn forget_before(&mut self, ns: u64) {
        self.utilizations
            .retain(|_, utilization| utilization.at_ns >= ns);
        self.used.retain(|_, (_, at_ns)| *at_ns >= ns);
    }

    /// Adds the queues of one service. Returns the highest recent utilization among its worker groups, event loops and CPUs; `None`
    /// if none is known. `by_requests` is the utilization of the workers by requests in service, if known: it is sampled more often.
    /// It does not apply to CPUs, since one request can keep a CPU busy. It replaces the utilization of workers that appear idle
    /// under overload, because what they do (such as a sleep) is not recognized as work.
    pub fn add(
        &mut self,
        queues: &[(Arc<QueueKey>, Gauge)],
        by_requests: Option<f64>,
    ) -> Option<f64> {
        let mut highest: Option<f64> = None;
        for (key, gauge) in queues {
            let Some(now) = gauge.utilization else {
                continue;
            };
            let known = self
                .utilizations
                .entry(Arc::clone(key))
                .or_insert_with(|| Utilization::new(gauge.at_ns, now));
            let of_workers = by_requests.filter(|_| key.kind == Kind::Workers);
            let recent = known.read(gauge.at_ns, now, of_workers);
            highest = Some(highest.unwrap_or(0.0).max(recent));
        }
        highest
    }

    /// The load of a service whose queues were added: its highest utilization or score and, while it sheds, what it uses of its
    /// capacity ÷ admit ratio.
    pub fn of(
        &mut self,
        now_ns: u64,
        target: TargetId,
        queues: &[(Arc<QueueKey>, Gauge)],
        score: f64,
        shedding: Shedding,
    ) -> Load {
        let mut highest = score;
        let mut cpu = 0.0;
        for (key, _) in queues {
            let Some(utilization) = self.utilizations.get(key) else {
                continue;
            };
            let mean = utilization.mean.value();
            highest = highest.max(mean);
            if key.kind == Kind::Runqueue {
                cpu = mean;
            }
        }
        let demand = self.demand(now_ns, target, shedding);
        Load {
            all: highest.max(demand).min(MAX_LOAD),
            cpu,
        }
    }

    /// Demand on a service that sheds, as a fraction of its capacity; 0 if it does not. The admitted work is the admitted share of
    /// the demand. It uses all of the capacity unless the demand has fallen, or a load balancer has moved it elsewhere.
    fn demand(&mut self, now_ns: u64, target: TargetId, shedding: Shedding) -> f64 {
        let Shedding {
            admit_ratio,
            is_limited,
            used,
        } = shedding;
        if admit_ratio >= 1.0 && !is_limited {
            self.used.remove(&target);
            return 0.0;
        }
        let (mean, at_ns) = self
            .used
            .entry(target)
            .or_insert((Ewma::new(1.0, UTILIZATION_TIME_CONSTANT_NS), now_ns));
        mean.update(used.unwrap_or(1.0), now_ns.saturating_sub(*at_ns));
        *at_ns = now_ns;
        mean.value() / admit_ratio.max(1.0 / MAX_LOAD)
    }
}

impl Utilization {
    fn new(at_ns: u64, now: f64) -> Self {
        Self {
            at_ns,
            mean: Ewma::mean_of(0, now, UTILIZATION_TIME_CONSTANT_NS),
            recent: Ewma::new(now, RECENT_UTILIZATION_TIME_CONSTANT_NS),
            // Undecided: the first sample decides.
            when_full: Ewma::new(MIN_BUSY_WHEN_FULL, WHEN_FULL_TIME_CONSTANT_NS),
        }
    }

    /// Adds a sample. Returns the recent utilization; `by_requests` is that of the workers by the requests in service, if known.
    fn read(&mut self, at_ns: u64, now: f64, by_requests: Option<f64>) -> f64 {
        let elapsed_ns = at_ns.saturating_sub(self.at_ns);
        self.at_ns = at_ns;
        if elapsed_ns > 0 {
            self.mean.update(now, elapsed_ns);
        }
        self.recent.update(now, elapsed_ns);
        let Some(by_requests) = by_requests else {
            return self.recent.value();
        };
        if by_requests >= MIN_FULL_BY_REQUESTS {
            self.when_full.update(now, elapsed_ns);
        }
        let is_recognized = self.when_full.value() >= MIN_BUSY_WHEN_FULL;
        let limit = if is_recognized {
            self.recent.value()
        } else {
            1.0
        };
        by_requests.min(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Shedding = Shedding {
        admit_ratio: 1.0,
        is_limited: false,
        used: None,
    };

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
    fn the_load_is_the_highest_mean_utilization() {
        let mut loads = Loads::default();
        let mut load = Load::default();
        for tick in 0..100 {
            let at_ns = tick * 100_000_000;
            // Three of four workers are busy, on average.
            let busy = if tick % 4 == 0 { 0.0 } else { 1.0 };
            let queues = [
                queue(Kind::Workers, at_ns, busy),
                queue(Kind::Runqueue, at_ns, 0.25),
            ];
            let busiest = loads.add(&queues, None);
            let by_requests = loads.add(&queues, Some(0.1));
            assert!(busiest >= by_requests && by_requests >= Some(0.25));
            load = loads.of(at_ns, 1, &queues, 0.1, NONE);
        }
        assert!((load.all - 0.75).abs() < 0.05, "{load:?}");
        assert!((load.cpu - 0.25).abs() < 1e-9, "{load:?}");
        loads.forget_before(u64::MAX);
        let none = loads.of(0, 1, &[], 0.4, NONE);
        assert_eq!(
            (none.all, none.cpu),
            (0.4, 0.0),
            "the score, without a utilization"
        );
    }

    #[test]
    fn the_first_sample_does_not_count() {
        let mut loads = Loads::default();
        for (tick, busy) in [(0, 0.0), (1, 0.6), (2, 0.8)] {
            loads.add(&[queue(Kind::Workers, tick * 100_000_000, busy)], None);
        }
        let queues = [queue(Kind::Workers, 0, 0.0)];
        let load = loads.of(0, 1, &queues, 0.0, NONE).all;
        assert!((load - 0.7).abs() < 1e-9, "{load}");
    }

    #[test]
    fn workers_that_look_idle_under_overload_are_as_busy_as_their_requests() {
        let mut loads = Loads::default();
        let mut at_ns = 0;
        let mut run = |busy: f64, by_requests: f64| {
            let mut last = None;
            for _ in 0..10 {
                at_ns += 100_000_000;
                last = loads.add(&[queue(Kind::Workers, at_ns, busy)], Some(by_requests));
            }
            last.unwrap()
        };
        assert!(run(0.0, 0.5) < 0.01, "not under overload");
        assert!(run(0.0, 1.5) >= 1.0, "asleep, with a request each");
        assert!((run(0.0, 0.25) - 0.25).abs() < 1e-9, "fewer requests");
        assert!(run(1.0, 1.0) > 0.9, "now at work");
        assert!(run(0.2, 0.5) < 0.25, "fewer workers than requests");
    }

    #[test]
    fn overload_is_one_over_the_admit_ratio_and_two_at_most() {
        let mut loads = Loads::default();
        for (admit_ratio, load) in [(1.0, 0.9), (0.8, 1.25), (0.5, 2.0), (0.05, 2.0)] {
            let shedding = Shedding {
                admit_ratio,
                ..NONE
            };
            let all = loads.of(0, 1, &[], 0.9, shedding).all;
            assert_eq!(all, load, "{admit_ratio}");
        }
        let limited = Shedding {
            is_limited: true,
            ..NONE
        };
        assert_eq!(loads.of(0, 1, &[], 0.7, limited).all, 1.0);
    }

    #[test]
    fn a_service_whose_work_has_moved_elsewhere_has_little_load_though_it_still_sheds() {
        let mut loads = Loads::default();
        let mut last = 0.0;
        for tick in 0..100 {
            let shedding = Shedding {
                admit_ratio: 0.8,
                is_limited: true,
                used: Some(if tick < 50 { 1.0 } else { 0.2 }),
            };
            last = loads.of(tick * 100_000_000, 1, &[], 0.1, shedding).all;
            if tick < 50 {
                assert!((last - 1.25).abs() < 1e-9, "{last}");
            }
        }
        assert!((last - 0.25).abs() < 0.1, "{last}");
        assert_eq!(loads.of(0, 1, &[], 0.1, NONE).all, 0.1);
    }
}
