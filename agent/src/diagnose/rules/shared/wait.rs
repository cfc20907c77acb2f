//! How long work has waited.

use crate::{
    diagnose::{case::Case, rules::checks::Checks},
    event::explain::Unit,
};

/// Whether nothing left the queue during the episode while, as far as connections show, the processes that serve it have no
/// request in service.
pub(in crate::diagnose::rules) fn takes_nothing(case: Case<'_>) -> bool {
    let serves = case
        .first()
        .is_some_and(|first| case.view.topology.serve_any(&first.threads.tgids()));
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
