//! The service runs out of file descriptors. With none left, accept fails with EMFILE, and connections stay in the accept queue.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, unclosed::Unclosed},
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        inputs::{MAX_FILES_LEFT, files_left},
    },
    event::explain::Unit,
    queue::{Kind, Reading},
    text::count,
};

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
        Some(finding(case, open, checks))
    },
};

/// A listener's queue fills, and a process of the service has no descriptor left to accept with. If some are closed, it does not
/// accept at once (nginx: after half a second), and until then the queue stands for the same reason.
pub(super) const NONE_LEFT_TO_ACCEPT: Rule = Rule {
    cause: &CAUSE,
    name: "none left to accept with",
    scope: Scope::Kinds(&[Kind::Accept, Kind::Syn, Kind::Unix]),
    basis: Basis::Fact,
    test: |case, checks| {
        let (from_ns, _) = case.time();
        let at_limit = case.inputs.open_files_at_limit(case.target(), from_ns);
        let now = none_left(case, checks);
        let earlier = checks.is("or none were left earlier", at_limit.is_some(), true);
        let open = at_limit.or_else(|| case.inputs.open_files(case.target()));
        (now || earlier).then(|| finding(case, open, checks))
    },
};

fn none_left(case: Case<'_>, checks: &mut Checks) -> bool {
    let left = case
        .inputs
        .of(case.target(), Kind::Fd)
        .filter_map(|(_, reading)| files_left(reading));
    match left.min() {
        Some(left) => checks.at_most(
            "file descriptors left",
            left as f64,
            MAX_FILES_LEFT as f64,
            Unit::Count,
        ),
        None => checks.unknown("file descriptors left", Unit::Count),
    }
}

fn finding(case: Case<'_>, reading: Option<&Reading>, checks: &mut Checks) -> Finding {
    /// Most of the descriptors are leaked connections: a higher limit would only be reached later.
    const MIN_UNCLOSED: f64 = 0.5;
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
    if left <= MAX_FILES_LEFT {
        return format!("{limit} is reached: {WHAT_TO_DO}");
    }
    format!(
        "{} file descriptors are left below {limit}; without one, accept and connect fail. If the number of open ones still grows, {WHAT_TO_DO}",
        count(left)
    )
}
