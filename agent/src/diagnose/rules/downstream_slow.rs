//! The service waits for responses of another service.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        culprit, far_end,
        lock::{self, SerialCalls},
        pool::{self, Slow},
    },
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, inputs::Pool},
    event::{Activity, Confidence, Culprit, explain::Unit},
    queue::Kind,
    text::{count, duration},
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
            Some((step, pool)) => Some(pool::culprit_of(case, (step.target, step.tgid), &pool)),
            None => lock::other_end(case),
        };
        let (now, baseline) = response_times(case, culprit.as_ref());
        checks.context("response time of the culprit", now, Unit::Nanoseconds);
        checks.context("its baseline", baseline, Unit::Nanoseconds);
        Some(finding(case, culprit))
    },
};

/// What is sent on the fullest connection of a send queue is not acknowledged, since the service at its other end has not
/// accepted the connection and its backlog is full.
pub(super) const NOT_ACCEPTED: Rule = Rule {
    cause: &CAUSE,
    name: "the other end does not accept the connection",
    scope: Scope::Kinds(&[Kind::Send]),
    basis: Basis::Fact,
    test: |case, checks| {
        let link = far_end::fullest_link(case)?;
        let listener = case.view.topology.listener_of(link);
        checks.is(
            "a process of this machine listens, and nobody has accepted it",
            listener.is_some(),
            true,
        );
        let listener = listener?;
        let culprit = match far_end::beyond(case, link).last() {
            Some(last) => culprit::at_the_end(case, last),
            None => culprit::process(case, listener),
        };
        let fact = format!(
            "the connection to {} is not accepted, so what is sent on it is not acknowledged",
            link.remote
        );
        Some(Finding::blaming(culprit, |who| advice(case, who)).fact(fact))
    },
};

/// Threads wait for a lock whose holder waits for a response.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for a response",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        // Where the lock itself is the reason, another rule blames it.
        if SerialCalls::of(case).is_some_and(|calls| calls.lock_is_the_reason(checks)) {
            return None;
        }
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
    let mut facts: Vec<String> = Vec::new();
    let behind = behind_one_call(case);
    facts.extend(behind.map(|requests| {
        format!(
            "the only thread of its event loop waits in a system call for one response, and {} requests wait for the thread",
            count(requests)
        )
    }));
    facts.extend(fact(case, culprit.as_ref()));
    let used_up = pool::ends_without_a_reason(case)
        .then(|| pool::used_up_by_slow_calls(case))
        .flatten();
    facts.extend(
        used_up
            .as_ref()
            .map(|(pool, slow)| used_up_fact(pool, *slow)),
    );
    let finding = Finding::blaming(culprit, |who| {
        let advice = advice(case, who);
        match behind {
            Some(_) => format!(
                "{advice} In the service, make this call asynchronous or move it to another thread: it blocks the event loop for all other requests."
            ),
            None => advice,
        }
    });
    finding
        .fact((!facts.is_empty()).then(|| facts.join("; ")))
        .at_most(used_up.map_or(Confidence::High, |(_, slow)| match slow {
            Slow::LongerThanTheWhole(_) => Confidence::High,
            Slow::Unanswered => Confidence::Medium,
            // If the calls always took that long, the pool is too small.
            Slow::Long => Confidence::Low,
        }))
        .unsure_without_culprit()
}

fn used_up_fact(pool: &Pool, slow: Slow) -> String {
    let Pool {
        connections,
        endpoint,
        ..
    } = pool;
    let takes = duration(pool.typical_ns().unwrap_or(0));
    let all = format!("all {connections} connections to {endpoint} are in use");
    match slow {
        Slow::Unanswered => format!("{all}, and none of their calls is answered"),
        Slow::LongerThanTheWhole(whole_ns) => format!(
            "{all}: a response takes {takes}; before, a whole response of the calling service took {}",
            duration(whole_ns as u64)
        ),
        Slow::Long => format!(
            "{all}: a response takes {takes} (no baseline: if it always took that long, the pool is too small)"
        ),
    }
}

/// The number of requests that wait for the service's only thread while that waits for one response.
fn behind_one_call(case: Case<'_>) -> Option<u64> {
    let inflight = case.inputs.of(case.target(), Kind::Inflight);
    let requests: u64 = inflight.map(|(_, reading)| reading.depth).sum();
    let threads = case.threads() as u64;
    // A thread that serves one connection at a time is not an event loop.
    (pool::waits_in_one_call(case) && requests > threads).then_some(requests)
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
