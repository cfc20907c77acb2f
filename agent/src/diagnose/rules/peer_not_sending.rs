//! The process at the other end of a connection sends only part of a request, or none at all.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, far_end, kept_alive::KeptAlive, wait},
};
use crate::{
    cause::Cause,
    event::{Activity, Confidence, Culprit},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::PeerNotSending,
    suggested_by: &[Activity::PeerSend],
    supported_by: &[Activity::PeerSend],
};

/// Most of the threads' time goes into reading requests that were begun.
pub(super) const REQUESTS_INCOMPLETE: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for the rest of a request",
    scope: Scope::MainActivity(&[Activity::PeerSend]),
    basis: Basis::Time,
    test: |case, _| {
        let first = case.first()?;
        Some(finding(culprit::peer(case, first)))
    },
};

/// All connections that the service has accepted are to peers that send nothing, and they occupy its workers.
pub(super) const SILENT_PEERS: Rule = Rule {
    cause: &CAUSE,
    name: "accepted connections are silent",
    scope: Scope::MainActivity(&[Activity::Idle]),
    basis: Basis::Time,
    test: |case, checks| {
        let waited = wait::is_long(case, checks);
        let parked = checks.is(
            "threads wait on a futex, not on a connection",
            far_end::is_parked(case),
            false,
        );
        let peer = culprit::silent_peers(case);
        let silent = checks.is(
            "it has accepted connections, and works on no request",
            peer.is_some(),
            true,
        );
        // Some were answered: they may be kept open on purpose.
        let answered = KeptAlive::of(case).is_some_and(|kept| kept.answered > 0);
        checks.answer("some of them were answered", answered);
        (waited && parked && silent).then(|| {
            finding(peer)
                .share(case.share(Activity::Idle))
                .at_most(if answered {
                    Confidence::Medium
                } else {
                    Confidence::High
                })
        })
    },
};

fn finding(culprit: Option<Culprit>) -> Finding {
    let who = culprit
        .as_ref()
        .map_or_else(String::new, |who| format!(" ({})", who.name));
    Finding::blaming(culprit, |_| {
        format!(
            "Workers wait for clients that do not finish their requests{who}: set a read timeout, or put a buffering proxy in front."
        )
    })
}
