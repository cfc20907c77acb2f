//! The service waits for responses of another service.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{lock, pool},
};
use crate::{
    cause::Cause,
    diagnose::case::Case,
    event::{Activity, Culprit, explain::Unit},
    text::duration,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::DownstreamSlow,
    suggested_by: &[Activity::Downstream],
    supported_by: &[Activity::Downstream],
};

/// Most of the threads' time goes into waiting for responses.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for responses",
    scope: Scope::MainActivity(&[Activity::Downstream]),
    basis: Basis::Time,
    test: |case, checks| {
        let culprit = match pool::exhausted_along_the_chain(case) {
            Some((step, pool)) => Some(pool::culprit(case, step.target, Some(step.tgid), &pool)),
            None => lock::end_of_chain(case),
        };
        let (now, baseline) = response_times(case, culprit.as_ref());
        checks.context("response time of the culprit", now, Unit::Nanoseconds);
        checks.context("its baseline", baseline, Unit::Nanoseconds);
        Some(finding(case, culprit))
    },
};

/// Threads wait for a lock whose holder waits for a response.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for a response",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        let found = lock::held_while(
            case,
            checks,
            (
                "the lock holder waits for another service",
                Activity::Downstream,
            ),
            |_| lock::end_of_chain(case),
            |who| advice(case, who),
        )?;
        let fact = fact(case, found.culprit.as_ref());
        Some(found.fact(fact))
    },
};

fn finding(case: Case<'_>, culprit: Option<Culprit>) -> Finding {
    let fact = fact(case, culprit.as_ref());
    Finding::blaming(culprit, |who| advice(case, who)).fact(fact)
}

/// How long calls to the culprit take now, and took before the queue filled, ns.
fn response_times(case: Case<'_>, culprit: Option<&Culprit>) -> (Option<f64>, Option<f64>) {
    let endpoint = culprit.and_then(|culprit| culprit.endpoint.as_deref());
    endpoint.map_or((None, None), |endpoint| {
        case.inputs.response_times(case.target(), endpoint)
    })
}

fn fact(case: Case<'_>, culprit: Option<&Culprit>) -> Option<String> {
    let (now, baseline) = response_times(case, culprit);
    Some(format!(
        "{} takes {} to respond (baseline {})",
        culprit?.endpoint.as_deref()?,
        duration(now? as u64),
        duration(baseline? as u64)
    ))
}

fn advice(case: Case<'_>, who: &str) -> String {
    if let Some((pid, since)) = lock::idle_transaction(case) {
        return format!(
            "End the transaction of {who}, idle for {since} (pg_terminate_backend({pid}) for PostgreSQL), or its client; adding workers here will not help."
        );
    }
    let deepest = case.last().filter(|_| case.steps.len() > 1);
    let there = match deepest.map(|step| step.activity) {
        Some(Activity::OnCpu | Activity::RunnableOwn) => {
            format!("{who} is busy computing: find the slow query or command there.")
        }
        Some(Activity::Disk) => format!("{who} waits for its disk: check the device there."),
        Some(Activity::Lock) => format!("{who} waits for a lock: find its holder."),
        Some(Activity::Stopped) => format!("{who} is stopped: `kill -CONT` resumes it."),
        _ => format!("Investigate {who}."),
    };
    format!(
        "{there} Until then shorten the timeout or open the circuit breaker; adding workers here will not help."
    )
}
