//! The network between two processes carries less than is sent.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        culprit::{self, at_the_end},
        far_end,
    },
};
use crate::{
    cause::Cause,
    diagnose::topology::Link,
    event::{Activity, Confidence, explain::Unit},
    queue::Kind,
    text::bytes,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::NetworkLimited,
    suggested_by: &[],
    supported_by: &[Activity::PeerRead],
};

/// The fullest connection of a send queue, whose peer has room to receive more.
pub(super) const SEND_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "the peer's window is open",
    scope: Scope::Kinds(&[Kind::Send]),
    basis: Basis::Fact,
    test: |case, checks| {
        let link = far_end::fullest_link(case)?;
        let has_room = has_room(link, checks);
        let is_backed_up = checks.more_than(
            "written and not sent",
            f64::from(link.unsent),
            0.0,
            Unit::Bytes,
        );
        has_room.then(|| {
            let culprit = culprit::endpoint(case, link);
            if is_backed_up {
                return Finding::blaming(culprit, advice);
            }
            Finding::blaming(culprit, lost)
                .fact(format!(
                    "{} sent to {} are not acknowledged, and nothing waits behind them",
                    bytes(link.unacknowledged.into()),
                    link.remote
                ))
                .at_most(Confidence::Medium)
        })
    },
};

/// Threads wait to write to a connection whose peer has room to receive more.
pub(super) const WRITERS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait to send, and the peer's window is open",
    scope: Scope::MainActivity(&[Activity::PeerRead]),
    basis: Basis::Time,
    test: |case, checks| {
        let link = far_end::link_written_to(case)?;
        has_room(link, checks)
            .then(|| Finding::blaming(case.last().map(|last| at_the_end(case, last)), advice))
    },
};

fn has_room(link: &Link, checks: &mut Checks) -> bool {
    far_end::describe(link, checks);
    checks.is(
        "the peer's receive window is closed",
        link.peer_has_no_room(),
        false,
    )
}

fn lost(peer: &str) -> String {
    format!(
        "Data sent to {peer} is lost on the way, or its host does not respond: check that the host is reachable, and look for losses (ss -ti, nstat -z TcpRetransSegs, firewalls)."
    )
}

fn advice(peer: &str) -> String {
    format!(
        "The network path to {peer} is saturated: check its bandwidth and losses (ss -ti, tc -s qdisc); compress, send less, or spread the load."
    )
}
