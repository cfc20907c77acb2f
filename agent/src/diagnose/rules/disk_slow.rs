//! The service waits for a disk.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{culprit, lock},
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, wait_graph::Step},
    event::Activity,
    queue::Kind,
    sample::IoLimit,
    text::{bytes, count},
};

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
    let limits = limits(case, step);
    Finding::blaming(step.and_then(|step| culprit::disk(case, step)), |file| {
        match &limits {
            Some(_) => format!(
                "The control group of the service has a limit for this device. If the service waits for that limit, raise it (io.max, blkio.throttle.*). Otherwise: {}",
                advice(file)
            ),
            None => advice(file),
        }
    })
    .fact(limits)
}

/// The I/O limits of the control group of the process that waits, in words.
fn limits(case: Case<'_>, step: Option<&Step>) -> Option<String> {
    let target = step.and_then(|step| step.target).unwrap_or(case.target());
    let target = case.view.targets.get(target)?;
    let limits: Vec<String> = case.inputs.io_limits(target).map(words_of).collect();
    (!limits.is_empty()).then(|| format!("its control group allows {}", limits.join(", ")))
}

/// `1 writes/s on vda`.
fn words_of(limit: &IoLimit) -> String {
    let number =
        |value: Option<u64>, what: &str| value.map(|value| format!("{} {what}", count(value)));
    let size =
        |value: Option<u64>, what: &str| value.map(|value| format!("{} {what}", bytes(value)));
    let all = [
        number(limit.reads_per_s, "reads/s"),
        number(limit.writes_per_s, "writes/s"),
        size(limit.read_bytes_per_s, "read per s"),
        size(limit.written_bytes_per_s, "written per s"),
    ];
    let all: Vec<String> = all.into_iter().flatten().collect();
    format!("{} on {}", all.join(" and "), limit.device)
}

fn advice(file: &str) -> String {
    format!(
        "Check the device behind {file} (iostat -x 1) and what else writes to it; batch or defer flushes."
    )
}
