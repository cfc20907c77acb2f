//! Connection pools that are exhausted, here or further along the wait chain.

use super::culprit;
use crate::{
    diagnose::{
        case::Case,
        inputs::{MAX_SLOWDOWN, Pool},
        wait_graph::Step,
    },
    event::{Activity, Culprit, CulpritKind},
    sample::TargetId,
};

/// The exhausted pool of the service itself. `None` if the pool is only a consequence: a service further along the wait chain
/// lacks something or has an exhausted pool, or the calls count as slow although their baseline is unknown.
pub(in crate::diagnose::rules) fn exhausted_here(case: Case<'_>) -> Option<Pool> {
    used_up_here(case)
        .filter(|pool| slow_without_baseline(case, pool).is_none())
        .filter(|_| exhausted_along_the_chain(case).is_none())
}

/// The service's own pool, if all its connections are in use, no matter why its calls are slow.
pub(in crate::diagnose::rules) fn used_up_here(case: Case<'_>) -> Option<Pool> {
    case.inputs
        .exhausted_pool(case.target())
        .filter(|pool| {
            let served = case.served;
            let remote = || pool.endpoint.parse().ok();
            served.is_none_or(|served| remote().is_some_and(|remote| served.leads_to(remote)))
        })
        .filter(|_| ends_without_a_reason(case) && !waits_in_one_call(case))
}

/// Why the calls over a pool count as slow although their own baseline is unknown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::diagnose::rules) enum Slow {
    /// No call is answered.
    Unanswered,
    /// One call takes longer than a whole response of the service that makes it took before, ns.
    LongerThanTheWhole(f64),
    /// A call takes a second or more. It is unknown whether it always did.
    Long,
}

/// Whether calls whose baseline is unknown are slow. More connections would not help then.
pub(in crate::diagnose::rules) fn slow_without_baseline(
    case: Case<'_>,
    pool: &Pool,
) -> Option<Slow> {
    /// One second: a call that takes this long is more often the fault of the called service than of the pool.
    const LONG_NS: f64 = 1e9;
    if pool.baseline_ns.is_some() {
        return None;
    }
    if pool.is_unanswered {
        return Some(Slow::Unanswered);
    }
    let now_ns = pool.typical_ns()? as f64;
    // The first hop's response time contains that of the calls behind it.
    if let Some(whole_ns) = case.inputs.busiest_baseline_ns(case.target())
        && now_ns > whole_ns * MAX_SLOWDOWN
    {
        return Some(Slow::LongerThanTheWhole(whole_ns));
    }
    (now_ns >= LONG_NS).then_some(Slow::Long)
}

/// Whether each process has only one thread that serves the queue, and that thread waits in a system call for one response:
/// requests wait for the thread, not for a connection.
pub(in crate::diagnose::rules) fn waits_in_one_call(case: Case<'_>) -> bool {
    /// More than half: whatever else the thread does is not why requests wait.
    const MIN_IN_CALL: f64 = 0.5;
    let Some(first) = case.first() else {
        return false;
    };
    let mut members = first.threads.members.iter();
    first.threads.tgids().len() == first.threads.len()
        && members.all(|(thread, _)| case.view.window.in_one_call(*thread) > MIN_IN_CALL)
}

/// Whether the threads at the end of the chain show no reason for being slow.
pub(in crate::diagnose::rules) fn ends_without_a_reason(case: Case<'_>) -> bool {
    case.steps.len() < 2 || case.last().is_some_and(lacks_nothing)
}

/// Whether the threads at the end of the chain neither lack anything nor compute.
pub(in crate::diagnose::rules) fn lacks_nothing(last: &Step) -> bool {
    matches!(
        last.activity,
        Activity::Inside | Activity::Asleep | Activity::Idle | Activity::Unknown
    )
}

/// The first service further along the chain whose own pool is exhausted: those behind it are no slower than before.
pub(in crate::diagnose::rules) fn exhausted_along_the_chain(
    case: Case<'_>,
) -> Option<(&Step, Pool)> {
    let own = case.first().and_then(|step| step.target);
    let calls = |step: &&Step| step.activity == Activity::Downstream && step.target != own;
    case.steps
        .iter()
        .skip(1)
        .filter(|_| case.last().is_some_and(lacks_nothing))
        .filter(calls)
        .filter_map(|step| Some((step, case.inputs.exhausted_pool(step.target?)?)))
        .find(|(_, pool)| slow_without_baseline(case, pool).is_none())
}

/// A pool, of the service itself or of one further along the chain, whose connections are all in use because its calls are
/// slow. These calls have no baseline.
pub(in crate::diagnose::rules) fn used_up_by_slow_calls(case: Case<'_>) -> Option<(Pool, Slow)> {
    let own = used_up_here(case);
    let calls = |step: &&Step| step.activity == Activity::Downstream;
    let further = case
        .steps
        .iter()
        .skip(1)
        .filter(calls)
        .filter_map(|step| case.inputs.exhausted_pool(step.target?));
    // The last of them: its calls lead to the end of the chain.
    own.into_iter()
        .chain(further)
        .filter_map(|pool| slow_without_baseline(case, &pool).map(|slow| (pool, slow)))
        .next_back()
}

/// A pool of the service itself as a culprit.
pub(in crate::diagnose::rules) fn own_culprit(
    case: Case<'_>,
    connections: u64,
    endpoint: String,
) -> Culprit {
    let name = name(connections, &endpoint);
    Culprit {
        endpoint: Some(endpoint),
        ..culprit::limit(case, name)
    }
}

/// The pool of a process of another service as a culprit.
pub(in crate::diagnose::rules) fn culprit_of(
    case: Case<'_>,
    (target, tgid): (Option<TargetId>, u32),
    pool: &Pool,
) -> Culprit {
    let process = case.view.topology.process(tgid, case.view.targets);
    let name = name(pool.connections, &pool.endpoint);
    Culprit {
        target,
        pid: Some(tgid),
        endpoint: Some(pool.endpoint.clone()),
        ..Culprit::named(CulpritKind::Limit, format!("{name} of {process}"))
    }
}

fn name(connections: u64, endpoint: &str) -> String {
    format!("a pool of {connections} connections to {endpoint}")
}
