//! The service has no local ports left for connections to an address: connect fails with EADDRNOTAVAIL.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::culprit,
};
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, Confidence, explain::Unit},
    sample::LocalPorts,
    text::count,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::PortsExhausted,
    suggested_by: &[],
    supported_by: &[],
};

/// All local ports of a range are in use towards an address that the service calls, and its threads wait for nothing else that
/// is known.
pub(super) const NONE_LEFT: Rule = Rule {
    cause: &CAUSE,
    name: "none left to connect from",
    scope: Scope::MainActivity(&[
        Activity::Asleep,
        Activity::Idle,
        Activity::Inside,
        Activity::Unknown,
        Activity::OnCpu,
        Activity::RunnableOwn,
    ]),
    basis: Basis::Fact,
    test: |case, checks| {
        let target = case.target();
        let mut used_up = case.view.topology.ports_used_up(target);
        let ports = used_up.find(|ports| case.inputs.has_called(target, ports.remote));
        checks.context(
            "local ports in use towards an address that it calls",
            ports.map(|ports| f64::from(ports.used)),
            Unit::Count,
        );
        checks.is("all ports of a range are in use", ports.is_some(), true);
        let first = case.first()?;
        // A service that fails at once and tries again computes.
        let computes = matches!(
            first.activity,
            Activity::OnCpu | Activity::RunnableOwn | Activity::Idle
        );
        let most = if computes {
            Confidence::Medium
        } else {
            Confidence::High
        };
        Some(finding(case, ports?).at_most(most))
    },
};

fn finding(case: Case<'_>, ports: &LocalPorts) -> Finding {
    let LocalPorts {
        remote,
        lowest,
        highest,
        used,
        time_wait,
        ..
    } = *ports;
    let limit = format!("the local ports {lowest} to {highest} for connections to {remote}");
    let closed = time_wait.saturating_mul(2) >= used;
    Finding::blaming(culprit::limit(case, limit), |_| {
        let what = if closed {
            "Keep connections open and reuse them (keep-alive, a pool): each new one keeps its port for a minute after it is closed here. Until then: `sysctl -w net.ipv4.tcp_tw_reuse=1`"
        } else {
            "Most of the local ports are in use by open connections: close connections that are not needed, or share them (a pool). Until then: more addresses to connect from or to"
        };
        format!(
            "connect() to {remote} fails with EADDRNOTAVAIL. {what}, or a wider range (net.ipv4.ip_local_port_range). More workers do not help."
        )
    })
    .fact(format!(
        "{} of the {} local ports {lowest} to {highest} are in use for connections to {remote}, {} of them in TIME_WAIT",
        count(u64::from(used)),
        count(u64::from(ports.span())),
        count(u64::from(time_wait))
    ))
}
