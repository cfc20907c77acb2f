//! The service waits for an accelerator, such as a GPU: its threads spin in the driver's library or wait for the device.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::lock,
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        classify::{Resource, Thread},
        profile::ThreadProfile,
        words,
    },
    event::{Activity, Confidence, Culprit, CulpritKind, explain::Unit},
    sample::Accelerator,
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::AcceleratorBound,
    suggested_by: &[Activity::Accelerator],
    supported_by: &[Activity::Accelerator],
};

/// A thread of the service is on the accelerator for most of the time. Others of its threads, such as its event loop, wait for
/// it inside the process.
pub(super) const THREADS_WAIT: Rule = Rule {
    cause: &CAUSE,
    name: "a thread waits for an accelerator",
    scope: Scope::MainActivity(&[
        Activity::Accelerator,
        Activity::Inside,
        Activity::OnCpu,
        Activity::RunnableOwn,
    ]),
    basis: Basis::Time,
    test: |case, checks| {
        /// More than half of the time it does nothing else.
        const MIN_ON_ACCELERATOR: f64 = 0.5;
        let Some((thread, through, share)) = busiest(case) else {
            checks.unknown("time of a thread on an accelerator", Unit::Ratio);
            return None;
        };
        let most = checks.more_than(
            "time of a thread on an accelerator",
            share,
            MIN_ON_ACCELERATOR,
            Unit::Ratio,
        );
        // A thread that computes beside it may be what keeps it from being fed.
        let main = case.share(Activity::Accelerator);
        let more = checks.at_least(
            "time on an accelerator (threshold: time on a CPU)",
            main,
            case.share(Activity::OnCpu),
            Unit::Ratio,
        );
        let is_main = case
            .first()
            .is_some_and(|first| first.activity == Activity::Accelerator);
        (most && more).then(|| {
            finding(case, thread, through)
                .share(share)
                .at_most(if is_main {
                    Confidence::High
                } else {
                    Confidence::Medium
                })
        })
    },
};

/// Threads wait for a lock whose holder waits for an accelerator.
pub(super) const LOCK_HOLDER_WAITS: Rule = Rule {
    cause: &CAUSE,
    name: "the lock holder waits for an accelerator",
    scope: Scope::MainActivity(&[Activity::Lock]),
    basis: Basis::Time,
    test: |case, checks| {
        lock::held_while(
            case,
            checks,
            (
                "the lock holder waits for an accelerator",
                Activity::Accelerator,
            ),
            |_| lock::end_of_chain(case),
            advice,
        )
    },
};

/// The thread of the service that is on an accelerator for most of the time, through what, and the share.
fn busiest(case: Case<'_>) -> Option<(Thread, Accelerator, f64)> {
    let tgids = &case.view.targets.get(case.target())?.tgids;
    let through = |profile: &ThreadProfile| {
        let mut seen = profile.by.keys().filter_map(|seen| match seen.resource {
            Resource::Accelerator(through) => Some(through),
            _ => None,
        });
        seen.next()
    };
    tgids
        .iter()
        .flat_map(|tgid| case.view.window.of_process(*tgid))
        .filter_map(|(thread, profile)| {
            let share = profile.share_of(Activity::Accelerator);
            Some((thread, through(profile)?, share))
        })
        .max_by(|a, b| a.2.total_cmp(&b.2))
}

fn finding(case: Case<'_>, thread: Thread, through: Accelerator) -> Finding {
    let culprit = Culprit {
        target: Some(case.target()),
        pid: Some(thread.0),
        ..Culprit::named(
            CulpritKind::Thread,
            format!("{}, in {}", words::thread(case, thread), through.name()),
        )
    };
    Finding::blaming(culprit, advice)
}

fn advice(who: &str) -> String {
    format!(
        "{who} waits for its accelerator, even if it seems to use a CPU: check the device's load, memory and clock (nvidia-smi, rocm-smi, xpu-smi), and what else runs on it. Batch requests, use a smaller model or input, or add a device and an instance. More CPUs, threads or workers on this device do not help."
    )
}
