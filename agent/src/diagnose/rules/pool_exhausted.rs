//! All connections to another service are in use, and work waits for one.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        capacity::needed,
        pool::{culprit, exhausted_here},
    },
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        inputs::{MAX_SLOWDOWN, MIN_IN_USE, Pool, min_inflight},
    },
    event::{Activity, Confidence, Culprit, explain::Unit},
    queue::Kind,
    text::{count, duration, rate},
};

const SECOND_NS: f64 = 1e9;

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::PoolExhausted,
    suggested_by: &[],
    supported_by: &[Activity::Downstream, Activity::Idle, Activity::Inside],
};

pub(super) const ALL_IN_USE: Rule = Rule {
    cause: &CAUSE,
    name: "all connections are in use",
    scope: Scope::MainActivity(&[
        Activity::Downstream,
        Activity::Asleep,
        Activity::Inside,
        Activity::Idle,
    ]),
    basis: Basis::Time,
    test: |case, checks| {
        let exhausted = exhausted_here(case);
        describe(case, exhausted.as_ref(), checks);
        checks.is(
            "a pool is exhausted, and nothing beyond it is slow",
            exhausted.is_some(),
            true,
        );
        exhausted.map(|pool| finding(case, &pool))
    },
};

/// Records the numbers of the exhausted pool, else of the fullest one.
fn describe(case: Case<'_>, exhausted: Option<&Pool>, checks: &mut Checks) {
    let fullest = case.inputs.fullest_pool(case.target());
    let Some(pool) = exhausted.or(fullest.as_ref()) else {
        checks.unknown("connections of a pool", Unit::Count);
        return;
    };
    let connections = pool.connections as f64;
    checks.context("connections of the pool", Some(connections), Unit::Count);
    checks.at_least(
        "samples in which all of them are in use",
        pool.in_use,
        MIN_IN_USE,
        Unit::Ratio,
    );
    checks.at_least(
        "requests in flight",
        pool.inflight as f64,
        min_inflight(pool.connections),
        Unit::Count,
    );
    match (pool.response_time_ns, pool.baseline_ns) {
        (Some(now), Some(baseline)) => {
            checks.at_most(
                "time per call",
                now,
                baseline * MAX_SLOWDOWN,
                Unit::Nanoseconds,
            );
        }
        (now, _) => {
            checks.context("time per call", now, Unit::Nanoseconds);
            checks.context("its baseline", None, Unit::Nanoseconds);
        }
    }
}

fn finding(case: Case<'_>, pool: &Pool) -> Finding {
    let owner = case.view.targets.get(case.target());
    let culprit = Culprit {
        pid: owner.and_then(|owner| owner.tgids.first().copied()),
        ..culprit(case, Some(case.target()), None, pool)
    };
    let finding = Finding::blaming(culprit, |_| advice(case, pool)).fact(fact(pool));
    if pool.baseline_ns.is_some() {
        // Slow calls exhaust a pool as well. Comparing with the baseline separates the two.
        return Finding {
            includes: &[Cause::DownstreamSlow],
            ..finding
        };
    }
    Finding {
        max_confidence: Confidence::Medium,
        ..finding
    }
}

fn fact(pool: &Pool) -> String {
    let response = pool.typical_ns().map_or_else(String::new, |ns| {
        format!(", a response takes {}", duration(ns))
    });
    let baseline = match pool.baseline_ns {
        Some(_) => "",
        None => " (no baseline)",
    };
    format!(
        "all {} connections to {} are in use in nearly every sample while {} requests are in flight{response}{baseline}",
        pool.connections,
        pool.endpoint,
        count(pool.inflight),
    )
}

fn advice(case: Case<'_>, pool: &Pool) -> String {
    let raise = match too_small(case, pool) {
        Some(sum) => format!("{sum}."),
        None => format!(
            "Raise the pool of {} connections to {}, if that service has capacity, or release each sooner.",
            pool.connections, pool.endpoint
        ),
    };
    if pool.baseline_ns.is_some() {
        return raise;
    }
    format!(
        "{raise} If {} used to respond faster, start there.",
        pool.endpoint
    )
}

/// What the pool carries, what arrives, and what would be enough. Little's law: connections = rate × time per call.
fn too_small(case: Case<'_>, pool: &Pool) -> Option<String> {
    let response_time_ns = pool.typical_ns()?;
    let response_s = response_time_ns as f64 / SECOND_NS;
    // Rates of bytes say nothing about requests.
    let arrivals = case
        .episode
        .arrival_rate
        .filter(|_| case.episode.key.kind != Kind::Recv)?;
    let carries = pool.connections as f64 / response_s.max(1e-6);
    let needed = needed(arrivals, response_s);
    (needed > pool.connections).then(|| {
        format!(
            "{} connections × {} per response carry {}/s, {}/s arrive: {needed} connections would keep up, if {} has capacity",
            pool.connections,
            duration(response_time_ns),
            rate(carries),
            rate(arrivals),
            pool.endpoint
        )
    })
}
