//! Computes the pressure on each service, which is what gets published, from the gauges of its queues. Pure.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    concurrency::Concurrency,
    constants::{EXPIRE_AFTER_NS, FAIL_OPEN_AFTER_NS, RETRY_AFTER_MS},
    controller::{Controller, ControllerState, Observation},
    learned::{Learned, LearnedQueue},
    load::{Load, Loads, Shedding},
    requests::{DispatchState, Requests},
    response_size::ResponseSizes,
    waits::{Known, Waits},
};
use crate::{
    detect::Gauge,
    event::Level,
    queue::{Criterion, Kind, QueueKey},
    sample::{Target, TargetId},
};

/// The pressure on one service.
#[derive(Clone, Debug)]
pub struct Pressure {
    pub target: Arc<Target>,
    pub level: Level,
    /// Score of the worst queue: 1 is saturated; may exceed 1.
    pub score: f64,
    /// Share of new work to admit, 0 to 1.
    pub admit_ratio: f64,
    pub load: Load,
    /// Recent utilization of its busiest worker group, event loop or CPU set, 0 to 1.
    pub utilization: Option<f64>,
    /// Maximum number of requests to have in service at once; `None` without overload, or if unknown.
    pub concurrency_limit: Option<u32>,
    /// Reject work at dequeue if it waited longer, ns. `None`: no overload, or one that rejecting at dequeue would not relieve.
    pub max_queue_wait_ns: Option<u64>,
    /// Age of the oldest work that has not been dequeued yet, ns.
    pub oldest_age_ns: u64,
    /// `None`: no queue is filling.
    pub time_to_full_ns: Option<u64>,
    /// When rejected clients should retry, ms; 0: nothing is rejected.
    pub retry_after_ms: u32,
    /// Worst first.
    pub queues: Vec<(Arc<QueueKey>, Gauge)>,
    /// The controllers of its queues, in the order of `queues`. A queue has one from its first delay until it has been empty for a
    /// while.
    pub controllers: Vec<(Arc<QueueKey>, ControllerState)>,
}

impl Pressure {
    /// New work is to be rejected: by admit ratio, concurrency limit or max queue wait.
    pub fn is_shedding(&self) -> bool {
        self.admit_ratio < 1.0
            || self.concurrency_limit.is_some()
            || self.max_queue_wait_ns.is_some()
    }
}

/// Each with the time of its last reading, ns.
type Controllers = HashMap<Arc<QueueKey>, (Controller, u64)>;

/// Computes the pressure on all services, and keeps the controllers of their queues.
#[derive(Default)]
pub struct PressureTracker {
    controllers: Controllers,
    loads: Loads,
    concurrency: Concurrency,
    requests: Requests,
    response_sizes: ResponseSizes,
    /// By a former agent.
    learned: Learned,
}

impl PressureTracker {
    /// Starts with what a former agent has learned.
    pub fn resume(learned: Learned) -> Self {
        Self {
            learned,
            ..Self::default()
        }
    }

    /// What a later agent can use.
    pub fn learned(&self, now_ns: u64, pressures: &[Pressure]) -> Learned {
        let mut learned = Learned::new(now_ns);
        for pressure in pressures {
            for (key, _) in &pressure.queues {
                let controller = self.controllers.get(key);
                let queue = LearnedQueue {
                    requests: self.requests.learned(key),
                    controller: controller.and_then(|(controller, _)| controller.learned()),
                    response_bytes: self.response_sizes.learned(key),
                };
                learned.add(&pressure.target, key, queue);
            }
        }
        learned
    }

    /// Adds the gauges of all queues. Returns one pressure per selected target, in the order of their ids.
    pub fn read<'a>(
        &mut self,
        now_ns: u64,
        gauges: impl Iterator<Item = (&'a Arc<QueueKey>, &'a Gauge)>,
        targets: impl Iterator<Item = &'a Arc<Target>>,
    ) -> Vec<Pressure> {
        let mut by_target: BTreeMap<TargetId, Vec<(Arc<QueueKey>, Gauge)>> = BTreeMap::new();
        for (key, gauge) in gauges {
            if now_ns.saturating_sub(gauge.at_ns) > EXPIRE_AFTER_NS {
                continue;
            }
            let queues = by_target.entry(key.target).or_default();
            queues.push((Arc::clone(key), *gauge));
        }
        self.controllers.retain(|_, (controller, read_ns)| {
            now_ns.saturating_sub(*read_ns) <= FAIL_OPEN_AFTER_NS && !controller.is_expired()
        });
        self.loads
            .forget_before(now_ns.saturating_sub(EXPIRE_AFTER_NS));
        let fail_open_ns = now_ns.saturating_sub(FAIL_OPEN_AFTER_NS);
        self.concurrency.forget_before(fail_open_ns);
        self.requests.forget_before(fail_open_ns);
        self.response_sizes.forget_before(fail_open_ns);
        targets
            .filter(|target| !target.is_neighbour)
            .map(|target| {
                let queues = by_target.remove(&target.id).unwrap_or_default();
                self.of_target(now_ns, Arc::clone(target), queues)
            })
            .collect()
    }

    fn of_target(
        &mut self,
        now_ns: u64,
        target: Arc<Target>,
        mut queues: Vec<(Arc<QueueKey>, Gauge)>,
    ) -> Pressure {
        for (key, gauge) in &queues {
            if key.kind == Kind::Inflight && !self.requests.knows(key) {
                let learned = self.learned.get(&target, key, now_ns);
                if let Some(requests) = learned.requests {
                    self.requests.resume(key, requests);
                }
                if let Some(bytes) = learned.response_bytes {
                    self.response_sizes.resume(key, gauge.at_ns, bytes);
                }
            }
        }
        self.response_sizes.bound(&mut queues);
        let shed_target_ns = self.shed_target_ns(&queues);
        let limit = self.concurrency.add(target.id, &queues, shed_target_ns);
        let known = self.known_requests(&queues, limit.map(|limit| limit.in_service));
        let utilization = self
            .loads
            .add(&queues, limit.map(|limit| limit.utilization));
        let admit_ratio = queues
            .iter()
            .filter(|(key, _)| is_inbound(key))
            .map(|(key, gauge)| self.admit_ratio(now_ns, &target, key, gauge, known, utilization))
            .fold(1.0, f64::min);
        queues.sort_unstable_by(|(a, of_a), (b, of_b)| {
            let rank = |gauge: &Gauge| Reverse((gauge.level, (gauge.score * 1e6) as u64));
            rank(of_a).cmp(&rank(of_b)).then_with(|| a.cmp(b))
        });
        let oldest_age_ns = queues
            .iter()
            .filter_map(age_before_dequeue)
            .max()
            .unwrap_or(0);
        let score = queues
            .iter()
            .map(|(_, gauge)| gauge.score)
            .fold(0.0, f64::max);
        let max_queue_wait_ns = self.max_queue_wait_ns(&queues, known);
        let is_limited = limit.is_some() || max_queue_wait_ns.is_some();
        let shedding = Shedding {
            admit_ratio,
            is_limited,
            used: self.used(&queues),
        };
        let (min_ms, max_ms) = RETRY_AFTER_MS;
        let retry_after_ms = if admit_ratio < 1.0 || is_limited {
            (oldest_age_ns.saturating_mul(2) / 1_000_000).clamp(min_ms, max_ms) as u32
        } else {
            0
        };
        Pressure {
            level: queues.first().map_or(Level::Ok, |(_, gauge)| gauge.level),
            score,
            admit_ratio,
            load: self.loads.of(now_ns, target.id, &queues, score, shedding),
            utilization,
            concurrency_limit: limit.map(|limit| limit.limit),
            max_queue_wait_ns,
            oldest_age_ns,
            time_to_full_ns: queues
                .iter()
                .filter_map(|(_, gauge)| gauge.time_to_full_ns)
                .min(),
            retry_after_ms,
            controllers: self.controllers_of(&queues),
            target,
            queues,
        }
    }

    /// Recent utilization as a fraction of the one under overload, by the queue that sheds the most; `None` if unknown.
    fn used(&self, queues: &[(Arc<QueueKey>, Gauge)]) -> Option<f64> {
        let shedding = queues
            .iter()
            .filter_map(|(key, _)| Some(&self.controllers.get(key)?.0))
            .filter(|controller| controller.is_shedding());
        shedding
            .min_by(|a, b| a.admit_ratio().total_cmp(&b.admit_ratio()))?
            .used()
    }

    /// What is known about the requests of a service, of which `in_service` are in service simultaneously under overload.
    fn known_requests(
        &mut self,
        queues: &[(Arc<QueueKey>, Gauge)],
        in_service: Option<f64>,
    ) -> Option<Known> {
        let Self {
            controllers,
            requests,
            ..
        } = self;
        let waits_before_dequeue = || queues.iter().filter(|(key, _)| can_be_shed_at_dequeue(key));
        let is_shed = |key: &Arc<QueueKey>| is_shed(controllers, key);
        let now = DispatchState {
            dequeue_wait_ns: waits_before_dequeue()
                .map(|(_, gauge)| gauge.delay_ns)
                .max()
                .unwrap_or(0),
            are_dequeued_soon: waits_before_dequeue()
                .all(|(_, gauge)| gauge.delay_ns <= gauge.target_delay_ns),
            are_shed_at_dequeue: waits_before_dequeue().any(|(key, _)| is_shed(key)),
            are_shed: queues.iter().any(|(key, _)| is_shed(key)),
        };
        let service_time_ns = requests.add(queues, now, is_shed)?;
        Some(Known {
            service_time_ns,
            in_service,
        })
    }

    /// The smallest target delay of the accept queues whose work is shed, ns; `None` if there are none.
    fn shed_target_ns(&self, queues: &[(Arc<QueueKey>, Gauge)]) -> Option<u64> {
        queues
            .iter()
            .filter(|(key, _)| key.kind == Kind::Accept && is_shed(&self.controllers, key))
            .map(|(_, gauge)| gauge.target_delay_ns)
            .min()
    }

    /// The max queue wait, ns, if overload shows only in queues whose work is rejected at dequeue. Work that waits within the service
    /// itself cannot be rejected that way.
    fn max_queue_wait_ns(
        &self,
        queues: &[(Arc<QueueKey>, Gauge)],
        known: Option<Known>,
    ) -> Option<u64> {
        let mut smallest_ns = None;
        for (key, gauge) in queues {
            if !is_shed(&self.controllers, key) {
                continue;
            }
            if !can_be_shed_at_dequeue(key) {
                return None;
            }
            let own_ns = waits(key, gauge, known).published_max_queue_wait_ns();
            smallest_ns = Some(smallest_ns.map_or(own_ns, |ns: u64| ns.min(own_ns)));
        }
        smallest_ns
    }

    fn controllers_of(
        &self,
        queues: &[(Arc<QueueKey>, Gauge)],
    ) -> Vec<(Arc<QueueKey>, ControllerState)> {
        let state = |key| Some((Arc::clone(key), self.controllers.get(key)?.0.state()));
        queues.iter().filter_map(|(key, _)| state(key)).collect()
    }

    fn admit_ratio(
        &mut self,
        now_ns: u64,
        target: &Target,
        key: &Arc<QueueKey>,
        gauge: &Gauge,
        known: Option<Known>,
        utilization: Option<f64>,
    ) -> f64 {
        let Waits {
            target_delay_ns,
            max_queue_wait_ns,
        } = waits(key, gauge, known);
        let mut observation = Observation {
            now_ns: gauge.at_ns,
            delay_ns: gauge.delay_ns,
            target_delay_ns,
            max_queue_wait_ns,
            is_counted: gauge.is_counted,
            arrivals: gauge.arrivals,
            departures: gauge.departures,
            utilization,
        };
        // In-flight requests: the controller acts on how long they wait inside the service. If the service itself has become slower
        // than its learned service time, decisions based on that are void.
        if let Some(inside_wait) = self.requests.inside(key)
            && !gauge.is_target_configured
        {
            observation.delay_ns = inside_wait.delay_ns;
            observation.target_delay_ns = inside_wait.target_delay_ns;
            observation.max_queue_wait_ns = inside_wait.target_delay_ns;
            observation.utilization = inside_wait.utilization;
            if inside_wait.is_slower {
                self.controllers.remove(key);
                return 1.0;
            }
        }
        // The state of the queue is no longer known: fail open.
        if now_ns.saturating_sub(gauge.at_ns) > FAIL_OPEN_AFTER_NS {
            self.controllers.remove(key);
            return 1.0;
        }
        // An empty queue needs no controller.
        if observation.delay_ns == 0 && !self.controllers.contains_key(key) {
            return 1.0;
        }
        let (controller, read_ns) = self.controllers.entry(Arc::clone(key)).or_insert_with(|| {
            let learned = self.learned.get(target, key, now_ns).controller;
            let controller = match learned {
                Some(learned) => Controller::resume(observation, learned),
                None => Controller::new(observation),
            };
            (controller, observation.now_ns)
        });
        // Without a new reading there is nothing new to decide on.
        if gauge.at_ns > *read_ns {
            controller.read(observation);
            *read_ns = gauge.at_ns;
        }
        controller.admit_ratio()
    }
}

/// The acceptable waits in a queue. A configured target delay is used as it is.
fn waits(key: &QueueKey, gauge: &Gauge, known: Option<Known>) -> Waits {
    let known = known.filter(|_| can_be_shed_at_dequeue(key) && !gauge.is_target_configured);
    Waits::of(gauge.target_delay_ns, known)
}

/// The age of the oldest work in an inbound queue, ns, if the work there has not been dequeued yet.
fn age_before_dequeue((key, gauge): &(Arc<QueueKey>, Gauge)) -> Option<u64> {
    let awaits_dequeue = is_inbound(key) && key.kind.criterion() != Criterion::AgainstBaseline;
    gauge
        .oldest_age_ns
        .filter(|_| awaits_dequeue && gauge.depth > 0)
}

/// Whether the work of this queue is shed.
fn is_shed(controllers: &Controllers, key: &Arc<QueueKey>) -> bool {
    controllers
        .get(key)
        .is_some_and(|(controller, _)| controller.is_shedding())
}

/// Whether requests wait in this queue until the service dequeues them, which is where it can reject them.
fn can_be_shed_at_dequeue(key: &QueueKey) -> bool {
    matches!(key.kind, Kind::Accept | Kind::Recv)
}

/// Whether the work in this queue comes from clients, so that shedding reduces it.
pub fn is_inbound(key: &QueueKey) -> bool {
    match key.kind {
        Kind::Syn | Kind::Accept | Kind::Udp | Kind::Inflight => true,
        // A connection that the service opened itself carries responses.
        Kind::Recv => key.id.remote().is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal::controller::Mode;

    fn target(id: u32, is_neighbour: bool) -> Arc<Target> {
        Arc::new(Target {
            id,
            name: "shop".to_owned(),
            pid: 7,
            is_neighbour,
            ..Target::default()
        })
    }

    fn queue(kind: Kind, name: &str, score: f64, level: Level) -> (Arc<QueueKey>, Gauge) {
        let key = QueueKey::new(1, kind, name.into());
        let gauge = Gauge {
            score,
            level,
            depth: 3,
            oldest_age_ns: Some(9),
            ..Gauge::default()
        };
        (Arc::new(key), gauge)
    }

    fn read(
        tracker: &mut PressureTracker,
        now_ns: u64,
        queues: &[(Arc<QueueKey>, Gauge)],
    ) -> Vec<Pressure> {
        let targets = [target(1, false), target(2, true)];
        tracker.read(
            now_ns,
            queues.iter().map(|(key, gauge)| (key, gauge)),
            targets.iter(),
        )
    }

    #[test]
    fn the_worst_queue_comes_first_and_defines_level_and_score() {
        let queues = [
            queue(Kind::Pipe, "pipe:[1]", 0.2, Level::Ok),
            queue(Kind::Accept, ":80", 0.95, Level::Critical),
            queue(Kind::Runqueue, "cpu", 1.4, Level::Warn),
        ];
        let pressures = read(&mut PressureTracker::default(), 0, &queues);
        assert_eq!(pressures.len(), 1, "a neighbour is not published");
        assert_eq!(pressures[0].queues[0].0.kind, Kind::Accept);
        assert_eq!(
            (pressures[0].level, pressures[0].score),
            (Level::Critical, 1.4)
        );
        assert_eq!(
            (pressures[0].admit_ratio, pressures[0].retry_after_ms),
            (1.0, 0)
        );
        assert_eq!(pressures[0].oldest_age_ns, 9, "of the accept queue only");
    }

    #[test]
    fn a_service_without_queues_is_under_no_pressure() {
        let pressures = read(&mut PressureTracker::default(), 0, &[]);
        assert_eq!(
            (pressures[0].level, pressures[0].admit_ratio),
            (Level::Ok, 1.0)
        );
    }

    #[test]
    fn a_max_queue_wait_is_published_only_for_queues_whose_work_is_rejected_at_dequeue() {
        for (kinds, expected_ns) in [
            (&[Kind::Accept][..], Some(13_000_000)),
            (&[Kind::Recv], Some(13_000_000)),
            (&[Kind::Inflight], None),
            (&[Kind::Accept, Kind::Inflight], None),
        ] {
            let mut tracker = PressureTracker::default();
            let mut max_queue_wait_ns = None;
            for tick in 1..20_u64 {
                let queues = kinds.iter().map(|kind| {
                    let (key, gauge) = queue(*kind, ":80", 1.0, Level::Critical);
                    (key, waiting_more(tick, gauge))
                });
                let queues: Vec<_> = queues.collect();
                let pressure = &read(&mut tracker, tick * 100_000_000, &queues)[0];
                max_queue_wait_ns = pressure.max_queue_wait_ns;
                if max_queue_wait_ns.is_some() {
                    assert!(pressure.load.all >= 1.0 && pressure.retry_after_ms >= 1_000);
                }
            }
            assert_eq!(max_queue_wait_ns, expected_ns, "{kinds:?}");
        }
    }

    /// Arrivals are twice the departures, so the delay rises.
    fn waiting_more(tick: u64, gauge: Gauge) -> Gauge {
        Gauge {
            at_ns: tick * 100_000_000,
            delay_ns: tick * 100_000_000,
            target_delay_ns: 20_000_000,
            is_counted: true,
            arrivals: 10 * tick,
            departures: 5 * tick,
            ..gauge
        }
    }

    #[test]
    fn inbound_work_is_shed_and_responses_to_the_service_are_not() {
        let mut tracker = PressureTracker::default();
        for (kind, name, sheds) in [
            (Kind::Accept, ":80", true),
            (Kind::Recv, "-> 10.0.0.1:5432", false),
            (Kind::Pipe, "pipe:[1]", false),
        ] {
            let mut admit = 1.0;
            for tick in 1..20_u64 {
                let (key, gauge) = queue(kind, name, 1.0, Level::Critical);
                let gauge = waiting_more(tick, gauge);
                let pressures = read(&mut tracker, gauge.at_ns, &[(key, gauge)]);
                admit = pressures[0].admit_ratio;
                assert_eq!(pressures[0].retry_after_ms > 0, admit < 1.0);
            }
            assert_eq!(admit < 0.6, sheds, "{kind:?} {admit}");
        }
    }

    #[test]
    fn the_controller_of_an_overloaded_queue_reports_why_it_sheds() {
        let mut tracker = PressureTracker::default();
        let mut modes = Vec::new();
        for tick in 1..20_u64 {
            let (key, gauge) = queue(Kind::Accept, ":80", 1.0, Level::Critical);
            let gauge = waiting_more(tick, gauge);
            let pressure = &read(&mut tracker, gauge.at_ns, &[(key, gauge)])[0];
            let (_, state) = &pressure.controllers[0];
            assert_eq!(state.admit_ratio, pressure.admit_ratio);
            assert_eq!(
                state.mode == Mode::Open,
                pressure.admit_ratio >= 1.0,
                "{state:?}"
            );
            modes.push(state.mode);
        }
        assert_eq!(modes.first(), Some(&Mode::Open));
        assert_eq!(modes.last(), Some(&Mode::Draining));
    }
}
