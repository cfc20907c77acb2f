//! What the holder of a lock does: that is why others wait for it.

use super::{capacity::needed, culprit};
use crate::{
    diagnose::{
        case::Case,
        classify::Resource,
        inputs::MAX_SLOWDOWN,
        profile::{TURNS, TakingTurns, count_with_share},
        rules::{checks::Checks, rule::Finding},
        wait_graph::{ChainEnd, Step},
        words::idle_in_transaction_ns,
    },
    event::{Activity, Confidence, Culprit, explain::Unit},
    sample::{LockHolder, SharedLock},
    text::{duration, rate},
};

/// The first step of the wait chain that does not wait for a lock: its holder.
pub(in crate::diagnose::rules) fn holder(case: Case<'_>) -> Option<&Step> {
    let mut steps = case.steps.iter();
    steps.find(|step| step.activity != Activity::Lock)
}

/// Threads that call another service in turn, each while it holds a lock.
pub(in crate::diagnose::rules) struct SerialCalls {
    /// The address that they call.
    pub(in crate::diagnose::rules) endpoint: String,
    /// How long a call takes, and took before the queue filled, ns.
    takes_ns: Option<f64>,
    baseline_ns: Option<f64>,
    arrivals_per_s: Option<f64>,
    /// The threads that serve the queue.
    threads: usize,
}

impl SerialCalls {
    /// `None`: the lock is not held over calls, or by few threads only. Such a thread may do something else than the others.
    pub(in crate::diagnose::rules) fn of(case: Case<'_>) -> Option<Self> {
        let holder = holder(case).filter(|holder| holder.activity == Activity::Downstream)?;
        let Resource::Connection(cookie) = holder.resource else {
            return None;
        };
        let endpoint = case.view.topology.link(cookie)?.remote.to_string();
        let holders = case.view.window.holders(holder.threads.while_holding()?)?;
        let calls = holders
            .iter()
            .filter(|(thread, _)| case.view.targets.of(thread.0) == Some(case.target()))
            .map(|(_, profile)| profile.samples_of(Activity::Downstream));
        if count_with_share(calls, TakingTurns::MIN_TURNS) < TakingTurns::MIN_THREADS {
            return None;
        }
        let (takes_ns, baseline_ns) = case.inputs.response_times(case.target(), &endpoint);
        Some(Self {
            endpoint,
            takes_ns: takes_ns.or_else(|| case.inputs.between_responses_ns(case.target())),
            baseline_ns,
            arrivals_per_s: case.inputs.arrivals_per_s(case.target()),
            threads: case.threads(),
        })
    }

    /// Whether the lock is why requests wait: a call takes no longer than before, or these threads would keep up if they made
    /// their calls at the same time.
    pub(in crate::diagnose::rules) fn lock_is_the_reason(&self, checks: &mut Checks) -> bool {
        const CALL: &str = "time per call, made one at a time";
        const NEEDED: &str = "or threads needed if the calls were made concurrently";
        let usual = match (self.takes_ns, self.baseline_ns) {
            (Some(takes), Some(baseline)) => {
                checks.at_most(CALL, takes, baseline * MAX_SLOWDOWN, Unit::Nanoseconds)
            }
            (takes, _) => {
                checks.context(CALL, takes, Unit::Nanoseconds);
                false
            }
        };
        let keep_up = match self.needed() {
            Some(needed) => checks.at_most(NEEDED, needed as f64, self.threads as f64, Unit::Count),
            None => checks.unknown(NEEDED, Unit::Count),
        };
        usual || keep_up
    }

    fn needed(&self) -> Option<u64> {
        Some(needed(self.arrivals_per_s?, self.takes_ns? / 1e9))
    }

    /// `calls to 127.0.0.1:6379 are made one at a time, under the lock; each takes 50 ms (baseline 49 ms), so at most 20/s are
    /// possible; 30/s arrive`.
    pub(in crate::diagnose::rules) fn fact(&self) -> String {
        let takes = self.takes_ns.map_or_else(String::new, |takes_ns| {
            let baseline = self.baseline_ns.map_or_else(
                || "no baseline".to_owned(),
                |ns| format!("baseline {}", duration(ns as u64)),
            );
            let passes = rate(1e9 / takes_ns.max(1.0));
            format!(
                "; each takes {} ({baseline}), so at most {passes}/s are possible",
                duration(takes_ns as u64)
            )
        });
        let arrive = self.arrivals_per_s.map_or_else(String::new, |arrivals| {
            format!("; {}/s arrive", rate(arrivals))
        });
        format!(
            "calls to {} are made one at a time, under the lock{takes}{arrive}",
            self.endpoint
        )
    }
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
