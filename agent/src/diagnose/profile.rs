//! What threads' wall time went into: one count per look, kept for each of the last seconds.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::{
    Activity,
    classify::{Doing, Object, Threads, classify},
    inputs::LONG_TURN_NS,
    topology::Topology,
    wait_graph::Crowd,
};
use crate::{
    queue::{
        Kind, Readings, Targets,
        syscalls::{Does, call_of},
    },
    sample::{Sample, State, TargetId, Wait},
    text::harmless,
};

const SECOND_NS: u64 = 1_000_000_000;
/// Seconds that are kept: those that a verdict is made of, and a few more.
const KEEP_SECONDS: usize = 25;
/// Threads counted in one second at most; what is beyond is not looked at.
const MAX_THREADS: usize = 4_096;

/// A thread, by its process and its own number.
pub(super) type Thread = (u32, u32);

#[derive(Default)]
pub(super) struct Profile {
    seconds: VecDeque<Second>,
    names: HashMap<Thread, String>,
    turns: HashMap<Thread, Turn>,
}

/// A thread since it last slept.
#[derive(Clone, Copy)]
struct Turn {
    voluntary: u64,
    /// CPU time that it had used when it woke, ns.
    woke_at_ns: u64,
    /// It last slept in epoll_wait.
    of_a_loop: bool,
}

struct Second {
    from_ns: u64,
    threads: HashMap<Thread, Vec<(Doing, u32)>>,
    /// What those who held a lock did while others waited for it.
    held: BTreeMap<Lock, BTreeMap<Thread, Time>>,
    cpu: BTreeMap<TargetId, Split>,
    /// Threads of event loops that have computed for long without sleeping.
    long_turns: BTreeSet<Thread>,
}

/// A lock, by its process and address.
pub(super) type Lock = (u32, u64);

/// Who had the CPU while threads of a target waited for one: sums of shares.
#[derive(Clone, Copy, Debug, Default)]
struct Split {
    own: f64,
    foreign: f64,
    quota: f64,
    steal: f64,
}

/// A stretch of time.
pub(super) struct Window {
    threads: BTreeMap<Thread, Time>,
    held: BTreeMap<Lock, BTreeMap<Thread, Time>>,
    cpu: BTreeMap<TargetId, Split>,
    long_turns: BTreeSet<Thread>,
    pub(super) from_ns: u64,
    pub(super) to_ns: u64,
}

/// What one thread's looks were.
#[derive(Clone, Debug, Default)]
pub(super) struct Time {
    pub(super) looks: u32,
    pub(super) by: BTreeMap<Doing, u32>,
}

impl Profile {
    pub(super) fn read(
        &mut self,
        now_ns: u64,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        (world, near): (&Topology, impl Fn(u32) -> bool),
    ) {
        let waits: &[Wait] = match (sample.walks.profile, sample.walks.waits) {
            (true, _) => &sample.profile,
            (false, true) => &sample.waits,
            (false, false) => &[],
        };
        if sample.targets.is_some() {
            self.names
                .retain(|(tgid, _), _| targets.of(*tgid).is_some());
            self.turns
                .retain(|(tgid, _), _| targets.of(*tgid).is_some());
        }
        let threads = Threads::of(waits);
        let long_turns = self.turn(waits, &near);
        let second = self.second(now_ns);
        let now: BTreeMap<Thread, Doing> = waits
            .iter()
            .filter(|wait| near(wait.tgid))
            .filter_map(|wait| Some(((wait.tgid, wait.tid), classify(wait, &threads, world)?)))
            .collect();
        second.hold(&now);
        second.long_turns.extend(long_turns);
        for (thread, doing) in now {
            if !second.threads.contains_key(&thread) && second.threads.len() >= MAX_THREADS {
                continue;
            }
            let counts = second.threads.entry(thread).or_default();
            match counts.iter_mut().find(|(known, _)| *known == doing) {
                Some((_, count)) => *count += 1,
                None => counts.push((doing, 1)),
            }
        }
        for (key, reading) in &readings.queues {
            if key.kind == Kind::Runqueue {
                let split = second.cpu.entry(key.target).or_default();
                for (name, share) in &reading.extra {
                    split.add(name, *share);
                }
            }
        }
        for wait in waits.iter().filter(|wait| near(wait.tgid)) {
            let thread = (wait.tgid, wait.tid);
            if !self.names.contains_key(&thread) && self.names.len() < MAX_THREADS {
                self.names.insert(thread, harmless(&wait.comm));
            }
        }
    }

    /// Follows the turns of threads that live in epoll_wait; answers those that take long.
    fn turn(&mut self, waits: &[Wait], near: &impl Fn(u32) -> bool) -> Vec<Thread> {
        let mut long = Vec::new();
        for wait in waits.iter().filter(|wait| near(wait.tgid)) {
            let thread = (wait.tgid, wait.tid);
            let runs = matches!(wait.state, State::Running | State::Runnable);
            let before = self.turns.get(&thread).copied();
            let turn = match before {
                Some(turn) if runs && turn.voluntary == wait.voluntary => turn,
                Some(turn) if runs => Turn {
                    voluntary: wait.voluntary,
                    woke_at_ns: wait.cpu_ns,
                    ..turn
                },
                _ => Turn {
                    voluntary: wait.voluntary,
                    woke_at_ns: wait.cpu_ns,
                    of_a_loop: matches!(call_of(wait), Some((_, Does::Epoll))),
                },
            };
            // By CPU time: one that waits for a CPU is not busy.
            if turn.of_a_loop && wait.cpu_ns.saturating_sub(turn.woke_at_ns) >= LONG_TURN_NS {
                long.push(thread);
            }
            if before.is_some() || self.turns.len() < MAX_THREADS {
                self.turns.insert(thread, turn);
            }
        }
        long
    }

    fn second(&mut self, now_ns: u64) -> &mut Second {
        let is_new = self
            .seconds
            .back()
            .is_none_or(|second| now_ns.saturating_sub(second.from_ns) >= SECOND_NS);
        if is_new {
            if self.seconds.len() >= KEEP_SECONDS {
                self.seconds.pop_front();
            }
            self.seconds.push_back(Second {
                from_ns: now_ns,
                threads: HashMap::new(),
                held: BTreeMap::new(),
                cpu: BTreeMap::new(),
                long_turns: BTreeSet::new(),
            });
        }
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }

    /// All that was seen in the seconds that overlap with this time.
    pub(super) fn over(&self, from_ns: u64, to_ns: u64) -> Window {
        let mut window = Window {
            threads: BTreeMap::new(),
            held: BTreeMap::new(),
            cpu: BTreeMap::new(),
            long_turns: BTreeSet::new(),
            from_ns,
            to_ns,
        };
        let within = |second: &&Second| {
            second.from_ns <= to_ns && second.from_ns.saturating_add(SECOND_NS) > from_ns
        };
        for second in self.seconds.iter().filter(within) {
            for (thread, counts) in &second.threads {
                let time = window.threads.entry(*thread).or_default();
                for (doing, count) in counts {
                    time.add(doing, *count);
                }
            }
            for (lock, holders) in &second.held {
                let all = window.held.entry(*lock).or_default();
                for (thread, time) in holders {
                    let all = all.entry(*thread).or_default();
                    for (doing, count) in &time.by {
                        all.add(doing, *count);
                    }
                }
            }
            window.long_turns.extend(&second.long_turns);
            for (target, split) in &second.cpu {
                window.cpu.entry(*target).or_default().sum(split);
            }
        }
        window
    }

    pub(super) fn comm(&self, thread: Thread) -> Option<&str> {
        self.names.get(&thread).map(String::as_str)
    }
}

impl Second {
    /// What those do who hold a lock now that others wait for. Of an interpreter's lock, which keeps no owner, these are
    /// the threads of its process that use a CPU, or want one.
    fn hold(&mut self, now: &BTreeMap<Thread, Doing>) {
        let waited_for: BTreeMap<Lock, (Option<u32>, bool)> = now
            .values()
            .filter_map(|doing| match doing.object {
                Object::Lock {
                    tgid,
                    address,
                    owner,
                    interpreter,
                } => Some(((tgid, address), (owner, interpreter))),
                _ => None,
            })
            .collect();
        for ((tgid, address), (owner, interpreter)) in waited_for {
            let works =
                |doing: &Doing| matches!(doing.activity, Activity::OnCpu | Activity::RunnableOwn);
            let threads = now.range((tgid, 0)..=(tgid, u32::MAX));
            let holds = |tid: u32, doing: &Doing| match owner {
                Some(owner) => tid == owner,
                None => interpreter && works(doing),
            };
            for ((_, tid), doing) in threads.filter(|((_, tid), doing)| holds(*tid, doing)) {
                let holders = self.held.entry((tgid, address)).or_default();
                holders.entry((tgid, *tid)).or_default().add(doing, 1);
            }
        }
    }
}

impl Split {
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

    /// Of the time spent waiting for a CPU, by who had it.
    fn divide(&self, share: f64) -> [(Activity, f64); 4] {
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

impl Time {
    fn add(&mut self, doing: &Doing, count: u32) {
        self.looks = self.looks.saturating_add(count);
        *self.by.entry(doing.clone()).or_default() += count;
    }

    /// Share of the looks at which it waited for work.
    pub(super) fn idle(&self) -> f64 {
        self.share_of(Activity::Idle)
    }

    pub(super) fn share_of(&self, activity: Activity) -> f64 {
        let of = self
            .by
            .iter()
            .filter(|(doing, _)| doing.activity == activity);
        let looks: u32 = of.map(|(_, count)| count).sum();
        f64::from(looks) / f64::from(self.looks.max(1))
    }
}

impl Window {
    pub(super) fn threads(&self) -> impl Iterator<Item = (Thread, &Time)> {
        self.threads.iter().map(|(thread, time)| (*thread, time))
    }

    /// Whether this thread of an event loop was away from it for long.
    pub(super) fn had_a_long_turn(&self, thread: Thread) -> bool {
        self.long_turns.contains(&thread)
    }

    pub(super) fn of(&self, thread: Thread) -> Option<&Time> {
        self.threads.get(&thread)
    }

    /// Threads of one process.
    pub(super) fn of_process(&self, tgid: u32) -> impl Iterator<Item = (Thread, &Time)> {
        let range = self.threads.range((tgid, 0)..=(tgid, u32::MAX));
        range.map(|(thread, time)| (*thread, time))
    }

    /// What those did who held a lock while others waited for it.
    pub(super) fn holders(&self, lock: Lock) -> Option<&BTreeMap<Thread, Time>> {
        self.held.get(&lock)
    }

    /// What the wall time of some threads went into, each by its weight; the largest share first, all of them together 1.
    /// `target`: whose run queue says who had the CPU.
    pub(super) fn shares(&self, crowd: &Crowd, target: Option<TargetId>) -> Vec<(Activity, f64)> {
        let mut sums: BTreeMap<Activity, f64> = BTreeMap::new();
        for (_, weight, time) in crowd.times(self) {
            for (doing, count) in &time.by {
                let share = f64::from(*count) / f64::from(time.looks.max(1));
                *sums.entry(doing.activity).or_default() += weight * share;
            }
        }
        let all: f64 = sums.values().sum();
        if all <= 0.0 {
            return Vec::new();
        }
        if let Some(waits) = sums.remove(&Activity::RunnableOwn) {
            let split = target.and_then(|target| self.cpu.get(&target).copied());
            for (activity, share) in split.unwrap_or_default().divide(waits) {
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
