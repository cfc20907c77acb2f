//! Pools of connections that are used up.

use super::{Case, Finding};
use crate::{
    diagnose::{Activity, Cause, Culprit, CulpritKind, inputs::Pool, wait_graph::Step},
    sample::TargetId,
};

pub(super) fn exhausted(case: Case<'_>, target: TargetId, pool: Pool) -> Finding {
    let owner = case.view.targets.get(target);
    Finding {
        culprit: Some(Culprit {
            pid: owner.and_then(|owner| owner.tgids.first().copied()),
            ..culprit(case, Some(target), None, &pool)
        }),
        pool: Some(pool),
        ..Finding::of(Cause::PoolExhausted)
    }
}

/// Whoever is at the end of the way neither lacks anything nor computes: the time that it takes is what its work takes.
pub(super) fn is_at_ease(last: &Step) -> bool {
    matches!(
        last.activity,
        Activity::Inside | Activity::Asleep | Activity::Idle | Activity::Unknown
    )
}

/// The first service further on whose own pool is used up: those behind it do what they always do.
pub(super) fn on_the_way<'s>(case: Case<'_>, steps: &'s [Step]) -> Option<(&'s Step, Pool)> {
    let own = steps.first().and_then(|step| step.target);
    let calls = |step: &&Step| step.activity == Activity::Downstream && step.target != own;
    steps
        .iter()
        .skip(1)
        .filter(|_| steps.last().is_some_and(is_at_ease))
        .filter(calls)
        .find_map(|step| Some((step, case.facts.used_up(step.target?)?)))
}

pub(super) fn culprit(
    case: Case<'_>,
    target: Option<TargetId>,
    tgid: Option<u32>,
    pool: &Pool,
) -> Culprit {
    let of = tgid.map_or_else(String::new, |tgid| {
        format!(" of {}", case.view.world.process(tgid, case.view.targets))
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
