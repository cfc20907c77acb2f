//! One JSON object a line, `"type"` first. Units are in the names; what is not known is absent.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::Arc,
};

use serde_json::{Map, Value};

use super::Sink;
use crate::{
    detect::{Episode, Event, QueueState},
    queue::{QueueKey, Reading},
    sample::{AgentReport, Target, TargetId},
};

/// Writes events as JSON lines.
pub struct Json<W: Write> {
    out: W,
    targets: BTreeMap<TargetId, Arc<Target>>,
}

impl<W: Write> Json<W> {
    /// Writes to `out`, a line per event, flushed at once.
    pub fn new(out: W) -> Self {
        Self {
            out,
            targets: BTreeMap::new(),
        }
    }

    fn line(&mut self, object: Map<String, Value>) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, &Value::Object(object))?;
        self.out.write_all(b"\n")?;
        self.out.flush()
    }
}

impl<W: Write> Sink for Json<W> {
    fn emit(&mut self, event: &Event) -> io::Result<()> {
        let object = match event {
            Event::Targets { at, targets } => {
                self.targets
                    .extend(targets.iter().map(|target| (target.id, Arc::clone(target))));
                for target in targets {
                    self.line(target_object(at.unix_ns, target))?;
                }
                return Ok(());
            }
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
            Event::Episode(episode) => self.episode(episode),
            Event::Agent { at, report } => agent_object(at.unix_ns, report),
            // These shape the traces; the lines above tell the same.
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
        self.key(&mut object, &state.key);
        reading(&mut object, &state.key, &state.reading);
        object.put_some("arrivals_per_s", state.arrivals_per_s.map(round));
        object.put_some("departures_per_s", state.departures_per_s.map(round));
        object.put_some("wait_ns", state.reading.wait_ns);
        object.put_some("oldest_ns", state.reading.oldest_ns);
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

    fn key(&self, object: &mut Object, key: &QueueKey) {
        if let Some(target) = self.targets.get(&key.target) {
            object.put("target", target.name.as_str());
            object.put("pid", target.pid);
        }
        object.put("kind", key.kind.name());
        object.put("name", key.name.as_str());
    }

    fn episode(&self, episode: &Episode) -> Map<String, Value> {
        let mut object = Object::new("episode");
        object.put("id", episode.id.as_str());
        object.put("trace_id", episode.incident.as_str());
        if episode.ongoing {
            object.put("ongoing", true);
        }
        self.key(&mut object, &episode.key);
        object.put("sign_unix_ns", episode.sign.unix_ns);
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
            "usual_arrivals_per_s",
            episode.baseline_arrival_rate.map(round),
        );
        object.put_some(
            "usual_departures_per_s",
            episode.baseline_service_rate.map(round),
        );
        object.put("driven_by", episode.driven_by.name());
        object.put_some("time_to_full_ns", episode.time_to_full_ns);
        object.put_some("lead_ns", episode.lead_ns);
        object.put_some("worst", episode.worst.as_deref());
        object.put("depths", episode.depths.clone());
        object.put("evidence", episode.evidence.as_str());
        object.put("advice", episode.advice.as_str());
        object.0
    }
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
struct Object(Map<String, Value>);

impl Object {
    fn new(kind: &str) -> Self {
        let mut map = Map::new();
        map.insert("type".to_owned(), kind.into());
        Self(map)
    }

    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    fn put_some(&mut self, key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(key, value);
        }
    }
}

/// Four digits after the point are more than any of these measures has.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
