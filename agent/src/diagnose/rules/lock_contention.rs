//! Threads wait for a lock whose holder works.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, lock},
};
use crate::{cause::Cause, diagnose::case::Case, event::Activity};

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
        let culprit = match holder {
            Some(_) => lock::end_of_chain(case),
            None => culprit::lock(case, first),
        };
        Some(Finding::blaming(culprit, |who| advice(case, who)).share(first.share))
    },
};

fn advice(case: Case<'_>, who: &str) -> String {
    if lock::is_an_interpreters(case) {
        return "Its threads take turns on the interpreter's lock: more threads cannot help, more processes can.".to_owned();
    }
    if let Some((_, since)) = lock::idle_transaction(case) {
        return format!(
            "End the transaction of {who}, idle for {since}, or its client; set idle_in_transaction_session_timeout."
        );
    }
    format!(
        "{who} holds the lock while it works: shorten the critical section, or split the lock; more workers only wait longer."
    )
}
