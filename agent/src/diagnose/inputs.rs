//! What the queues and the machine say beside the threads: the last readings of targets that are looked at closely, how
//! fast calls on each endpoint are usually answered, who else uses the CPU.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

use crate::{
    queue::{Kind, QueueKey, Reading, Readings, Targets},
    sample::{Cgroup, Neighbour, Sample, Target, TargetId},
};

/// Looks at a pool that are remembered.
const RECENT: usize = 64;
/// A pool is in use to the last connection where that holds in so much of the looks.
const ALWAYS: f64 = 0.8;
/// Looks without which nothing is said of a pool.
const ENOUGH: usize = 5;
/// A turn of an event loop that keeps others waiting, ns.
pub(super) const LONG_TURN_NS: u64 = 100_000_000;
/// Looks at answers that are remembered: those of the longest time that a verdict is made of.
const ANSWERED_LOOKS: usize = 256;
/// What others used is remembered for so long, ns.
const HOGS_NS: u64 = 30_000_000_000;
/// Less of a CPU starves nobody.
const WORTH: f64 = 0.05;
/// Calls are slow where they take so many times as long as usual.
const SLOW: f64 = 2.0;
/// More requests than connections, by so much: some of them wait for one.
const BEYOND_POOL: f64 = 1.25;

#[derive(Default)]
pub(super) struct Facts {
    last: HashMap<Arc<QueueKey>, Reading>,
    calls: HashMap<Arc<QueueKey>, Calls>,
    /// What each process used since the look before: time of the look, and how long that was, ns.
    neighbours: VecDeque<(u64, u64, Vec<Neighbour>)>,
    neighbours_ns: Option<u64>,
    cgroups: HashMap<String, Cgroup>,
    /// When an event loop of a target was last seen in a turn that keeps others waiting.
    long_turns: HashMap<TargetId, u64>,
    /// Requests that a target answered: when that was seen, and how many.
    answered: HashMap<TargetId, VecDeque<(u64, u64)>>,
}

/// Calls on one endpoint.
#[derive(Default)]
struct Calls {
    usual_ns: Option<f64>,
    now_ns: Option<f64>,
    /// Connections in use, and all.
    recent: VecDeque<(u64, u64)>,
}

/// A pool of connections that is used up.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) endpoint: String,
    pub(super) connections: u64,
    pub(super) inflight: u64,
    pub(super) answer_ns: Option<u64>,
    /// Whether calls take as long as ever is known.
    pub(super) usual_known: bool,
}

/// Who uses a CPU that others want.
#[derive(Clone, Debug)]
pub(super) struct Hog {
    pub(super) tgid: u32,
    pub(super) name: String,
    pub(super) cgroup: Option<String>,
    /// Of one CPU.
    pub(super) share: f64,
}

impl Facts {
    pub(super) fn read(
        &mut self,
        sample: &Sample,
        readings: &Readings,
        near: impl Fn(TargetId) -> bool,
    ) {
        for key in &readings.gone {
            self.last.remove(key);
            self.calls.remove(key);
        }
        for (key, reading) in &readings.queues {
            if key.kind == Kind::Downstream {
                let calls = self.calls.entry(Arc::clone(key)).or_default();
                calls.read(reading, near(key.target));
            }
            if key.kind == Kind::Inflight
                && near(key.target)
                && let Some(answered) = reading.departures
            {
                let looks = self.answered.entry(key.target).or_default();
                looks.push_back((sample.mono_ns, answered));
                while looks.len() > ANSWERED_LOOKS {
                    looks.pop_front();
                }
            }
            if key.kind == Kind::Eventloop && is_long_turn(reading) {
                self.long_turns.insert(key.target, sample.mono_ns);
            }
            if near(key.target) {
                self.last.insert(Arc::clone(key), reading.clone());
            }
        }
        self.last.retain(|key, _| near(key.target));
        self.long_turns.retain(|target, _| near(*target));
        self.answered.retain(|target, _| near(*target));
        if sample.walks.neighbours {
            let now_ns = sample.mono_ns;
            if let Some(before_ns) = self.neighbours_ns.replace(now_ns) {
                let over_ns = now_ns.saturating_sub(before_ns);
                self.neighbours
                    .push_back((now_ns, over_ns, sample.neighbours.clone()));
            }
            let old = |(at_ns, ..): &(u64, u64, _)| now_ns.saturating_sub(*at_ns) > HOGS_NS;
            while self.neighbours.front().is_some_and(old) {
                self.neighbours.pop_front();
            }
        }
        if sample.walks.system {
            let entry = |group: &Cgroup| (group.path.clone(), group.clone());
            self.cgroups = sample.cgroups.iter().map(entry).collect();
        }
    }

    /// Requests that were answered since then; `None` where nobody counted.
    pub(super) fn answered(&self, target: TargetId, since_ns: u64) -> Option<u64> {
        let looks = self.answered.get(&target)?;
        let since = looks.iter().filter(|(at_ns, _)| *at_ns > since_ns);
        Some(since.map(|(_, count)| count).sum())
    }

    /// For how long at most no request was answered since then, ns.
    pub(super) fn longest_pause_ns(&self, target: TargetId, since_ns: u64) -> u64 {
        let looks = self.answered.get(&target).into_iter().flatten();
        let mut since = looks.filter(|(at_ns, _)| *at_ns > since_ns);
        let Some(&(mut last_ns, _)) = since.next() else {
            return 0;
        };
        let mut longest_ns = 0;
        for (at_ns, count) in since {
            if *count == 0 {
                longest_ns = longest_ns.max(at_ns.saturating_sub(last_ns));
            } else {
                last_ns = *at_ns;
            }
        }
        longest_ns
    }

    /// Whether an event loop of this target was in a long turn since then.
    pub(super) fn had_a_long_turn(&self, target: TargetId, since_ns: u64) -> bool {
        let last = self.long_turns.get(&target);
        last.is_some_and(|at_ns| *at_ns >= since_ns)
    }

    /// Takes in how the pools of connections are used, after [`Facts::read`].
    pub(super) fn look_at_pools(&mut self, pools: &BTreeMap<(TargetId, SocketAddr), (u64, u64)>) {
        for (key, calls) in &mut self.calls {
            let Some(remote) = key.id.remote() else {
                continue;
            };
            if let Some((used, all)) = pools.get(&(key.target, remote)) {
                calls.look(*used, *all);
            }
        }
    }

    pub(super) fn of(
        &self,
        target: TargetId,
        kind: Kind,
    ) -> impl Iterator<Item = (&Arc<QueueKey>, &Reading)> {
        let ours = move |key: &Arc<QueueKey>| key.target == target && key.kind == kind;
        self.last.iter().filter(move |(key, _)| ours(key))
    }

    /// Of the process of this target that has most files open.
    pub(super) fn open_files(&self, target: TargetId) -> Option<&Reading> {
        let files = self.of(target, Kind::Fd).map(|(_, reading)| reading);
        files.max_by_key(|reading| reading.depth)
    }

    pub(super) fn cgroup(&self, target: &Target) -> Option<&Cgroup> {
        self.cgroups.get(target.cgroup.as_ref()?)
    }

    /// A pool of this target's that is used up while calls take as long as ever: work waits for a connection.
    pub(super) fn used_up(&self, target: TargetId) -> Option<Pool> {
        let inflight = self
            .of(target, Kind::Inflight)
            .map(|(_, reading)| reading.depth)
            .sum();
        self.of(target, Kind::Downstream)
            .filter_map(|(key, reading)| {
                let calls = self.calls.get(key)?;
                let connections = calls.always_full()?;
                let waits = inflight as f64 >= connections as f64 * BEYOND_POOL
                    && inflight >= connections + 2;
                (waits && !calls.is_slow(reading)).then(|| Pool {
                    endpoint: endpoint(key),
                    connections,
                    inflight,
                    answer_ns: calls.now_ns.or(calls.usual_ns).map(|ns| ns as u64),
                    usual_known: calls.usual_ns.is_some(),
                })
            })
            .max_by_key(|pool| pool.connections)
    }

    /// How long calls on an endpoint take and usually took, ns.
    pub(super) fn answers(&self, target: TargetId, endpoint: &str) -> (Option<f64>, Option<f64>) {
        let named = |key: &Arc<QueueKey>| self::endpoint(key) == endpoint;
        self.of(target, Kind::Downstream)
            .find(|(key, _)| named(key))
            .and_then(|(key, _)| self.calls.get(key))
            .map_or((None, None), |calls| (calls.now_ns, calls.usual_ns))
    }

    /// Whether calls of this target take about as long as ever, as far as that is known.
    pub(super) fn calls_are_as_usual(&self, target: TargetId) -> bool {
        let mut known = self
            .of(target, Kind::Downstream)
            .filter_map(|(key, reading)| Some((self.calls.get(key)?, reading)))
            .filter(|(calls, _)| calls.usual_ns.is_some())
            .peekable();
        known.peek().is_some() && known.all(|(calls, reading)| !calls.is_slow(reading))
    }

    /// Who, not of this target, used most CPU in this time: the busiest process of those that have one name and one
    /// control group, and what they used together.
    pub(super) fn hog(
        &self,
        target: TargetId,
        targets: &Targets,
        (from_ns, to_ns): (u64, u64),
    ) -> Option<Hog> {
        let looks = self.neighbours.iter().filter(|(at_ns, over_ns, _)| {
            *at_ns > from_ns && at_ns.saturating_sub(*over_ns) < to_ns
        });
        let mut over_ns = 0_u64;
        let mut groups: BTreeMap<(&str, Option<&str>), BTreeMap<u32, u64>> = BTreeMap::new();
        for (_, elapsed_ns, neighbours) in looks {
            over_ns = over_ns.saturating_add(*elapsed_ns);
            let foreign = neighbours
                .iter()
                .filter(|one| targets.of(one.tgid) != Some(target));
            for one in foreign {
                let group = (one.name.as_str(), one.cgroup.as_deref());
                let used = groups
                    .entry(group)
                    .or_default()
                    .entry(one.tgid)
                    .or_default();
                *used = used.saturating_add(one.cpu_ns);
            }
        }
        let sum = |used: &BTreeMap<u32, u64>| {
            used.values().fold(0_u64, |sum, ns| sum.saturating_add(*ns))
        };
        let ((name, cgroup), used) = groups.into_iter().max_by_key(|(_, used)| sum(used))?;
        let (busiest, _) = used.iter().max_by_key(|(_, ns)| **ns)?;
        Some(Hog {
            tgid: *busiest,
            name: name.to_owned(),
            cgroup: cgroup.map(str::to_owned),
            share: sum(&used) as f64 / over_ns.max(1) as f64,
        })
        .filter(|hog| hog.share >= WORTH)
    }
}

/// The address that a queue of calls leads to.
pub(super) fn endpoint(key: &QueueKey) -> String {
    let remote = key.id.remote();
    remote.map_or_else(|| key.name().to_owned(), |remote| remote.to_string())
}

/// One turn takes long, or does not end.
fn is_long_turn(reading: &Reading) -> bool {
    let turn_ns = reading.oldest_age_ns.max(reading.wait_ns).unwrap_or(0);
    reading.depth > 0 && turn_ns >= LONG_TURN_NS
}

impl Calls {
    fn read(&mut self, reading: &Reading, near: bool) {
        let measure = |name: &str| {
            let found = reading.extra.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| *value)
        };
        if let Some(answer_ns) = measure("answer_ns") {
            let side = if near {
                &mut self.now_ns
            } else {
                &mut self.usual_ns
            };
            *side = Some(side.map_or(answer_ns, |before| before * 0.8 + answer_ns * 0.2));
        }
        if !near {
            self.now_ns = None;
            self.recent.clear();
        }
    }

    /// So many of the connections are in use.
    fn look(&mut self, used: u64, connections: u64) {
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((used, connections));
    }

    /// The size of the pool, if every connection of it was in use nearly all the time, and none was added.
    fn always_full(&self) -> Option<u64> {
        if self.recent.len() < ENOUGH {
            return None;
        }
        let (first, last) = (self.recent.front()?.1, self.recent.back()?.1);
        let full = self.recent.iter().filter(|(depth, size)| depth >= size);
        let share = full.count() as f64 / self.recent.len() as f64;
        (share >= ALWAYS && last <= first.saturating_add(1)).then_some(last)
    }

    /// Slower than usual; what is not answered at all counts with its age.
    fn is_slow(&self, reading: &Reading) -> bool {
        let oldest_age_ns = reading.oldest_age_ns.map_or(0.0, |ns| ns as f64);
        let now = self.now_ns.unwrap_or(0.0).max(oldest_age_ns);
        self.usual_ns.is_some_and(|usual| now > usual * SLOW)
    }
}
