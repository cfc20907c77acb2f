//! Threads wait for a lock whose holder works, or take turns as an interpreter's lock makes them.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{
        culprit,
        lock::{self, SerialCalls},
    },
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        profile::TakingTurns,
        wait_graph::{ChainEnd, Step},
        words::percent,
    },
    event::{Activity, Culprit, explain::Unit},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::LockContention,
    suggested_by: &[Activity::Lock],
    supported_by: &[Activity::Lock],
};

/// The holder waits for nothing that an earlier rule names.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for a lock",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        let first = case.first()?;
        let holder = lock::holder(case);
        checks.answer("the lock holder was seen", holder.is_some());
        if let Some(calls) = SerialCalls::of(case) {
            return Some(serial_calls(case, &calls));
        }
        let end = case.last().and_then(|last| last.end.as_ref());
        let culprit = match (holder, end) {
            (Some(_), _) | (None, Some(ChainEnd::Unsampled(_))) => lock::end_of_chain(case),
            (None, _) => culprit::lock(case, first),
        };
        // The runtime's threads wait for such a lock partly in ways that an idle thread has, too.
        let turns = case.view.window.taking_turns(first.tgid);
        let turns =
            turns.filter(|turns| lock::is_an_interpreters(case) && turns.is_one_at_a_time());
        checks.context(
            "samples in which exactly one thread needed a CPU",
            turns.map(TakingTurns::one),
            Unit::Ratio,
        );
        let share = turns.map_or(first.share, TakingTurns::one);
        let finding = Finding::blaming(culprit, |who| advice(case, who)).share(share);
        let confidence = lock::max_confidence(case);
        Some(finding.at_most(confidence).unsure_without_culprit())
    },
};

/// Threads call another service one at a time, although that service would answer several calls at once.
fn serial_calls(case: Case<'_>, calls: &SerialCalls) -> Finding {
    let culprit = culprit::own_process(case).map(|own| Culprit {
        endpoint: Some(calls.endpoint.clone()),
        ..own
    });
    Finding::blaming(culprit, |who| {
        format!(
            "{who} holds a lock during its calls to {}: make the call outside the lock, or give each thread a connection of its own. More workers would only wait longer. Find the lock in the stacks of the process (jstack PID, py-spy dump, gdb -p PID).",
            calls.endpoint
        )
    })
    .fact(calls.fact())
    .at_most(lock::max_confidence(case))
}

/// Several threads of one process need a CPU, but hardly ever two at the same time, although the service may use more CPUs: they
/// take turns.
/// Threads wait for some global locks of interpreters (Ruby's VM lock, OCaml's master lock) on condition variables, as idle threads
/// do, so no lock shows.
pub(super) const TAKING_TURNS: Rule = Rule {
    cause: &CAUSE,
    name: "threads take turns",
    scope: Scope::MainActivity(&[Activity::Idle, Activity::OnCpu, Activity::RunnableOwn]),
    basis: Basis::Fact,
    test: |case, checks| {
        let first = case.first()?;
        let turns = case.view.window.taking_turns(first.tgid)?;
        let samples = checks.at_least(
            "samples of its threads",
            f64::from(turns.samples()),
            f64::from(TakingTurns::MIN_SAMPLES),
            Unit::Count,
        );
        let one = checks.at_least(
            "samples in which exactly one thread needed a CPU",
            turns.one(),
            TakingTurns::MIN_ONE,
            Unit::Ratio,
        );
        let more = checks.at_most(
            "samples in which more than one did",
            turns.more(),
            TakingTurns::MAX_MORE,
            Unit::Ratio,
        );
        let threads = turns.threads(TakingTurns::MIN_TURNS);
        let several = checks.at_least(
            "threads that took turns",
            threads as f64,
            TakingTurns::MIN_THREADS as f64,
            Unit::Count,
        );
        let target = case.view.targets.get(case.target())?;
        let cpus = checks.more_than(
            "CPUs that the service may use",
            f64::from(target.cpus),
            1.0,
            Unit::Count,
        );
        (samples && one && more && several && cpus).then(|| {
            Finding::blaming(culprit::own_process(case), |_| {
                INTERPRETER_ADVICE.to_owned()
            })
            .share(turns.one())
            .fact(format!(
                "{threads} threads take turns on one CPU: exactly one of them needs a CPU in {} of the samples, more than one in {}",
                percent(turns.one()),
                percent(turns.more())
            ))
        })
    },
};

const INTERPRETER_ADVICE: &str = "Its threads take turns at one lock: an interpreter's lock, or a monitor of their runtime. More threads cannot help; more processes can. If it is a monitor, find it with jstack PID, and hold it for less time.";

fn advice(case: Case<'_>, who: &str) -> String {
    if lock::is_an_interpreters(case) {
        return INTERPRETER_ADVICE.to_owned();
    }
    if let Some((_, since)) = lock::idle_transaction(case) {
        return format!(
            "End the transaction of {who}, idle for {since}, or its client; set idle_in_transaction_session_timeout."
        );
    }
    let is_idle = |holder: &Step| matches!(holder.activity, Activity::Idle | Activity::Asleep);
    if lock::holder(case).is_some_and(is_idle) {
        return format!(
            "{who} holds the lock and waits for something else: find out why it does not release the lock, or end its process."
        );
    }
    format!(
        "{who} holds the lock while it works: shorten the critical section, or split the lock; more workers only wait longer."
    )
}
