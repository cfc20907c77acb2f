//! The service runs out of file descriptors. With none left, accept fails with EMFILE, and connections stay in the accept queue.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, unclosed::Unclosed},
};
use crate::{cause::Cause, diagnose::case::Case, event::explain::Unit, queue::Kind, text::count};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::FdExhausted,
    suggested_by: &[],
    supported_by: &[],
};

/// The queue that fills is the table of file descriptors itself.
pub(super) const OWN_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "file descriptors are the queue",
    scope: Scope::Kinds(&[Kind::Fd]),
    basis: Basis::Fact,
    test: |case, checks| {
        let open = case.inputs.open_files(case.target());
        checks.context(
            "open file descriptors",
            open.map(|reading| reading.depth as f64),
            Unit::Count,
        );
        Some(finding(case, checks))
    },
};

/// A listener's queue fills, and a process of the service has no descriptor left to accept with.
pub(super) const NONE_LEFT_TO_ACCEPT: Rule = Rule {
    cause: &CAUSE,
    name: "none left to accept with",
    scope: Scope::Kinds(&[Kind::Accept, Kind::Syn, Kind::Unix]),
    basis: Basis::Fact,
    test: |case, checks| none_left(case, checks).then(|| finding(case, checks)),
};

/// A service that keeps one descriptor in reserve counts as exhausted, too.
const MAX_LEFT: u64 = 1;

fn none_left(case: Case<'_>, checks: &mut Checks) -> bool {
    let left = case
        .inputs
        .of(case.target(), Kind::Fd)
        .filter_map(|(_, reading)| Some(reading.limit?.saturating_sub(reading.depth)));
    match left.min() {
        Some(left) => checks.at_most(
            "file descriptors left",
            left as f64,
            MAX_LEFT as f64,
            Unit::Count,
        ),
        None => checks.unknown("file descriptors left", Unit::Count),
    }
}

fn finding(case: Case<'_>, checks: &mut Checks) -> Finding {
    /// Most of the descriptors are leaked connections: a higher limit would only be reached later.
    const MIN_UNCLOSED: f64 = 0.5;
    let reading = case.inputs.open_files(case.target());
    let open = reading.map_or(0, |reading| reading.depth);
    let fact = reading.map(|reading| {
        format!(
            "{} of {} file descriptors are open",
            count(reading.depth),
            count(reading.limit.unwrap_or(0))
        )
    });
    let unclosed = Unclosed::of(case);
    let connections = unclosed.as_ref().map_or(0, |it| it.connections);
    let are_leaked = checks.at_least(
        "of them, connections that the peer has closed",
        connections as f64 / open.max(1) as f64,
        MIN_UNCLOSED,
        Unit::Ratio,
    );
    if let Some(unclosed) = unclosed.filter(|_| are_leaked) {
        let facts = [fact, Some(unclosed.words())];
        let facts: Vec<String> = facts.into_iter().flatten().collect();
        return Finding::blaming(unclosed.culprit(case), |_| {
            format!(
                "{} A higher limit (LimitNOFILE=, ulimit -n) only gains time.",
                unclosed.advice(case)
            )
        })
        .fact(facts.join("; "));
    }
    let limit = reading.and_then(|reading| reading.limit);
    let limit = limit.or(case.episode.limit).unwrap_or(0);
    let left = reading.map_or(0, |reading| limit.saturating_sub(reading.depth));
    let culprit = culprit::limit(case, format!("RLIMIT_NOFILE of {limit}"));
    Finding::blaming(culprit, |name| advice(name, left)).fact(fact)
}

fn advice(limit: &str, left: u64) -> String {
    const WHAT_TO_DO: &str = "raise the limit (LimitNOFILE=, ulimit -n), and look for descriptors that are never closed (ls -l /proc/PID/fd).";
    if left <= MAX_LEFT {
        return format!("{limit} is reached: {WHAT_TO_DO}");
    }
    format!(
        "{} file descriptors are left below {limit}; without one, accept and connect fail. If the number of open ones still grows, {WHAT_TO_DO}",
        count(left)
    )
}
