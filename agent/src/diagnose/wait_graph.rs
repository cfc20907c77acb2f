//! From a blocked thread to what it waits for, and on, until something works, waits for a CPU, or leaves the machine.
//!
//! What is followed is a crowd: threads that wait together, each with a weight. At each step most of their time tells what
//! they wait for; whoever is at the other end of that is the next crowd.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Activity,
    classify::{Doing, Object},
    profile::{Lock, Profile, Thread, Time, Window},
    topology::{Held, Link, Topology},
};
use crate::{event::share_of, queue::Targets, sample::TargetId};

/// Steps after which nothing new is expected.
const MAX_STEPS: usize = 12;
/// A thread that waits for work more often than that does not work.
const ALWAYS_IDLE: f64 = 0.98;
/// A thread that has more than that of a crowd's weight stands for it.
const MOSTLY_ONE: f64 = 0.5;
/// A crowd that works less than that waits for work.
const MOSTLY_IDLE: f64 = 0.85;

/// Threads, each with its weight.
#[derive(Clone, Debug, Default)]
pub(super) struct Crowd {
    pub(super) members: Vec<(Thread, f64)>,
    /// They matter only while they hold this lock.
    while_holding: Option<Lock>,
}

impl Crowd {
    pub(super) fn of(threads: impl IntoIterator<Item = Thread>) -> Self {
        Self {
            members: threads.into_iter().map(|thread| (thread, 1.0)).collect(),
            while_holding: None,
        }
    }

    /// Whoever held a lock, by how long.
    fn holding(lock: Lock, window: &Window) -> Option<Self> {
        let holders = window.holders(lock)?;
        let weight = |time: &Time| f64::from(time.looks);
        let members = holders.iter().map(|(thread, time)| (*thread, weight(time)));
        Some(Self {
            members: members.collect(),
            while_holding: Some(lock),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// What each did, in the time that matters.
    pub(super) fn times<'a>(
        &'a self,
        window: &'a Window,
    ) -> impl Iterator<Item = (Thread, f64, &'a Time)> {
        let time = move |thread: &Thread| match self.while_holding {
            Some(lock) => window.holders(lock)?.get(thread),
            None => window.of(*thread),
        };
        self.members
            .iter()
            .filter_map(move |(thread, weight)| Some((*thread, *weight, time(thread)?)))
    }

    /// Looks at all of them.
    pub(super) fn looks(&self, window: &Window) -> u64 {
        self.times(window)
            .map(|(.., time)| u64::from(time.looks))
            .sum()
    }
}

/// Where it all can be looked up.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) world: &'a Topology,
    pub(super) profile: &'a Profile,
    pub(super) targets: &'a Targets,
    pub(super) window: &'a Window,
}

/// One crowd, and what it is busy with.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) target: Option<TargetId>,
    /// The process of the crowd's heaviest thread.
    pub(super) tgid: u32,
    /// Set where the crowd is, for the most part, this one thread of several.
    pub(super) thread: Option<Thread>,
    pub(super) crowd: Crowd,
    pub(super) shares: Vec<(Activity, f64)>,
    /// What most of the time went into, what was waited for most of that time, and the share of all of it.
    pub(super) activity: Activity,
    pub(super) object: Object,
    pub(super) share: f64,
    /// Where the trail ends, if it ends here.
    pub(super) end: Option<End>,
}

/// Why a trail goes no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing to wait for: it works, waits for a CPU or a disk, sleeps.
    Here,
    /// The other end is not on this machine, or not seen.
    Away(String),
    /// A process of this machine whose threads are not looked at.
    Unseen(u32),
    /// It waits for one that waits for it.
    Cycle,
}

/// Who is next.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Thread(Thread),
    /// Whoever holds it.
    Holders(Lock),
    /// A process; the descriptor of the connection by which it was found.
    Process(u32, Option<u32>),
    Away(String),
}

/// From the threads of a target to the head of the jam. At least one step where anything was sampled.
pub(super) fn from_target(view: View<'_>, target: TargetId) -> Vec<Step> {
    let tgids = view.targets.get(target).map(|target| target.tgids.clone());
    let crowd = workers(view, &tgids.unwrap_or_default());
    from_crowd(view, crowd)
}

/// The threads of some processes that do work: those that wait for work at every look are left out, unless all do.
pub(super) fn workers(view: View<'_>, tgids: &[u32]) -> Crowd {
    let all = || tgids.iter().flat_map(|tgid| view.window.of_process(*tgid));
    let active: Vec<Thread> = all()
        .filter(|(_, time)| time.idle() < ALWAYS_IDLE && !is_helper(time))
        .map(|(thread, _)| thread)
        .collect();
    if active.is_empty() {
        Crowd::of(all().map(|(thread, _)| thread))
    } else {
        Crowd::of(active)
    }
}

/// A thread that only ever sleeps by its own wish or waits for work keeps time; it does not work.
fn is_helper(time: &Time) -> bool {
    let asleep = time.share_of(Activity::Asleep);
    let idle = time.idle();
    idle > 0.5 && asleep + idle > ALWAYS_IDLE
}

pub(super) fn from_crowd(view: View<'_>, crowd: Crowd) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut threads: BTreeSet<Thread> = BTreeSet::new();
    let mut locks: BTreeSet<Lock> = BTreeSet::new();
    let mut crowd = crowd;
    while crowd.len() > 0 && steps.len() < MAX_STEPS {
        // Who holds a lock may have waited for it before; but not hold what it waits for in the end.
        let fresh = match crowd.while_holding {
            Some(lock) => locks.insert(lock),
            None => crowd
                .members
                .iter()
                .any(|(thread, _)| threads.insert(*thread)),
        };
        if !fresh {
            if let Some(last) = steps.last_mut() {
                last.end = Some(End::Cycle);
            }
            break;
        }
        threads.extend(crowd.members.iter().map(|(thread, _)| *thread));
        let mut step = look(view, &crowd);
        crowd = Crowd::default();
        match next(view, &step) {
            None => step.end = Some(End::Here),
            Some(Next::Away(name)) => step.end = Some(End::Away(name)),
            Some(Next::Thread(thread)) => crowd = Crowd::of([thread]),
            Some(Next::Holders(lock)) => {
                crowd = Crowd::holding(lock, view.window).unwrap_or_default();
                if crowd.len() == 0 {
                    step.end = Some(End::Here);
                }
            }
            Some(Next::Process(tgid, _)) => {
                crowd = beyond(view, &step, tgid);
                if crowd.times(view.window).next().is_none() {
                    step.end = Some(End::Unseen(tgid));
                }
            }
        }
        let ended = step.end.is_some();
        steps.push(step);
        if ended {
            break;
        }
    }
    steps
}

/// What a crowd's time went into.
fn look(view: View<'_>, crowd: &Crowd) -> Step {
    let mut weights: BTreeMap<u32, f64> = BTreeMap::new();
    for ((tgid, _), weight) in &crowd.members {
        *weights.entry(*tgid).or_default() += weight;
    }
    let heaviest = weights.iter().max_by(|a, b| a.1.total_cmp(b.1));
    let tgid = heaviest.map_or(0, |(tgid, _)| *tgid);
    let target = view.targets.of(tgid);
    let shares = view.window.shares(crowd, target);
    let activity = main_activity(&shares);
    let share = share_of(&shares, activity);
    let doing = objects(view, crowd, activity);
    let object = doing
        .iter()
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map_or(Object::None, |(object, _)| object.clone());
    let all: f64 = crowd.members.iter().map(|(_, weight)| weight).sum();
    let alone = crowd
        .members
        .iter()
        .find(|(_, weight)| *weight > all * MOSTLY_ONE)
        .map(|(thread, _)| *thread)
        .filter(|_| view.window.of_process(tgid).count() > 1);
    Step {
        target,
        tgid,
        thread: alone,
        crowd: crowd.clone(),
        shares,
        activity,
        object,
        share,
        end: None,
    }
}

/// What most of the time went into that was not spent waiting for work. All that needs a CPU counts together against the
/// rest.
pub(super) fn main_activity(shares: &[(Activity, f64)]) -> Activity {
    let of = |activity: Activity| share_of(shares, activity);
    if of(Activity::Idle) > MOSTLY_IDLE || shares.is_empty() {
        return if shares.is_empty() {
            Activity::Unknown
        } else {
            Activity::Idle
        };
    }
    let cpu = [
        Activity::OnCpu,
        Activity::RunnableOwn,
        Activity::RunnableForeign,
        Activity::Throttled,
        Activity::Stolen,
    ];
    let on_cpu: f64 = cpu.iter().map(|activity| of(*activity)).sum();
    let other = shares
        .iter()
        .filter(|(activity, _)| *activity != Activity::Idle && !cpu.contains(activity))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    match other {
        Some((activity, share)) if *share >= on_cpu => *activity,
        _ => cpu
            .into_iter()
            .max_by(|a, b| of(*a).total_cmp(&of(*b)))
            .unwrap_or(Activity::OnCpu),
    }
}

/// What a crowd waits for in one activity, by weight.
fn objects(view: View<'_>, crowd: &Crowd, activity: Activity) -> BTreeMap<Object, f64> {
    let mut objects = BTreeMap::new();
    for (_, weight, time) in crowd.times(view.window) {
        for (doing, count) in &time.by {
            if doing.activity == activity {
                let share = f64::from(*count) / f64::from(time.looks.max(1));
                *objects.entry(doing.object.clone()).or_default() += weight * share;
            }
        }
    }
    objects
}

/// Where the heaviest part of a crowd's waiting leads; processes of one service count together.
fn next(view: View<'_>, step: &Step) -> Option<Next> {
    let mut groups: BTreeMap<(Option<TargetId>, Option<Next>), (f64, Next)> = BTreeMap::new();
    for (object, weight) in objects(view, &step.crowd, step.activity) {
        let Some(next) = beyond_object(view, step, &object) else {
            continue;
        };
        let service = match &next {
            Next::Process(tgid, _) => view.targets.of(*tgid),
            Next::Thread(_) | Next::Holders(_) | Next::Away(_) => None,
        };
        let group = match service {
            Some(service) => (Some(service), None),
            None => (None, Some(next.clone())),
        };
        let entry = groups.entry(group).or_insert((0.0, next));
        entry.0 += weight;
    }
    let heaviest = groups.into_values().max_by(|a, b| a.0.total_cmp(&b.0));
    heaviest.map(|(_, next)| next)
}

fn beyond_object(view: View<'_>, step: &Step, object: &Object) -> Option<Next> {
    match (step.activity, object) {
        (Activity::Downstream | Activity::PeerRead, Object::Connection(cookie)) => {
            let link = view.world.link(*cookie)?;
            Some(other_end(view, link))
        }
        (Activity::Downstream | Activity::Output, Object::Unix(inode)) => {
            holder(view, step.tgid, Held::Unix(*inode))
        }
        (Activity::Output, Object::Pipe(inode)) => holder(view, step.tgid, Held::Pipe(*inode)),
        (Activity::Lock, Object::Lock { tgid, address, .. }) => {
            let lock = (*tgid, *address);
            match view.window.holders(lock) {
                Some(_) => Some(Next::Holders(lock)),
                None => working_without(view, lock).map(Next::Thread),
            }
        }
        (Activity::Lock, Object::Titled) => suspect(view, step),
        _ => None,
    }
}

fn other_end(view: View<'_>, link: &Link) -> Next {
    match view.world.other_end(link) {
        Some(end) => Next::Process(end.tgid, Some(end.fd)),
        None => Next::Away(link.remote.to_string()),
    }
}

fn holder(view: View<'_>, tgid: u32, held: Held) -> Option<Next> {
    let others = view.world.other_holders(tgid, held);
    others.first().map(|tgid| Next::Process(*tgid, None))
}

/// Where a lock does not say who holds it: the thread of its process that works most and does not wait for it.
fn working_without(view: View<'_>, (tgid, address): Lock) -> Option<Thread> {
    let waits = |doing: &Doing| matches!(&doing.object, Object::Lock { address: other, .. } if *other == address);
    view.window
        .of_process(tgid)
        .map(|(thread, time)| {
            let here: u32 = time
                .by
                .iter()
                .filter(|(doing, _)| waits(doing))
                .map(|(_, count)| count)
                .sum();
            let free = 1.0 - f64::from(here) / f64::from(time.looks.max(1));
            (thread, (free - time.idle()).max(0.0))
        })
        .filter(|(_, busy)| *busy > 0.0)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(thread, _)| thread)
}

/// Says of itself that it holds a transaction and does nothing in it.
pub(super) fn holds_a_transaction(title: &str) -> bool {
    title.trim_end().contains("idle in transaction")
}

/// Processes of this service wait for each other, and only their titles tell: the suspect is the one that has been idle
/// in a transaction for longest, else the one whose request is oldest and that does not wait.
fn suspect(view: View<'_>, step: &Step) -> Option<Next> {
    let tgids = &view.targets.get(step.target?)?.tgids;
    if let Some((_, (tgid, _))) = view
        .world
        .titled(tgids, holds_a_transaction)
        .into_iter()
        .next()
    {
        return Some(Next::Process(tgid, None));
    }
    let waiting: BTreeSet<u32> = step
        .crowd
        .members
        .iter()
        .map(|((tgid, _), _)| *tgid)
        .collect();
    let waits = |tgid: &u32| {
        let title = view.world.title(*tgid);
        title.is_some_and(|titled| titled.title.trim_end().ends_with(" waiting"))
    };
    let others = tgids.iter().filter(|tgid| !waiting.contains(tgid));
    let oldest = others
        .filter(|tgid| !waits(tgid))
        .filter_map(|tgid| Some((view.world.business(*tgid).oldest_request?, *tgid)))
        .min();
    oldest.map(|(_, tgid)| Next::Process(tgid, None))
}

/// The threads beyond: of all processes of the same service that the crowd leads to, each by its weight; in each the
/// threads that hold the connection, where one can be told, else those that work.
fn beyond(view: View<'_>, step: &Step, tgid: u32) -> Crowd {
    let service = view.targets.of(tgid);
    let mut crowd: BTreeMap<Thread, f64> = BTreeMap::new();
    for (object, weight) in objects(view, &step.crowd, step.activity) {
        let Some(Next::Process(other, fd)) = beyond_object(view, step, &object) else {
            continue;
        };
        let same = other == tgid || service.is_some() && view.targets.of(other) == service;
        if !same {
            continue;
        }
        let threads = threads_of(view, other, fd);
        let each = weight / threads.len().max(1) as f64;
        for thread in threads {
            *crowd.entry(thread).or_default() += each;
        }
    }
    let mut members: Vec<(Thread, f64)> = crowd.into_iter().collect();
    members.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    Crowd {
        members,
        while_holding: None,
    }
}

fn threads_of(view: View<'_>, tgid: u32, fd: Option<u32>) -> Vec<Thread> {
    let held = fd.and_then(|fd| view.world.held(tgid, fd));
    if let Some(Held::Connection(cookie)) = held {
        let serves = |time: &Time| {
            let on_it = |doing: &Doing| doing.object == Object::Connection(cookie);
            time.by.keys().any(on_it)
        };
        let serving: Vec<Thread> = view
            .window
            .of_process(tgid)
            .filter(|(_, time)| serves(time))
            .map(|(thread, _)| thread)
            .collect();
        if !serving.is_empty() {
            return serving;
        }
    }
    let working = workers(view, &[tgid]).members;
    working.into_iter().map(|(thread, _)| thread).collect()
}
