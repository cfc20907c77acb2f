//! The service waits until another process reads what it writes: a log pipe, a terminal, a unix socket.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, far_end, lock},
};
use crate::{
    cause::Cause,
    diagnose::wait_graph::{chain_of, workers},
    event::Activity,
    queue::Kind,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::OutputBlocked,
    suggested_by: &[Activity::Output],
    supported_by: &[Activity::Output],
};

/// The queue that fills is a pipe that another service reads.
pub(super) const PIPE: Rule = Rule {
    cause: &CAUSE,
    name: "another service reads the pipe",
    scope: Scope::Kinds(&[Kind::Pipe]),
    basis: Basis::Fact,
    test: |case, checks| {
        let reader = far_end::reader_of_the_pipe(case);
        if !checks.is(
            "a process of another service reads it",
            reader.is_some(),
            true,
        ) {
            return None;
        }
        let reader = reader?;
        let steps = chain_of(case.view, workers(case.view, &[reader]));
        let culprit = match steps.last() {
            Some(last) => culprit::at_the_end(case, last),
            None => culprit::process(case, reader),
        };
        Some(Finding::blaming(culprit, advice))
    },
};

/// Most of the threads' time goes into writes that block.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for output to be read",
    scope: Scope::MainActivity(&[Activity::Output]),
    basis: Basis::Time,
    test: |case, checks| {
        let reader = lock::other_end(case);
        checks.answer("the reader is known", reader.is_some());
        Some(Finding::blaming(reader, advice).unsure_without_culprit())
    },
};

/// Threads wait for a lock whose holder waits for its output to be read.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for output to be read",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        lock::held_while(
            case,
            checks,
            (
                "the lock holder waits for its output to be read",
                Activity::Output,
            ),
            |_| lock::end_of_chain(case),
            advice,
        )
    },
};

fn advice(reader: &str) -> String {
    format!(
        "{reader} does not read what is written to it: fix or restart the reader, or let the service write to a file; log less meanwhile."
    )
}
