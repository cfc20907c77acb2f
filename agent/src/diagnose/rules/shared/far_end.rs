//! What is at the other end of a connection or of a pipe.

use crate::{
    diagnose::{
        case::Case,
        classify::Resource,
        rules::checks::Checks,
        topology::{Link, OpenFile},
        wait_graph::{Step, chain_of, workers},
    },
    event::{Activity, explain::Unit},
    queue::{Kind, QueueId},
};

/// The connection of a send queue that holds the most bytes.
pub(in crate::diagnose::rules) fn fullest_link(case: Case<'_>) -> Option<&Link> {
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
        .topology
        .links()
        .map(|(_, link)| link)
        .filter(ours)
        .max_by_key(|link| link.unacknowledged.saturating_add(link.unsent))
}

/// The wait chain of the process at the other end of a connection, or of the one that is to accept it.
pub(in crate::diagnose::rules) fn beyond(case: Case<'_>, link: &Link) -> Vec<Step> {
    let topology = case.view.topology;
    let end = topology.other_end(link).map(|end| end.tgid);
    let end = end.or_else(|| topology.listener_of(link));
    end.map_or_else(Vec::new, |tgid| {
        chain_of(case.view, workers(case.view, &[tgid]))
    })
}

/// The process of another service that reads the pipe which is the episode's queue.
pub(in crate::diagnose::rules) fn reader_of_the_pipe(case: Case<'_>) -> Option<u32> {
    let key = &case.episode.key;
    let tgids = &case.view.targets.get(key.target)?.tgids;
    let inode = match key.id {
        QueueId::Pipe(inode) => inode,
        QueueId::Fifo { inode, .. } => inode?,
        _ => return None,
    };
    let writer = tgids.first()?;
    let readers = case
        .view
        .topology
        .other_holders(*writer, OpenFile::Pipe(inode));
    readers.into_iter().find(|reader| !tgids.contains(reader))
}

/// The connection that the threads wait to write to.
pub(in crate::diagnose::rules) fn link_written_to(case: Case<'_>) -> Option<&Link> {
    match case.first()?.resource {
        Resource::Connection(cookie) => case.view.topology.link(cookie),
        _ => None,
    }
}

/// The queue holds what another service sent on connections that this one opened: responses, not requests.
pub(in crate::diagnose::rules) fn holds_responses(case: Case<'_>) -> bool {
    let key = &case.episode.key;
    key.kind == Kind::Recv && key.id.remote().is_some()
}

/// The threads wait for work, and on a futex: what they wait for is not seen.
pub(in crate::diagnose::rules) fn is_parked(case: Case<'_>) -> bool {
    let first = case.first();
    first
        .is_some_and(|first| first.activity == Activity::Idle && first.resource == Resource::Parked)
}

/// Records the numbers that distinguish a closed window from a slow network.
pub(in crate::diagnose::rules) fn describe(link: &Link, checks: &mut Checks) {
    let bytes = |bytes: u32| Some(f64::from(bytes));
    checks.context("unacknowledged", bytes(link.unacknowledged), Unit::Bytes);
    checks.context("written and not sent", bytes(link.unsent), Unit::Bytes);
    checks.context("the peer's receive window", bytes(link.window), Unit::Bytes);
}
