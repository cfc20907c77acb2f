//! Connection pools that are exhausted, here or further along the wait chain.

use crate::{
    diagnose::{case::Case, inputs::Pool, wait_graph::Step},
    event::{Activity, Culprit, CulpritKind},
    sample::TargetId,
};

/// The exhausted pool of the service itself. Where the wait chain leads on to a service that lacks something, that service
/// is the cause, and the pool is a consequence.
pub(in crate::diagnose::rules) fn exhausted_here(case: Case<'_>) -> Option<Pool> {
    let leads_nowhere = case.steps.len() < 2 || case.last().is_some_and(lacks_nothing);
    case.inputs
        .exhausted_pool(case.target())
        .filter(|_| leads_nowhere)
}

/// Whether the threads at the end of the chain neither lack anything nor compute: they take the time that their work takes.
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
        .find_map(|step| Some((step, case.inputs.exhausted_pool(step.target?)?)))
}

/// The pool as a culprit; `tgid` is named where it is another service's.
pub(in crate::diagnose::rules) fn culprit(
    case: Case<'_>,
    target: Option<TargetId>,
    tgid: Option<u32>,
    pool: &Pool,
) -> Culprit {
    let of = tgid.map_or_else(String::new, |tgid| {
        format!(
            " of {}",
            case.view.topology.process(tgid, case.view.targets)
        )
    });
    Culprit {
        target,
        pid: tgid,
        endpoint: Some(pool.endpoint.clone()),
        ..Culprit::named(
            CulpritKind::Limit,
            format!(
                "a pool of {} connections to {}{of}",
                pool.connections, pool.endpoint
            ),
        )
    }
}
