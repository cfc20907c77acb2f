//! The service waits for a disk.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, lock},
};
use crate::{cause::Cause, diagnose::case::Case, event::Activity, queue::Kind};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::DiskSlow,
    suggested_by: &[Activity::Disk],
    supported_by: &[Activity::Disk],
};

/// The queue that fills is the disk's.
pub(super) const OWN_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "the disk is the queue",
    scope: Scope::Kinds(&[Kind::Disk]),
    basis: Basis::Fact,
    test: |case, _| Some(finding(case)),
};

/// Most of the threads' time goes into disk reads, writes and flushes.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "threads wait for a disk",
    scope: Scope::MainActivity(&[Activity::Disk]),
    basis: Basis::Time,
    test: |case, _| Some(finding(case)),
};

/// Threads wait for a lock whose holder waits for a disk.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for a disk",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        lock::held_while(
            case,
            checks,
            ("the lock holder waits for a disk", Activity::Disk),
            |holder| culprit::disk(case, holder),
            advice,
        )
    },
};

fn finding(case: Case<'_>) -> Finding {
    let mut steps = case.steps.iter();
    let waits = steps.find(|step| step.activity == Activity::Disk);
    let step = waits.or(case.first());
    Finding::blaming(step.and_then(|step| culprit::disk(case, step)), advice)
}

fn advice(file: &str) -> String {
    format!(
        "Check the device behind {file} (iostat -x 1) and what else writes to it; batch or defer flushes."
    )
}
