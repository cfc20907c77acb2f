//! How long work has waited.

use crate::{
    diagnose::{case::Case, rules::checks::Checks},
    event::explain::Unit,
};

/// Whether nothing left the queue during the episode, and the processes that serve it have no request in service, as far as
/// connections show.
pub(in crate::diagnose::rules) fn takes_nothing(case: Case<'_>) -> bool {
    let members = case.first().map(|first| first.threads.members.iter());
    let mut tgids = members.into_iter().flatten().map(|((tgid, _), _)| *tgid);
    let serves = tgids.any(|tgid| case.view.topology.work_of(tgid).in_service > 0);
    case.episode.departures == Some(0) && !serves
}

/// Whether work has waited longer than an idle thread needs to take it.
pub(in crate::diagnose::rules) fn is_long(case: Case<'_>, checks: &mut Checks) -> bool {
    /// A second: far above the wake-up latency of an idle thread.
    const MIN_WAIT_NS: f64 = 1e9;
    match case.episode.wait_max_ns {
        Some(wait_ns) => checks.more_than(
            "longest wait",
            wait_ns as f64,
            MIN_WAIT_NS,
            Unit::Nanoseconds,
        ),
        None => checks.unknown("longest wait", Unit::Nanoseconds),
    }
}
