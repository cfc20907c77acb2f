//! From the queue's own process to the head of the jam, hop by hop.

use super::{Case, far_end, pool, weigh::spoken_for};
use crate::{
    diagnose::{
        Activity, Cause, Hop,
        topology::Titled,
        wait_graph::{End, Step, holds_a_transaction},
        words,
    },
    queue::Kind,
};

/// The hops from the queue's process to the head of the jam.
pub(super) fn path(case: Case<'_>, steps: &[Step], cause: Cause) -> Vec<Hop> {
    let kind = case.episode.key.kind;
    let mut hops: Vec<Hop> = Vec::new();
    if kind == Kind::Send
        && let Some(link) = far_end::fullest_link(case)
    {
        hops.push(Hop {
            target: Some(case.episode.key.target),
            pid: Some(link.tgid),
            name: case.view.world.process(link.tgid, case.view.targets),
            what: format!("has bytes for {} that wait", link.remote),
            cause,
        });
        let beyond = far_end::beyond(case, link);
        hops.extend(beyond.iter().map(|step| hop(case, step, None)));
        return hops;
    }
    let pool = pool::on_the_way(case, steps).map(|(step, _)| step.tgid);
    for (index, step) in steps.iter().enumerate() {
        if index == 0 {
            hops.push(hop(case, step, Some(cause)));
        } else if pool == Some(step.tgid) {
            hops.push(hop(case, step, Some(Cause::PoolExhausted)));
            return hops;
        } else {
            hops.push(hop(case, step, None));
        }
    }
    let last = steps.last();
    match last.and_then(|last| last.end.as_ref()) {
        Some(End::Away(name)) => hops.push(Hop {
            target: None,
            pid: None,
            name: name.clone(),
            what: "not on this machine, or not seen".to_owned(),
            cause: Cause::Unknown,
        }),
        Some(End::Unseen(tgid)) => hops.push(Hop {
            target: case.view.targets.of(*tgid),
            pid: Some(*tgid),
            name: case.view.world.process(*tgid, case.view.targets),
            what: "its threads are not looked at".to_owned(),
            cause: Cause::Unknown,
        }),
        _ => {}
    }
    hops
}

pub(super) fn hop(case: Case<'_>, step: &Step, cause: Option<Cause>) -> Hop {
    Hop {
        target: step.target,
        pid: Some(step.tgid),
        name: words::crowd(case, step),
        what: words::busy_with(case, step),
        cause: cause.unwrap_or_else(|| match step.activity {
            // Of another service nobody knows whether that is what it always does.
            Activity::Asleep | Activity::Inside => Cause::Unknown,
            activity => spoken_for(activity),
        }),
    }
}

/// Whether the process at the end holds a transaction in which it does nothing.
pub(in crate::diagnose) fn idle_in_transaction<'a>(
    case: Case<'a>,
    step: &Step,
) -> Option<&'a Titled> {
    let titled = case.view.world.title(step.tgid)?;
    holds_a_transaction(&titled.title).then_some(titled)
}
