//! Queues that fill at the other end: whoever is there does not read, or the way there carries no more.

use super::{Case, Finding, culprit};
use crate::{
    diagnose::{
        Cause,
        classify::Object,
        topology::{Held, Link},
        wait_graph::{End, Step, from_crowd, workers},
    },
    queue::QueueId,
};

/// A send queue fills at the other end of its connection.
pub(super) fn sending(case: Case<'_>) -> Finding {
    let Some(link) = fullest_link(case) else {
        return Finding::of(Cause::Unknown);
    };
    if !link.peer_has_no_room() {
        return Finding {
            culprit: Some(culprit::endpoint(case, link)),
            ..Finding::of(Cause::NetworkLimited)
        };
    }
    let beyond = beyond(case, link);
    let culprit = match beyond.last() {
        Some(last) if last.end != Some(End::Cycle) => culprit::at_the_end(case, last),
        _ => culprit::endpoint(case, link),
    };
    Finding {
        culprit: Some(culprit),
        ..Finding::of(Cause::PeerNotReading)
    }
}

/// The connection of the queue that holds most.
pub(super) fn fullest_link<'a>(case: Case<'a>) -> Option<&'a Link> {
    let key = &case.episode.key;
    let ours = |link: &&Link| {
        let named = match key.id {
            QueueId::Remote(remote) => !link.accepted && link.remote == remote,
            QueueId::Port(port) => link.accepted && link.local.port() == port,
            _ => false,
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
pub(super) fn beyond(case: Case<'_>, link: &Link) -> Vec<Step> {
    let end = case.view.world.other_end(link);
    end.map_or_else(Vec::new, |end| {
        from_crowd(case.view, workers(case.view, &[end.tgid]))
    })
}

/// The target writes to a pipe that somebody else is to read.
pub(super) fn pipe(case: Case<'_>) -> Option<Finding> {
    let key = &case.episode.key;
    let tgids = case.view.targets.get(key.target)?.tgids.clone();
    let inode = match key.id {
        QueueId::Pipe(inode) => inode,
        QueueId::Fifo { inode, .. } => inode?,
        _ => return None,
    };
    let held = Held::Pipe(inode);
    let readers = tgids
        .first()
        .map(|tgid| case.view.world.other_holders(*tgid, held))?;
    let reader = readers.into_iter().find(|reader| !tgids.contains(reader))?;
    let steps = from_crowd(case.view, workers(case.view, &[reader]));
    let culprit = match steps.last() {
        Some(last) => culprit::at_the_end(case, last),
        None => culprit::process(case, reader),
    };
    Some(Finding {
        culprit: Some(culprit),
        ..Finding::of(Cause::OutputBlocked)
    })
}

pub(super) fn slow_reader(case: Case<'_>, first: &Step) -> Cause {
    let link = match first.object {
        Object::Connection(cookie) => case.view.world.link(cookie),
        _ => None,
    };
    match link {
        Some(link) if !link.peer_has_no_room() => Cause::NetworkLimited,
        _ => Cause::PeerNotReading,
    }
}
