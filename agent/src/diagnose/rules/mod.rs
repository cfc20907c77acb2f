//! From what the time went into to one cause. Every rule speaks of kernel facts; which queue it is about decides where to
//! begin to look.
//!
//! `time` decides by what the workers' wall time went into, `far_end` by what stands at the other end of a connection or a
//! pipe, `pool` knows when connections to another service are used up; `weigh` says how much the time speaks for a cause,
//! `path` and `culprit` who stands where.

mod culprit;
mod far_end;
mod path;
mod pool;
mod time;
mod weigh;

pub(super) use path::idle_in_transaction;

use super::{
    Activity, Cause, Culprit, Verdict,
    classify::Object,
    inputs::{Facts, Pool},
    wait_graph::{Crowd, End, Step, View, from_crowd, from_target},
    words,
};
use crate::{
    event::{Episode, Level},
    queue::{Kind, QueueId, Reading},
};
pub(super) use time::is_surge;
use weigh::share;

/// A cause that less of the time speaks for is not named.
const CARRIES: f64 = 0.2;
/// Looks at each thread on average, without which nothing is said of its time.
const ENOUGH: u64 = 4;
/// Workers that have so much time left are not what fills a queue.
const SPARE: f64 = 0.25;

/// All that a verdict is made from.
#[derive(Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) view: View<'a>,
    pub(super) facts: &'a Facts,
    pub(super) episode: &'a Episode,
    /// More work came to this service than usual, as this queue or another one of it tells.
    pub(super) surges: bool,
}

impl Case<'_> {
    /// From when to when it is judged.
    pub(super) fn time(&self) -> (u64, u64) {
        (self.view.window.from_ns, self.view.window.to_ns)
    }
}

/// A cause before it is put in words.
pub(super) struct Finding {
    pub(super) cause: Cause,
    pub(super) share: Option<f64>,
    /// The share of the time that speaks for it is what it is told by.
    pub(super) by_time: bool,
    pub(super) culprit: Option<Culprit>,
    pub(super) pool: Option<Pool>,
    pub(super) limit: Option<Limit>,
    /// A cycle of waiting.
    pub(super) cycle: bool,
}

/// Which parameter is too small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Workers,
    Backlog,
}

impl Finding {
    fn of(cause: Cause) -> Self {
        Self {
            cause,
            share: None,
            by_time: false,
            culprit: None,
            pool: None,
            limit: None,
            cycle: false,
        }
    }
}

/// Why this episode happens.
pub(super) fn judge(case: Case<'_>) -> Verdict {
    let steps = trail(case);
    let mut finding = find(case, &steps);
    let shares = steps
        .first()
        .map(|step| step.shares.clone())
        .unwrap_or_default();
    let looks = steps
        .first()
        .map_or(0, |step| step.crowd.looks(case.view.window));
    if finding.by_time && looks < ENOUGH * steps.first().map_or(0, |step| step.crowd.len() as u64) {
        finding = Finding::of(Cause::Unknown);
    }
    if finding.by_time {
        let share = weigh::speaks_for(&shares, finding.cause);
        finding.share = finding.share.or(share);
        if finding.share.is_none_or(|share| share < CARRIES) {
            finding = Finding::of(Cause::Unknown);
        }
    }
    let runner_up = weigh::runner_up(&shares, &finding);
    let path = path::path(case, &steps, finding.cause);
    let root = path
        .last()
        .filter(|_| path.len() > 1)
        .map(|hop| hop.cause)
        .filter(|root| *root != Cause::Unknown);
    Verdict {
        cause: finding.cause,
        share: finding.share,
        confidence: weigh::confidence(&finding, looks),
        runner_up,
        driven_by: case.episode.driven_by,
        evidence: words::evidence(case, &finding, &steps),
        advice: words::advice(case, &finding, &steps),
        culprit: finding.culprit,
        root,
        path,
        shares,
        samples: looks,
        messages: Vec::new(),
    }
}

/// Whose threads to look at first: that depends on which queue fills.
fn trail(case: Case<'_>) -> Vec<Step> {
    let view = case.view;
    let key = &case.episode.key;
    let of = |threads: Crowd| from_crowd(view, threads);
    match key.id {
        QueueId::Thread { tid, .. } => {
            let threads = view.window.threads();
            let here = threads.filter(|((_, other), _)| *other == tid);
            of(Crowd::of(here.map(|(thread, _)| thread)))
        }
        QueueId::Lock { address, tgid } => {
            let lock = (tgid, address);
            let waits = |object: &Object| matches!(object, Object::Lock { tgid, address, .. } if (*tgid, *address) == lock);
            let threads = view.window.of_process(tgid);
            let waiting = threads
                .filter(|(_, time)| time.by.keys().any(|doing| waits(&doing.object)))
                .map(|(thread, _)| thread);
            of(Crowd::of(waiting))
        }
        _ => from_target(view, key.target),
    }
}

fn find(case: Case<'_>, steps: &[Step]) -> Finding {
    let episode = case.episode;
    match episode.key.kind {
        Kind::Fd => return fd_exhausted(case),
        Kind::Memory => return Finding::of(Cause::MemoryStalled),
        Kind::Disk => return time::disk(case, steps),
        Kind::Send => return far_end::sending(case),
        Kind::Pipe => {
            if let Some(finding) = far_end::pipe(case) {
                return finding;
            }
        }
        Kind::Runqueue => {
            return Finding {
                by_time: true,
                ..time::on_cpu(case, steps)
            };
        }
        _ => {}
    }
    if let Some(finding) = hard_facts(case, steps) {
        return finding;
    }
    let Some(first) = steps.first() else {
        return Finding::of(Cause::Unknown);
    };
    if let Some(finding) = backlog(case, first) {
        return finding;
    }
    Finding {
        by_time: true,
        ..time::decide(case, steps, first)
    }
}

/// What is so, however the threads spend their time.
fn hard_facts(case: Case<'_>, steps: &[Step]) -> Option<Finding> {
    let target = case.episode.key.target;
    let is_full = |(_, reading): (_, &Reading)| {
        reading
            .limit
            .is_some_and(|limit| reading.depth + 1 >= limit)
    };
    if matches!(case.episode.key.kind, Kind::Accept | Kind::Syn | Kind::Unix)
        && case.facts.of(target, Kind::Fd).any(is_full)
    {
        return Some(fd_exhausted(case));
    }
    let first = steps.first()?;
    let stopped = share(first, Activity::Stopped);
    if stopped > 0.5 {
        return Some(Finding {
            share: Some(stopped),
            culprit: Some(culprit::process(case, first.tgid)),
            ..Finding::of(Cause::ConsumerStalled)
        });
    }
    if steps
        .last()
        .is_some_and(|last| last.end == Some(End::Cycle))
    {
        return Some(Finding {
            share: Some(first.share),
            culprit: steps.last().map(|last| culprit::at_the_end(case, last)),
            cycle: true,
            ..Finding::of(Cause::ConsumerStalled)
        });
    }
    None
}

/// Connections are refused although the workers have time: bursts are larger than the backlog.
fn backlog(case: Case<'_>, first: &Step) -> Option<Finding> {
    let episode = case.episode;
    let refuses = episode.losses > 0 || episode.level_max == Level::Full;
    let spare = share(first, Activity::Idle) >= SPARE;
    let goes_on = episode.departures.is_none_or(|departures| departures > 0);
    (episode.key.kind == Kind::Accept && refuses && spare && goes_on).then(|| Finding {
        limit: Some(Limit::Backlog),
        culprit: Some(culprit::limit(
            case,
            format!("a backlog of {}", episode.limit.unwrap_or(0)),
        )),
        ..Finding::of(Cause::UndersizedLimit)
    })
}

fn fd_exhausted(case: Case<'_>) -> Finding {
    let target = case.episode.key.target;
    let fullest = case
        .facts
        .open_files(target)
        .and_then(|reading| reading.limit);
    let allowed = fullest.or(case.episode.limit).unwrap_or(0);
    Finding {
        culprit: Some(culprit::limit(case, format!("RLIMIT_NOFILE of {allowed}"))),
        ..Finding::of(Cause::FdExhausted)
    }
}
