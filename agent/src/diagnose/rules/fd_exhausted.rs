//! The service has no file descriptors left: accept fails with EMFILE, and connections stay in the accept queue.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::culprit,
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
        Some(finding(case))
    },
};

/// A listener's queue fills, and a process of the service has no descriptor left to accept with.
pub(super) const NONE_LEFT_TO_ACCEPT: Rule = Rule {
    cause: &CAUSE,
    name: "none left to accept with",
    scope: Scope::Kinds(&[Kind::Accept, Kind::Syn, Kind::Unix]),
    basis: Basis::Fact,
    test: |case, checks| none_left(case, checks).then(|| finding(case)),
};

fn none_left(case: Case<'_>, checks: &mut Checks) -> bool {
    /// A service that keeps one descriptor in reserve counts as exhausted, too.
    const MAX_LEFT: f64 = 1.0;
    let left = case
        .inputs
        .of(case.target(), Kind::Fd)
        .filter_map(|(_, reading)| Some(reading.limit?.saturating_sub(reading.depth)));
    match left.min() {
        Some(left) => checks.at_most("file descriptors left", left as f64, MAX_LEFT, Unit::Count),
        None => checks.unknown("file descriptors left", Unit::Count),
    }
}

fn finding(case: Case<'_>) -> Finding {
    let reading = case.inputs.open_files(case.target());
    let limit = reading.and_then(|reading| reading.limit);
    let limit = limit.or(case.episode.limit).unwrap_or(0);
    let culprit = culprit::limit(case, format!("RLIMIT_NOFILE of {limit}"));
    Finding::blaming(culprit, |limit| {
        format!(
            "{limit} is reached: raise it (LimitNOFILE=, ulimit -n), and look for descriptors that are never closed (ls -l /proc/PID/fd)."
        )
    })
    .fact(reading.map(|reading| {
        format!(
            "{} of {} file descriptors are open",
            count(reading.depth),
            count(reading.limit.unwrap_or(0))
        )
    }))
}
