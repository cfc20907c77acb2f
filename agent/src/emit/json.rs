//! Events as JSON lines: one object per line, `"type"` first. Key names include the unit; unknown values are absent.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    sync::Arc,
};

use serde_json::{Map, Value};

use super::{
    Sink,
    cause::Reported,
    churn::{Churn, Omitted},
    explain,
};
use crate::{
    cause::Cause,
    diagnose::NoBaseline,
    event::{
        CauseStretch, Culprit, Episode, Event, Hop, Instant, LoggedMessage, QueueState, Verdict,
    },
    queue::{QueueKey, Reading},
    sample::{AgentReport, ExactWait, ExactWaitKind, Target, TargetId},
};

/// Writes events as JSON lines.
pub struct Json<W: Write> {
    out: W,
    targets: Targets,
    reported: Reported,
    churn: Churn,
    /// The number of targets now.
    watched: usize,
}

/// Maximum number of exited targets that are kept: lines about their last episodes name them.
const MAX_EXITED: usize = 1_000;

/// The targets that lines may name, by id.
type Targets = BTreeMap<TargetId, Arc<Target>>;

impl<W: Write> Json<W> {
    /// Writes to `out`, one line per event, flushed after each.
    pub fn new(out: W) -> Self {
        Self {
            out,
            targets: Targets::new(),
            reported: Reported::default(),
            churn: Churn::default(),
            watched: 0,
        }
    }

    fn line(&mut self, object: Map<String, Value>) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, &Value::Object(object))?;
        self.out.write_all(b"\n")?;
        self.out.flush()
    }
}

impl<W: Write> Json<W> {
    /// Prints each target that is new or has changed.
    fn targets_changed(&mut self, at: Instant, targets: &[Arc<Target>]) -> io::Result<()> {
        let is_first = self.churn.is_first();
        self.churn_summary(at)?;
        for target in targets {
            let before = self.targets.insert(target.id, Arc::clone(target));
            if before.as_ref().is_some_and(|before| before == target) {
                continue;
            }
            if is_first || self.churn.take(1) {
                self.line(target_object(at.unix_ns, target))?;
                continue;
            }
            let is_new = before.is_none();
            self.churn.omit(Omitted {
                started: is_new.into(),
                changed: (!is_new).into(),
                exited: 0,
            });
        }
        self.watched = targets.len();
        let ids: BTreeSet<TargetId> = targets.iter().map(|target| target.id).collect();
        let exited: Vec<TargetId> = self
            .targets
            .keys()
            .filter(|id| !ids.contains(id))
            .copied()
            .collect();
        // Ids grow, so those that exited longest ago come first.
        for id in &exited[..exited.len().saturating_sub(MAX_EXITED)] {
            self.targets.remove(id);
        }
        Ok(())
    }

    /// Once per interval, how many targets started or changed without a line.
    fn churn_summary(&mut self, at: Instant) -> io::Result<()> {
        let Some(omitted) = self.churn.begin(at) else {
            return Ok(());
        };
        let mut object = Object::new("targets");
        object.put("time_unix_ns", at.unix_ns);
        object.put("watched", self.watched);
        object.put("started", omitted.started);
        object.put("changed", omitted.changed);
        self.line(object.0)
    }
}

impl Json<Vec<u8>> {
    /// Takes the lines written since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }
}

impl<W: Write> Sink for Json<W> {
    fn emit(&mut self, event: &Event) -> io::Result<()> {
        let object = match event {
            Event::Targets { at, targets } => return self.targets_changed(*at, targets),
            Event::Notice { at, notice } => {
                let mut object = Object::new("notice");
                object.put("time_unix_ns", at.unix_ns);
                object.put("code", notice.code.as_str());
                object.put("text", notice.text.as_str());
                object.0
            }
            Event::Queue(state) => {
                let mut object = self.queue("queue", state);
                if !state.reading.ages_ns.is_empty() {
                    object.put("ages_ns", state.reading.ages_ns.clone());
                }
                object.0
            }
            Event::Level {
                state,
                from,
                to,
                episode,
            } => {
                let mut object = self.queue("level", state);
                object.put("from", from.name());
                object.put("to", to.name());
                object.put("episode", episode.as_str());
                object.0
            }
            Event::Episode(episode) => {
                if !episode.ongoing {
                    self.reported.forget(&episode.id);
                }
                episode_object("episode", episode, &self.targets)
            }
            Event::Cause(stretch) if self.reported.is_news(&stretch.episode, &stretch.verdict) => {
                cause_object(stretch, &self.targets)
            }
            Event::Agent { at, report } => {
                self.churn_summary(*at)?;
                agent_object(at.unix_ns, report)
            }
            // These only shape traces; other lines report the same facts.
            Event::IncidentOpened { .. }
            | Event::IncidentClosed { .. }
            | Event::EpisodeOpened(_)
            | Event::Cause(_)
            | Event::Stretch(_) => return Ok(()),
        };
        self.line(object)
    }
}

impl<W: Write> Json<W> {
    fn queue(&self, kind: &str, state: &QueueState) -> Object {
        let mut object = Object::new(kind);
        object.put("time_unix_ns", state.at.unix_ns);
        queue_key(&mut object, &state.key, &self.targets);
        reading(&mut object, &state.key, &state.reading);
        object.put_some("arrivals_per_s", state.arrivals_per_s.map(round));
        object.put_some("departures_per_s", state.departures_per_s.map(round));
        object.put_some("wait_ns", state.reading.wait_ns);
        object.put_some("oldest_age_ns", state.reading.oldest_age_ns);
        object.put("losses", state.reading.losses);
        object.put("score", round(state.score));
        object.put("level", state.level.name());
        object.put_some("time_to_full_ns", state.time_to_full_ns);
        object.put_some("worst", state.reading.worst.as_deref());
        for (key, value) in &state.reading.extra {
            if value.fract() == 0.0 {
                object.put(key, *value as u64);
            } else {
                object.put(key, round(*value));
            }
        }
        object
    }
}

/// Writes the result of a diagnosis, one object per episode.
pub fn diagnoses<'a>(
    out: &mut impl Write,
    episodes: impl Iterator<Item = &'a Episode>,
    targets: &BTreeMap<TargetId, Arc<Target>>,
) -> io::Result<()> {
    for episode in episodes {
        let object = episode_object("diagnosis", episode, targets);
        serde_json::to_writer(&mut *out, &Value::Object(object))?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Writes what hooks have measured: each wait with the name of its system call.
pub fn exact_waits<'a>(
    out: &mut impl Write,
    waits: impl Iterator<Item = (&'a ExactWait, String)>,
    targets: &Targets,
) -> io::Result<()> {
    for (wait, call) in waits {
        serde_json::to_writer(&mut *out, &exact_wait_object(wait, &call, targets))?;
        writeln!(out)?;
    }
    out.flush()
}

fn exact_wait_object(wait: &ExactWait, call: &str, targets: &Targets) -> Map<String, Value> {
    let mut object = Object::new("exact_wait");
    let target = targets.get(&wait.target);
    object.put_some("target", target.map(|target| target.name.as_str()));
    object.put("tgid", wait.tgid);
    match wait.kind {
        ExactWaitKind::Woken | ExactWaitKind::Preempted => {
            let is_woken = wait.kind == ExactWaitKind::Woken;
            object.put("kind", "run_queue");
            object.put("after", if is_woken { "wakeup" } else { "preemption" });
        }
        ExactWaitKind::Blocked | ExactWaitKind::BlockedIo => {
            object.put("kind", "blocked");
            object.put("call", call);
            object.put("io", wait.kind == ExactWaitKind::BlockedIo);
            object.put_some("object", wait.object);
            object.put_some("path", wait.path.as_deref());
        }
    }
    let waits = &wait.distribution;
    object.put("count", waits.count);
    object.put("total_ns", waits.total_ns);
    object.put_some("mean_ns", waits.mean_ns());
    object.put_some("p50_ns", waits.quantile_ns(0.5));
    object.put_some("p99_ns", waits.quantile_ns(0.99));
    object.put("max_ns", waits.max_ns);
    if let Some(worst) = &wait.worst {
        object.put("max_tid", worst.tid);
        object.put("max_cpu", worst.cpu);
        if let Some(culprit) = &worst.culprit {
            object.put("culprit", culprit.comm.as_str());
            object.put("culprit_tid", culprit.tid);
            object.put("culprit_ns", worst.culprit_ns);
        }
        if let Some(waker) = &worst.waker {
            object.put("waker", waker.comm.as_str());
            object.put("waker_tid", waker.tid);
        }
    }
    object.0
}

/// Writes the queues that a diagnosis could not judge for lack of a baseline, one object per queue.
pub fn no_baseline(
    out: &mut impl Write,
    queues: &[NoBaseline],
    targets: &BTreeMap<TargetId, Arc<Target>>,
) -> io::Result<()> {
    for queue in queues {
        let mut object = Object::new("no_baseline");
        queue_key(&mut object, &queue.key, targets);
        object.put("depth", queue.waiting.depth);
        object.put("unit", queue.key.kind.unit());
        object.put("median_age_ns", queue.waiting.median_age_ns);
        object.put("oldest_age_ns", queue.waiting.oldest_age_ns);
        if let Some(calls) = &queue.calls {
            let mut of = Object(Map::new());
            of.put("endpoint", calls.endpoint.as_str());
            of.put_some("process", calls.process.as_deref());
            of.put("outstanding", calls.outstanding);
            of.put_some("connections", calls.connections);
            object.put("calls", of.0);
        }
        serde_json::to_writer(&mut *out, &Value::Object(object.0))?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

fn queue_key(object: &mut Object, key: &QueueKey, targets: &Targets) {
    if let Some(target) = targets.get(&key.target) {
        object.put("target", target.name.as_str());
        object.put("pid", target.pid);
    }
    object.put("kind", key.kind.name());
    object.put("name", key.name());
}

fn episode_object(kind: &str, episode: &Episode, targets: &Targets) -> Map<String, Value> {
    let mut object = Object::new(kind);
    object.put("id", episode.id.as_str());
    object.put("trace_id", episode.incident.as_str());
    if episode.ongoing {
        object.put("ongoing", true);
    }
    queue_key(&mut object, &episode.key, targets);
    object.put("onset_unix_ns", episode.onset.unix_ns);
    object.put("start_unix_ns", episode.start.unix_ns);
    object.put("end_unix_ns", episode.end.unix_ns);
    object.put("level_max", episode.level_max.name());
    object.put("score_max", round(episode.score_max));
    object.put("depth_max", episode.depth_max);
    object.put_some("limit", episode.limit);
    object.put("unit", episode.unit);
    object.put_some("wait_p50_ns", episode.wait_p50_ns);
    object.put_some("wait_p99_ns", episode.wait_p99_ns);
    object.put_some("wait_max_ns", episode.wait_max_ns);
    object.put_some("arrivals", episode.arrivals);
    object.put_some("departures", episode.departures);
    object.put("losses", episode.losses);
    object.put_some("arrivals_per_s", episode.arrival_rate.map(round));
    object.put_some("departures_per_s", episode.service_rate.map(round));
    object.put_some(
        "baseline_arrivals_per_s",
        episode.baseline_arrival_rate.map(round),
    );
    object.put_some(
        "baseline_departures_per_s",
        episode.baseline_service_rate.map(round),
    );
    let side = episode.verdict.as_ref();
    let side = side.map_or(episode.driven_by, |verdict| verdict.driven_by);
    object.put("driven_by", side.name());
    object.put_some("time_to_full_ns", episode.time_to_full_ns);
    object.put_some("lead_ns", episode.lead_ns);
    object.put_some("worst", episode.worst.as_deref());
    object.put("depths", episode.depths.clone());
    if let Some(verdict) = &episode.verdict {
        put_verdict(&mut object, verdict, targets);
    } else {
        object.put("evidence", episode.evidence.as_str());
        object.put("advice", episode.advice.as_str());
    }
    object.0
}

/// A cause that has become known or has changed.
fn cause_object(stretch: &CauseStretch, targets: &Targets) -> Map<String, Value> {
    let mut object = Object::new("cause");
    queue_key(&mut object, &stretch.key, targets);
    object.put("episode", stretch.episode.as_str());
    object.put("trace_id", stretch.incident.as_str());
    object.put("from_unix_ns", stretch.from.unix_ns);
    object.put("to_unix_ns", stretch.to.unix_ns);
    let verdict = &stretch.verdict;
    object.put("cause", verdict.cause.name());
    object.put_some("share", verdict.share.map(round));
    object.put_some(
        "culprit",
        verdict.culprit.as_ref().map(|it| culprit(it, targets)),
    );
    object.put("confidence", verdict.confidence.name());
    object.put("evidence", verdict.evidence.as_str());
    object.0
}

fn put_verdict(object: &mut Object, verdict: &Verdict, targets: &Targets) {
    object.put("cause", verdict.cause.name());
    object.put_some("share", verdict.share.map(round));
    object.put_some(
        "culprit",
        verdict.culprit.as_ref().map(|it| culprit(it, targets)),
    );
    object.put_some("root", verdict.root.map(Cause::name));
    if let Some((cause, share)) = verdict.runner_up {
        let mut other = Map::new();
        other.insert("cause".to_owned(), cause.name().into());
        other.insert("share".to_owned(), round(share).into());
        object.put("runner_up", other);
    }
    object.put("confidence", verdict.confidence.name());
    let path: Vec<Value> = verdict.path.iter().map(|it| hop(it, targets)).collect();
    object.put("path", path);
    let shares = verdict.shares.iter();
    let shares = shares.map(|(activity, share)| (activity.name().to_owned(), round(*share).into()));
    object.put("shares", shares.collect::<Map<String, Value>>());
    object.put("samples", verdict.samples);
    if !verdict.messages.is_empty() {
        let messages: Vec<Value> = verdict.messages.iter().map(message).collect();
        object.put("messages", messages);
    }
    object.put("evidence", verdict.evidence.as_str());
    object.put("advice", verdict.advice.as_str());
    if let Some(explanation) = &verdict.explanation {
        object.put("explain", explain::rules(explanation));
    }
}

fn culprit(culprit: &Culprit, targets: &Targets) -> Map<String, Value> {
    let mut object = Object(Map::new());
    object.put("kind", culprit.kind.name());
    object.put_some("target", name_of(culprit.target, targets));
    object.put_some("pid", culprit.pid);
    object.put("name", culprit.name.as_str());
    object.put_some("endpoint", culprit.endpoint.as_deref());
    object.put_some("container", culprit.container.as_deref());
    object.0
}

fn hop(hop: &Hop, targets: &Targets) -> Value {
    let mut object = Object(Map::new());
    object.put_some("target", name_of(hop.target, targets));
    object.put_some("pid", hop.pid);
    object.put("name", hop.name.as_str());
    object.put("state", hop.state.as_str());
    object.put("cause", hop.cause.name());
    Value::Object(object.0)
}

fn message(logged: &LoggedMessage) -> Value {
    let mut object = Object(Map::new());
    object.put("name", logged.name.as_str());
    object.put("path", logged.path.as_str());
    object.put("count", logged.count);
    object.put("line", logged.line.as_str());
    object.put("first_unix_ns", logged.first_unix_ns);
    object.put_some("lead_ns", logged.lead_ns);
    Value::Object(object.0)
}

/// The service's name, if the target is known.
fn name_of(target: Option<TargetId>, targets: &Targets) -> Option<&str> {
    Some(targets.get(&target?)?.name.as_str())
}

fn reading(object: &mut Object, key: &QueueKey, reading: &Reading) {
    object.put("depth", reading.depth);
    object.put_some("limit", reading.limit);
    object.put("unit", reading.unit.unwrap_or(key.kind.unit()));
    object.put_some("fill", reading.fill.map(round));
}

fn target_object(unix_ns: u64, target: &Target) -> Map<String, Value> {
    let mut object = Object::new("target");
    object.put("time_unix_ns", unix_ns);
    object.put("target", target.name.as_str());
    // Watched because a requested target has connections to it.
    object.put_some("neighbour", target.is_neighbour.then_some(true));
    object.put("pid", target.pid);
    object.put("exe", target.exe.as_str());
    object.put("comm", target.comm.as_str());
    object.put_some("container", target.container.as_deref());
    object.put_some("cgroup", target.cgroup.as_deref());
    object.put("processes", target.tgids.len());
    object.0
}

fn agent_object(unix_ns: u64, report: &AgentReport) -> Map<String, Value> {
    let mut object = Object::new("agent");
    object.put("time_unix_ns", unix_ns);
    if let Ok(Value::Object(counters)) = serde_json::to_value(report) {
        object.0.extend(counters);
    }
    object.0
}

/// An object under construction.
pub(crate) struct Object(pub(crate) Map<String, Value>);

impl Object {
    pub(crate) fn new(kind: &str) -> Self {
        let mut map = Map::new();
        map.insert("type".to_owned(), kind.into());
        Self(map)
    }

    pub(crate) fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    pub(crate) fn put_some(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }
}

/// Rounds to four decimals, which exceeds the precision of any of these quantities.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
