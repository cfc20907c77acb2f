//! What the holder of a lock does: that is why others wait for it.

use super::culprit;
use crate::{
    diagnose::{
        case::Case,
        classify::Resource,
        profile::TURNS,
        rules::{checks::Checks, rule::Finding},
        wait_graph::{ChainEnd, Step},
        words::idle_in_transaction_ns,
    },
    event::{Activity, Confidence, Culprit},
    sample::{LockHolder, SharedLock},
    text::duration,
};

/// The first step of the wait chain that does not wait for a lock: its holder.
pub(in crate::diagnose::rules) fn holder(case: Case<'_>) -> Option<&Step> {
    let mut steps = case.steps.iter();
    steps.find(|step| step.activity != Activity::Lock)
}

/// The holder of the lock waits for something itself: that is the cause. `advice` gets the culprit's name.
pub(in crate::diagnose::rules) fn held_while(
    case: Case<'_>,
    checks: &mut Checks,
    (question, activity): (&'static str, Activity),
    culprit: impl FnOnce(&Step) -> Option<Culprit>,
    advice: impl FnOnce(&str) -> String,
) -> Option<Finding> {
    let holder = holder(case);
    let waits = holder.is_some_and(|holder| holder.activity == activity);
    if !checks.is(question, waits, true) {
        return None;
    }
    let first = case.first()?;
    let finding = Finding::blaming(culprit(holder?), advice).share(first.share);
    Some(finding.at_most(max_confidence(case)))
}

/// Who is at the end of the wait chain.
pub(in crate::diagnose::rules) fn end_of_chain(case: Case<'_>) -> Option<Culprit> {
    case.last().map(|last| culprit::at_the_end(case, last))
}

/// Who or what is at the end of the wait chain. `None` if that is unknown.
pub(in crate::diagnose::rules) fn other_end(case: Case<'_>) -> Option<Culprit> {
    let last = case.last()?;
    let is_unknown = case.steps.len() == 1 && last.end == Some(ChainEnd::Reached);
    match &last.resource {
        Resource::File { .. } if is_unknown => culprit::disk(case, last),
        _ if is_unknown => None,
        _ => Some(culprit::at_the_end(case, last)),
    }
}

/// The highest confidence of a verdict on a lock. It is medium in three cases:
///
/// - the lock is inferred, because only one thread at a time is active while the others seem to wait for their turn;
/// - the lock on a file is inferred from the times at which a thread sleeps;
/// - the chain ends at a shared lock, so its holder is unknown.
pub(in crate::diagnose::rules) fn max_confidence(case: Case<'_>) -> Confidence {
    let is_inferred = case.steps.iter().any(|step| {
        matches!(
            step.resource,
            Resource::SharedLock {
                lock: SharedLock::File { polled: true, .. },
                ..
            } | Resource::Lock { address: TURNS, .. }
        )
    });
    let is_unheld = case.last().is_some_and(|last| {
        let is_shared = matches!(last.resource, Resource::SharedLock { .. });
        is_shared && last.activity == Activity::Lock && last.end == Some(ChainEnd::Reached)
    });
    if is_inferred || is_unheld {
        Confidence::Medium
    } else {
        Confidence::High
    }
}

/// The number of the thread that held a lock of the chain and has exited.
pub(in crate::diagnose::rules) fn exited_holder(case: Case<'_>) -> Option<u32> {
    case.steps.iter().find_map(|step| match step.resource {
        Resource::SharedLock {
            holder: LockHolder::Exited(tid),
            ..
        } => Some(tid),
        _ => None,
    })
}

/// Whether the chain leads to the lock of an interpreter, on which its threads take turns.
pub(in crate::diagnose::rules) fn is_an_interpreters(case: Case<'_>) -> bool {
    case.steps.iter().any(|step| {
        matches!(
            step.resource,
            Resource::Lock {
                interpreter: true,
                ..
            }
        )
    })
}

/// If the chain ends at a database session that is idle in a transaction: its process, and how long it has been idle.
pub(in crate::diagnose::rules) fn idle_transaction(case: Case<'_>) -> Option<(u32, String)> {
    let last = case.last()?;
    let idle_ns = idle_in_transaction_ns(case, last)?;
    Some((last.tgid, duration(idle_ns)))
}
