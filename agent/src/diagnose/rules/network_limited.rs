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
    diagnose::{case::Case, topology::Link},
    event::{Activity, Confidence, explain::Unit},
    queue::Kind,
    sample::Conntrack,
    text::{bytes, count, duration},
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

/// A connection request is not answered, and the connection tracking table that its packets pass has no room for it.
pub(super) const TRACKING_TABLE: Rule = Rule {
    cause: &CAUSE,
    name: "the connection tracking table is full",
    scope: Scope::MainActivity(&[
        Activity::Downstream,
        Activity::Asleep,
        Activity::Idle,
        Activity::Inside,
        Activity::Unknown,
    ]),
    basis: Basis::Fact,
    test: |case, checks| {
        let topology = &case.view.topology;
        let mut steps = case.steps.iter();
        let request = steps.find_map(|step| topology.unanswered_request(step.tgid));
        checks.is(
            "a connection request is not answered",
            request.is_some(),
            true,
        );
        let (link, age_ns) = request?;
        let table = topology.full_conntrack(link, age_ns);
        checks.is(
            "a connection tracking table on its way was full meanwhile",
            table.is_some(),
            true,
        );
        table.map(|table| table_full(case, table, link, age_ns))
    },
};

fn table_full(case: Case<'_>, table: &Conntrack, link: &Link, age_ns: u64) -> Finding {
    let of_whom = if table.is_of_host {
        "of the host"
    } else {
        "of its network namespace"
    };
    let limit = format!("the connection tracking table {of_whom}");
    let dropped = if table.drops > 0 {
        format!(", and has dropped {} packets", count(table.drops))
    } else {
        String::new()
    };
    Finding::blaming(culprit::limit(case, limit), |_| {
        "New connections lose their first packet: raise net.netfilter.nf_conntrack_max, close idle connections (conntrack -L lists them), or exempt this traffic (NOTRACK in the raw table). Open connections are not affected, so a pool helps; more workers do not.".to_owned()
    })
    .fact(format!(
        "the connection tracking table {of_whom} has been full ({} of {}){dropped}; {} has not answered a connection request for {}",
        count(table.entries),
        count(table.limit),
        link.remote,
        duration(age_ns)
    ))
    .at_most(if table.drops > 0 {
        Confidence::High
    } else {
        Confidence::Medium
    })
}

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
