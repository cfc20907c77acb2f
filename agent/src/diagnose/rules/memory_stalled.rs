//! The service waits for memory: reclaim at its limit, or swapping.

use super::{
    checks::Checks,
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::culprit,
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, words},
    event::{Activity, Confidence, Culprit, CulpritKind, explain::Unit, share_of},
    queue::{Kind, QueueId, QueueKey, Reading, STALL_SHARE},
    text::{bytes, rate},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::MemoryStalled,
    // No thread is seen to wait for memory: it waits for a disk, or computes, or nothing is known of its wait.
    suggested_by: &[],
    supported_by: &[],
};

/// The queue that fills is the one for memory itself.
pub(super) const OWN_QUEUE: Rule = Rule {
    cause: &CAUSE,
    name: "memory is the queue",
    scope: Scope::Kinds(&[Kind::Memory]),
    basis: Basis::Fact,
    test: |case, _| Some(finding(case)),
};

/// Another queue fills, and the tasks of the service's control group stall for memory: they wait for reclaim, or for pages that
/// were evicted and are needed again. Such a wait looks like one for a disk, or like none that is known.
pub(super) const GROUP_STALLS: Rule = Rule {
    cause: &CAUSE,
    name: "the control group stalls for memory",
    scope: Scope::MainActivity(&[
        Activity::Disk,
        Activity::Unknown,
        Activity::OnCpu,
        Activity::RunnableOwn,
        Activity::Lock,
    ]),
    basis: Basis::Fact,
    test: |case, checks| {
        let stalls = stalls(case, checks);
        let refaults = reads_again(case, checks);
        // Where threads wait for a lock, its holder is the one that waits for memory.
        let last = case.last()?.activity;
        let waits = matches!(last, Activity::Disk | Activity::Unknown);
        let computes = matches!(last, Activity::OnCpu | Activity::RunnableOwn);
        let is_lock = case.first()?.activity == Activity::Lock;
        let is_it = checks.is(
            "the end of the wait chain may wait for memory",
            waits || computes && !is_lock,
            true,
        );
        let reads_again = refaults
            && match last {
                Activity::Disk => true,
                // With a fast disk, reading pages and evicting others takes more CPU than time for the disk.
                Activity::OnCpu | Activity::RunnableOwn => computes_for_pages(case, checks),
                _ => false,
            };
        ((stalls || reads_again) && is_it).then(|| {
            // Reads of a working set that would not fit in any case are read again, too.
            let most = if stalls {
                Confidence::High
            } else {
                Confidence::Medium
            };
            finding(case).at_most(most)
        })
    },
};

/// The memory of the service's control group, or of the machine if that is short.
fn memory(case: Case<'_>) -> Option<(&QueueKey, &Reading)> {
    let mut readings = case.inputs.of(case.target(), Kind::Memory);
    let (key, reading) = readings.find(|(_, reading)| reading.fill.is_some())?;
    Some((key, reading))
}

fn stalls(case: Case<'_>, checks: &mut Checks) -> bool {
    /// Share of the time in which some task stalls for memory. The threshold of the memory queue's level critical is 0.1; this is
    /// three times that, since here it is to explain most of what the threads do.
    const MIN_STALLED: f64 = 0.3;
    match memory(case).and_then(|(_, reading)| reading.extra(STALL_SHARE)) {
        Some(share) => checks.at_least(
            "time in which tasks of the control group stalled for memory",
            share,
            MIN_STALLED,
            Unit::Ratio,
        ),
        None => checks.unknown(
            "time in which tasks of the control group stalled for memory",
            Unit::Ratio,
        ),
    }
}

/// Whether threads that compute do so for the kernel, which reads pages and evicts others: the stalls for memory are at the level
/// at which the memory queue itself warns, or each thread reads pages at such a rate that it does little else.
fn computes_for_pages(case: Case<'_>, checks: &mut Checks) -> bool {
    /// The share at which the memory queue warns, with the default thresholds.
    const MIN_SHORT: f64 = 0.078;
    /// Wall time of a thread per page, ns. Where a service on SQLite and one that maps a file do nothing but read back pages of a
    /// fast disk, it is about 100 µs (scenarios `memory-thrash-…`).
    const MAX_PER_PAGE_NS: f64 = 200_000.0;
    const STALLS: &str =
        "and time in which tasks stalled (threshold: where the memory queue warns)";
    let short = match memory(case).and_then(|(_, reading)| reading.extra(STALL_SHARE)) {
        Some(share) => checks.at_least(STALLS, share, MIN_SHORT, Unit::Ratio),
        None => checks.unknown(STALLS, Unit::Ratio),
    };
    let often = refaults(case)
        .zip(case.last())
        .is_some_and(|((per_s, _), last)| {
            let busy = last.threads.len() as f64 * (1.0 - share_of(&last.shares, Activity::Idle));
            checks.at_most(
                "or wall time of a thread per page read again",
                busy * 1e9 / per_s.max(1.0),
                MAX_PER_PAGE_NS,
                Unit::Nanoseconds,
            )
        });
    short || often
}

/// Most of the pages that the control group reads were evicted shortly before, for lack of memory.
fn reads_again(case: Case<'_>, checks: &mut Checks) -> bool {
    /// More than half: had they been kept, most of the reads would not wait.
    const MIN_SHARE: f64 = 0.5;
    /// Pages per second. A thread that waits for a fast disk reads some thousand pages a second, for a slow one a hundred.
    const MIN_PER_S: f64 = 100.0;
    let Some((per_s, share)) = refaults(case) else {
        return checks.unknown(
            "or pages read again after eviction, per second",
            Unit::Count,
        );
    };
    let many = checks.at_least(
        "or pages read again after eviction, per second",
        per_s,
        MIN_PER_S,
        Unit::Count,
    );
    let most = checks.at_least(
        "and their share of the pages read",
        share,
        MIN_SHARE,
        Unit::Ratio,
    );
    many && most
}

fn refaults(case: Case<'_>) -> Option<(f64, f64)> {
    let target = case.view.targets.get(case.target())?;
    case.inputs.refaults(target)
}

fn fact(case: Case<'_>, reading: &Reading) -> Option<String> {
    let share = reading.extra(STALL_SHARE)?;
    let limit = bytes(reading.limit?);
    let again = refaults(case).map_or_else(String::new, |(per_s, share)| {
        format!(
            "; {} of the pages that it read had been evicted shortly before ({}/s)",
            words::percent(share.min(1.0)),
            rate(per_s)
        )
    });
    Some(format!(
        "tasks stalled for memory in {} of the last 5 s, at a limit of {limit}{again}",
        words::percent(share)
    ))
}

fn finding(case: Case<'_>) -> Finding {
    let memory = memory(case);
    let limited = memory.and_then(|(key, _)| match &key.id {
        QueueId::Cgroup(group) => Some(format!("the memory limit of {group}")),
        _ => None,
    });
    let culprit = limited.map(|limit| Culprit {
        target: Some(case.target()),
        container: culprit::container(case, case.target()),
        ..Culprit::named(CulpritKind::Cgroup, limit)
    });
    Finding::blaming(culprit, |_| {
        "Raise the memory limit (memory.max, memory.high, memory.limit_in_bytes) or make the service use less; find what grew."
            .to_owned()
    })
    .fact(memory.and_then(|(_, reading)| fact(case, reading)))
}
