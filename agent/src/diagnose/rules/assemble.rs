//! Makes the verdict: the finding, its confidence, the alternative cause, and the path to the root cause.

use super::{
    rule::{CauseInfo, Finding},
    shared::{far_end, hidden, pool},
    table::suggested_by,
};
use crate::{
    cause::Cause,
    diagnose::{
        case::Case,
        wait_graph::{ChainEnd, Step},
        words,
    },
    event::{Activity, Confidence, Hop, Verdict},
    queue::Kind,
    text::duration,
};

/// Smallest shares of the threads' time for high and for medium confidence.
const HIGH_SHARE: f64 = 0.6;
const MEDIUM_SHARE: f64 = 0.35;
/// Samples below which the confidence is medium at most: with 40, the standard error of a share is at most 8 points.
const MIN_SAMPLES_FOR_HIGH: u64 = 40;
/// An alternative explanation with a smaller share is not worth showing.
const MIN_RUNNER_UP: f64 = 0.05;

/// The verdict on a case; without a finding, `unknown`.
pub(super) fn verdict(case: Case<'_>, found: Option<(&CauseInfo, &Finding)>) -> Verdict {
    let cause = found.map_or(Cause::Unknown, |(info, _)| info.cause);
    let finding = found.map(|(_, finding)| finding);
    let shares = case.first().map(|first| first.shares.clone());
    let shares = shares.unwrap_or_default();
    let path = path(case, cause);
    let root = path
        .last()
        .filter(|_| path.len() > 1)
        .map(|hop| hop.cause)
        .filter(|root| *root != Cause::Unknown);
    Verdict {
        cause,
        share: finding.and_then(|finding| finding.share),
        confidence: finding.map_or(Confidence::Low, |finding| {
            confidence(finding, case.samples())
                .min(hidden::max_confidence(case, cause))
                .min(case.known_consumers().0)
        }),
        runner_up: runner_up(&shares, cause, finding),
        driven_by: case.episode.driven_by,
        evidence: evidence(case, cause, finding),
        advice: finding.map_or_else(
            || case.episode.key.kind.advice().to_owned(),
            |finding| finding.advice.clone(),
        ),
        culprit: finding.and_then(|finding| finding.culprit.clone()),
        root,
        path,
        shares,
        samples: case.samples(),
        messages: Vec::new(),
        explanation: None,
    }
}

fn confidence(finding: &Finding, samples: u64) -> Confidence {
    let by_time = match finding.share {
        Some(share) if share >= HIGH_SHARE => Confidence::High,
        Some(share) if share >= MEDIUM_SHARE => Confidence::Medium,
        Some(_) => Confidence::Low,
        // Decided by something other than time: a limit that is reached, a receive window that is closed.
        None => Confidence::High,
    };
    let by_samples = match finding.share {
        Some(_) if samples < MIN_SAMPLES_FOR_HIGH => Confidence::Medium,
        _ => Confidence::High,
    };
    by_time.min(by_samples).min(finding.max_confidence)
}

/// The cause with the largest share among the others that the time suggests.
fn runner_up(
    shares: &[(Activity, f64)],
    cause: Cause,
    finding: Option<&Finding>,
) -> Option<(Cause, f64)> {
    let mut sums: Vec<(Cause, f64)> = Vec::new();
    for (activity, share) in shares {
        let other = suggested_by(*activity);
        match sums.iter_mut().find(|(known, _)| *known == other) {
            Some((_, sum)) => *sum += share,
            None => sums.push((other, *share)),
        }
    }
    let included = |other: &Cause| finding.is_some_and(|finding| finding.includes.contains(other));
    sums.into_iter()
        .filter(|(other, share)| {
            *other != cause
                && *other != Cause::Unknown
                && *share >= MIN_RUNNER_UP
                && !included(other)
        })
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

/// One sentence: the fact that decided, how uneven the listening sockets are, then what each step of the wait chain does. Waits
/// that hooks measured follow the estimate from samples.
fn evidence(case: Case<'_>, cause: Cause, finding: Option<&Finding>) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.extend(finding.and_then(|finding| finding.fact.clone()));
    parts.extend(case.uneven.map(words::uneven));
    if let Some(first) = case.first() {
        let (from_ns, to_ns) = case.time();
        let threads = first.threads.len();
        let plural = if threads == 1 { "thread" } else { "threads" };
        let time = match to_ns.saturating_sub(from_ns) {
            // It has just begun.
            0 => String::new(),
            time_ns => format!(" in {}", duration(time_ns)),
        };
        parts.push(format!(
            "{threads} {plural} of {} spent {}{time}",
            case.view.topology.name(first.tgid, case.view.targets),
            words::busy_with(case, first),
        ));
    }
    let measured = &case.inputs.exact_waits;
    parts.extend(measured.words(case.target(), cause, case.time()));
    for step in case.steps.iter().skip(1) {
        parts.push(format!(
            "{}: {}",
            words::processes(case, step),
            words::busy_with(case, step)
        ));
    }
    match case.last().and_then(|last| last.end.as_ref()) {
        Some(ChainEnd::Remote(name)) => {
            parts.push(format!("{name} is not on this machine, or not visible"));
        }
        Some(ChainEnd::Unsampled(tgid)) => parts.push(format!(
            "the threads of {} are not sampled",
            case.view.topology.process(*tgid, case.view.targets)
        )),
        Some(ChainEnd::Cycle) => parts.push("they wait for each other".to_owned()),
        _ => {}
    }
    parts.extend(case.known_consumers().1);
    parts.extend(hidden::words(case, cause));
    parts.join("; ")
}

/// The hops from the queue's process to the root cause.
fn path(case: Case<'_>, cause: Cause) -> Vec<Hop> {
    if case.episode.key.kind == Kind::Send
        && let Some(link) = far_end::fullest_link(case)
    {
        let mut hops = vec![Hop {
            target: Some(case.target()),
            pid: Some(link.tgid),
            name: case.view.topology.process(link.tgid, case.view.targets),
            state: format!("has unsent bytes for {}", link.remote),
            cause,
        }];
        let beyond = far_end::beyond(case, link);
        hops.extend(beyond.iter().map(|step| hop(case, step, None)));
        return hops;
    }
    let mut hops: Vec<Hop> = Vec::new();
    let pool = pool::exhausted_along_the_chain(case).map(|(step, _)| step.tgid);
    for (index, step) in case.steps.iter().enumerate() {
        if index == 0 {
            hops.push(hop(case, step, Some(cause)));
        } else if pool == Some(step.tgid) {
            hops.push(hop(case, step, Some(Cause::PoolExhausted)));
            return hops;
        } else {
            hops.push(hop(case, step, None));
        }
    }
    match case.last().and_then(|last| last.end.as_ref()) {
        Some(ChainEnd::Remote(name)) => hops.push(Hop {
            target: None,
            pid: None,
            name: name.clone(),
            state: "not on this machine, or not visible".to_owned(),
            cause: Cause::Unknown,
        }),
        Some(ChainEnd::Unsampled(tgid)) => hops.push(Hop {
            target: case.view.targets.of(*tgid),
            pid: Some(*tgid),
            name: case.view.topology.process(*tgid, case.view.targets),
            state: "its threads are not sampled".to_owned(),
            cause: Cause::Unknown,
        }),
        _ => {}
    }
    hops
}

fn hop(case: Case<'_>, step: &Step, cause: Option<Cause>) -> Hop {
    Hop {
        target: step.target,
        pid: Some(step.tgid),
        name: words::processes(case, step),
        state: words::busy_with(case, step),
        cause: cause.unwrap_or_else(|| match step.activity {
            // It is unknown whether another service always takes this long.
            Activity::Asleep | Activity::Inside => Cause::Unknown,
            activity => suggested_by(activity),
        }),
    }
}
