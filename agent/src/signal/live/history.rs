//! The last ten minutes of the busiest queues, in a bounded amount of memory.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::{detect::Gauge, event::Level, queue::QueueKey, signal::pressure::Pressure};

/// Queues with a history: with [`POINTS`] each, about 250 kB. An empty queue needs none.
const MAX_HISTORIES: usize = 128;
/// Time that one point covers, ns, unless another one is chosen.
const POINT_NS: u64 = 5_000_000_000;
/// Number of points of a history: ten minutes, with the usual length of a point.
pub(super) const POINTS: usize = 120;
/// Readings per point.
const READINGS: u64 = 5;

/// The maximum of a queue's state during the time of a point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Point {
    pub(super) depth: u64,
    /// The wait, ms. Saturates after 49 days.
    pub(super) wait_ms: u32,
    pub(super) level: Level,
    /// The score, thousandths. Saturates at 65: what is beyond is no more urgent.
    score: u16,
}

impl Point {
    fn of(gauge: &Gauge) -> Self {
        let wait_ms = wait_ns(gauge).unwrap_or(0) / 1_000_000;
        Self {
            depth: gauge.depth,
            wait_ms: u32::try_from(wait_ms).unwrap_or(u32::MAX),
            level: gauge.level,
            score: (gauge.score * 1e3) as u16,
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            depth: self.depth.max(other.depth),
            wait_ms: self.wait_ms.max(other.wait_ms),
            level: self.level.max(other.level),
            score: self.score.max(other.score),
        }
    }

    fn rank(self) -> Rank {
        (self.level, self.score)
    }

    /// Whether there is nothing to show.
    fn is_idle(self) -> bool {
        (self.depth, self.wait_ms, self.level) == (0, 0, Level::Ok)
    }
}

/// How long the work in a queue waits: the estimated delay, or the age of the oldest item if that is greater, ns.
pub(super) fn wait_ns(gauge: &Gauge) -> Option<u64> {
    gauge
        .oldest_age_ns
        .max(gauge.wait_ns)
        .filter(|_| gauge.depth > 0)
}

/// The past of one queue. Before its first point, the queue was empty or had no history.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    past: VecDeque<Point>,
    /// The point in progress.
    now: Point,
    /// The highest level, and the highest score at that level, of all points: which queues matter most.
    rank: Rank,
}

type Rank = (Level, u16);

impl History {
    /// All points, oldest first; the last is in progress.
    pub(super) fn points(&self) -> impl Iterator<Item = Point> {
        self.past.iter().copied().chain(std::iter::once(self.now))
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    fn next_point(&mut self) {
        if self.past.len() == POINTS {
            self.past.pop_front();
        }
        self.past.push_back(std::mem::take(&mut self.now));
        // What left the history no longer counts.
        self.rank = self.points().map(Point::rank).max().unwrap_or_default();
    }

    fn is_empty(&self) -> bool {
        self.points().all(Point::is_idle)
    }
}

/// The histories of the busiest queues.
#[derive(Clone)]
pub(super) struct Histories {
    by_key: Arc<HashMap<Arc<QueueKey>, Arc<History>>>,
    point_ns: u64,
    point_began_ns: Option<u64>,
}

impl Default for Histories {
    fn default() -> Self {
        Self::new(POINT_NS)
    }
}

impl Histories {
    pub(super) fn new(point_ns: u64) -> Self {
        Self {
            by_key: Arc::default(),
            point_ns,
            point_began_ns: None,
        }
    }

    /// Time that one point covers, ns.
    pub(super) fn point_ns(&self) -> u64 {
        self.point_ns
    }

    /// Time that a history covers, ns.
    pub(super) fn length_ns(&self) -> u64 {
        self.point_ns * POINTS as u64
    }

    /// Time from one reading to the next, ns. What matters is a standing queue: it lasts longer.
    pub(super) fn interval_ns(&self) -> u64 {
        self.point_ns / READINGS
    }

    pub(super) fn get(&self, key: &Arc<QueueKey>) -> Option<&History> {
        self.by_key.get(key).map(Arc::as_ref)
    }

    /// Adds the present state of all queues.
    pub(super) fn read(&mut self, mono_ns: u64, pressures: &[Pressure]) {
        let began_ns = *self.point_began_ns.get_or_insert(mono_ns);
        let histories = Arc::make_mut(&mut self.by_key);
        // After a pause (a stopped process) the points in between are empty.
        let passed = mono_ns.saturating_sub(began_ns) / self.point_ns;
        if passed > 0 {
            self.point_began_ns = Some(began_ns + passed * self.point_ns);
            for history in histories.values_mut() {
                let history = Arc::make_mut(history);
                (0..passed.min(POINTS as u64 + 1)).for_each(|_| history.next_point());
            }
            histories.retain(|_, history| !history.is_empty());
        }
        let queues = || pressures.iter().flat_map(|pressure| &pressure.queues);
        let mut busy = Vec::new();
        for (key, gauge) in queues() {
            if let Some(history) = histories.get_mut(key) {
                let now = history.now.max(Point::of(gauge));
                if now != history.now {
                    let history = Arc::make_mut(history);
                    history.now = now;
                    history.rank = history.rank.max(now.rank());
                }
            } else if gauge.depth > 0 {
                busy.push((Point::of(gauge).rank(), key, gauge));
            }
        }
        admit(histories, busy);
    }
}

/// Gives the worst of these queues a history. Beyond the bound, a worse queue takes the place of a better one.
fn admit(
    histories: &mut HashMap<Arc<QueueKey>, Arc<History>>,
    mut busy: Vec<(Rank, &Arc<QueueKey>, &Gauge)>,
) {
    busy.sort_by(|(a, ..), (b, ..)| b.cmp(a));
    busy.truncate(MAX_HISTORIES);
    let excess = (histories.len() + busy.len()).saturating_sub(MAX_HISTORIES);
    let mut replaceable: Vec<(Rank, Arc<QueueKey>)> = Vec::new();
    if excess > 0 {
        let ranks = histories.iter();
        replaceable = ranks.map(|(key, of)| (of.rank, Arc::clone(key))).collect();
        replaceable.sort();
    }
    let mut replaceable = replaceable.into_iter();
    for (new_rank, key, gauge) in busy {
        if histories.len() >= MAX_HISTORIES {
            match replaceable.next() {
                Some((old_rank, old)) if old_rank < new_rank => histories.remove(&old),
                // The others are no worse.
                _ => return,
            };
        }
        let history = History {
            now: Point::of(gauge),
            rank: new_rank,
            ..History::default()
        };
        histories.insert(Arc::clone(key), Arc::new(history));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{queue::Kind, sample::Target, signal::PressureTracker};

    const SECOND: u64 = 1_000_000_000;
    const LENGTH_NS: u64 = POINT_NS * POINTS as u64;

    fn key(port: u16) -> Arc<QueueKey> {
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        Arc::new(QueueKey::new(
            1,
            Kind::Accept,
            crate::queue::QueueId::Local(address),
        ))
    }

    fn pressures(queues: Vec<(Arc<QueueKey>, Gauge)>) -> Vec<Pressure> {
        let target = Arc::new(Target::default());
        let mut all =
            PressureTracker::default().read(0, std::iter::empty(), std::iter::once(&target));
        all[0].queues = queues;
        all
    }

    fn gauge(depth: u64, score: f64) -> Gauge {
        Gauge {
            depth,
            score,
            wait_ns: Some(depth * 1_000_000),
            ..Gauge::default()
        }
    }

    fn depths(histories: &Histories, key: &Arc<QueueKey>) -> Vec<u64> {
        let history = histories.get(key);
        history.map_or_else(Vec::new, |of| {
            of.points().map(|point| point.depth).collect()
        })
    }

    #[test]
    fn a_point_is_the_maximum_of_its_five_seconds() {
        let mut histories = Histories::default();
        for second in 0..12 {
            let depth = if second == 3 { 40 } else { 2 };
            let now = pressures(vec![(key(1), gauge(depth, 0.1))]);
            histories.read(second * SECOND, &now);
        }
        assert_eq!(depths(&histories, &key(1)), [40, 2, 2]);
        let waits: Vec<u32> = histories
            .get(&key(1))
            .unwrap()
            .points()
            .map(|it| it.wait_ms)
            .collect();
        assert_eq!(waits, [40, 2, 2]);
    }

    #[test]
    fn a_history_covers_ten_minutes_and_ends_with_its_last_point() {
        let mut histories = Histories::default();
        let busy = pressures(vec![(key(1), gauge(7, 0.1))]);
        let idle = pressures(vec![(key(1), gauge(0, 0.0))]);
        histories.read(0, &busy);
        let mut now_ns = 0;
        while now_ns < LENGTH_NS {
            now_ns += POINT_NS;
            histories.read(now_ns, &idle);
        }
        assert_eq!(depths(&histories, &key(1)).len(), POINTS + 1);
        assert_eq!(depths(&histories, &key(1))[0], 7);
        histories.read(now_ns + POINT_NS, &idle);
        assert!(histories.get(&key(1)).is_none(), "nothing left to show");
        histories.read(now_ns + POINT_NS, &busy);
        histories.read(now_ns + 100 * LENGTH_NS, &idle);
        assert!(histories.get(&key(1)).is_none(), "after a pause");
    }

    /// With more busy queues than histories, one that spiked long ago must not keep another one out for as long as it has some work.
    #[test]
    fn a_spike_counts_no_longer_than_it_is_shown() {
        let mut histories = Histories::default();
        let crowd = |score: f64| {
            (1..128)
                .map(|port| (key(port), gauge(1, score)))
                .collect::<Vec<_>>()
        };
        let with = |own: Gauge, others: Vec<(Arc<QueueKey>, Gauge)>| {
            pressures(others.into_iter().chain([(key(9_000), own)]).collect())
        };
        histories.read(0, &with(gauge(90, 0.9), crowd(0.3)));
        let mut now_ns = 0;
        let read = |histories: &mut Histories, now_ns: u64| {
            let mut now = with(gauge(1, 0.1), crowd(0.3));
            now[0].queues.push((key(9_001), gauge(2, 0.2)));
            histories.read(now_ns, &now);
        };
        while now_ns < LENGTH_NS {
            read(&mut histories, now_ns);
            assert!(histories.get(&key(9_000)).is_some(), "the spike is shown");
            now_ns += POINT_NS;
        }
        read(&mut histories, now_ns + POINT_NS);
        assert!(histories.get(&key(9_000)).is_none(), "its spike is over");
        assert!(histories.get(&key(9_001)).is_some());
        assert_eq!(histories.by_key.len(), MAX_HISTORIES);
    }

    #[test]
    fn the_number_of_histories_is_bounded_and_the_worst_queues_have_one() {
        let mut histories = Histories::default();
        let crowd = |from: u16, score: f64| {
            let ports = from..from + 1_000;
            pressures(ports.map(|port| (key(port), gauge(1, score))).collect())
        };
        histories.read(0, &crowd(1, 0.1));
        assert_eq!(histories.by_key.len(), MAX_HISTORIES);
        let mut later = crowd(2_000, 0.1);
        later[0].queues.push((key(9_000), gauge(50, 0.9)));
        histories.read(SECOND, &later);
        assert_eq!(histories.by_key.len(), MAX_HISTORIES);
        assert_eq!(depths(&histories, &key(9_000)), [50]);
        assert!(
            histories.get(&key(2_000)).is_none(),
            "no worse than those that have one"
        );
    }
}
