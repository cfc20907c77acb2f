//! Follows a wait chain: from threads to what they wait for, to the threads that can end that wait, and so on.
//!
//! A [`Step`] is a set of threads and what they do. The resource that they spend most of their waiting time on leads to the
//! next set: the holder of the lock, or the process at the other end of the connection. The chain ends at threads that work,
//! wait for a CPU or a disk, or sleep; where it leaves this machine; or where it closes into a cycle.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    classify::{Observation, Resource, Thread},
    consumers::Consumers,
    listening_sockets::Uneven,
    profile::{Lock, Profile, ThreadProfile, Window, shared},
    served::{At, Place, Served},
    thread_set::ThreadSet,
    topology::{Link, OpenFile, Topology},
};
use crate::{
    event::{Activity, Episode, share_of},
    queue::{QueueId, Targets},
    sample::{SharedLock, TargetId},
};

/// Longest wait chain. The longest of the recorded incidents has 4 steps.
const MAX_STEPS: usize = 12;
/// A thread that waits for work in this share of its samples or more is not a worker.
const MAX_IDLE_OF_A_WORKER: f64 = 0.98;
/// A thread with more than this share of a set's weight represents the whole set.
const MIN_DOMINANT_WEIGHT: f64 = 0.5;
/// Threads that wait for work for more than this share of their time are idle, whatever else they do.
const MIN_IDLE: f64 = 0.85;

/// The data needed to follow a wait chain.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) topology: &'a Topology,
    pub(super) profile: &'a Profile,
    pub(super) consumers: &'a Consumers,
    pub(super) targets: &'a Targets,
    pub(super) window: &'a Window,
}

/// Threads of a wait chain, and what they do.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// The service that they belong to.
    pub(super) target: Option<TargetId>,
    /// The process with the largest weight among them.
    pub(super) tgid: u32,
    /// The thread that represents all of them, if one has most of the weight and its process has more than one thread.
    pub(super) thread: Option<Thread>,
    pub(super) threads: ThreadSet,
    /// Shares of their wall time by activity, largest first.
    pub(super) shares: Vec<(Activity, f64)>,
    /// The main activity, see [`main_activity`].
    pub(super) activity: Activity,
    /// What they wait for during most of that activity.
    pub(super) resource: Resource,
    /// The main activity's share of their time.
    pub(super) share: f64,
    /// Set on the last step of a chain.
    pub(super) end: Option<ChainEnd>,
}

/// Why a wait chain ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChainEnd {
    /// These threads wait for no other thread: they work, wait for a CPU or a disk, or sleep.
    Reached,
    /// The other end, named by its address, is not on this machine, or not visible.
    Remote(String),
    /// The next process is on this machine, but its threads are not sampled.
    Unsampled(u32),
    /// They wait for threads that wait for them.
    Cycle,
}

/// Where a wait leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Thread(Thread),
    /// The holders of a lock.
    Holders(Lock),
    /// A process, and its descriptor of the connection that leads to it.
    Process(u32, Option<u32>),
    /// The service that waits: its call is in its own accept queue, or it accepted the call itself and all its active threads
    /// wait for such calls.
    Itself,
    Remote(String),
}

/// The wait chain behind an episode. If the queue is that of an event loop or of a lock, it begins at the loop's thread or
/// at the threads that wait for the lock. If it is inside the service, it begins at the workers of the processes that take items
/// from it, if these are known, or of their services, if they are idle themselves. Else it begins at the workers of the service.
/// `served`: the queue's items are passed on over connections. Then it goes on at their other ends, see [`chain_over`].
/// `uneven`: some listening sockets of its address fill, and others do not. Then it begins at the workers that should accept
/// from the sockets that fill, if they are known.
pub(super) fn chain_behind(
    view: View<'_>,
    episode: &Episode,
    uneven: Option<&Uneven>,
    served: Option<&Served>,
) -> Vec<Step> {
    let key = &episode.key;
    if let Some(served) = served {
        return chain_over(view, key.target, served);
    }
    if let Some(threads) =
        uneven.and_then(|uneven| behind_standing_queues(view, key.target, uneven))
    {
        return chain_of(view, threads);
    }
    match key.id {
        QueueId::Thread { tid, .. } => {
            let threads = view.window.threads();
            let here = threads.filter(|((_, other), _)| *other == tid);
            chain_of(view, ThreadSet::of(here.map(|(thread, _)| thread)))
        }
        QueueId::Lock { address, tgid } => {
            let lock = (tgid, address);
            let waits = |resource: &Resource| match resource {
                Resource::Lock { tgid, address, .. } => (*tgid, *address) == lock,
                Resource::SharedLock {
                    lock: SharedLock::Memory { address: other },
                    ..
                } => *other == address,
                _ => false,
            };
            let threads = view.window.of_process(tgid);
            let waiting = threads
                .filter(|(_, profile)| profile.by.keys().any(|seen| waits(&seen.resource)))
                .map(|(thread, _)| thread);
            chain_of(view, ThreadSet::of(waiting))
        }
        QueueId::App { .. } => {
            let named = view.consumers.of(key);
            let mut threads = named.iter().flat_map(|tgid| view.window.of_process(*tgid));
            if threads.any(|(_, profile)| works(profile)) {
                return chain_of(view, workers(view, named));
            }
            // A consumer that forks a process for each item only waits for it: then its service is the next best guess.
            let mut tgids: BTreeSet<u32> = BTreeSet::new();
            for consumer in named {
                let service = view.targets.of(*consumer);
                let service = service.and_then(|target| view.targets.get(target));
                tgids.insert(*consumer);
                tgids.extend(service.iter().flat_map(|target| &target.tgids));
            }
            let tgids: Vec<u32> = tgids.into_iter().collect();
            chain_of(view, workers(view, &tgids))
        }
        _ => chain_from(view, key.target),
    }
}

/// The wait chain of a service that passes the items of a queue on, as far as the queue's own connections lead: to who has most of the
/// waiting, else to the client that holds them in a transaction. Empty if they lead nowhere in particular: then what the service waits
/// for may have nothing to do with this queue. If its own threads lack something or compute, only that counts.
fn chain_over(view: View<'_>, target: TargetId, served: &Served) -> Vec<Step> {
    let own = chain_from(view, target);
    let Some(first) = own.first() else {
        return own;
    };
    if !waits_for_others(first.activity) {
        return own;
    }
    let mut first = first.clone();
    first.end = None;
    if served.is_held() {
        let holder = served.holder.map(|tgid| workers(view, &[tgid]));
        return followed_by(first, holder.map(|threads| chain_of(view, threads)));
    }
    if let Some(place) = served.place() {
        return chain_to(view, &first, place);
    }
    // Several servers hold the queue up. If they all wait for the same, that is the root.
    let chains = served.all_places().iter();
    let mut chains = chains.map(|place| chain_to(view, &first, place));
    let chain = chains.next().unwrap_or_default();
    let root = root_behind(&chain);
    match root.is_some() && chains.all(|other| root_behind(&other) == root) {
        true => chain,
        false => Vec::new(),
    }
}

/// Where a chain ends beyond the server: at an address, at a process that holds others up by doing nothing, else at a service.
#[derive(PartialEq, Eq)]
enum RootBehind {
    Address(String),
    Process(u32),
    Service(TargetId),
}

fn root_behind(chain: &[Step]) -> Option<RootBehind> {
    let last = chain.last()?;
    match &last.end {
        Some(ChainEnd::Remote(name)) if chain.len() > 1 => Some(RootBehind::Address(name.clone())),
        Some(ChainEnd::Reached) if chain.len() > 2 => Some(match last.target {
            Some(target) if Activity::NEEDS_CPU.contains(&last.activity) => {
                RootBehind::Service(target)
            }
            _ => RootBehind::Process(last.tgid),
        }),
        _ => None,
    }
}

/// The wait chain that begins with these threads of the service and the busy connections to one place.
fn chain_to(view: View<'_>, first: &Step, place: &Place) -> Vec<Step> {
    let Some(oldest) = place.cookies.first() else {
        return Vec::new();
    };
    let mut first = Step {
        activity: Activity::Downstream,
        share: share_of(&first.shares, Activity::Downstream),
        resource: Resource::Connection(*oldest),
        ..first.clone()
    };
    if let At::Address(address) = place.at {
        first.end = Some(ChainEnd::Remote(address.to_string()));
        return vec![first];
    }
    let mut weights: BTreeMap<Thread, f64> = BTreeMap::new();
    let mut tgids = BTreeSet::new();
    for link in place
        .cookies
        .iter()
        .filter_map(|one| view.topology.link(*one))
    {
        let end = view.topology.other_end(link);
        let end = end.map(|end| (end.tgid, Some(end.fd)));
        let listener = || Some((view.topology.listener_of(link)?, None));
        let Some((tgid, fd)) = end.or_else(listener) else {
            continue;
        };
        tgids.insert(tgid);
        let threads = serving(view, tgid, fd);
        let each = 1.0 / threads.len().max(1) as f64;
        for thread in threads {
            *weights.entry(thread).or_default() += each;
        }
    }
    let threads = ThreadSet::weighted(weights.into_iter().collect());
    if threads.profiles(view.window).next().is_none() {
        first.end = tgids.first().map(|tgid| ChainEnd::Unsampled(*tgid));
        return vec![first];
    }
    followed_by(first, Some(chain_of(view, threads)))
}

/// A step, and those behind it.
fn followed_by(mut first: Step, behind: Option<Vec<Step>>) -> Vec<Step> {
    let mut behind = behind.unwrap_or_default();
    if behind.is_empty() {
        first.end = Some(ChainEnd::Reached);
    }
    behind.insert(0, first);
    behind
}

/// Whether threads in this activity have nothing to do themselves: those of an event loop then wait for whatever is in progress.
fn waits_for_others(activity: Activity) -> bool {
    matches!(
        activity,
        Activity::Downstream
            | Activity::Idle
            | Activity::Inside
            | Activity::PeerSend
            | Activity::Unknown
    )
}

/// The wait chain of a service's workers. At least one step if anything was sampled.
pub(super) fn chain_from(view: View<'_>, target: TargetId) -> Vec<Step> {
    let tgids = view.targets.get(target).map(|target| target.tgids.clone());
    let workers = workers(view, &tgids.unwrap_or_default());
    chain_of(view, workers)
}

/// The worker threads of some processes. Threads that wait for work in nearly every sample, and timers, are left out, unless
/// nothing else remains.
pub(super) fn workers(view: View<'_>, tgids: &[u32]) -> ThreadSet {
    let all = || tgids.iter().flat_map(|tgid| view.window.of_process(*tgid));
    let active: Vec<Thread> = all()
        .filter(|(_, profile)| works(profile))
        .map(|(thread, _)| thread)
        .collect();
    if active.is_empty() {
        ThreadSet::of(all().map(|(thread, _)| thread))
    } else {
        ThreadSet::of(active)
    }
}

/// The threads that should accept from the listening sockets with a standing queue. `None`: they are not known. Where each
/// process has sockets of its own, these are the workers of the processes that hold them. Where all processes have inherited
/// all sockets, or threads share them, they are the threads that are not idle, unless there are more of them than such sockets.
fn behind_standing_queues(view: View<'_>, target: TargetId, uneven: &Uneven) -> Option<ThreadSet> {
    /// The workers of the empty sockets are idle for most of the time.
    const MAX_IDLE: f64 = 0.5;
    if !uneven.holders.is_empty() {
        let holders: Vec<u32> = uneven.holders.iter().copied().collect();
        return Some(workers(view, &holders)).filter(|threads| threads.len() > 0);
    }
    let tgids = &view.targets.get(target)?.tgids;
    let threads = tgids.iter().flat_map(|tgid| view.window.of_process(*tgid));
    let busy: Vec<Thread> = threads
        .filter(|(_, profile)| profile.idle() < MAX_IDLE)
        .map(|(thread, _)| thread)
        .collect();
    (1..=uneven.standing)
        .contains(&busy.len())
        .then(|| ThreadSet::of(busy))
}

/// Whether a thread is a worker: it does not wait for work nearly all the time, and does not just run timers.
fn works(profile: &ThreadProfile) -> bool {
    profile.idle() < MAX_IDLE_OF_A_WORKER && !is_timer(profile)
}

/// Whether a thread only sleeps or waits for work, mostly the latter: it runs timers and does no work.
fn is_timer(profile: &ThreadProfile) -> bool {
    let asleep = profile.share_of(Activity::Asleep);
    let idle = profile.idle();
    idle > 0.5 && asleep + idle > MAX_IDLE_OF_A_WORKER
}

/// The wait chain that begins at some threads.
pub(super) fn chain_of(view: View<'_>, threads: ThreadSet) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut visited: BTreeSet<Thread> = BTreeSet::new();
    let mut visited_locks: BTreeSet<Lock> = BTreeSet::new();
    let mut threads = threads;
    while threads.len() > 0 && steps.len() < MAX_STEPS {
        // The holder of a lock may have waited for it before. But a lock that leads back to itself is a cycle.
        let is_new = match threads.while_holding() {
            Some(lock) => visited_locks.insert(lock),
            None => threads
                .members
                .iter()
                .any(|(thread, _)| visited.insert(*thread)),
        };
        if !is_new {
            if let Some(last) = steps.last_mut() {
                last.end = Some(ChainEnd::Cycle);
            }
            break;
        }
        visited.extend(threads.members.iter().map(|(thread, _)| *thread));
        let mut step = step(view, &threads);
        threads = ThreadSet::default();
        match next(view, &step) {
            None => step.end = Some(ChainEnd::Reached),
            Some(Next::Itself) => step.end = Some(ChainEnd::Cycle),
            Some(Next::Remote(name)) => step.end = Some(ChainEnd::Remote(name)),
            Some(Next::Thread(thread)) => threads = ThreadSet::of([thread]),
            Some(Next::Holders(lock)) => {
                threads = ThreadSet::holding(lock, view.window).unwrap_or_default();
                if threads.len() == 0 {
                    step.end = Some(ChainEnd::Reached);
                }
            }
            Some(Next::Process(tgid, _)) => {
                threads = beyond(view, &step, tgid);
                if threads.profiles(view.window).next().is_none() {
                    step.end = Some(ChainEnd::Unsampled(tgid));
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

/// Describes some threads as one step of a chain.
fn step(view: View<'_>, threads: &ThreadSet) -> Step {
    let mut weights: BTreeMap<u32, f64> = BTreeMap::new();
    for ((tgid, _), weight) in &threads.members {
        *weights.entry(*tgid).or_default() += weight;
    }
    let heaviest = weights.iter().max_by(|a, b| a.1.total_cmp(b.1));
    let tgid = heaviest.map_or(0, |(tgid, _)| *tgid);
    let target = view.targets.of(tgid);
    let shares = threads.shares(view.window, target);
    let activity = main_activity(&shares);
    let share = share_of(&shares, activity);
    let resource = resources(view, threads, activity)
        .into_iter()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(Resource::None, |(resource, _)| resource);
    let all: f64 = threads.members.iter().map(|(_, weight)| weight).sum();
    let dominant = threads
        .members
        .iter()
        .find(|(_, weight)| *weight > all * MIN_DOMINANT_WEIGHT)
        .map(|(thread, _)| *thread)
        .filter(|_| view.window.of_process(tgid).count() > 1);
    Step {
        target,
        tgid,
        thread: dominant,
        threads: threads.clone(),
        shares,
        activity,
        resource,
        share,
        end: None,
    }
}

/// The activity with the largest share of the time, not counting idleness. The activities that need a CPU count as one sum. If
/// that sum is the largest, the largest of them is the main activity. Idle if the idle share exceeds [`MIN_IDLE`].
pub(super) fn main_activity(shares: &[(Activity, f64)]) -> Activity {
    let of = |activity: Activity| share_of(shares, activity);
    if shares.is_empty() {
        return Activity::Unknown;
    }
    if of(Activity::Idle) > MIN_IDLE {
        return Activity::Idle;
    }
    let cpu = Activity::NEEDS_CPU;
    let needs_cpu: f64 = cpu.iter().map(|activity| of(*activity)).sum();
    let other = shares
        .iter()
        .filter(|(activity, _)| *activity != Activity::Idle && !cpu.contains(activity))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    match other {
        Some((activity, share)) if *share >= needs_cpu => *activity,
        _ => cpu
            .iter()
            .copied()
            .max_by(|a, b| of(*a).total_cmp(&of(*b)))
            .unwrap_or(Activity::OnCpu),
    }
}

/// What threads wait for in one activity, by weight.
fn resources(view: View<'_>, threads: &ThreadSet, activity: Activity) -> BTreeMap<Resource, f64> {
    let mut resources = BTreeMap::new();
    for (_, weight, profile) in threads.profiles(view.window) {
        for (observation, count) in &profile.by {
            if observation.activity == activity {
                let share = f64::from(*count) / f64::from(profile.samples.max(1));
                let share = share * profile.presence();
                *resources.entry(observation.resource.clone()).or_default() += weight * share;
            }
        }
    }
    resources
}

/// Where most of the waiting of a step leads. Processes of one service count together.
fn next(view: View<'_>, step: &Step) -> Option<Next> {
    let mut groups: BTreeMap<(Option<TargetId>, Option<Next>), (f64, Next)> = BTreeMap::new();
    for (resource, weight) in resources(view, &step.threads, step.activity) {
        let Some(next) = behind(view, step, &resource) else {
            continue;
        };
        let service = match &next {
            Next::Process(tgid, _) => view.targets.of(*tgid),
            Next::Thread(_) | Next::Holders(_) | Next::Itself | Next::Remote(_) => None,
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

/// Where to find the threads that can end the wait for a resource. `None`: there are none, or they are unknown.
fn behind(view: View<'_>, step: &Step, resource: &Resource) -> Option<Next> {
    match (step.activity, resource) {
        (Activity::PeerRead, Resource::Connection(cookie)) => {
            let link = view.topology.link(*cookie)?;
            // Otherwise the data is held up on its way, and no thread of the peer can do anything about it.
            let is_unread = link.peer_has_no_room() && !view.topology.has_read_all(link);
            is_unread.then(|| other_end(view, step, link))
        }
        (Activity::Downstream, Resource::Connection(cookie)) => {
            let link = view.topology.link(*cookie)?;
            if view.topology.is_on_its_way(link, *cookie, view.targets) {
                return Some(Next::Remote(link.remote.to_string()));
            }
            Some(other_end(view, step, link))
        }
        (Activity::Downstream, Resource::Datagrams(remote)) => {
            (remote.port() != 0).then(|| Next::Remote(remote.to_string()))
        }
        (Activity::Downstream | Activity::Output, Resource::Unix(inode)) => {
            other_holder(view, step.tgid, OpenFile::Unix(*inode))
        }
        (Activity::Output, Resource::Pipe(inode)) => {
            other_holder(view, step.tgid, OpenFile::Pipe(*inode))
        }
        (Activity::Lock, Resource::Lock { tgid, address, .. }) => {
            let lock = (*tgid, *address);
            match view.window.holders(lock) {
                Some(_) => Some(Next::Holders(lock)),
                None => likely_holder(view, lock).map(Next::Thread),
            }
        }
        (Activity::Lock, Resource::SharedLock { id, holder, .. }) => {
            let lock = shared(*id);
            match view.window.holders(lock) {
                Some(_) => Some(Next::Holders(lock)),
                None => holder.tgid().map(|tgid| Next::Process(tgid, None)),
            }
        }
        (Activity::Lock, Resource::RowLock) => row_lock_holder(view, step),
        _ => None,
    }
}

fn other_end(view: View<'_>, step: &Step, link: &Link) -> Next {
    let topology = view.topology;
    let is_own = |service| topology.is_in_its_own_accept_queue(service, link, view.targets);
    if all_wait_for_own_calls(view, link) {
        return Next::Itself;
    }
    match topology.other_end(link) {
        Some(end) => Next::Process(end.tgid, Some(end.fd)),
        // No process holds the other end: the service has not accepted its own connection.
        None if step.target.is_some_and(is_own) => Next::Itself,
        None => match topology.listener_of(link) {
            Some(tgid) if tgid != link.tgid => Next::Process(tgid, None),
            _ => Next::Remote(link.remote.to_string()),
        },
    }
}

/// Whether the process has accepted this call from itself, and all its active threads wait for such calls, so that none is left
/// to answer them. A thread that works might be answering one.
fn all_wait_for_own_calls(view: View<'_>, link: &Link) -> bool {
    /// Nearly all samples: between two calls a thread does something else.
    const MIN_WAITING: f64 = 0.9;
    let is_own = |resource: &Resource| match resource {
        Resource::Connection(cookie) => {
            let link = view.topology.link(*cookie);
            link.is_some_and(|link| view.topology.own_end(link).is_some())
        }
        _ => false,
    };
    let waits = |profile: &ThreadProfile| {
        let own = profile
            .by
            .iter()
            .filter(|(seen, _)| seen.activity == Activity::Downstream && is_own(&seen.resource));
        let own: u32 = own.map(|(_, count)| count).sum();
        f64::from(own) >= f64::from(profile.samples) * MIN_WAITING
    };
    view.topology.own_end(link).is_some()
        && workers(view, &[link.tgid])
            .profiles(view.window)
            .all(|(.., profile)| waits(profile))
}

fn other_holder(view: View<'_>, tgid: u32, file: OpenFile) -> Option<Next> {
    let others = view.topology.other_holders(tgid, file);
    let reads = |tgid: &&u32| view.window.of_process(**tgid).next().is_some();
    // Prefer a process whose threads are sampled: a supervisor that passed the socket on still holds it, too.
    let reader = others.iter().find(reads).or_else(|| others.first());
    reader.map(|tgid| Next::Process(*tgid, None))
}

/// The likely holder of a lock that does not record its owner: the thread of its process that works most and does not wait
/// for the lock.
fn likely_holder(view: View<'_>, (tgid, address): Lock) -> Option<Thread> {
    // Until the holders of shared locks are first searched for, a wait for a mutex in shared memory is recorded as
    // `Resource::Lock`; afterwards as `SharedLock`. Both count as waiting.
    let waits = |seen: &Observation| match &seen.resource {
        Resource::Lock { address: other, .. } => *other == address,
        Resource::SharedLock { .. } => true,
        _ => false,
    };
    view.window
        .of_process(tgid)
        .map(|(thread, profile)| {
            let waiting: u32 = profile
                .by
                .iter()
                .filter(|(seen, _)| waits(seen))
                .map(|(_, count)| count)
                .sum();
            let not_waiting = 1.0 - f64::from(waiting) / f64::from(profile.samples.max(1));
            (thread, (not_waiting - profile.idle()).max(0.0))
        })
        .filter(|(_, busy)| *busy > 0.0)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(thread, _)| thread)
}

/// The likely holder of a row lock that processes of this service wait for, as only their titles show. It is the
/// process that has been idle in a transaction the longest; else, of the processes that do not wait, the one with the
/// oldest request.
fn row_lock_holder(view: View<'_>, step: &Step) -> Option<Next> {
    let tgids = &view.targets.get(step.target?)?.tgids;
    if let Some(tgid) = view.topology.longest_idle_in_transaction(tgids) {
        return Some(Next::Process(tgid, None));
    }
    let waiting = step.threads.tgids();
    let others = tgids.iter().filter(|tgid| !waiting.contains(tgid));
    let oldest = others
        .filter(|tgid| !view.topology.waits_by_its_title(**tgid))
        .filter_map(|tgid| Some((view.topology.work_of(*tgid).oldest_request?, *tgid)))
        .min();
    oldest.map(|(_, tgid)| Next::Process(tgid, None))
}

/// The threads at the other end: those of `tgid`, and of all other processes of its service that the step leads to. Each
/// process has the weight of the waiting that leads to it, divided among its threads that serve the connection (see [`serving`]).
fn beyond(view: View<'_>, step: &Step, tgid: u32) -> ThreadSet {
    let service = view.targets.of(tgid);
    let mut weights: BTreeMap<Thread, f64> = BTreeMap::new();
    for (resource, weight) in resources(view, &step.threads, step.activity) {
        let Some(Next::Process(other, fd)) = behind(view, step, &resource) else {
            continue;
        };
        let same = other == tgid || service.is_some() && view.targets.of(other) == service;
        if !same {
            continue;
        }
        let threads = serving(view, other, fd);
        let each = weight / threads.len().max(1) as f64;
        for thread in threads {
            *weights.entry(thread).or_default() += each;
        }
    }
    let mut members: Vec<(Thread, f64)> = weights.into_iter().collect();
    members.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ThreadSet::weighted(members)
}

/// The threads of a process that were seen to serve the connection behind a descriptor; if there are none, all its workers.
fn serving(view: View<'_>, tgid: u32, fd: Option<u32>) -> Vec<Thread> {
    let file = fd.and_then(|fd| view.topology.open_file(tgid, fd));
    if let Some(OpenFile::Connection(cookie)) = file {
        let serves = |profile: &ThreadProfile| {
            let on_it = |seen: &Observation| seen.resource == Resource::Connection(cookie);
            profile.by.keys().any(on_it)
        };
        let serving: Vec<Thread> = view
            .window
            .of_process(tgid)
            .filter(|(_, profile)| serves(profile))
            .map(|(thread, _)| thread)
            .collect();
        if !serving.is_empty() {
            return serving;
        }
    }
    let working = workers(view, &[tgid]).members;
    working.into_iter().map(|(thread, _)| thread).collect()
}
