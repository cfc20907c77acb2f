//! What rules know apart from threads: the last readings of queues in focus, the response times of calls with their baseline,
//! the use of connection pools, the CPU use of other processes, and the counters of JVMs.

use crate::hash::HashMap;
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    exact_waits::{Asked, CpuWaits, ExactWaits},
    jvm_counters::{Collecting, JvmReadings},
};
use crate::{
    queue::{Kind, QueueKey, Reading, Readings, Targets},
    sample::{Cgroup, CpuUser, Hidden, HiddenFact, IoLimit, Refaults, Sample, Target, TargetId},
};

/// A service that keeps one descriptor in reserve counts as without any, too.
pub(super) const MAX_FILES_LEFT: u64 = 1;
/// A turn of an event loop that keeps others waiting, ns: far above the few milliseconds of a healthy turn.
pub(super) const LONG_TURN_NS: u64 = 100_000_000;
/// Maximum number of samples kept of a pool's connections.
const MAX_POOL_SAMPLES: usize = 64;
/// Minimum number of samples before anything is concluded about a pool.
const MIN_POOL_SAMPLES: usize = 5;
/// A pool is exhausted if all connections are in use in at least this share of the samples. Not 1: a connection is briefly
/// free between two calls.
pub(super) const MIN_IN_USE: f64 = 0.8;
/// Calls are slow if they take more than this multiple of their baseline.
pub(super) const MAX_SLOWDOWN: f64 = 2.0;
/// Calls that wait for longer than this, ns, while none is answered, are not answered at all.
const MIN_UNANSWERED_NS: u64 = 2_000_000_000;
/// Weight of a new response time in its EWMA.
const RESPONSE_WEIGHT: f64 = 0.2;
/// Maximum number of counts of responses or arrivals kept per service: enough for the longest window that a verdict is made from.
const MAX_RESPONSE_SAMPLES: usize = 256;
/// The CPU use of other processes is kept for this time, ns.
const CPU_USERS_KEPT_NS: u64 = 30_000_000_000;
/// A process that uses less of one CPU than this starves nobody.
const MIN_HOG_SHARE: f64 = 0.05;
/// Pages that are read again are counted over this time, ns: two samples of control groups or more. A longer window would hold
/// many seconds from before the incident.
const REFAULT_WINDOW_NS: u64 = 2_000_000_000;
/// Maximum number of counts kept per control group: more than the window holds.
const MAX_REFAULT_SAMPLES: usize = 64;
/// An address that a service has called is forgotten after this time, ns: as long as the kernel keeps a closed connection in
/// TIME_WAIT.
const CALLED_KEPT_NS: u64 = 60_000_000_000;
/// Maximum number of addresses kept that services have called. Further ones are not remembered.
const MAX_CALLED: usize = 4_096;

/// The number of requests in flight at which some of them must be waiting for a connection, in a pool of this size.
pub(super) fn min_inflight(connections: u64) -> f64 {
    /// Requests have to exceed connections by a quarter, and by at least two.
    const MIN_RATIO: f64 = 1.25;
    const MIN_MORE: u64 = 2;
    (connections as f64 * MIN_RATIO).max((connections + MIN_MORE) as f64)
}

#[derive(Default)]
pub(super) struct Inputs {
    /// Last readings of the queues in focus.
    last: HashMap<Arc<QueueKey>, Reading>,
    calls: HashMap<Arc<QueueKey>, Calls>,
    /// CPU time of each process: when it was read, the period that it covers, ns, and the processes.
    cpu_users: VecDeque<(u64, u64, Vec<CpuUser>)>,
    cpu_users_ns: Option<u64>,
    cgroups: HashMap<String, Cgroup>,
    io_limits: Vec<IoLimit>,
    hidden: Vec<Hidden>,
    /// Pages read again by each control group: when they were counted, CLOCK_MONOTONIC, ns.
    refaults: HashMap<String, VecDeque<(u64, Refaults)>>,
    /// What hooks measured.
    pub(super) exact_waits: ExactWaits,
    /// When each service was last seen to call each address, CLOCK_MONOTONIC, ns.
    called: HashMap<(TargetId, SocketAddr), u64>,
    /// When an event loop of a service was last seen in a long turn, ns.
    long_turns: HashMap<TargetId, u64>,
    /// When each service was last seen without file descriptors left, ns, and how many were open.
    without_files: HashMap<TargetId, (u64, Reading)>,
    /// Requests that each service responded to: when they were counted, ns, and how many.
    responses: HashMap<TargetId, VecDeque<(u64, u64)>>,
    /// Connections or requests that arrived at each service, by the kind of queue that counted them: when, ns, and how many.
    arrived: HashMap<(TargetId, Kind), VecDeque<(u64, u64)>>,
    jvms: JvmReadings,
}

/// Calls on one endpoint.
#[derive(Default)]
struct Calls {
    /// EWMA of the response time while the service is out of focus, that is, healthy, ns.
    baseline_ns: Option<f64>,
    /// EWMA of the response time while the service is in focus, ns.
    now_ns: Option<f64>,
    recent: VecDeque<PoolUse>,
    /// Calls answered while the service is in focus.
    answered: u64,
}

/// How many of the connections to one endpoint are in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PoolUse {
    pub(super) used: u64,
    /// Those that have carried nothing for a while.
    pub(super) unused: u64,
    pub(super) all: u64,
}

/// How a service uses the connections that it opened to one endpoint.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) endpoint: String,
    pub(super) connections: u64,
    /// Those that have carried nothing for a while, although the others were all in use.
    pub(super) unused: u64,
    /// Share of the samples in which all of them, except the unused ones, were in use.
    pub(super) in_use: f64,
    /// No connection was added while they were sampled: this is the limit of the pool.
    is_at_limit: bool,
    /// Requests in flight at the service.
    pub(super) inflight: u64,
    /// How long calls take, ns; a call that is not answered at all counts with its age.
    pub(super) response_time_ns: Option<f64>,
    /// EWMA of the response time while in focus, ns.
    mean_response_time_ns: Option<f64>,
    /// EWMA of the response time before the queue filled, ns.
    pub(super) baseline_ns: Option<f64>,
    /// No call was answered while they were sampled, and half of them have waited for longer than [`MIN_UNANSWERED_NS`].
    pub(super) is_unanswered: bool,
}

impl Pool {
    /// All connections are in use while calls are no slower than before: work waits for a connection.
    fn is_exhausted(&self) -> bool {
        let is_slow = self.response_time_ns.zip(self.baseline_ns);
        let is_slow = is_slow.is_some_and(|(now, baseline)| now > baseline * MAX_SLOWDOWN);
        self.in_use >= MIN_IN_USE
            && self.is_at_limit
            && self.inflight as f64 >= min_inflight(self.connections)
            && !is_slow
            // Some unused connections are normal if requests wait for the responses on the others.
            && (self.unused == 0 || self.baseline_ns.is_some())
    }

    /// The time that a call typically takes, ns.
    pub(super) fn typical_ns(&self) -> Option<u64> {
        self.mean_response_time_ns
            .or(self.baseline_ns)
            .map(|ns| ns as u64)
    }
}

/// Who uses a CPU that others want.
#[derive(Clone, Debug)]
pub(super) struct Hog {
    pub(super) tgid: u32,
    pub(super) name: String,
    pub(super) cgroup: Option<String>,
    /// Share of one CPU; may exceed 1 if several threads use it.
    pub(super) share: f64,
}

impl Inputs {
    /// Adds one sample, with the readings of its queues.
    pub(super) fn read(
        &mut self,
        sample: &Sample,
        readings: &Readings,
        in_focus: impl Fn(TargetId) -> bool,
    ) {
        for key in &readings.gone {
            self.last.remove(key);
            self.calls.remove(key);
        }
        for (key, reading) in &readings.queues {
            if key.kind == Kind::Downstream {
                self.read_called(key, sample.mono_ns);
                let calls = self.calls.entry(Arc::clone(key)).or_default();
                calls.read(reading, in_focus(key.target));
            }
            if key.kind == Kind::Inflight
                && in_focus(key.target)
                && let Some(count) = reading.departures
            {
                let counts = self.responses.entry(key.target).or_default();
                remember(counts, sample.mono_ns, count);
            }
            if matches!(key.kind, Kind::Accept | Kind::Inflight)
                && in_focus(key.target)
                && let Some(count) = reading.arrivals
            {
                let counts = self.arrived.entry((key.target, key.kind)).or_default();
                remember(counts, sample.mono_ns, count);
            }
            if key.kind == Kind::Eventloop && is_long_turn(reading) {
                self.long_turns.insert(key.target, sample.mono_ns);
            }
            if key.kind == Kind::Fd
                && files_left(reading).is_some_and(|left| left <= MAX_FILES_LEFT)
            {
                let now = (sample.mono_ns, reading.clone());
                self.without_files.insert(key.target, now);
            }
            if in_focus(key.target) {
                self.last.insert(Arc::clone(key), reading.clone());
            }
        }
        let now_ns = sample.mono_ns;
        let is_recent = |at_ns: u64| now_ns.saturating_sub(at_ns) < CALLED_KEPT_NS;
        self.called.retain(|_, at_ns| is_recent(*at_ns));
        self.last.retain(|key, _| in_focus(key.target));
        self.long_turns.retain(|target, _| in_focus(*target));
        self.without_files.retain(|target, _| in_focus(*target));
        self.responses.retain(|target, _| in_focus(*target));
        self.arrived.retain(|(target, _), _| in_focus(*target));
        self.jvms.read(sample);
        if sample.scans.cpu_users {
            self.read_cpu_users(sample);
        }
        if let Some(report) = &sample.hooks {
            self.exact_waits.read(now_ns, report, &in_focus);
        }
        if sample.scans.system {
            let entry = |group: &Cgroup| (group.path.clone(), group.clone());
            self.cgroups = sample.cgroups.iter().map(entry).collect();
            self.io_limits.clone_from(&sample.io_limits);
            self.hidden.clone_from(&sample.hidden);
            self.read_refaults(sample);
        }
    }

    fn read_called(&mut self, key: &QueueKey, now_ns: u64) {
        if let Some(remote) = key.id.remote() {
            let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
            let called = (key.target, remote);
            if self.called.len() < MAX_CALLED || self.called.contains_key(&called) {
                self.called.insert(called, now_ns);
            }
        }
    }

    /// Whether a service was seen to call an address in the last minute.
    pub(super) fn has_called(&self, target: TargetId, remote: SocketAddr) -> bool {
        self.called.contains_key(&(target, remote))
    }

    fn read_cpu_users(&mut self, sample: &Sample) {
        let now_ns = sample.mono_ns;
        if let Some(before_ns) = self.cpu_users_ns.replace(now_ns) {
            let over_ns = now_ns.saturating_sub(before_ns);
            self.cpu_users
                .push_back((now_ns, over_ns, sample.cpu_users.clone()));
        }
        let is_old =
            |(at_ns, ..): &(u64, u64, _)| now_ns.saturating_sub(*at_ns) > CPU_USERS_KEPT_NS;
        while self.cpu_users.front().is_some_and(is_old) {
            self.cpu_users.pop_front();
        }
    }

    /// Requests that a service responded to since then. `None`: they are not counted.
    pub(super) fn responses(&self, target: TargetId, since_ns: u64) -> Option<u64> {
        let samples = self.responses.get(&target)?;
        let since = samples.iter().filter(|(at_ns, _)| *at_ns > since_ns);
        Some(since.map(|(_, count)| count).sum())
    }

    /// The mean time between two responses of a service, over the last seconds, ns. Where it makes one call at a time and each
    /// request makes one, that is the time of a call.
    pub(super) fn between_responses_ns(&self, target: TargetId) -> Option<f64> {
        per_s(self.responses.get(&target)?).map(|per_s| 1e9 / per_s)
    }

    /// How many requests per second arrive at a service, over the last seconds. Where each comes with a connection of its own, its
    /// accept queue counts those as well that nobody has begun. `None`: they are not counted.
    pub(super) fn arrivals_per_s(&self, target: TargetId) -> Option<f64> {
        let of_kind = |kind: Kind| per_s(self.arrived.get(&(target, kind))?);
        let known = [Kind::Accept, Kind::Inflight];
        known.into_iter().filter_map(of_kind).reduce(f64::max)
    }

    /// The longest time without any response since then, ns.
    pub(super) fn longest_pause_ns(&self, target: TargetId, since_ns: u64) -> u64 {
        let samples = self.responses.get(&target).into_iter().flatten();
        let mut since = samples.filter(|(at_ns, _)| *at_ns > since_ns);
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

    /// Whether an event loop of this service was in a long turn since then.
    pub(super) fn had_a_long_turn(&self, target: TargetId, since_ns: u64) -> bool {
        let last = self.long_turns.get(&target);
        last.is_some_and(|at_ns| *at_ns >= since_ns)
    }

    /// Adds, after [`Inputs::read`], how many connections to each endpoint are in use, and how many there are.
    pub(super) fn read_pools(&mut self, pools: &BTreeMap<(TargetId, SocketAddr), PoolUse>) {
        for (key, calls) in &mut self.calls {
            let Some(remote) = key.id.remote() else {
                continue;
            };
            if let Some(pool) = pools.get(&(key.target, remote)) {
                calls.read_pool(*pool);
            }
        }
    }

    /// The last readings of a service's queues of one kind.
    pub(super) fn of(
        &self,
        target: TargetId,
        kind: Kind,
    ) -> impl Iterator<Item = (&Arc<QueueKey>, &Reading)> {
        let ours = move |key: &Arc<QueueKey>| key.target == target && key.kind == kind;
        self.last.iter().filter(move |(key, _)| ours(key))
    }

    /// The file descriptors of the process of this service that has the most of them open.
    pub(super) fn open_files(&self, target: TargetId) -> Option<&Reading> {
        let files = self.of(target, Kind::Fd).map(|(_, reading)| reading);
        files.max_by_key(|reading| reading.depth)
    }

    /// The same when none was left, if that was since then.
    pub(super) fn open_files_at_limit(&self, target: TargetId, since_ns: u64) -> Option<&Reading> {
        let (at_ns, reading) = self.without_files.get(&target)?;
        (*at_ns >= since_ns).then_some(reading)
    }

    pub(super) fn cgroup(&self, target: &Target) -> Option<&Cgroup> {
        self.cgroups.get(target.cgroup.as_ref()?)
    }

    fn read_refaults(&mut self, sample: &Sample) {
        let is_read = |group: &String| sample.refaults.iter().any(|it| it.cgroup == *group);
        self.refaults.retain(|group, _| is_read(group));
        for refaults in &sample.refaults {
            let counts = self.refaults.entry(refaults.cgroup.clone()).or_default();
            counts.push_back((sample.mono_ns, refaults.clone()));
            let is_old = |(at_ns, _): &(u64, Refaults)| {
                sample.mono_ns.saturating_sub(*at_ns) > REFAULT_WINDOW_NS
            };
            while counts.len() > MAX_REFAULT_SAMPLES || counts.get(1).is_some_and(is_old) {
                counts.pop_front();
            }
        }
    }

    /// Pages per second that a service's control group has read again soon after they were evicted, over the last seconds, and
    /// their share of all pages that it read.
    pub(super) fn refaults(&self, target: &Target) -> Option<(f64, f64)> {
        let counts = self.refaults.get(target.cgroup.as_ref()?)?;
        let ((from_ns, first), (to_ns, last)) = (counts.front()?, counts.back()?);
        let seconds = to_ns.saturating_sub(*from_ns) as f64 / 1e9;
        let refaults = last.refaults.saturating_sub(first.refaults) as f64;
        let pages = last.pages.saturating_sub(first.pages) as f64;
        (seconds >= 1.0).then(|| (refaults / seconds, refaults / pages.max(1.0)))
    }

    /// How much a JVM collected garbage in this time, CLOCK_MONOTONIC ns, by its own counters. `None`: they were not read.
    pub(super) fn collecting(&self, tgid: u32, time: (u64, u64)) -> Option<Collecting> {
        self.jvms.over(tgid, time)
    }

    /// Whether the agent cannot see this fact of a service's control group.
    pub(super) fn is_hidden(&self, target: &Target, fact: HiddenFact) -> bool {
        let group = target.cgroup.as_deref().unwrap_or_default();
        let mut hidden = self.hidden.iter();
        hidden.any(|hidden| hidden.fact == fact && hidden.cgroup == group)
    }

    /// Whether the agent sees no processes outside its pid namespace.
    pub(super) fn hides_processes(&self) -> bool {
        let mut hidden = self.hidden.iter();
        hidden.any(|hidden| hidden.fact == HiddenFact::Processes)
    }

    /// The I/O limits of a service's control group, one per device.
    pub(super) fn io_limits(&self, target: &Target) -> impl Iterator<Item = &IoLimit> {
        let group = target.cgroup.clone();
        let limits = self.io_limits.iter();
        limits.filter(move |limit| Some(&limit.cgroup) == group.as_ref())
    }

    fn pools(&self, target: TargetId) -> impl Iterator<Item = Pool> {
        let inflight = self.of(target, Kind::Inflight);
        let inflight = inflight.map(|(_, reading)| reading.depth).sum();
        self.of(target, Kind::Downstream)
            .filter_map(move |(key, reading)| self.calls.get(key)?.pool(key, reading, inflight))
    }

    /// The largest exhausted pool of this service.
    pub(super) fn exhausted_pool(&self, target: TargetId) -> Option<Pool> {
        self.pools(target)
            .filter(Pool::is_exhausted)
            .max_by_key(|pool| pool.connections)
    }

    /// The pool of this service whose connections were all in use in the largest share of the samples.
    pub(super) fn fullest_pool(&self, target: TargetId) -> Option<Pool> {
        self.pools(target)
            .max_by(|a, b| a.in_use.total_cmp(&b.in_use))
    }

    /// For a constant number of connections to this endpoint, none of them in use: the number of those on which a call may be
    /// outstanding. Otherwise `None`.
    pub(super) fn steady_pool(&self, target: TargetId, remote: SocketAddr) -> Option<u64> {
        let (key, reading) = self
            .of(target, Kind::Downstream)
            .find(|(key, _)| key.id.remote() == Some(remote))?;
        let calls = self.calls.get(key)?;
        let latest = calls.recent.iter().rev().take(MIN_POOL_SAMPLES);
        let all = calls.recent.back()?.all;
        let steady = latest.clone().all(|pool| pool.used == 0 && pool.all == all);
        (steady && latest.count() == MIN_POOL_SAMPLES)
            .then(|| measure(reading, "unknown").unwrap_or(0.0) as u64)
    }

    /// The response time of calls on an endpoint and its baseline, ns.
    pub(super) fn response_times(
        &self,
        target: TargetId,
        endpoint: &str,
    ) -> (Option<f64>, Option<f64>) {
        let named = |key: &Arc<QueueKey>| endpoint_of(key) == endpoint;
        self.of(target, Kind::Downstream)
            .find(|(key, _)| named(key))
            .and_then(|(key, _)| self.calls.get(key))
            .map_or((None, None), |calls| (calls.now_ns, calls.baseline_ns))
    }

    /// The baseline of the calls on the endpoint with the most outstanding calls of this service, ns.
    pub(super) fn busiest_baseline_ns(&self, target: TargetId) -> Option<f64> {
        let (key, _) = self
            .of(target, Kind::Downstream)
            .filter(|(_, reading)| reading.depth > 0)
            .max_by_key(|(key, reading)| (reading.depth, Arc::clone(key)))?;
        self.calls.get(key)?.baseline_ns
    }

    /// Whether no call of this service is slow, and the baseline of at least one is known.
    pub(super) fn calls_are_at_baseline(&self, target: TargetId) -> bool {
        let mut known = self
            .of(target, Kind::Downstream)
            .filter_map(|(key, reading)| Some((self.calls.get(key)?, reading)))
            .filter(|(calls, _)| calls.baseline_ns.is_some())
            .peekable();
        known.peek().is_some() && known.all(|(calls, reading)| !calls.is_slow(reading))
    }

    /// The process outside this service that had the CPU for most of the time that others had it in the longest waits, as
    /// hooks measured.
    pub(super) fn measured_culprit(&self, asked: &Asked<'_>) -> Option<u32> {
        self.exact_waits.has_the_cpu(asked)
    }

    /// Whether hooks saw this process have the CPU during one of the longest waits.
    pub(super) fn was_seen_with_the_cpu(&self, asked: &Asked<'_>, tgid: u32) -> bool {
        self.exact_waits.had_the_cpu(asked, tgid)
    }

    /// The waits of this service for a CPU, and who had it, as hooks measured.
    pub(super) fn measured_cpu_waits(&self, asked: &Asked<'_>) -> Option<CpuWaits> {
        self.exact_waits.cpu_waits(asked)
    }

    /// The CPU use of this process, if samples have it.
    pub(super) fn cpu_user(&self, tgid: u32, time: (u64, u64)) -> Option<Hog> {
        let (mut used_ns, mut over_ns, mut found) = (0_u64, 0_u64, None);
        for (_, elapsed_ns, cpu_users) in self.cpu_users_within(time) {
            over_ns = over_ns.saturating_add(*elapsed_ns);
            if let Some(user) = cpu_users.iter().find(|user| user.tgid == tgid) {
                used_ns = used_ns.saturating_add(user.cpu_ns);
                found = Some(user);
            }
        }
        found.map(|user| Hog {
            tgid,
            name: user.name.clone(),
            cgroup: user.cgroup.clone(),
            share: used_ns as f64 / over_ns.max(1) as f64,
        })
    }

    /// The CPU use of processes in this time.
    fn cpu_users_within(
        &self,
        (from_ns, to_ns): (u64, u64),
    ) -> impl Iterator<Item = &(u64, u64, Vec<CpuUser>)> {
        self.cpu_users.iter().filter(move |(at_ns, over_ns, _)| {
            *at_ns > from_ns && at_ns.saturating_sub(*over_ns) < to_ns
        })
    }

    /// The process outside this service that used the most CPU in this time. Processes with the same name and control
    /// group count together; the busiest of them is named.
    pub(super) fn hog(&self, target: TargetId, targets: &Targets, time: (u64, u64)) -> Option<Hog> {
        let mut over_ns = 0_u64;
        let mut groups: BTreeMap<(&str, Option<&str>), BTreeMap<u32, u64>> = BTreeMap::new();
        for (_, elapsed_ns, cpu_users) in self.cpu_users_within(time) {
            over_ns = over_ns.saturating_add(*elapsed_ns);
            let foreign = cpu_users
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
        .filter(|hog| hog.share >= MIN_HOG_SHARE)
    }
}

/// Adds a count, and drops the oldest beyond [`MAX_RESPONSE_SAMPLES`].
fn remember(counts: &mut VecDeque<(u64, u64)>, at_ns: u64, count: u64) {
    counts.push_back((at_ns, count));
    while counts.len() > MAX_RESPONSE_SAMPLES {
        counts.pop_front();
    }
}

/// The rate of what was counted at these times, if anything was, over a second at least.
fn per_s(samples: &VecDeque<(u64, u64)>) -> Option<f64> {
    let (from_ns, to_ns) = (samples.front()?.0, samples.back()?.0);
    let seconds = to_ns.saturating_sub(from_ns) as f64 / 1e9;
    let after_the_first = samples.iter().filter(|(at_ns, _)| *at_ns > from_ns);
    let count: u64 = after_the_first.map(|(_, count)| count).sum();
    (seconds >= 1.0 && count > 0).then(|| count as f64 / seconds)
}

/// The address that a queue of calls leads to: `127.0.0.1:5432`.
pub(super) fn endpoint_of(key: &QueueKey) -> String {
    let remote = key.id.remote();
    remote.map_or_else(|| key.name().to_owned(), |remote| remote.to_string())
}

/// File descriptors that a process can still open.
pub(super) fn files_left(reading: &Reading) -> Option<u64> {
    Some(reading.limit?.saturating_sub(reading.depth))
}

/// The present turn of an event loop is long.
fn is_long_turn(reading: &Reading) -> bool {
    let turn_ns = reading.oldest_age_ns.max(reading.wait_ns).unwrap_or(0);
    reading.depth > 0 && turn_ns >= LONG_TURN_NS
}

/// One of the further measures of a reading.
fn measure(reading: &Reading, name: &str) -> Option<f64> {
    let found = reading.extra.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| *value)
}

impl Calls {
    fn read(&mut self, reading: &Reading, in_focus: bool) {
        if let Some(response_time_ns) = measure(reading, "response_time_ns") {
            let mean = if in_focus {
                &mut self.now_ns
            } else {
                &mut self.baseline_ns
            };
            *mean = Some(mean.map_or(response_time_ns, |before| {
                before * (1.0 - RESPONSE_WEIGHT) + response_time_ns * RESPONSE_WEIGHT
            }));
        }
        if in_focus {
            self.answered += reading.departures.unwrap_or(0);
        } else {
            self.now_ns = None;
            self.recent.clear();
            self.answered = 0;
        }
    }

    fn read_pool(&mut self, pool: PoolUse) {
        if self.recent.len() >= MAX_POOL_SAMPLES {
            self.recent.pop_front();
        }
        self.recent.push_back(pool);
    }

    /// `None`: too few samples.
    fn pool(&self, key: &QueueKey, reading: &Reading, inflight: u64) -> Option<Pool> {
        if self.recent.len() < MIN_POOL_SAMPLES {
            return None;
        }
        let (first, latest) = (self.recent.front()?.all, *self.recent.back()?);
        let last = latest.all;
        let is_full =
            |pool: &&PoolUse| pool.used > 0 && pool.used.saturating_add(pool.unused) >= pool.all;
        let full = self.recent.iter().filter(is_full);
        Some(Pool {
            endpoint: endpoint_of(key),
            connections: last,
            unused: latest.unused,
            in_use: full.count() as f64 / self.recent.len() as f64,
            is_at_limit: last <= first.saturating_add(1),
            inflight,
            response_time_ns: self.response_time_ns(reading),
            mean_response_time_ns: self.now_ns,
            baseline_ns: self.baseline_ns,
            is_unanswered: self.answered == 0
                && reading
                    .ages_ns
                    .get(reading.ages_ns.len() / 2)
                    .is_some_and(|age_ns| *age_ns >= MIN_UNANSWERED_NS),
        })
    }

    /// The EWMA, or the age of the oldest call if that is older: calls that are not answered at all are slow, too.
    fn response_time_ns(&self, reading: &Reading) -> Option<f64> {
        let oldest_ns = reading.oldest_age_ns.map(|ns| ns as f64);
        match (self.now_ns, oldest_ns) {
            (Some(now), Some(oldest)) => Some(now.max(oldest)),
            (now, oldest) => now.or(oldest),
        }
    }

    fn is_slow(&self, reading: &Reading) -> bool {
        let known = self.response_time_ns(reading).zip(self.baseline_ns);
        known.is_some_and(|(now, baseline)| now > baseline * MAX_SLOWDOWN)
    }
}
