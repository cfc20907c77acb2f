//! Who or what the root cause is.

use std::collections::BTreeMap;

use crate::{
    diagnose::{
        case::Case,
        classify::Resource,
        topology::Link,
        wait_graph::{ChainEnd, Step},
        words,
    },
    event::{Activity, Culprit, CulpritKind},
    sample::TargetId,
};

/// Who is at the end of a wait chain.
pub(in crate::diagnose::rules) fn at_the_end(case: Case<'_>, last: &Step) -> Culprit {
    match &last.end {
        Some(ChainEnd::Remote(name)) => Culprit {
            endpoint: Some(name.clone()),
            ..Culprit::named(CulpritKind::Endpoint, name.clone())
        },
        Some(ChainEnd::Unsampled(tgid)) => process(case, *tgid),
        _ => match last.thread {
            Some(thread) => Culprit {
                target: last.target,
                pid: Some(thread.0),
                container: last.target.and_then(|target| container(case, target)),
                ..Culprit::named(CulpritKind::Thread, words::thread(case, thread))
            },
            None => process(case, last.tgid),
        },
    }
}

pub(in crate::diagnose::rules) fn process(case: Case<'_>, tgid: u32) -> Culprit {
    let target = case.view.targets.of(tgid);
    Culprit {
        target,
        pid: Some(tgid),
        container: target.and_then(|target| container(case, target)),
        ..Culprit::named(
            CulpritKind::Process,
            case.view.topology.process(tgid, case.view.targets),
        )
    }
}

/// The process of the threads that serve the queue.
pub(in crate::diagnose::rules) fn own_process(case: Case<'_>) -> Option<Culprit> {
    case.first().map(|first| process(case, first.tgid))
}

pub(in crate::diagnose::rules) fn container(case: Case<'_>, target: TargetId) -> Option<String> {
    case.view.targets.get(target)?.container.clone()
}

/// The other end of the connection that a step waited for most of the time.
pub(in crate::diagnose::rules) fn peer(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Resource::Connection(cookie) = step.resource else {
        return None;
    };
    let link = case.view.topology.link(cookie)?;
    Some(endpoint(case, link))
}

/// The other end of a connection: a process of this machine, else an address.
pub(in crate::diagnose::rules) fn endpoint(case: Case<'_>, link: &Link) -> Culprit {
    let remote = link.remote.to_string();
    match case.view.topology.other_end(link) {
        Some(end) => Culprit {
            endpoint: Some(remote.clone()),
            ..process(case, end.tgid)
        },
        None => Culprit {
            endpoint: Some(remote.clone()),
            ..Culprit::named(CulpritKind::Endpoint, remote)
        },
    }
}

/// The process that holds the other ends of most connections on which the service waits for a request, if the service has
/// connections and works on no request.
pub(in crate::diagnose::rules) fn silent_peers(case: Case<'_>) -> Option<Culprit> {
    let topology = case.view.topology;
    let ours = case.first()?.threads.tgids();
    let mut peers: BTreeMap<Option<u32>, (u32, &Link)> = BTreeMap::new();
    for (_, link) in topology.links() {
        if link.accepted && !link.closed_by_peer && ours.contains(&link.tgid) {
            let peer = topology.other_end(link).map(|end| end.tgid);
            peers.entry(peer).or_insert((0, link)).0 += 1;
        }
    }
    let (_, link) = peers.into_values().max_by_key(|(count, _)| *count)?;
    (!topology.serve_any(&ours)).then(|| endpoint(case, link))
}

pub(in crate::diagnose::rules) fn lock(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let (tgid, name) = match &step.resource {
        Resource::Lock { tgid, address, .. } => {
            let process = case.view.topology.process(*tgid, case.view.targets);
            (*tgid, format!("the lock at {address:#x} of {process}"))
        }
        Resource::SharedLock { lock, .. } => (step.tgid, words::shared_lock(lock)),
        _ => return None,
    };
    Some(Culprit {
        target: step.target,
        pid: Some(tgid),
        ..Culprit::named(CulpritKind::Lock, name)
    })
}

/// A parameter of the service.
pub(in crate::diagnose::rules) fn limit(case: Case<'_>, name: String) -> Culprit {
    let target = case.view.targets.get(case.target());
    Culprit {
        target: Some(case.target()),
        pid: target.and_then(|target| target.tgids.first().copied()),
        ..Culprit::named(CulpritKind::Limit, name)
    }
}

/// The thread of a step that uses the most CPU, or its process if that has no other thread.
pub(in crate::diagnose::rules) fn busiest_thread(case: Case<'_>, step: &Step) -> Culprit {
    let on_cpu = |thread| {
        let profile = case.view.window.of(thread);
        profile.map_or(0.0, |profile| profile.share_of(Activity::OnCpu))
    };
    let busiest = step
        .threads
        .members
        .iter()
        .map(|(thread, _)| *thread)
        .max_by(|a, b| on_cpu(*a).total_cmp(&on_cpu(*b)));
    match busiest {
        Some(thread) if case.view.window.of_process(thread.0).count() > 1 => Culprit {
            target: step.target,
            pid: Some(thread.0),
            ..Culprit::named(CulpritKind::Thread, words::thread(case, thread))
        },
        Some(thread) => process(case, thread.0),
        None => process(case, step.tgid),
    }
}

/// The file that a step waits for, else what the queue itself names as worst.
pub(in crate::diagnose::rules) fn disk(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let name = match &step.resource {
        Resource::File {
            path,
            device: Some(device),
        } => format!("{path} on {device}"),
        Resource::File { path, device: None } => path.clone(),
        _ => case.episode.worst.clone()?,
    };
    Some(Culprit {
        target: step.target,
        pid: Some(step.tgid),
        ..Culprit::named(CulpritKind::File, name)
    })
}
