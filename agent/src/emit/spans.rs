//! Turns what the pipeline says into finished spans: an incident is a trace, and it is whole at every moment.
//!
//! A span is made when it is complete, after its parent, and once. Pure: no clock, no I/O; a replay gives the same
//! spans with the same ids.

#![forbid(unsafe_code)]

mod attributes;
mod id;
mod resource;

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{
        Event as SpanEvent, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
    },
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanEvents, SpanLinks},
};

pub use self::resource::Host;
use self::{
    attributes::Attributes,
    id::{span_id, trace_id},
};
use crate::{
    detect::{Episode, Event, Happening, Instant, Level, Stretch},
    queue::Kind,
    sample::{Target, TargetId},
};

/// Finished spans of one watched service, parents first.
#[derive(Clone, Debug)]
pub struct Batch {
    pub resource: Arc<Resource>,
    pub spans: Vec<SpanData>,
}

/// The stream of events on one side, finished spans on the other.
pub struct Spans {
    host: Host,
    scope: InstrumentationScope,
    targets: HashMap<TargetId, Arc<Resource>>,
    /// By incident id.
    open: HashMap<String, Incident>,
    strays: u64,
}

/// An incident whose root was made.
struct Incident {
    trace: TraceId,
    root: SpanId,
    /// As the target was when the incident opened: it may be gone when the last span is made.
    resource: Arc<Resource>,
    /// Episodes whose onset was made and which have not ended.
    onsets: HashSet<String>,
}

impl Spans {
    pub fn new(host: Host) -> Self {
        let scope = InstrumentationScope::builder("tailback")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Self {
            host,
            scope,
            targets: HashMap::new(),
            open: HashMap::new(),
            strays: 0,
        }
    }

    /// The spans that `event` completes.
    pub fn take(&mut self, event: &Event) -> Option<Batch> {
        match event {
            Event::Targets { targets, .. } => {
                self.targets = targets
                    .iter()
                    .map(|target| (target.id, self.describe(target)))
                    .collect();
                None
            }
            Event::IncidentOpened {
                id,
                target,
                sign,
                at,
                first,
            } => {
                let root = self.incident(id, *target, *sign, *at, *first)?;
                self.batch(id, vec![root])
            }
            Event::EpisodeOpened(episode) => self.onset(episode),
            Event::Stretch(stretch) => self.stretch(stretch),
            Event::Episode(episode) if !episode.ongoing => self.saturation(episode),
            Event::IncidentClosed { id, .. } => {
                self.open.remove(id);
                None
            }
            Event::Episode(_)
            | Event::Cause(_)
            | Event::Notice { .. }
            | Event::Queue(_)
            | Event::Level { .. }
            | Event::Agent { .. } => None,
        }
    }

    /// Spans not made because the parent they belong to never was.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Opens the incident and makes its root, unless that was done.
    fn incident(
        &mut self,
        id: &str,
        target: TargetId,
        sign: Instant,
        at: Instant,
        first: Kind,
    ) -> Option<SpanData> {
        if self.open.contains_key(id) {
            return None;
        }
        let resource = match self.targets.get(&target) {
            Some(resource) => Arc::clone(resource),
            None => self.describe(&Target {
                id: target,
                ..Target::default()
            }),
        };
        let incident = Incident {
            trace: trace_id(id),
            root: span_id(&[id, "incident"]),
            resource,
            onsets: HashSet::new(),
        };
        let span = Draft {
            trace: incident.trace,
            id: incident.root,
            parent: SpanId::INVALID,
            name: "queue.incident".into(),
            from: sign,
            to: at,
        };
        let attributes = Attributes::default().text("tailback.queue.kind", first.name());
        self.open.insert(id.to_owned(), incident);
        Some(span.finish(&self.scope, attributes))
    }

    fn onset(&mut self, episode: &Episode) -> Option<Batch> {
        let Episode {
            incident: id,
            key,
            sign,
            start,
            ..
        } = episode;
        let root = self.incident(id, key.target, *sign, *start, key.kind);
        let incident = self.open.get_mut(id)?;
        if !incident.onsets.insert(episode.id.clone()) {
            return self.stray();
        }
        let span = Draft {
            trace: incident.trace,
            id: span_id(&[&episode.id, "onset"]),
            parent: incident.root,
            name: format!("queue.onset {}", key.kind.name()).into(),
            from: *sign,
            to: *start,
        };
        let onset = span.finish(&self.scope, Attributes::default().onset(episode));
        self.batch(id, root.into_iter().chain([onset]).collect())
    }

    fn stretch(&mut self, stretch: &Stretch) -> Option<Batch> {
        let Stretch {
            incident: id,
            episode,
            key,
            level,
            ..
        } = stretch;
        let Some(incident) = self
            .open
            .get(id)
            .filter(|incident| incident.onsets.contains(episode))
        else {
            return self.stray();
        };
        if *level == Level::Ok {
            return self.stray();
        }
        let span = Draft {
            trace: incident.trace,
            id: span_id(&[episode, "level", &stretch.index.to_string()]),
            parent: span_id(&[episode, "onset"]),
            name: format!("queue.level {} {}", key.kind.name(), level.name()).into(),
            from: stretch.from,
            to: stretch.to,
        };
        let mut span = span.finish(&self.scope, Attributes::default().stretch(stretch));
        span.status = status(key.kind, stretch.losses);
        self.batch(id, vec![span])
    }

    fn saturation(&mut self, episode: &Episode) -> Option<Batch> {
        let Episode {
            incident: id, key, ..
        } = episode;
        let Some(incident) = self
            .open
            .get_mut(id)
            .filter(|incident| incident.onsets.contains(&episode.id))
        else {
            return self.stray();
        };
        incident.onsets.remove(&episode.id);
        let span = Draft {
            trace: incident.trace,
            id: span_id(&[&episode.id, "saturation"]),
            parent: span_id(&[&episode.id, "onset"]),
            name: format!("queue.saturation {}", key.kind.name()).into(),
            from: episode.start,
            to: episode.end,
        };
        let mut span = span.finish(&self.scope, Attributes::default().episode(episode));
        span.events = events(episode);
        span.status = status(key.kind, episode.losses);
        self.batch(id, vec![span])
    }

    fn batch(&self, incident: &str, spans: Vec<SpanData>) -> Option<Batch> {
        let resource = Arc::clone(&self.open.get(incident)?.resource);
        Some(Batch { resource, spans })
    }

    fn describe(&self, target: &Target) -> Arc<Resource> {
        Arc::new(resource::resource(target, &self.host))
    }

    fn stray(&mut self) -> Option<Batch> {
        self.strays += 1;
        None
    }
}

/// What differs between the spans before their attributes.
struct Draft {
    trace: TraceId,
    id: SpanId,
    parent: SpanId,
    name: Cow<'static, str>,
    from: Instant,
    to: Instant,
}

impl Draft {
    fn finish(self, scope: &InstrumentationScope, attributes: Attributes) -> SpanData {
        SpanData {
            span_context: SpanContext::new(
                self.trace,
                self.id,
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: self.parent,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: self.name,
            start_time: wall(self.from),
            end_time: after(self.from, self.to),
            attributes: attributes.into_vec(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: scope.clone(),
        }
    }
}

fn wall(at: Instant) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(at.unix_ns)
}

/// The wall clock at `at` as counted from `start`: within a span time runs evenly, also when the clock is set.
fn after(start: Instant, at: Instant) -> SystemTime {
    wall(start) + Duration::from_nanos(at.mono_ns.saturating_sub(start.mono_ns))
}

/// An error only where work was really lost.
fn status(kind: Kind, losses: u64) -> Status {
    if losses == 0 {
        return Status::Unset;
    }
    Status::Error {
        description: format!("{losses} {}", kind.losses()).into(),
    }
}

fn events(episode: &Episode) -> SpanEvents {
    let mut events = SpanEvents::default();
    events.dropped_count = episode.moments_dropped;
    events.events = episode
        .moments
        .iter()
        .filter_map(|moment| {
            let none = Attributes::default();
            let (name, attributes) = match moment.what {
                Happening::Level(Level::Warn) => ("level.warn", none),
                Happening::Level(Level::Critical) => ("level.critical", none),
                Happening::Level(Level::Full) => ("level.full", none),
                // Coming back to ok is `recovered`.
                Happening::Level(Level::Ok) => return None,
                Happening::Loss(count) => ("loss", none.count("tailback.losses", count)),
                Happening::Forecast(ns) => ("forecast.full", none.time_to_full(Some(ns))),
                Happening::Cause(cause) => (
                    "cause.changed",
                    none.text("tailback.cause", cause.name()),
                ),
                Happening::Recovered => ("recovered", none),
            };
            let attributes: Vec<KeyValue> = attributes.into_vec();
            Some(SpanEvent::new(
                name,
                after(episode.start, moment.at),
                attributes,
                0,
            ))
        })
        .collect();
    events
}

#[cfg(test)]
mod tests;
