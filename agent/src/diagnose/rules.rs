//! From what the time went into to one cause. Every rule speaks of kernel facts; which queue it is about decides where to
//! begin to look.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Activity, Cause, Confidence, Culprit, CulpritKind, Hop, Verdict,
    classify::Object,
    facts::{Facts, Pool},
    follow::{Crowd, End, Step, View, from_crowd, from_target, holds_a_transaction, workers},
    words,
    world::{Held, Link},
};
use crate::{
    detect::{DrivenBy, Episode, Level},
    queue::{Kind, lock_of},
    sample::TargetId,
};

/// A cause that less of the time speaks for is not named.
const CARRIES: f64 = 0.2;
/// Shares by which a verdict is trusted much, and somewhat.
const SURE: f64 = 0.6;
const LIKELY: f64 = 0.35;
/// Looks without which a verdict is a suspicion.
const ENOUGH_LOOKS: u64 = 40;
/// Of the time in which threads need a CPU: what a quota or others must have taken to be the cause.
const TAKEN: f64 = 0.25;
/// A turn of an event loop that keeps others waiting, ns.
const LONG_TURN_NS: u64 = 100_000_000;
/// Workers that have so much time left are not what fills a queue.
const SPARE: f64 = 0.25;

/// All that a verdict is made from.
#[derive(Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) view: View<'a>,
    pub(super) facts: &'a Facts,
    pub(super) episode: &'a Episode,
}

impl Case<'_> {
    /// From when to when it is judged.
    pub(super) fn time(&self) -> (u64, u64) {
        (self.view.window.from_ns, self.view.window.to_ns)
    }
}

/// A cause before it is put in words.
pub(super) struct Finding {
    pub(super) cause: Cause,
    pub(super) share: Option<f64>,
    pub(super) culprit: Option<Culprit>,
    pub(super) pool: Option<Pool>,
    pub(super) limit: Option<Limit>,
    /// A cycle of waiting.
    pub(super) cycle: bool,
}

/// Which parameter is too small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Workers,
    Backlog,
}

impl Finding {
    fn of(cause: Cause) -> Self {
        Self {
            cause,
            share: None,
            culprit: None,
            pool: None,
            limit: None,
            cycle: false,
        }
    }
}

/// Why this episode happens.
pub(super) fn judge(case: Case<'_>) -> Verdict {
    let steps = trail(case);
    let mut finding = find(case, &steps);
    let shares = steps
        .first()
        .map(|step| step.shares.clone())
        .unwrap_or_default();
    let looks = steps
        .first()
        .map_or(0, |step| step.crowd.looks(case.view.window));
    finding.share = finding.share.or_else(|| speaks_for(&shares, finding.cause));
    let runner_up = runner_up(&shares, finding.cause);
    let path = path(case, &steps, finding.cause);
    let root = path
        .last()
        .filter(|_| path.len() > 1)
        .map(|hop| hop.cause)
        .filter(|root| *root != Cause::Unknown);
    Verdict {
        cause: finding.cause,
        share: finding.share,
        confidence: confidence(&finding, looks),
        runner_up,
        driven_by: case.episode.driven_by,
        evidence: words::evidence(case, &finding, &steps),
        advice: words::advice(case, &finding, &steps),
        culprit: finding.culprit,
        root,
        path,
        shares,
        looks,
        messages: Vec::new(),
    }
}

/// Whose threads to look at first: that depends on which queue fills.
fn trail(case: Case<'_>) -> Vec<Step> {
    let view = case.view;
    let key = &case.episode.key;
    let of = |threads: Crowd| from_crowd(view, threads);
    match key.kind {
        Kind::Eventloop => match key.name.rsplit_once('/') {
            Some((_, tid)) => {
                let tid: Option<u32> = tid.parse().ok();
                let threads = view.window.threads();
                let here = threads.filter(|((_, other), _)| Some(*other) == tid);
                of(Crowd::of(here.map(|(thread, _)| thread)))
            }
            None => Vec::new(),
        },
        Kind::Lock => {
            let Some(lock) = lock_of(&key.name) else {
                return Vec::new();
            };
            let waits = |object: &Object| matches!(object, Object::Lock { tgid, address, .. } if (*tgid, *address) == lock);
            let threads = view.window.of_process(lock.0);
            let waiting = threads
                .filter(|(_, time)| time.by.keys().any(|doing| waits(&doing.object)))
                .map(|(thread, _)| thread);
            of(Crowd::of(waiting))
        }
        _ => from_target(view, key.target),
    }
}

fn find(case: Case<'_>, steps: &[Step]) -> Finding {
    let episode = case.episode;
    match episode.key.kind {
        Kind::Fd => return fd_exhausted(case),
        Kind::Memory => return Finding::of(Cause::MemoryStalled),
        Kind::Disk => return disk(case, steps),
        Kind::Send => return sending(case),
        Kind::Pipe => {
            if let Some(finding) = pipe(case) {
                return finding;
            }
        }
        Kind::Runqueue => return on_cpu(case, steps),
        _ => {}
    }
    if let Some(finding) = hard_facts(case, steps) {
        return finding;
    }
    let Some(first) = steps.first() else {
        return Finding::of(Cause::Unknown);
    };
    if let Some(finding) = backlog(case, first) {
        return finding;
    }
    by_time(case, steps, first)
}

/// What is so, however the threads spend their time.
fn hard_facts(case: Case<'_>, steps: &[Step]) -> Option<Finding> {
    let target = case.episode.key.target;
    let is_full = |(_, reading): (_, &crate::queue::Reading)| {
        reading
            .limit
            .is_some_and(|limit| reading.depth + 1 >= limit)
    };
    if matches!(case.episode.key.kind, Kind::Accept | Kind::Syn | Kind::Unix)
        && case.facts.of(target, Kind::Fd).any(is_full)
    {
        return Some(fd_exhausted(case));
    }
    let first = steps.first()?;
    let stopped = share(first, Activity::Stopped);
    if stopped > 0.5 {
        return Some(Finding {
            share: Some(stopped),
            culprit: Some(process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        });
    }
    if steps
        .last()
        .is_some_and(|last| last.end == Some(End::Cycle))
    {
        return Some(Finding {
            share: Some(first.share),
            culprit: steps.last().map(|last| at_the_end(case, last)),
            cycle: true,
            ..Finding::of(Cause::ConsumerStalled)
        });
    }
    None
}

/// Connections are refused although the workers have time: bursts are larger than the backlog.
fn backlog(case: Case<'_>, first: &Step) -> Option<Finding> {
    let episode = case.episode;
    let refuses = episode.losses > 0 || episode.level_max == Level::Full;
    let spare = share(first, Activity::Idle) >= SPARE;
    let goes_on = episode.departures.is_none_or(|departures| departures > 0);
    (episode.key.kind == Kind::Accept && refuses && spare && goes_on).then(|| Finding {
        limit: Some(Limit::Backlog),
        culprit: Some(limit(
            case,
            format!("a backlog of {}", episode.limit.unwrap_or(0)),
        )),
        ..Finding::of(Cause::UndersizedLimit)
    })
}

/// More work came than usual. Dispatches and turns are not work that came from outside.
fn surges(case: Case<'_>) -> bool {
    let counts_work = !matches!(
        case.episode.key.kind,
        Kind::Runqueue | Kind::Eventloop | Kind::Lock
    );
    counts_work && case.episode.driven_by == DrivenBy::Producer
}

/// From what most of the workers' time went into.
fn by_time(case: Case<'_>, steps: &[Step], first: &Step) -> Finding {
    let target = case.episode.key.target;
    let surges = surges(case);
    let last = steps.last().unwrap_or(first);
    let pool = case
        .facts
        .used_up(target)
        .filter(|_| steps.len() < 2 || is_at_ease(last));
    match first.activity {
        Activity::OnCpu
        | Activity::RunnableOwn
        | Activity::RunnableForeign
        | Activity::Throttled
        | Activity::Stolen => on_cpu(case, steps),
        Activity::Downstream => {
            if surges && case.facts.calls_are_as_usual(target) && pool.is_none() {
                return Finding::of(Cause::ProducerSurge);
            }
            if let Some(pool) = pool {
                return exhausted(case, target, pool);
            }
            let there = pool_on_the_way(case, steps);
            Finding {
                culprit: Some(match &there {
                    Some((step, pool)) => pool_culprit(case, step.target, Some(step.tgid), pool),
                    None => at_the_end(case, last),
                }),
                ..Finding::of(Cause::DownstreamSlow)
            }
        }
        Activity::Lock => behind_a_lock(case, steps, first),
        Activity::Disk => disk(case, steps),
        Activity::Output => Finding {
            culprit: Some(at_the_end(case, last)),
            ..Finding::of(Cause::OutputBlocked)
        },
        Activity::PeerRead => Finding {
            culprit: Some(at_the_end(case, last)),
            ..Finding::of(slow_reader(case, first))
        },
        Activity::PeerSend => Finding {
            culprit: peer(case, first),
            ..Finding::of(Cause::PeerNotSending)
        },
        Activity::Memory => Finding::of(Cause::MemoryStalled),
        // What others sent is not read, and nothing outside keeps the process from it.
        Activity::Asleep | Activity::Inside
            if case.episode.key.kind == Kind::Recv && case.episode.key.name.starts_with("->") =>
        {
            Finding {
                culprit: Some(process(case, first.tgid)),
                ..Finding::of(Cause::ConsumerStalled)
            }
        }
        Activity::Asleep | Activity::Inside => match pool {
            Some(pool) => exhausted(case, target, pool),
            None if surges => Finding::of(Cause::ProducerSurge),
            None => Finding {
                limit: Some(Limit::Workers),
                culprit: Some(limit(case, format!("{} workers", first.crowd.len()))),
                ..Finding::of(Cause::UndersizedLimit)
            },
        },
        Activity::Stopped => Finding {
            culprit: Some(process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        },
        Activity::Idle => match pool {
            Some(pool) => exhausted(case, target, pool),
            None => idle(case, first),
        },
        Activity::Unknown => Finding::of(Cause::Unknown),
    }
}

/// Nobody works, and yet the queue stands: nothing at all is taken from it, or the evidence does not carry.
fn idle(case: Case<'_>, first: &Step) -> Finding {
    let stands = case
        .episode
        .wait_max_ns
        .is_some_and(|wait| wait > 1_000_000_000);
    if !stands {
        return Finding::of(Cause::Unknown);
    }
    // It would go on if anybody let it: all that it has accepted are peers that do not send.
    let parked = first.object == Object::Parked;
    if !parked && let Some(culprit) = silent_peers(case, first) {
        return Finding {
            share: Some(share(first, Activity::Idle)),
            culprit: Some(culprit),
            ..Finding::of(Cause::PeerNotSending)
        };
    }
    let nothing_leaves = case
        .episode
        .departures
        .is_none_or(|departures| departures == 0);
    if nothing_leaves {
        return Finding {
            share: Some(share(first, Activity::Idle)),
            culprit: Some(process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        };
    }
    Finding::of(Cause::Unknown)
}

/// Whoever holds most of the connections on which a service waits for a request, where it has them all the same and works
/// on none.
fn silent_peers(case: Case<'_>, first: &Step) -> Option<Culprit> {
    let world = case.view.world;
    let members = first.crowd.members.iter();
    let ours: BTreeSet<u32> = members.map(|((tgid, _), _)| *tgid).collect();
    let works = ours.iter().any(|tgid| world.business(*tgid).working > 0);
    let mut peers: BTreeMap<Option<u32>, (u32, &Link)> = BTreeMap::new();
    for (_, link) in world.links() {
        if link.accepted && ours.contains(&link.tgid) {
            let peer = world.other_end(link).map(|end| end.tgid);
            peers.entry(peer).or_insert((0, link)).0 += 1;
        }
    }
    let (_, link) = peers.into_values().max_by_key(|(count, _)| *count)?;
    (!works).then(|| endpoint(case, link))
}

/// What the holder does is the cause, where it waits for something itself.
fn behind_a_lock(case: Case<'_>, steps: &[Step], first: &Step) -> Finding {
    let last = steps.last().unwrap_or(first);
    let holder = steps.iter().find(|step| step.activity != Activity::Lock);
    let cause = match holder.map(|holder| holder.activity) {
        Some(Activity::Downstream) => Cause::DownstreamSlow,
        Some(Activity::Disk) => Cause::DiskSlow,
        Some(Activity::Output) => Cause::OutputBlocked,
        Some(Activity::PeerRead) => Cause::PeerNotReading,
        Some(Activity::Stopped) => Cause::ConsumerStalled,
        _ => Cause::LockContention,
    };
    let culprit = match (cause, holder) {
        (Cause::DiskSlow, Some(holder)) => disk_culprit(case, holder),
        (Cause::LockContention, None) => lock(case, first),
        _ => Some(at_the_end(case, last)),
    };
    Finding {
        share: Some(first.share),
        culprit,
        ..Finding::of(cause)
    }
}

/// Who has the CPU: a quota, others, or the service itself; and whether that is its usual work.
fn on_cpu(case: Case<'_>, steps: &[Step]) -> Finding {
    let Some(first) = steps.first() else {
        return Finding::of(Cause::Unknown);
    };
    let target = case.episode.key.target;
    let of = |activity| share(first, activity);
    let needs = of(Activity::OnCpu)
        + of(Activity::RunnableOwn)
        + of(Activity::RunnableForeign)
        + of(Activity::Throttled)
        + of(Activity::Stolen);
    let foreign = of(Activity::RunnableForeign) + of(Activity::Stolen);
    let throttled = of(Activity::Throttled);
    if throttled >= needs * TAKEN && throttled >= foreign {
        let group = case
            .view
            .targets
            .get(target)
            .and_then(|it| it.cgroup.clone());
        return Finding {
            culprit: group.map(|group| Culprit {
                kind: CulpritKind::Cgroup,
                target: Some(target),
                pid: None,
                name: format!("the CPU quota of {group}"),
                endpoint: None,
                container: container(case, target),
            }),
            ..Finding::of(Cause::CpuThrottled)
        };
    }
    if foreign >= needs * TAKEN && foreign > of(Activity::RunnableOwn) {
        return Finding {
            culprit: case
                .facts
                .hog(target, case.view.targets, case.time())
                .map(|hog| Culprit {
                    kind: CulpritKind::Process,
                    target: case.view.targets.of(hog.tgid),
                    pid: Some(hog.tgid),
                    name: format!("{} ({})", hog.name, hog.tgid),
                    endpoint: None,
                    container: hog.cgroup,
                }),
            ..Finding::of(Cause::CpuStarved)
        };
    }
    if let Some(culprit) = blocked_loop(case, first) {
        return Finding {
            culprit: Some(culprit),
            ..Finding::of(Cause::EventLoopBlocked)
        };
    }
    if surges(case) {
        return Finding {
            share: Some(needs),
            ..Finding::of(Cause::ProducerSurge)
        };
    }
    Finding {
        share: Some(needs),
        culprit: Some(busiest_thread(case, first)),
        ..Finding::of(Cause::CpuBound)
    }
}

/// One turn of an event loop takes long, or does not end.
fn blocked_loop(case: Case<'_>, first: &Step) -> Option<Culprit> {
    let key = &case.episode.key;
    let is_long = |reading: &crate::queue::Reading| {
        let turn_ns = reading.oldest_ns.max(reading.wait_ns).unwrap_or(0);
        reading.depth > 0 && turn_ns >= LONG_TURN_NS
    };
    let itself = key.kind == Kind::Eventloop;
    let long = case
        .facts
        .of(key.target, Kind::Eventloop)
        .any(|(_, reading)| is_long(reading));
    (itself || long).then(|| busiest_thread(case, first))
}

fn disk(case: Case<'_>, steps: &[Step]) -> Finding {
    let waits = |step: &&Step| step.activity == Activity::Disk;
    let step = steps.iter().find(waits).or(steps.first());
    Finding {
        culprit: step.and_then(|step| disk_culprit(case, step)),
        ..Finding::of(Cause::DiskSlow)
    }
}

fn disk_culprit(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::File { path, device } = &step.object else {
        return case.episode.worst.as_ref().map(|worst| Culprit {
            kind: CulpritKind::File,
            target: step.target,
            pid: Some(step.tgid),
            name: worst.clone(),
            endpoint: None,
            container: None,
        });
    };
    Some(Culprit {
        kind: CulpritKind::File,
        target: step.target,
        pid: Some(step.tgid),
        name: match device {
            Some(device) => format!("{path} on {device}"),
            None => path.clone(),
        },
        endpoint: None,
        container: None,
    })
}

fn fd_exhausted(case: Case<'_>) -> Finding {
    let target = case.episode.key.target;
    let fullest = case
        .facts
        .of(target, Kind::Fd)
        .max_by_key(|(_, reading)| reading.depth)
        .and_then(|(_, reading)| reading.limit);
    let allowed = fullest.or(case.episode.limit).unwrap_or(0);
    Finding {
        culprit: Some(limit(case, format!("RLIMIT_NOFILE of {allowed}"))),
        ..Finding::of(Cause::FdExhausted)
    }
}

/// A send queue fills at the other end of its connection.
fn sending(case: Case<'_>) -> Finding {
    let Some(link) = fullest_link(case) else {
        return Finding::of(Cause::Unknown);
    };
    if !link.peer_has_no_room() {
        return Finding {
            culprit: Some(endpoint(case, link)),
            ..Finding::of(Cause::NetworkLimited)
        };
    }
    let beyond = beyond(case, link);
    let culprit = match beyond.last() {
        Some(last) if last.end != Some(End::Cycle) => at_the_end(case, last),
        _ => endpoint(case, link),
    };
    Finding {
        culprit: Some(culprit),
        ..Finding::of(Cause::PeerNotReading)
    }
}

/// The connection of the queue that holds most.
fn fullest_link<'a>(case: Case<'a>) -> Option<&'a Link> {
    let key = &case.episode.key;
    let ours = |link: &&Link| {
        let named = match key.name.strip_prefix("-> ") {
            Some(remote) => !link.accepted && link.remote.to_string() == remote,
            None => link.accepted && key.name == format!(":{}", link.local.port()),
        };
        named && case.view.targets.of(link.tgid) == Some(key.target)
    };
    case.view
        .world
        .links()
        .map(|(_, link)| link)
        .filter(ours)
        .max_by_key(|link| link.unacknowledged.saturating_add(link.unsent))
}

/// What the process at the other end of a connection is busy with.
fn beyond(case: Case<'_>, link: &Link) -> Vec<Step> {
    let end = case.view.world.other_end(link);
    end.map_or_else(Vec::new, |end| {
        from_crowd(case.view, workers(case.view, &[end.tgid]))
    })
}

/// The target writes to a pipe that somebody else is to read.
fn pipe(case: Case<'_>) -> Option<Finding> {
    let key = &case.episode.key;
    let tgids = case.view.targets.get(key.target)?.tgids.clone();
    let inode: u64 = key
        .name
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .and_then(|(inode, _)| inode.parse().ok())?;
    let held = Held::Pipe(inode);
    let readers = tgids
        .first()
        .map(|tgid| case.view.world.other_holders(*tgid, held))?;
    let reader = readers.into_iter().find(|reader| !tgids.contains(reader))?;
    let steps = from_crowd(case.view, workers(case.view, &[reader]));
    let culprit = match steps.last() {
        Some(last) => at_the_end(case, last),
        None => process(case, reader),
    };
    Some(Finding {
        culprit: Some(culprit),
        ..Finding::of(Cause::OutputBlocked)
    })
}

fn slow_reader(case: Case<'_>, first: &Step) -> Cause {
    let link = match first.object {
        Object::Connection(cookie) => case.view.world.link(cookie),
        _ => None,
    };
    match link {
        Some(link) if !link.peer_has_no_room() => Cause::NetworkLimited,
        _ => Cause::PeerNotReading,
    }
}

fn exhausted(case: Case<'_>, target: TargetId, pool: Pool) -> Finding {
    Finding {
        culprit: Some(pool_culprit(case, Some(target), None, &pool)),
        pool: Some(pool),
        ..Finding::of(Cause::PoolExhausted)
    }
}

/// Whoever is at the end of the way neither lacks anything nor computes: the time that it takes is what its work takes.
fn is_at_ease(last: &Step) -> bool {
    matches!(
        last.activity,
        Activity::Inside | Activity::Asleep | Activity::Idle | Activity::Unknown
    )
}

/// The first service further on whose own pool is used up: those behind it do what they always do.
fn pool_on_the_way<'s>(case: Case<'_>, steps: &'s [Step]) -> Option<(&'s Step, Pool)> {
    let own = steps.first().and_then(|step| step.target);
    let calls = |step: &&Step| step.activity == Activity::Downstream && step.target != own;
    steps
        .iter()
        .skip(1)
        .filter(|_| steps.last().is_some_and(is_at_ease))
        .filter(calls)
        .find_map(|step| Some((step, case.facts.used_up(step.target?)?)))
}

fn pool_culprit(
    case: Case<'_>,
    target: Option<TargetId>,
    tgid: Option<u32>,
    pool: &Pool,
) -> Culprit {
    let of = tgid.map_or_else(String::new, |tgid| {
        format!(" of {}", case.view.world.process(tgid, case.view.targets))
    });
    Culprit {
        kind: CulpritKind::Limit,
        target,
        pid: tgid,
        name: format!(
            "a pool of {} connections to {}{of}",
            pool.connections, pool.endpoint
        ),
        endpoint: Some(pool.endpoint.clone()),
        container: None,
    }
}

fn share(step: &Step, activity: Activity) -> f64 {
    let found = step.shares.iter().find(|(one, _)| *one == activity);
    found.map_or(0.0, |(_, share)| *share)
}

/// Which cause an activity speaks for, where nothing more is known.
pub(super) fn spoken_for(activity: Activity) -> Cause {
    match activity {
        Activity::Idle | Activity::Unknown => Cause::Unknown,
        Activity::OnCpu | Activity::RunnableOwn => Cause::CpuBound,
        Activity::RunnableForeign | Activity::Stolen => Cause::CpuStarved,
        Activity::Throttled => Cause::CpuThrottled,
        Activity::Downstream => Cause::DownstreamSlow,
        Activity::PeerRead => Cause::PeerNotReading,
        Activity::PeerSend => Cause::PeerNotSending,
        Activity::Lock => Cause::LockContention,
        Activity::Disk => Cause::DiskSlow,
        Activity::Output => Cause::OutputBlocked,
        Activity::Memory => Cause::MemoryStalled,
        Activity::Asleep | Activity::Inside => Cause::UndersizedLimit,
        Activity::Stopped => Cause::ConsumerStalled,
    }
}

/// The share of the time that speaks for a cause.
fn speaks_for(shares: &[(Activity, f64)], cause: Cause) -> Option<f64> {
    let speaks = |activity: Activity| match cause {
        Cause::PoolExhausted => matches!(
            activity,
            Activity::Downstream | Activity::Idle | Activity::Inside
        ),
        Cause::EventLoopBlocked => activity == Activity::OnCpu,
        Cause::NetworkLimited => activity == Activity::PeerRead,
        Cause::ProducerSurge => activity != Activity::Idle,
        cause => spoken_for(activity) == cause,
    };
    let sum: f64 = shares
        .iter()
        .filter(|(activity, _)| speaks(*activity))
        .map(|(_, share)| share)
        .sum();
    (sum > 0.0).then_some(sum)
}

fn runner_up(shares: &[(Activity, f64)], cause: Cause) -> Option<(Cause, f64)> {
    const WORTH: f64 = 0.05;
    let mut sums: Vec<(Cause, f64)> = Vec::new();
    for (activity, share) in shares {
        let other = spoken_for(*activity);
        match sums.iter_mut().find(|(known, _)| *known == other) {
            Some((_, sum)) => *sum += share,
            None => sums.push((other, *share)),
        }
    }
    let local = |other: Cause| match cause {
        Cause::ProducerSurge | Cause::EventLoopBlocked => other == Cause::CpuBound,
        Cause::PoolExhausted => other == Cause::DownstreamSlow,
        _ => false,
    };
    sums.into_iter()
        .filter(|(other, share)| {
            *other != cause && *other != Cause::Unknown && *share >= WORTH && !local(*other)
        })
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

fn confidence(finding: &Finding, looks: u64) -> Confidence {
    let by_time = match finding.share {
        Some(share) if share >= SURE => Confidence::High,
        Some(share) if share >= LIKELY => Confidence::Medium,
        Some(share) if share >= CARRIES => Confidence::Low,
        Some(_) => Confidence::Low,
        // Told by something else than time: a limit that is reached, a window that is closed.
        None => Confidence::High,
    };
    match finding.cause {
        Cause::Unknown => Confidence::Low,
        _ if looks < ENOUGH_LOOKS && finding.share.is_some() => by_time.min(Confidence::Medium),
        _ => by_time,
    }
}

/// The hops from the queue's process to the head of the jam.
fn path(case: Case<'_>, steps: &[Step], cause: Cause) -> Vec<Hop> {
    let kind = case.episode.key.kind;
    let mut hops: Vec<Hop> = Vec::new();
    if kind == Kind::Send
        && let Some(link) = fullest_link(case)
    {
        hops.push(Hop {
            target: Some(case.episode.key.target),
            pid: Some(link.tgid),
            name: case.view.world.process(link.tgid, case.view.targets),
            what: format!("has bytes for {} that wait", link.remote),
            cause,
        });
        let beyond = beyond(case, link);
        hops.extend(beyond.iter().map(|step| hop(case, step, None)));
        return hops;
    }
    let pool = pool_on_the_way(case, steps).map(|(step, _)| step.tgid);
    for (index, step) in steps.iter().enumerate() {
        if index == 0 {
            hops.push(hop(case, step, Some(cause)));
        } else if pool == Some(step.tgid) {
            hops.push(hop(case, step, Some(Cause::PoolExhausted)));
            return hops;
        } else {
            hops.push(hop(case, step, None));
        }
    }
    let last = steps.last();
    match last.and_then(|last| last.end.as_ref()) {
        Some(End::Away(name)) => hops.push(Hop {
            target: None,
            pid: None,
            name: name.clone(),
            what: "not on this machine, or not seen".to_owned(),
            cause: Cause::Unknown,
        }),
        Some(End::Unseen(tgid)) => hops.push(Hop {
            target: case.view.targets.of(*tgid),
            pid: Some(*tgid),
            name: case.view.world.process(*tgid, case.view.targets),
            what: "its threads are not looked at".to_owned(),
            cause: Cause::Unknown,
        }),
        _ => {}
    }
    hops
}

fn hop(case: Case<'_>, step: &Step, cause: Option<Cause>) -> Hop {
    Hop {
        target: step.target,
        pid: Some(step.tgid),
        name: words::crowd(case, step),
        what: words::busy_with(case, step),
        cause: cause.unwrap_or_else(|| match step.activity {
            // Of another service nobody knows whether that is what it always does.
            Activity::Asleep | Activity::Inside => Cause::Unknown,
            activity => spoken_for(activity),
        }),
    }
}

/// Who stands at the end of a trail.
fn at_the_end(case: Case<'_>, last: &Step) -> Culprit {
    match &last.end {
        Some(End::Away(name)) => Culprit {
            kind: CulpritKind::Endpoint,
            target: None,
            pid: None,
            name: name.clone(),
            endpoint: Some(name.clone()),
            container: None,
        },
        Some(End::Unseen(tgid)) => process(case, *tgid),
        _ => match last.thread {
            Some(thread) => Culprit {
                kind: CulpritKind::Thread,
                target: last.target,
                pid: Some(thread.0),
                name: words::thread(case, thread),
                endpoint: None,
                container: last.target.and_then(|target| container(case, target)),
            },
            None => process(case, last.tgid),
        },
    }
}

fn process(case: Case<'_>, tgid: u32) -> Culprit {
    let target = case.view.targets.of(tgid);
    Culprit {
        kind: CulpritKind::Process,
        target,
        pid: Some(tgid),
        name: case.view.world.process(tgid, case.view.targets),
        endpoint: None,
        container: target.and_then(|target| container(case, target)),
    }
}

fn container(case: Case<'_>, target: TargetId) -> Option<String> {
    case.view.targets.get(target)?.container.clone()
}

/// The other end of the connection that most of the time was waited for.
fn peer(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::Connection(cookie) = step.object else {
        return None;
    };
    let link = case.view.world.link(cookie)?;
    Some(endpoint(case, link))
}

fn endpoint(case: Case<'_>, link: &Link) -> Culprit {
    let remote = link.remote.to_string();
    match case.view.world.other_end(link) {
        Some(end) => Culprit {
            endpoint: Some(remote),
            ..process(case, end.tgid)
        },
        None => Culprit {
            kind: CulpritKind::Endpoint,
            target: None,
            pid: None,
            name: remote.clone(),
            endpoint: Some(remote),
            container: None,
        },
    }
}

fn lock(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::Lock { tgid, address, .. } = step.object else {
        return None;
    };
    Some(Culprit {
        kind: CulpritKind::Lock,
        target: step.target,
        pid: Some(tgid),
        name: format!(
            "the lock at {address:#x} of {}",
            case.view.world.process(tgid, case.view.targets)
        ),
        endpoint: None,
        container: None,
    })
}

fn limit(case: Case<'_>, name: String) -> Culprit {
    let target = case.view.targets.get(case.episode.key.target);
    Culprit {
        kind: CulpritKind::Limit,
        target: Some(case.episode.key.target),
        pid: target.and_then(|target| target.tgids.first().copied()),
        name,
        endpoint: None,
        container: None,
    }
}

fn busiest_thread(case: Case<'_>, step: &Step) -> Culprit {
    let works = |thread| {
        let time = case.view.window.of(thread);
        time.map_or(0.0, |time| time.share_of(Activity::OnCpu))
    };
    let busiest = step
        .crowd
        .members
        .iter()
        .map(|(thread, _)| *thread)
        .max_by(|a, b| works(*a).total_cmp(&works(*b)));
    match busiest {
        Some(thread) if case.view.window.of_process(thread.0).count() > 1 => Culprit {
            kind: CulpritKind::Thread,
            target: step.target,
            pid: Some(thread.0),
            name: words::thread(case, thread),
            endpoint: None,
            container: None,
        },
        Some(thread) => process(case, thread.0),
        None => process(case, step.tgid),
    }
}

/// Whether the process at the end holds a transaction in which it does nothing.
pub(super) fn idle_in_transaction<'a>(
    case: Case<'a>,
    step: &Step,
) -> Option<&'a super::world::Titled> {
    let titled = case.view.world.title(step.tgid)?;
    holds_a_transaction(&titled.title).then_some(titled)
}
