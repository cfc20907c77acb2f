//! The network between two processes carries less than is sent.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        culprit::{self, at_the_end},
        far_end,
    },
};
use crate::{cause::Cause, diagnose::topology::Link, event::Activity, queue::Kind};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::NetworkLimited,
    suggested_by: &[],
    supported_by: &[Activity::PeerRead],
};

/// The fullest connection of a send queue, whose peer still offers window.
pub(super) const SEND_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "the peer offers window",
    scope: Scope::Kinds(&[Kind::Send]),
    basis: Basis::Fact,
    test: |case, checks| {
        let link = far_end::fullest_link(case)?;
        has_room(link, checks).then(|| Finding::blaming(culprit::endpoint(case, link), advice))
    },
};

/// Threads wait to write to a connection whose peer still offers window.
pub(super) const WRITERS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait to send, and the peer offers window",
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

fn advice(peer: &str) -> String {
    format!(
        "The network path to {peer} is saturated: check its bandwidth and losses (ss -ti, tc -s qdisc); compress, send less, or spread the load."
    )
}
