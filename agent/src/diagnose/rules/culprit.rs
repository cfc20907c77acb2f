//! Who or what stands at the head of the jam.

use super::Case;
use crate::{
    diagnose::{
        Activity, Culprit, CulpritKind,
        classify::Object,
        topology::Link,
        wait_graph::{End, Step},
        words,
    },
    sample::TargetId,
};

/// Who stands at the end of a trail.
pub(super) fn at_the_end(case: Case<'_>, last: &Step) -> Culprit {
    match &last.end {
        Some(End::Away(name)) => Culprit {
            endpoint: Some(name.clone()),
            ..Culprit::named(CulpritKind::Endpoint, name.clone())
        },
        Some(End::Unseen(tgid)) => process(case, *tgid),
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

pub(super) fn process(case: Case<'_>, tgid: u32) -> Culprit {
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

pub(super) fn container(case: Case<'_>, target: TargetId) -> Option<String> {
    case.view.targets.get(target)?.container.clone()
}

/// The other end of the connection that most of the time was waited for.
pub(super) fn peer(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::Connection(cookie) = step.object else {
        return None;
    };
    let link = case.view.world.link(cookie)?;
    Some(endpoint(case, link))
}

pub(super) fn endpoint(case: Case<'_>, link: &Link) -> Culprit {
    let remote = link.remote.to_string();
    match case.view.world.other_end(link) {
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

pub(super) fn lock(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::Lock { tgid, address, .. } = step.object else {
        return None;
    };
    Some(Culprit {
        target: step.target,
        pid: Some(tgid),
        ..Culprit::named(
            CulpritKind::Lock,
            format!(
                "the lock at {address:#x} of {}",
                case.view.world.process(tgid, case.view.targets)
            ),
        )
    })
}

pub(super) fn limit(case: Case<'_>, name: String) -> Culprit {
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

pub(super) fn busiest_thread(case: Case<'_>, step: &Step) -> Culprit {
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
            target: step.target,
            pid: Some(thread.0),
            ..Culprit::named(CulpritKind::Thread, words::thread(case, thread))
        },
        Some(thread) => process(case, thread.0),
        None => process(case, step.tgid),
    }
}

pub(super) fn disk(case: Case<'_>, step: &Step) -> Option<Culprit> {
    let Object::File { path, device } = &step.object else {
        return case.episode.worst.as_ref().map(|worst| Culprit {
            target: step.target,
            pid: Some(step.tgid),
            ..Culprit::named(CulpritKind::File, worst.clone())
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
