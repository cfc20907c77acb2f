//! What is signalled of one service: made from how its queues stand. Pure.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    concurrency::Concurrency,
    controller::{Controller, Look},
    load::{Load, Loads},
    requests::{Known, Now, Requests, Wait},
};
use crate::{
    detect::Gauge,
    event::Level,
    queue::{Criterion, Kind, QueueKey},
    sample::{Target, TargetId},
};

/// Callers that are turned away are asked to come again after this long at least, and at most, ms.
const RETRY_MS: (u64, u64) = (1_000, 30_000);

/// Nobody is turned away for a queue that was not looked at for so long, and later it is no longer told of: the slowest walk
/// comes every 30 s.
const UNKNOWN_NS: u64 = 5_000_000_000;
const OLD_NS: u64 = 60_000_000_000;

/// The pressure on one service.
#[derive(Clone, Debug)]
pub struct Pressure {
    pub target: Arc<Target>,
    pub level: Level,
    /// 0 to 1, may pass 1.
    pub score: f64,
    /// Share of new work to admit, 0 to 1.
    pub admit_ratio: f64,
    pub load: Load,
    /// The most requests at once, while work is to be turned away and it is known.
    pub concurrency_limit: Option<u32>,
    /// Work that has waited for longer is to be turned away, ns; `None`: none is, or others than those who take it would be.
    pub max_queue_wait_ns: Option<u64>,
    /// Of the work that nobody has taken yet, the age of the oldest, ns.
    pub oldest_age_ns: u64,
    /// `None`: no queue is filling.
    pub time_to_full_ns: Option<u64>,
    /// 0: nobody is turned away.
    pub retry_after_ms: u32,
    /// The worst first.
    pub queues: Vec<(Arc<QueueKey>, Gauge)>,
}

impl Pressure {
    /// Work is to be turned away: by a share, by a number at once, or by how long it waited.
    pub fn is_limited(&self) -> bool {
        self.admit_ratio < 1.0
            || self.concurrency_limit.is_some()
            || self.max_queue_wait_ns.is_some()
    }
}

/// The pressure on all services, and what is to be remembered of it.
#[derive(Default)]
pub struct Board {
    /// Each with the time of the reading that it took in last.
    controllers: HashMap<Arc<QueueKey>, (Controller, u64)>,
    loads: Loads,
    concurrency: Concurrency,
    requests: Requests,
}

impl Board {
    /// Takes in how the queues stand. One pressure for each target that was asked for, in the order of their ids.
    pub fn read<'a>(
        &mut self,
        now_ns: u64,
        gauges: impl Iterator<Item = (&'a Arc<QueueKey>, &'a Gauge)>,
        targets: impl Iterator<Item = &'a Arc<Target>>,
    ) -> Vec<Pressure> {
        let mut by_target: BTreeMap<TargetId, Vec<(Arc<QueueKey>, Gauge)>> = BTreeMap::new();
        for (key, gauge) in gauges {
            if now_ns.saturating_sub(gauge.at_ns) > OLD_NS {
                continue;
            }
            let queues = by_target.entry(key.target).or_default();
            queues.push((Arc::clone(key), *gauge));
        }
        self.controllers.retain(|_, (controller, read_ns)| {
            now_ns.saturating_sub(*read_ns) <= UNKNOWN_NS && !controller.is_idle()
        });
        self.loads.forget_before(now_ns.saturating_sub(OLD_NS));
        let unknown_ns = now_ns.saturating_sub(UNKNOWN_NS);
        self.concurrency.forget_before(unknown_ns);
        self.requests.forget_before(unknown_ns);
        targets
            .filter(|target| !target.followed)
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
        let shed_ns = self.shed_ns(&queues);
        let at_once = self.concurrency.take_in(target.id, &queues, shed_ns);
        let waits_for_long = |(key, gauge): &(Arc<QueueKey>, Gauge)| {
            waits_untaken(key) && gauge.delay_ns > gauge.target_delay_ns
        };
        let is_shed_for =
            |(key, _): &(Arc<QueueKey>, Gauge)| self.asks(key, Controller::is_shedding);
        let now = Now {
            are_taken: !queues.iter().any(waits_for_long),
            are_shed: queues.iter().any(is_shed_for),
        };
        let time_ns = self.requests.take_in(target.id, &queues, now);
        let known = time_ns.map(|time_ns| Known {
            time_ns,
            at_once: at_once.map(|at_once| at_once.in_service),
        });
        let busy = self
            .loads
            .take_in(&queues, at_once.map(|at_once| at_once.busy));
        let admit = queues
            .iter()
            .filter(|(key, _)| takes_work_in(key))
            .map(|(key, gauge)| self.admit(now_ns, key, gauge, known, busy))
            .fold(1.0, f64::min);
        queues.sort_unstable_by(|(a, of_a), (b, of_b)| {
            let rank = |gauge: &Gauge| Reverse((gauge.level, (gauge.score * 1e6) as u64));
            rank(of_a).cmp(&rank(of_b)).then_with(|| a.cmp(b))
        });
        let waits = |(key, gauge): &(Arc<QueueKey>, Gauge)| {
            let is_untaken =
                takes_work_in(key) && key.kind.criterion() != Criterion::AgainstBaseline;
            gauge
                .oldest_age_ns
                .filter(|_| is_untaken && gauge.depth > 0)
        };
        let oldest_age_ns = queues.iter().filter_map(waits).max().unwrap_or(0);
        let score = queues
            .iter()
            .map(|(_, gauge)| gauge.score)
            .fold(0.0, f64::max);
        let (least, most) = RETRY_MS;
        let max_queue_wait_ns = self.max_queue_wait_ns(&queues, known);
        // Where no share tells how much too much there is, that it is as much as can be done.
        let is_limited = at_once.is_some() || max_queue_wait_ns.is_some();
        let retry_after_ms = if admit < 1.0 || is_limited {
            (oldest_age_ns.saturating_mul(2) / 1_000_000).clamp(least, most) as u32
        } else {
            0
        };
        Pressure {
            level: queues.first().map_or(Level::Ok, |(_, gauge)| gauge.level),
            score,
            admit_ratio: admit,
            load: self.loads.of(&queues, score, admit, is_limited),
            concurrency_limit: at_once.map(|at_once| at_once.most),
            max_queue_wait_ns,
            oldest_age_ns,
            time_to_full_ns: queues
                .iter()
                .filter_map(|(_, gauge)| gauge.time_to_full_ns)
                .min(),
            retry_after_ms,
            target,
            queues,
        }
    }

    /// The least delay that is fine, ns, of the queues of connections that nobody has taken, where work is to be turned away for
    /// one of them.
    fn shed_ns(&self, queues: &[(Arc<QueueKey>, Gauge)]) -> Option<u64> {
        queues
            .iter()
            .filter(|(key, _)| key.kind == Kind::Accept && self.asks(key, Controller::is_shedding))
            .map(|(_, gauge)| gauge.target_delay_ns)
            .min()
    }

    /// How long work may have waited when it is taken, ns, where work is to be turned away for nothing but how long that is: not
    /// for what waits in the service itself.
    fn max_queue_wait_ns(
        &self,
        queues: &[(Arc<QueueKey>, Gauge)],
        known: Option<Known>,
    ) -> Option<u64> {
        let mut least_ns = None;
        for (key, gauge) in queues {
            if !waits_untaken(key) && self.asks(key, Controller::is_shedding) {
                return None;
            }
            if waits_untaken(key) && self.asks(key, Controller::is_too_much) {
                let most_ns = wait(key, gauge, known).most_ns;
                least_ns = Some(least_ns.map_or(most_ns, |least_ns: u64| least_ns.min(most_ns)));
            }
        }
        least_ns
    }

    fn asks(&self, key: &Arc<QueueKey>, is_it: impl Fn(&Controller) -> bool) -> bool {
        let controller = self.controllers.get(key);
        controller.is_some_and(|(controller, _)| is_it(controller))
    }

    fn admit(
        &mut self,
        now_ns: u64,
        key: &Arc<QueueKey>,
        gauge: &Gauge,
        known: Option<Known>,
        busy: Option<f64>,
    ) -> f64 {
        let Wait { fine_ns, most_ns } = wait(key, gauge, known);
        let look = Look {
            now_ns: gauge.at_ns,
            delay_ns: gauge.delay_ns,
            target_delay_ns: fine_ns,
            max_queue_wait_ns: most_ns,
            is_counted: gauge.is_counted,
            arrivals: gauge.arrivals,
            departures: gauge.departures,
            utilization: busy,
        };
        // Nobody knows any more how it stands.
        if now_ns.saturating_sub(gauge.at_ns) > UNKNOWN_NS {
            self.controllers.remove(key);
            return 1.0;
        }
        // Nothing is to be remembered of a queue in which nothing waits.
        if gauge.delay_ns == 0 && !self.controllers.contains_key(key) {
            return 1.0;
        }
        let (controller, read_ns) = self
            .controllers
            .entry(Arc::clone(key))
            .or_insert_with(|| (Controller::new(look), look.now_ns));
        // A queue that was not looked at since tells nothing new.
        if gauge.at_ns > *read_ns {
            controller.read(look);
            *read_ns = gauge.at_ns;
        }
        controller.admit()
    }
}

/// How long work may wait in a queue.
fn wait(key: &QueueKey, gauge: &Gauge, known: Option<Known>) -> Wait {
    let known = known.filter(|_| waits_untaken(key) && !gauge.is_target_configured);
    Wait::of(gauge.target_delay_ns, known)
}

/// A request waits in such a queue until it is taken.
fn waits_untaken(key: &QueueKey) -> bool {
    matches!(key.kind, Kind::Accept | Kind::Recv)
}

/// Work that others bring waits in such a queue: less of it comes when callers hold back.
pub fn takes_work_in(key: &QueueKey) -> bool {
    match key.kind {
        Kind::Syn | Kind::Accept | Kind::Udp | Kind::Inflight => true,
        // Connections that the service opened itself bring answers.
        Kind::Recv => key.id.remote().is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(id: u32, followed: bool) -> Arc<Target> {
        Arc::new(Target {
            id,
            name: "shop".to_owned(),
            pid: 7,
            followed,
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

    fn read(board: &mut Board, now_ns: u64, queues: &[(Arc<QueueKey>, Gauge)]) -> Vec<Pressure> {
        let targets = [target(1, false), target(2, true)];
        board.read(
            now_ns,
            queues.iter().map(|(key, gauge)| (key, gauge)),
            targets.iter(),
        )
    }

    #[test]
    fn the_worst_queue_comes_first_and_gives_level_and_score() {
        let queues = [
            queue(Kind::Pipe, "pipe:[1]", 0.2, Level::Ok),
            queue(Kind::Accept, ":80", 0.95, Level::Critical),
            queue(Kind::Runqueue, "cpu", 1.4, Level::Warn),
        ];
        let pressures = read(&mut Board::default(), 0, &queues);
        assert_eq!(pressures.len(), 1, "one that is followed is not signalled");
        assert_eq!(pressures[0].queues[0].0.kind, Kind::Accept);
        assert_eq!(
            (pressures[0].level, pressures[0].score),
            (Level::Critical, 1.4)
        );
        assert_eq!(
            (pressures[0].admit_ratio, pressures[0].retry_after_ms),
            (1.0, 0)
        );
        assert_eq!(pressures[0].oldest_age_ns, 9, "of the accept queue alone");
    }

    #[test]
    fn a_service_without_queues_is_under_no_pressure() {
        let pressures = read(&mut Board::default(), 0, &[]);
        assert_eq!(
            (pressures[0].level, pressures[0].admit_ratio),
            (Level::Ok, 1.0)
        );
    }

    #[test]
    fn how_long_work_may_have_waited_is_said_where_it_waits_to_be_taken_and_nowhere_else() {
        for (kinds, most_ns) in [
            (&[Kind::Accept][..], Some(15_000_000)),
            (&[Kind::Recv], Some(15_000_000)),
            (&[Kind::Inflight], None),
            (&[Kind::Accept, Kind::Inflight], None),
        ] {
            let mut board = Board::default();
            let mut said = None;
            for tick in 1..20_u64 {
                let queues = kinds.iter().map(|kind| {
                    let (key, gauge) = queue(*kind, ":80", 1.0, Level::Critical);
                    (key, waiting_more(tick, gauge))
                });
                let queues: Vec<_> = queues.collect();
                let pressure = &read(&mut board, tick * 100_000_000, &queues)[0];
                said = pressure.max_queue_wait_ns;
                if said.is_some() {
                    assert!(pressure.load.all >= 1.0 && pressure.retry_after_ms >= 1_000);
                }
            }
            assert_eq!(said, most_ns, "{kinds:?}");
        }
    }

    /// Twice what leaves comes, so that it waits for longer and longer.
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
    fn work_that_stands_is_turned_away_and_what_the_service_itself_asked_for_is_not() {
        let mut board = Board::default();
        for (kind, name, sheds) in [
            (Kind::Accept, ":80", true),
            (Kind::Recv, "-> 10.0.0.1:5432", false),
            (Kind::Pipe, "pipe:[1]", false),
        ] {
            let mut admit = 1.0;
            for tick in 1..20_u64 {
                let (key, gauge) = queue(kind, name, 1.0, Level::Critical);
                let gauge = waiting_more(tick, gauge);
                let pressures = read(&mut board, gauge.at_ns, &[(key, gauge)]);
                admit = pressures[0].admit_ratio;
                assert_eq!(pressures[0].retry_after_ms > 0, admit < 1.0);
            }
            assert_eq!(admit < 0.6, sheds, "{kind:?} {admit}");
        }
    }
}
