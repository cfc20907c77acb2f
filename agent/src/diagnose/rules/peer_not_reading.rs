//! The process at the other end of a connection does not read.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        culprit::{self, at_the_end},
        far_end, lock,
    },
};
use crate::{
    cause::Cause,
    diagnose::{topology::Link, wait_graph::ChainEnd},
    event::{Activity, explain::Unit},
    queue::Kind,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::PeerNotReading,
    suggested_by: &[Activity::PeerRead],
    supported_by: &[Activity::PeerRead],
};

/// The fullest connection of a send queue, whose peer has no room to receive more.
pub(super) const SEND_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "the peer's window is closed",
    scope: Scope::Kinds(&[Kind::Send]),
    basis: Basis::Fact,
    test: |case, checks| {
        let link = far_end::fullest_link(case)?;
        if !is_closed(link, checks) {
            return None;
        }
        let beyond = far_end::beyond(case, link);
        let culprit = match beyond.last() {
            Some(last) if last.end != Some(ChainEnd::Cycle) => at_the_end(case, last),
            _ => culprit::endpoint(case, link),
        };
        Some(Finding::blaming(culprit, advice))
    },
};

/// Threads wait to write to a connection whose peer has no room to receive more.
pub(super) const WRITERS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait to send, and the peer's window is closed",
    scope: Scope::MainActivity(&[Activity::PeerRead]),
    basis: Basis::Time,
    test: |case, checks| {
        let closed = match far_end::link_written_to(case) {
            Some(link) => is_closed(link, checks),
            // The connection is no longer seen: a blocked write is blamed on the peer unless something shows otherwise.
            None => {
                checks.context("the peer's receive window", None, Unit::Bytes);
                true
            }
        };
        closed.then(|| Finding::blaming(case.last().map(|last| at_the_end(case, last)), advice))
    },
};

/// Threads wait for a lock whose holder waits for a peer to read.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for a peer to read",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        lock::held_while(
            case,
            checks,
            (
                "the lock holder waits for a peer to read",
                Activity::PeerRead,
            ),
            |_| lock::end_of_chain(case),
            advice,
        )
    },
};

fn is_closed(link: &Link, checks: &mut Checks) -> bool {
    far_end::describe(link, checks);
    checks.is(
        "the peer's receive window is closed",
        link.peer_has_no_room(),
        true,
    )
}

fn advice(peer: &str) -> String {
    format!(
        "{peer} does not read what is sent to it: bound the buffer per peer, set a write timeout, and find what the peer waits for."
    )
}
