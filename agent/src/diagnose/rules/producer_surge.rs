//! Arrivals exceed the service's baseline, and the service is no slower than before.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{capacity::Capacity, cpu::CpuTime, pool},
};
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, DrivenBy, Episode, explain::Unit},
    queue::Kind,
    text::rate,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::ProducerSurge,
    suggested_by: &[],
    // Under a surge the workers do more of whatever they normally do, so every activity counts.
    supported_by: &[
        Activity::OnCpu,
        Activity::RunnableOwn,
        Activity::RunnableForeign,
        Activity::Throttled,
        Activity::Stolen,
        Activity::Downstream,
        Activity::PeerRead,
        Activity::PeerSend,
        Activity::Lock,
        Activity::Disk,
        Activity::Output,
        Activity::Asleep,
        Activity::Inside,
        Activity::Stopped,
        Activity::Unknown,
    ],
};

/// Threads use the CPU that they want, and there is more to compute than in the baseline.
pub(super) const COMPUTING: Rule = Rule {
    cause: &CAUSE,
    name: "arrivals above baseline, computing",
    scope: Scope::Cpu,
    basis: Basis::Time,
    test: |case, checks| {
        let surges = surges(case, checks);
        let work = checks.is(
            "the queue counts work from outside",
            counts_work(case.episode.key.kind),
            true,
        );
        (surges && work).then(|| finding(case).share(CpuTime::of(case).needed))
    },
};

/// Threads wait for calls that take no longer than before, and there are more of them.
pub(super) const CALLING: Rule = Rule {
    cause: &CAUSE,
    name: "arrivals above baseline, calls as fast as before",
    scope: Scope::MainActivity(&[Activity::Downstream]),
    basis: Basis::Time,
    test: |case, checks| {
        let surges = surges(case, checks);
        let is_at_baseline = checks.is(
            "all calls take less than twice their baseline",
            case.inputs.calls_are_at_baseline(case.target()),
            true,
        );
        let pool = checks.is(
            "a connection pool is exhausted",
            pool::exhausted_here(case).is_some(),
            false,
        );
        (surges && is_at_baseline && pool).then(|| finding(case))
    },
};

/// Threads wait for something of their own, and more requests do so.
pub(super) const WAITING: Rule = Rule {
    cause: &CAUSE,
    name: "arrivals above baseline, waiting inside",
    scope: Scope::MainActivity(&[Activity::Asleep, Activity::Inside]),
    basis: Basis::Time,
    test: |case, checks| surges(case, checks).then(|| finding(case)),
};

fn surges(case: Case<'_>, checks: &mut Checks) -> bool {
    let episode = case.episode;
    checks.context("arrivals", episode.arrival_rate, Unit::PerSecond);
    checks.context(
        "baseline of arrivals",
        episode.baseline_arrival_rate,
        Unit::PerSecond,
    );
    checks.is(
        "arrivals of this service are above their baseline",
        case.surges,
        true,
    )
}

fn finding(case: Case<'_>) -> Finding {
    let episode = case.episode;
    let rates = episode.arrival_rate.zip(episode.baseline_arrival_rate);
    let fact = rates.map(|(now, baseline)| {
        let served = episode.service_rate;
        let served = served.map_or_else(String::new, |served| {
            format!(", {}/s are served", rate(served))
        });
        format!(
            "{}/s arrive (baseline {}/s){served}",
            rate(now),
            rate(baseline)
        )
    });
    Finding {
        includes: &[Cause::CpuBound],
        ..Finding::new(match Capacity::of(case) {
            Some(capacity) => format!("Shed load or rate-limit callers now. {}.", capacity.words()),
            None => "Shed load or rate-limit callers now; then add capacity.".to_owned(),
        })
    }
    .fact(fact)
}

/// Whether arrivals at such a queue are work from outside. Dispatches and turns of a loop are not.
fn counts_work(kind: Kind) -> bool {
    !matches!(kind, Kind::Runqueue | Kind::Eventloop | Kind::Lock)
}

/// Whether more work arrives at a service than its baseline, by its open episodes.
pub(in crate::diagnose) fn is_surge(episodes: &[&Episode]) -> bool {
    // While connections wait to be accepted, the requests in flight follow the rate of accepting, not the rate of arrivals.
    let waits_to_be_accepted = episodes.iter().any(|one| one.key.kind == Kind::Accept);
    episodes.iter().any(|one| {
        one.driven_by == DrivenBy::Producer
            && counts_work(one.key.kind)
            && !(waits_to_be_accepted && one.key.kind == Kind::Inflight)
    })
}
