//! What most of the workers' wall time went into decides.

use std::collections::{BTreeMap, BTreeSet};

use super::{Case, Finding, Limit, culprit, far_end, pool, weigh::share};
use crate::{
    diagnose::{
        Activity, Cause, Culprit, CulpritKind, classify::Object, inputs::LONG_TURN_NS,
        topology::Link, wait_graph::Step,
    },
    event::{DrivenBy, Episode},
    queue::Kind,
};

/// Of the time in which threads need a CPU: what a quota or others must have taken to be the cause.
const TAKEN: f64 = 0.25;

/// Dispatches and turns are not work that came from outside.
fn counts_work(kind: Kind) -> bool {
    !matches!(kind, Kind::Runqueue | Kind::Eventloop | Kind::Lock)
}

/// Whether more work comes to a service than usual, by its open episodes.
pub(in crate::diagnose) fn is_surge(episodes: &[&Episode]) -> bool {
    // While work waits to be taken, what comes to be served is as much as is taken, however much comes.
    let waits_untaken = episodes.iter().any(|one| one.key.kind == Kind::Accept);
    episodes.iter().any(|one| {
        one.driven_by == DrivenBy::Producer
            && counts_work(one.key.kind)
            && !(waits_untaken && one.key.kind == Kind::Inflight)
    })
}

/// From what most of the workers' time went into.
pub(super) fn decide(case: Case<'_>, steps: &[Step], first: &Step) -> Finding {
    let target = case.episode.key.target;
    let surges = case.surges;
    let last = steps.last().unwrap_or(first);
    let used_up = case
        .facts
        .used_up(target)
        .filter(|_| steps.len() < 2 || pool::is_at_ease(last));
    match first.activity {
        Activity::OnCpu
        | Activity::RunnableOwn
        | Activity::RunnableForeign
        | Activity::Throttled
        | Activity::Stolen => on_cpu(case, steps),
        Activity::Downstream => {
            if surges && case.facts.calls_are_as_usual(target) && used_up.is_none() {
                return Finding::of(Cause::ProducerSurge);
            }
            if let Some(pool) = used_up {
                return pool::exhausted(case, target, pool);
            }
            let there = pool::on_the_way(case, steps);
            Finding {
                culprit: Some(match &there {
                    Some((step, pool)) => pool::culprit(case, step.target, Some(step.tgid), pool),
                    None => culprit::at_the_end(case, last),
                }),
                ..Finding::of(Cause::DownstreamSlow)
            }
        }
        Activity::Lock => behind_a_lock(case, steps, first),
        Activity::Disk => disk(case, steps),
        Activity::Output => Finding {
            culprit: Some(culprit::at_the_end(case, last)),
            ..Finding::of(Cause::OutputBlocked)
        },
        Activity::PeerRead => Finding {
            culprit: Some(culprit::at_the_end(case, last)),
            ..Finding::of(far_end::slow_reader(case, first))
        },
        Activity::PeerSend => Finding {
            culprit: culprit::peer(case, first),
            ..Finding::of(Cause::PeerNotSending)
        },
        Activity::Memory => Finding::of(Cause::MemoryStalled),
        // What others sent is not read, and nothing outside keeps the process from it.
        Activity::Asleep | Activity::Inside
            if case.episode.key.kind == Kind::Recv && case.episode.key.id.remote().is_some() =>
        {
            Finding {
                share: Some(first.share),
                culprit: Some(culprit::process(case, first.tgid)),
                ..Finding::of(Cause::ConsumerStalled)
            }
        }
        // A loop serves many at once: it is not the number of its threads that keeps them.
        Activity::Inside
            if used_up.is_none() && matches!(first.object, Object::Connection(_)) && !surges =>
        {
            Finding::of(Cause::Unknown)
        }
        Activity::Asleep | Activity::Inside => match used_up {
            Some(pool) => pool::exhausted(case, target, pool),
            None if surges => Finding::of(Cause::ProducerSurge),
            None => Finding {
                limit: Some(Limit::Workers),
                culprit: Some(culprit::limit(
                    case,
                    format!("{} workers", first.crowd.len()),
                )),
                ..Finding::of(Cause::UndersizedLimit)
            },
        },
        Activity::Stopped => Finding {
            culprit: Some(culprit::process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        },
        Activity::Idle => match used_up {
            Some(pool) => pool::exhausted(case, target, pool),
            None => idle(case, first),
        },
        Activity::Unknown => Finding::of(Cause::Unknown),
    }
}

/// Nobody works, and yet the queue stands: nothing at all is taken from it, or the evidence does not carry.
pub(super) fn idle(case: Case<'_>, first: &Step) -> Finding {
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
            culprit: Some(culprit::process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        };
    }
    Finding::of(Cause::Unknown)
}

/// Whoever holds most of the connections on which a service waits for a request, where it has them all the same and works
/// on none.
pub(super) fn silent_peers(case: Case<'_>, first: &Step) -> Option<Culprit> {
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
    (!works).then(|| culprit::endpoint(case, link))
}

/// What the holder does is the cause, where it waits for something itself.
pub(super) fn behind_a_lock(case: Case<'_>, steps: &[Step], first: &Step) -> Finding {
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
        (Cause::DiskSlow, Some(holder)) => culprit::disk(case, holder),
        (Cause::LockContention, None) => culprit::lock(case, first),
        _ => Some(culprit::at_the_end(case, last)),
    };
    Finding {
        share: Some(first.share),
        culprit,
        ..Finding::of(cause)
    }
}

/// Who has the CPU: a quota, others, or the service itself; and whether that is its usual work.
pub(super) fn on_cpu(case: Case<'_>, steps: &[Step]) -> Finding {
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
    // Who else wants the CPU does not matter to those who wait for one turn of the loop.
    if first.crowd.len() == 1 && is_one_long_turn(case, first) {
        return Finding {
            share: Some(needs),
            culprit: Some(culprit::busiest_thread(case, first)),
            ..Finding::of(Cause::EventLoopBlocked)
        };
    }
    if throttled >= needs * TAKEN && throttled >= foreign {
        let group = case
            .view
            .targets
            .get(target)
            .and_then(|it| it.cgroup.clone());
        return Finding {
            culprit: group.map(|group| Culprit {
                target: Some(target),
                container: culprit::container(case, target),
                ..Culprit::named(CulpritKind::Cgroup, format!("the CPU quota of {group}"))
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
                    target: case.view.targets.of(hog.tgid),
                    pid: Some(hog.tgid),
                    container: hog.cgroup,
                    ..Culprit::named(CulpritKind::Process, format!("{} ({})", hog.name, hog.tgid))
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
    if case.surges && counts_work(case.episode.key.kind) {
        return Finding {
            share: Some(needs),
            ..Finding::of(Cause::ProducerSurge)
        };
    }
    Finding {
        share: Some(needs),
        culprit: Some(culprit::busiest_thread(case, first)),
        ..Finding::of(Cause::CpuBound)
    }
}

/// One turn of an event loop takes long, or does not end.
pub(super) fn blocked_loop(case: Case<'_>, first: &Step) -> Option<Culprit> {
    let key = &case.episode.key;
    let itself = key.kind == Kind::Eventloop;
    let long = case.facts.had_a_long_turn(key.target, case.time().0);
    (itself || long).then(|| culprit::busiest_thread(case, first))
}

/// The only thread that works lives in epoll_wait, has not been back there for long, and so few requests are answered that
/// each of its turns is one of them, or for a while none at all. A loop that has more work than it can do is not back there
/// either, but it answers all the time.
fn is_one_long_turn(case: Case<'_>, first: &Step) -> bool {
    const PAUSE_NS: u64 = 3 * LONG_TURN_NS;
    let (from_ns, to_ns) = case.time();
    let target = case.episode.key.target;
    let Some(answered) = case.facts.answered(target, from_ns) else {
        return false;
    };
    let mut members = first.crowd.members.iter();
    let long = members.any(|(thread, _)| case.view.window.had_a_long_turn(*thread));
    let each_ns = to_ns.saturating_sub(from_ns) / answered.max(1);
    let pause_ns = case.facts.longest_pause_ns(target, from_ns);
    long && (each_ns >= LONG_TURN_NS || pause_ns >= PAUSE_NS)
}

pub(super) fn disk(case: Case<'_>, steps: &[Step]) -> Finding {
    let waits = |step: &&Step| step.activity == Activity::Disk;
    let step = steps.iter().find(waits).or(steps.first());
    Finding {
        culprit: step.and_then(|step| culprit::disk(case, step)),
        ..Finding::of(Cause::DiskSlow)
    }
}
