//! A wall-clock profile of threads: what each does, one count per sample, kept for the last seconds.
//!
//! Verdicts are made from a [`Window`] of it: the samples taken during an episode.

use crate::hash::{HashMap, HashSet};
use std::collections::{BTreeMap, BTreeSet};

use super::{
    classify::{Observation, Resource, Thread, Threads, classify},
    loop_turns::{LongTurns, MAX_THREADS, Turns},
    seconds::Seconds,
    topology::Topology,
};
use crate::{
    event::Activity,
    queue::{
        Kind, Readings, Targets,
        syscalls::{CallClass, call_of},
    },
    sample::{Detail, LockHolder, Sample, State, TargetId, Wait},
    text::harmless,
};

/// A lock: the tgid of its process and its address there. For a lock that processes share: 0 and its id.
pub(super) type Lock = (u32, u64);

/// Stands for the address of a lock that is inferred, not seen: the threads of a process run in turn, one at a time.
pub(super) const TURNS: u64 = u64::MAX;

/// A thread at a futex of unknown meaning.
const PARKED: Observation = Observation {
    activity: Activity::Idle,
    resource: Resource::Parked,
};

/// The key of a lock that processes share.
pub(super) fn shared(id: u64) -> Lock {
    (0, id)
}

#[derive(Default)]
pub(super) struct Profile {
    seconds: Seconds<Second>,
    names: HashMap<Thread, String>,
    turns: Turns,
    /// Threads that were once parked at a futex of unknown meaning: workers of a pool, or threads that waited for a lock.
    parked: HashSet<Thread>,
}

#[derive(Default)]
struct Second {
    threads: HashMap<Thread, Vec<(Observation, u32)>>,
    /// What the holders of a lock did while others waited for it.
    held: BTreeMap<Lock, BTreeMap<Thread, ThreadProfile>>,
    cpu: BTreeMap<TargetId, CpuHolders>,
    long_turns: LongTurns,
    /// By process, see [`TakingTurns`]: threads that need a CPU, and threads that do anything.
    taking_turns: BTreeMap<u32, TakingTurns>,
    active: BTreeMap<u32, TakingTurns>,
    /// Samples of threads in a system call on one connection, waiting for its response and for nothing else.
    in_one_call: BTreeMap<Thread, u32>,
    /// Samples of threads in epoll_wait.
    polling: BTreeMap<Thread, u32>,
}

/// How many threads of a process needed a CPU at once, or did anything but wait for work.
#[derive(Clone, Debug, Default)]
pub(super) struct TakingTurns {
    samples: u32,
    /// Samples in which exactly one thread did, and those in which more did.
    one: u32,
    more: u32,
    /// The samples with exactly one, by its tid.
    by_thread: BTreeMap<u32, u32>,
}

/// Who had the CPU while threads of a service waited for one: sums of shares.
#[derive(Clone, Copy, Debug, Default)]
struct CpuHolders {
    /// Other threads of the same service.
    own: f64,
    /// Other services.
    foreign: f64,
    /// Nobody: the control group's quota was used up.
    quota: f64,
    /// The hypervisor.
    steal: f64,
}

/// The samples of a period.
pub(super) struct Window {
    threads: BTreeMap<Thread, ThreadProfile>,
    held: BTreeMap<Lock, BTreeMap<Thread, ThreadProfile>>,
    cpu: BTreeMap<TargetId, CpuHolders>,
    long_turns: LongTurns,
    taking_turns: BTreeMap<u32, TakingTurns>,
    in_one_call: BTreeMap<Thread, u32>,
    pub(super) from_ns: u64,
    pub(super) to_ns: u64,
}

/// What one thread was seen doing.
#[derive(Clone, Debug, Default)]
pub(super) struct ThreadProfile {
    /// Samples of the thread.
    pub(super) samples: u32,
    /// The same samples, by what the thread did.
    pub(super) by: BTreeMap<Observation, u32>,
    /// Further samples, which are left out: see [`Window::leave_out_spare_pollers`].
    left_out: u32,
}

impl Profile {
    /// Adds the threads of one sample, of the processes that are `in_focus`.
    pub(super) fn read(
        &mut self,
        now_ns: u64,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        (topology, in_focus): (&Topology, impl Fn(u32) -> bool),
    ) {
        let waits: &[Wait] = match (sample.scans.profile, sample.scans.waits) {
            (true, _) => &sample.profile,
            (false, true) => &sample.waits,
            (false, false) => &[],
        };
        if sample.targets.is_some() {
            self.names
                .retain(|(tgid, _), _| targets.of(*tgid).is_some());
            self.turns.retain(|tgid| targets.of(tgid).is_some());
            self.parked.retain(|(tgid, _)| targets.of(*tgid).is_some());
        }
        let threads = Threads::of(waits);
        self.turns.read_loops(readings);
        let long_turns = self.turns.read(waits, &in_focus);
        let second = self.seconds.at(now_ns);
        let mut now: BTreeMap<Thread, Observation> = waits
            .iter()
            .filter(|wait| in_focus(wait.tgid))
            .filter_map(|wait| Some(((wait.tgid, wait.tid), classify(wait, &threads, topology)?)))
            .collect();
        find_turns_to_accept(&mut now, targets, topology);
        second.count_holders(&now);
        second.long_turns.extend(&long_turns);
        second.count_turns(waits, &in_focus);
        second.count_active(waits, &now, (topology, &self.parked));
        for (thread, seen) in &now {
            if *seen == PARKED && self.parked.len() < MAX_THREADS {
                self.parked.insert(*thread);
            }
        }
        for wait in waits {
            let thread = (wait.tgid, wait.tid);
            let calls = now.get(&thread).is_some_and(|observation| {
                observation.activity == Activity::Downstream
                    && matches!(observation.resource, Resource::Connection(_))
            });
            if calls && is_on_one_file(wait) && second.in_one_call.len() < MAX_THREADS {
                *second.in_one_call.entry(thread).or_default() += 1;
            }
            if polls(wait) && now.contains_key(&thread) && second.polling.len() < MAX_THREADS {
                *second.polling.entry(thread).or_default() += 1;
            }
        }
        for (thread, observation) in now {
            if !second.threads.contains_key(&thread) && second.threads.len() >= MAX_THREADS {
                continue;
            }
            let counts = second.threads.entry(thread).or_default();
            match counts.iter_mut().find(|(known, _)| *known == observation) {
                Some((_, count)) => *count += 1,
                None => counts.push((observation, 1)),
            }
        }
        for (key, reading) in &readings.queues {
            if key.kind == Kind::Runqueue {
                let holders = second.cpu.entry(key.target).or_default();
                for (name, share) in &reading.extra {
                    holders.add(name, *share);
                }
            }
        }
        for wait in waits.iter().filter(|wait| in_focus(wait.tgid)) {
            let thread = (wait.tgid, wait.tid);
            if !self.names.contains_key(&thread) && self.names.len() < MAX_THREADS {
                self.names.insert(thread, harmless(&wait.comm));
            }
        }
    }

    /// The samples of all seconds that overlap with this time.
    pub(super) fn over(&self, from_ns: u64, to_ns: u64) -> Window {
        let mut window = Window {
            threads: BTreeMap::new(),
            held: BTreeMap::new(),
            cpu: BTreeMap::new(),
            long_turns: LongTurns::default(),
            taking_turns: BTreeMap::new(),
            in_one_call: BTreeMap::new(),
            from_ns,
            to_ns,
        };
        let mut polling: BTreeMap<Thread, u32> = BTreeMap::new();
        let mut active: BTreeMap<u32, TakingTurns> = BTreeMap::new();
        for second in self.seconds.within(from_ns, to_ns) {
            for (thread, counts) in &second.threads {
                let profile = window.threads.entry(*thread).or_default();
                for (observation, count) in counts {
                    profile.add(observation, *count);
                }
            }
            for (lock, holders) in &second.held {
                let all = window.held.entry(*lock).or_default();
                for (thread, profile) in holders {
                    let all = all.entry(*thread).or_default();
                    for (observation, count) in &profile.by {
                        all.add(observation, *count);
                    }
                }
            }
            window.long_turns.extend(&second.long_turns);
            for (thread, count) in &second.in_one_call {
                *window.in_one_call.entry(*thread).or_default() += count;
            }
            for (thread, count) in &second.polling {
                *polling.entry(*thread).or_default() += count;
            }
            for (tgid, turns) in &second.taking_turns {
                window.taking_turns.entry(*tgid).or_default().sum(turns);
            }
            for (tgid, turns) in &second.active {
                active.entry(*tgid).or_default().sum(turns);
            }
            for (target, holders) in &second.cpu {
                window.cpu.entry(*target).or_default().sum(holders);
            }
        }
        window.leave_out_spare_pollers(&polling);
        window.find_idle_loops(&polling, self.turns.woken());
        window.find_turns_to_wait(&active);
        window
    }

    /// The name of a thread (`/proc/PID/task/TID/comm`).
    pub(super) fn comm(&self, thread: Thread) -> Option<&str> {
        self.names.get(&thread).map(String::as_str)
    }
}

/// Whether a thread is in a system call that waits for one file: read, or poll with one entry. Some libraries poll before each
/// read, for its timeout.
fn is_on_one_file(wait: &Wait) -> bool {
    let entries = match wait.syscall.as_ref().map(|syscall| &syscall.detail) {
        Some(Detail::Poll(entries)) => entries.len(),
        _ => 0,
    };
    match call_of(wait) {
        Some((_, CallClass::Read)) => true,
        Some((_, CallClass::Poll)) => entries == 1,
        _ => false,
    }
}

/// Whether a thread sleeps in epoll_wait.
fn polls(wait: &Wait) -> bool {
    wait.state == State::Sleeping && matches!(call_of(wait), Some((_, CallClass::Epoll)))
}

impl Second {
    /// Counts how many threads of each process need a CPU in one sample.
    fn count_turns(&mut self, waits: &[Wait], in_focus: &impl Fn(u32) -> bool) {
        let mut active: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for wait in waits.iter().filter(|wait| in_focus(wait.tgid)) {
            let threads = active.entry(wait.tgid).or_default();
            if matches!(wait.state, State::Running | State::Runnable) {
                threads.push(wait.tid);
            }
        }
        for (tgid, threads) in active {
            self.taking_turns.entry(tgid).or_default().add(&threads);
        }
    }

    /// Like [`Second::count_holders`], for locks that processes share. If a process holds the lock, all its threads that do not
    /// wait for it count; idle ones only if there are no others.
    fn count_shared_holders(&mut self, now: &BTreeMap<Thread, Observation>) {
        let waited_for: BTreeSet<(u64, LockHolder)> = now
            .values()
            .filter(|seen| seen.activity == Activity::Lock)
            .filter_map(|seen| match seen.resource {
                Resource::SharedLock { id, holder, .. } => Some((id, holder)),
                _ => None,
            })
            .collect();
        for (id, holder) in waited_for {
            let Some(tgid) = holder.tgid() else {
                continue;
            };
            let may_hold = |(thread, seen): &(&Thread, &Observation)| {
                let waits =
                    matches!(seen.resource, Resource::SharedLock { id: other, .. } if other == id);
                let is_it = match holder {
                    LockHolder::Thread { tid, .. } => thread.1 == tid,
                    _ => true,
                };
                is_it && !waits
            };
            let threads = now.range((tgid, 0)..=(tgid, u32::MAX)).filter(may_hold);
            let threads: Vec<_> = threads.collect();
            let is_idle = |seen: &Observation| seen.activity == Activity::Idle;
            let all_idle = threads.iter().all(|(_, seen)| is_idle(seen));
            let holding = threads
                .iter()
                .filter(|(_, seen)| all_idle || !is_idle(seen));
            for (thread, seen) in holding {
                let holders = self.held.entry(shared(id)).or_default();
                holders.entry(**thread).or_default().add(seen, 1);
            }
        }
    }

    /// Counts how many threads of each process do anything but wait for work in one sample, and what the only one does. A thread
    /// in epoll_wait waits for whatever all others have begun: it takes no turn. Nor does one that sleeps, unless it was `parked`
    /// before: then it is no timer. And while there is only one request, nobody else has anything to do.
    fn count_active(
        &mut self,
        waits: &[Wait],
        now: &BTreeMap<Thread, Observation>,
        (topology, parked): (&Topology, &HashSet<Thread>),
    ) {
        const MIN_REQUESTS: u32 = 2;
        let mut active: BTreeMap<u32, Vec<(u32, &Observation)>> = BTreeMap::new();
        for wait in waits {
            let Some(seen) = now.get(&(wait.tgid, wait.tid)) else {
                continue;
            };
            let threads = active.entry(wait.tgid).or_default();
            let rests = match seen.activity {
                Activity::Idle | Activity::Lock | Activity::Unknown => true,
                Activity::Asleep => !parked.contains(&(wait.tgid, wait.tid)),
                _ => false,
            };
            if !polls(wait) && !rests {
                threads.push((wait.tid, seen));
            }
        }
        for (tgid, mut threads) in active {
            if topology.work_of(tgid).in_service < MIN_REQUESTS {
                threads.clear();
            }
            let tids: Vec<u32> = threads.iter().map(|(tid, _)| *tid).collect();
            self.active.entry(tgid).or_default().add(&tids);
            if let [(tid, seen)] = threads.as_slice() {
                let at_work = self.held.entry((tgid, TURNS)).or_default();
                if at_work.len() < MAX_THREADS {
                    at_work.entry((tgid, *tid)).or_default().add(seen, 1);
                }
            }
        }
    }

    /// Counts what the holders of locks do that others wait for now. An interpreter's lock records no owner: its
    /// holders are taken to be the threads of its process that use a CPU or want one.
    fn count_holders(&mut self, now: &BTreeMap<Thread, Observation>) {
        let waited_for: BTreeMap<Lock, (Option<u32>, bool)> = now
            .values()
            .filter_map(|observation| match observation.resource {
                Resource::Lock {
                    tgid,
                    address,
                    owner,
                    interpreter,
                } => Some(((tgid, address), (owner, interpreter))),
                _ => None,
            })
            .collect();
        self.count_shared_holders(now);
        for ((tgid, address), (owner, interpreter)) in waited_for {
            let needs_cpu = |observation: &Observation| {
                matches!(
                    observation.activity,
                    Activity::OnCpu | Activity::RunnableOwn
                )
            };
            let threads = now.range((tgid, 0)..=(tgid, u32::MAX));
            let holds = |tid: u32, observation: &Observation| match owner {
                Some(owner) => tid == owner,
                None => interpreter && needs_cpu(observation),
            };
            let holding = threads.filter(|((_, tid), observation)| holds(*tid, observation));
            for ((_, tid), observation) in holding {
                let holders = self.held.entry((tgid, address)).or_default();
                let profile = holders.entry((tgid, *tid)).or_default();
                profile.add(observation, 1);
            }
        }
    }
}

/// Workers that share a listener may take turns at waiting for a connection: the one whose turn it is holds a lock. The others,
/// which wait for this lock and have no request in service, are idle, too.
fn find_turns_to_accept(
    now: &mut BTreeMap<Thread, Observation>,
    targets: &Targets,
    topology: &Topology,
) {
    let idle = |tgid: u32, now: &BTreeMap<Thread, Observation>| {
        let mut threads = now.range((tgid, 0)..=(tgid, u32::MAX)).peekable();
        threads.peek().is_some() && threads.all(|(_, seen)| seen.activity == Activity::Idle)
    };
    let waits_for_a_turn = |thread: &Thread, seen: &Observation| {
        let Resource::SharedLock { holder, .. } = seen.resource else {
            return false;
        };
        holder.tgid().is_some_and(|holder| {
            targets.of(holder) == targets.of(thread.0)
                && topology.work_of(thread.0).in_service == 0
                && idle(holder, now)
        })
    };
    let waiting = now
        .iter()
        .filter(|(thread, seen)| waits_for_a_turn(thread, seen));
    let waiting: Vec<Thread> = waiting.map(|(thread, _)| *thread).collect();
    for thread in waiting {
        if let Some(seen) = now.get_mut(&thread) {
            *seen = Observation {
                activity: Activity::Idle,
                resource: Resource::Parked,
            };
        }
    }
}

impl TakingTurns {
    /// Adds one sample with these threads.
    fn add(&mut self, tids: &[u32]) {
        self.samples += 1;
        match tids {
            [] => {}
            [tid] => {
                self.one += 1;
                if self.by_thread.len() < MAX_THREADS {
                    *self.by_thread.entry(*tid).or_default() += 1;
                }
            }
            _ => self.more += 1,
        }
    }

    /// Whether one thread does it nearly all the time, in turn with others, and two hardly ever do at the same time.
    pub(super) fn is_one_at_a_time(&self) -> bool {
        self.samples >= Self::MIN_SAMPLES
            && self.one() >= Self::MIN_ONE
            && self.more() <= Self::MAX_MORE
            && self.threads(Self::MIN_TURNS) >= Self::MIN_THREADS
    }

    /// With fewer samples chance could keep two threads apart.
    pub(super) const MIN_SAMPLES: u32 = 20;
    /// One thread or another is active nearly all the time, …
    pub(super) const MIN_ONE: f64 = 0.8;
    /// … and two hardly ever are: threads are not all sampled at the same moment.
    pub(super) const MAX_MORE: f64 = 0.1;
    /// A thread takes part if it has at least this share of the turns.
    pub(super) const MIN_TURNS: f64 = 0.04;
    /// Minimum number of threads that take part: two might just hand work to each other.
    pub(super) const MIN_THREADS: usize = 3;

    fn sum(&mut self, other: &Self) {
        self.samples += other.samples;
        self.one += other.one;
        self.more += other.more;
        for (tid, count) in &other.by_thread {
            *self.by_thread.entry(*tid).or_default() += count;
        }
    }

    pub(super) fn samples(&self) -> u32 {
        self.samples
    }

    /// Share of the samples in which exactly one thread needed a CPU, 0 to 1.
    pub(super) fn one(&self) -> f64 {
        f64::from(self.one) / f64::from(self.samples.max(1))
    }

    /// Share of the samples in which more than one did, 0 to 1.
    pub(super) fn more(&self) -> f64 {
        f64::from(self.more) / f64::from(self.samples.max(1))
    }

    /// The threads that each had at least this share of those turns. Those with less are added up first: each request may have a
    /// thread of its own.
    pub(super) fn threads(&self, min_share: f64) -> usize {
        count_with_share(self.by_thread.values().copied(), min_share)
    }
}

/// How many of these have at least this share of the sum. Those with less are added up first.
pub(super) fn count_with_share(counts: impl Iterator<Item = u32> + Clone, min_share: f64) -> usize {
    let all: u32 = counts.clone().sum();
    let least = min_share * f64::from(all);
    let (large, small) = counts.fold((0, 0), |(large, small), count| {
        if f64::from(count) >= least {
            (large + 1, small)
        } else {
            (large, small + count)
        }
    });
    large + (f64::from(small) / least.max(1.0)) as usize
}

impl CpuHolders {
    /// Adds one measure of a run queue, by its name there.
    fn add(&mut self, name: &str, share: f64) {
        match name {
            "own_share" => self.own += share,
            "foreign_share" => self.foreign += share,
            "quota_share" => self.quota += share,
            "steal_share" => self.steal += share,
            _ => {}
        }
    }

    fn sum(&mut self, other: &Self) {
        self.own += other.own;
        self.foreign += other.foreign;
        self.quota += other.quota;
        self.steal += other.steal;
    }

    /// Splits `share`, the time spent waiting for a CPU, by who had it. If that is unknown, the service's own threads
    /// are assumed to have had it.
    fn split(&self, share: f64) -> [(Activity, f64); 4] {
        let all = self.own + self.foreign + self.quota + self.steal;
        let part = |part: f64| if all > 0.0 { share * part / all } else { 0.0 };
        let own = if all > 0.0 { part(self.own) } else { share };
        [
            (Activity::RunnableOwn, own),
            (Activity::RunnableForeign, part(self.foreign)),
            (Activity::Throttled, part(self.quota)),
            (Activity::Stolen, part(self.steal)),
        ]
    }
}

impl ThreadProfile {
    fn add(&mut self, observation: &Observation, count: u32) {
        self.samples = self.samples.saturating_add(count);
        *self.by.entry(observation.clone()).or_default() += count;
    }

    /// Share of the samples that is not left out, 0 to 1: the weight of the others.
    pub(super) fn presence(&self) -> f64 {
        let all = self.samples.saturating_add(self.left_out);
        f64::from(self.samples) / f64::from(all.max(1))
    }

    /// Share of the samples in which it waited for work.
    pub(super) fn idle(&self) -> f64 {
        self.share_of(Activity::Idle)
    }

    /// Samples in which it did this.
    pub(super) fn samples_of(&self, activity: Activity) -> u32 {
        let of = self
            .by
            .iter()
            .filter(|(observation, _)| observation.activity == activity);
        of.map(|(_, count)| count).sum()
    }

    /// Share of the samples in which it did this, 0 to 1.
    pub(super) fn share_of(&self, activity: Activity) -> f64 {
        f64::from(self.samples_of(activity)) / f64::from(self.samples.max(1))
    }
}

impl Window {
    /// A runtime's monitor parks each waiting thread at an address of its own, as an idle pool does. But where one thread at a time
    /// waits for something outside, and others take over from it, these are parked because they wait for their turn. Threads that
    /// compute in turn are left as they are: a rule of its own recognizes them.
    fn find_turns_to_wait(&mut self, active: &BTreeMap<u32, TakingTurns>) {
        /// More than half of the turns are spent waiting.
        const MAX_COMPUTING: f64 = 0.5;
        let computes = |profiles: &BTreeMap<Thread, ThreadProfile>| {
            let seen = || profiles.values().flat_map(|profile| &profile.by);
            let needs_cpu = seen().filter(|(seen, _)| Activity::NEEDS_CPU.contains(&seen.activity));
            let needed: u32 = needs_cpu.map(|(_, count)| count).sum();
            let all: u32 = seen().map(|(_, count)| count).sum();
            f64::from(needed) / f64::from(all.max(1))
        };
        for (tgid, turns) in active {
            let lock = (*tgid, TURNS);
            let waits = self
                .held
                .get(&lock)
                .is_some_and(|at_work| computes(at_work) < MAX_COMPUTING);
            if !waits || !turns.is_one_at_a_time() {
                self.held.remove(&lock);
                continue;
            }
            let its_turn = Observation {
                activity: Activity::Lock,
                resource: Resource::Lock {
                    tgid: *tgid,
                    address: TURNS,
                    owner: None,
                    interpreter: true,
                },
            };
            for tid in turns.by_thread.keys() {
                if let Some(profile) = self.threads.get_mut(&(*tgid, *tid))
                    && let Some(count) = profile.by.remove(&PARKED)
                {
                    profile.by.insert(its_turn.clone(), count);
                }
            }
        }
    }

    /// What a thread in epoll_wait waits for is concluded from what its whole process has in progress. That is wrong for a loop
    /// that has no part in it, such as one for timers. A loop that has never been woken, while another loop of the process has been,
    /// counts as idle. One that served requests and hangs now was woken once. `woken`: see [`Turns::woken`].
    fn find_idle_loops(&mut self, polling: &BTreeMap<Thread, u32>, woken: &HashSet<Thread>) {
        /// With fewer samples a loop that serves requests may not have been woken yet.
        const MIN_SAMPLES: u32 = 20;
        if woken.len() >= MAX_THREADS {
            return;
        }
        for (thread, polls) in polling {
            let others = polling.range((thread.0, 0)..=(thread.0, u32::MAX));
            let another_is_woken = others.map(|(other, _)| other).any(|it| woken.contains(it));
            if woken.contains(thread) || !another_is_woken {
                continue;
            }
            if let Some(profile) = self.threads.get_mut(thread)
                && profile.samples >= MIN_SAMPLES
                && profile.samples == *polls
            {
                profile.by = BTreeMap::from([(PARKED, profile.samples)]);
            }
        }
    }

    /// Runtimes that run many tasks on few threads (Go, tokio) let one of them poll for all, in turn, and park the others until
    /// there is something to run. A parked thread is no spare worker there: its samples are left out. `polling`: samples in
    /// epoll_wait.
    fn leave_out_spare_pollers(&mut self, polling: &BTreeMap<Thread, u32>) {
        /// A thread takes part if it polls for this share of its samples, …
        const MIN_POLLING: f64 = 0.02;
        /// … and so do at least this many threads of its process.
        const MIN_THREADS: usize = 2;
        let mut in_turn: BTreeMap<u32, Vec<Thread>> = BTreeMap::new();
        for (thread, polls) in polling {
            let takes_part = self.threads.get(thread).is_some_and(|profile| {
                let share = f64::from(*polls) / f64::from(profile.samples.max(1));
                share >= MIN_POLLING && profile.by.contains_key(&PARKED)
            });
            if takes_part {
                in_turn.entry(thread.0).or_default().push(*thread);
            }
        }
        let in_turn = in_turn.into_values();
        for thread in in_turn.filter(|all| all.len() >= MIN_THREADS).flatten() {
            if let Some(profile) = self.threads.get_mut(&thread)
                && let Some(count) = profile.by.remove(&PARKED)
            {
                profile.samples = profile.samples.saturating_sub(count);
                profile.left_out = count;
            }
        }
    }

    pub(super) fn threads(&self) -> impl Iterator<Item = (Thread, &ThreadProfile)> {
        self.threads
            .iter()
            .map(|(thread, profile)| (*thread, profile))
    }

    /// Whether this event-loop thread computed for [`LONG_TURN_NS`] or more without returning to epoll_wait.
    pub(super) fn had_a_long_turn(&self, thread: Thread) -> bool {
        self.long_turns.has_whole(thread)
    }

    /// Whether it computed for that long without sleeping, in a turn that was under way when it was first seen.
    pub(super) fn was_under_way(&self, thread: Thread) -> bool {
        self.long_turns.has_under_way(thread)
    }

    /// Share of the samples of a thread in which it waited for the response on one connection, and for nothing else, 0 to 1.
    pub(super) fn in_one_call(&self, thread: Thread) -> f64 {
        let samples = self
            .threads
            .get(&thread)
            .map_or(0, |profile| profile.samples);
        let in_call = self.in_one_call.get(&thread).copied().unwrap_or(0);
        f64::from(in_call) / f64::from(samples.max(1))
    }

    /// How many threads of a process needed a CPU at once.
    pub(super) fn taking_turns(&self, tgid: u32) -> Option<&TakingTurns> {
        self.taking_turns.get(&tgid)
    }

    pub(super) fn of(&self, thread: Thread) -> Option<&ThreadProfile> {
        self.threads.get(&thread)
    }

    /// Threads of one process.
    pub(super) fn of_process(&self, tgid: u32) -> impl Iterator<Item = (Thread, &ThreadProfile)> {
        let range = self.threads.range((tgid, 0)..=(tgid, u32::MAX));
        range.map(|(thread, profile)| (*thread, profile))
    }

    /// What the holders of a lock did while others waited for it.
    pub(super) fn holders(&self, lock: Lock) -> Option<&BTreeMap<Thread, ThreadProfile>> {
        self.held.get(&lock)
    }

    /// Shares of wall time by activity, over some threads with weights; largest first, with a sum of 1. The run queue
    /// of `target` shows who had the CPU while they waited for one.
    pub(super) fn shares<'a>(
        &self,
        profiles: impl Iterator<Item = (Thread, f64, &'a ThreadProfile)>,
        target: Option<TargetId>,
    ) -> Vec<(Activity, f64)> {
        let mut sums: BTreeMap<Activity, f64> = BTreeMap::new();
        for (_, weight, profile) in profiles {
            for (observation, count) in &profile.by {
                let share = f64::from(*count) / f64::from(profile.samples.max(1));
                let share = share * profile.presence();
                *sums.entry(observation.activity).or_default() += weight * share;
            }
        }
        let all: f64 = sums.values().sum();
        if all <= 0.0 {
            return Vec::new();
        }
        if let Some(waits) = sums.remove(&Activity::RunnableOwn) {
            let holders = target.and_then(|target| self.cpu.get(&target).copied());
            for (activity, share) in holders.unwrap_or_default().split(waits) {
                *sums.entry(activity).or_default() += share;
            }
        }
        let mut shares: Vec<(Activity, f64)> = sums
            .into_iter()
            .map(|(activity, share)| (activity, share / all))
            .filter(|(_, share)| *share > 0.0)
            .collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        shares
    }
}
