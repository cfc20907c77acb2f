//! One of the service's own limits is too small for its work: its backlog, its number of workers or of connections.

use super::{
    rule::{Basis, CauseInfo, Finding, Rule, Scope},
    shared::{capacity::Capacity, culprit, far_end, kept_alive::KeptAlive, wait},
};
use crate::{
    cause::Cause,
    diagnose::{case::Case, classify::Resource},
    event::{Activity, DrivenBy, Level, explain::Unit},
    queue::Kind,
    text::{count, duration},
};

const CAUSE: CauseInfo = CauseInfo {
    cause: Cause::UndersizedLimit,
    suggested_by: &[Activity::Asleep, Activity::Inside],
    supported_by: &[Activity::Asleep, Activity::Inside],
};

/// If the workers are idle for at least this share of their time, they do not explain a full backlog. The recorded incidents
/// `small-backlog` and `few-workers` test the value.
const MIN_IDLE: f64 = 0.25;

/// A queue that is empty in at least this share of its samples is filled by bursts: the workers catch up between them.
/// A queue that is never empty is a standing one: a longer backlog would only lengthen the wait. The recorded incident
/// `small-backlog` tests the value.
const MIN_EMPTY: f64 = 0.2;

/// If the queue is empty in at least this share of its samples, the workers keep up. If they accept fewer connections
/// than before, that is because the backlog has refused the others.
const TAKEN_AT_ONCE: f64 = 0.8;

/// Connections are refused although the workers have time and empty the queue again and again: bursts are larger than the backlog.
pub(super) const BACKLOG: Rule = Rule {
    cause: &CAUSE,
    name: "the backlog is too small",
    scope: Scope::Kinds(&[Kind::Accept]),
    basis: Basis::Fact,
    test: |case, checks| {
        let episode = case.episode;
        case.first()?;
        let full = checks.is(
            "the backlog was full",
            episode.level_max == Level::Full,
            true,
        );
        let refused = checks.more_than(
            "or connections refused or dropped",
            episode.losses as f64,
            0.0,
            Unit::Count,
        );
        let spare = checks.at_least(
            "time the workers were idle",
            case.share(Activity::Idle),
            MIN_IDLE,
            Unit::Ratio,
        );
        let accepts = match episode.departures {
            Some(departures) => {
                checks.more_than("connections accepted", departures as f64, 0.0, Unit::Count)
            }
            None => {
                checks.context("connections accepted", None, Unit::Count);
                true
            }
        };
        let empties = checks.at_least(
            "samples in which the queue was empty",
            episode.empty_share,
            MIN_EMPTY,
            Unit::Ratio,
        );
        let slower = matches!(episode.driven_by, DrivenBy::Consumer | DrivenBy::Both);
        let usual_rate = checks.is(
            "connections accepted more slowly than before, and some wait",
            slower && episode.empty_share < TAKEN_AT_ONCE,
            false,
        );
        ((full || refused) && spare && accepts && empties && usual_rate)
            .then(|| small_backlog(case))
    },
};

/// All workers are busy, and nothing visible from outside keeps them busy: there are too few of them.
pub(super) const WORKERS: Rule = Rule {
    cause: &CAUSE,
    name: "too few workers",
    scope: Scope::MainActivity(&[Activity::Asleep, Activity::Inside]),
    basis: Basis::Time,
    test: |case, checks| {
        let first = case.first()?;
        // An event loop serves many requests at once: the number of its threads does not limit them.
        let in_a_loop = checks.is(
            "requests wait in an event loop",
            matches!(first.resource, Resource::Connection(_)),
            false,
        );
        let all = checks.is(
            "listening sockets of other workers are empty",
            case.uneven.is_some(),
            false,
        );
        // A thread that sleeps with no request to serve is not busy: it backs off, or waits for a scheduled time.
        let asleep_at_work = match first.activity {
            Activity::Asleep => checks.is(
                "asleep, and nothing leaves the queue",
                wait::takes_nothing(case),
                false,
            ),
            _ => true,
        };
        (in_a_loop && all && asleep_at_work).then(|| {
            let limit = format!("{} workers", first.threads.len());
            let advice = match Capacity::of(case) {
                Some(capacity) => format!(
                    "{}. Nothing outside the service keeps them busy.",
                    capacity.words()
                ),
                None => "All workers are busy, and nothing outside the service keeps them busy: find what they wait for (gdb -p PID, py-spy dump), or add workers.".to_owned(),
            };
            Finding::blaming(culprit::limit(case, limit), |_| advice)
        })
    },
};

/// Connections that were answered and are kept open occupy all workers, or the limit of connections, while others wait.
pub(super) const KEPT_ALIVE: Rule = Rule {
    cause: &CAUSE,
    name: "idle connections occupy the workers",
    scope: Scope::MainActivity(&[Activity::Idle]),
    basis: Basis::Time,
    test: |case, checks| {
        /// Connections that were never answered have a share of 0. Those that were all answered have a share of 1, or less
        /// on a kernel that does not count data segments: there, a response must have taken longer than one timer tick.
        const MIN_ANSWERED: f64 = 0.1;
        let waited = wait::is_long(case, checks);
        let kept = KeptAlive::of(case);
        let silent = checks.is(
            "it has accepted connections, and works on no request",
            kept.is_some(),
            true,
        );
        let kept = kept?;
        let answered = checks.at_least(
            "connections on which a response was the last data",
            kept.answered as f64 / kept.connections.max(1) as f64,
            MIN_ANSWERED,
            Unit::Ratio,
        );
        let parked = checks.is(
            "threads wait on a futex, not on a connection",
            far_end::is_parked(case) && !kept.has_a_worker_each(),
            false,
        );
        (waited && silent && answered && parked).then(|| kept_alive(case, &kept))
    },
};

fn kept_alive(case: Case<'_>, kept: &KeptAlive) -> Finding {
    let KeptAlive {
        connections,
        workers,
        ..
    } = *kept;
    let silent = duration(kept.silent_ns);
    let (name, fact) = if kept.has_a_worker_each() {
        (
            format!("{workers} workers, all held by idle keep-alive connections"),
            format!(
                "{workers} workers wait for the next request on connections that were answered up to {silent} ago, while new connections wait"
            ),
        )
    } else {
        (
            format!("a limit of connections, used up by {connections} idle keep-alive connections"),
            format!(
                "{connections} connections that were answered up to {silent} ago are kept open and idle, while new connections wait"
            ),
        )
    };
    Finding::blaming(culprit::limit(case, name), |_| {
        "Shorten the keep-alive timeout: after each response it holds a worker for that long. Or allow more workers than there are clients that keep connections, or let an event-driven proxy in front hold the idle connections. The clients do nothing wrong.".to_owned()
    })
    .share(case.share(Activity::Idle))
    .fact(fact)
}

fn small_backlog(case: Case<'_>) -> Finding {
    let episode = case.episode;
    let limit = episode.limit.unwrap_or(0);
    let enough = enough(limit, episode.arrival_rate);
    let culprit = culprit::limit(case, format!("a backlog of {limit}"));
    Finding::blaming(culprit, |_| {
        format!(
            "Raise the backlog from {} to {} or more (the argument of listen(), and net.core.somaxconn): bursts exceed it, although the workers have idle time.",
            count(limit),
            count(enough)
        )
    })
    .fact(match episode.losses {
        0 => format!(
            "the backlog of {} was full although the workers had idle time",
            count(limit)
        ),
        losses => format!(
            "{} connections were refused or dropped at a backlog of {} although the workers had idle time",
            count(losses),
            count(limit)
        ),
    })
}

/// The largest of the arrivals of one second, four times the present backlog, and the kernel's former default.
fn enough(limit: u64, arrivals_per_s: Option<f64>) -> u64 {
    /// The kernel's default of net.core.somaxconn until 5.4.
    const DEFAULT: u64 = 128;
    let grown = limit.saturating_mul(4);
    arrivals_per_s
        .map_or(grown, |arrivals| (arrivals as u64).max(grown))
        .max(DEFAULT)
}
