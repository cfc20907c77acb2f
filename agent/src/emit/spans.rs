//! Turns the pipeline's events into finished spans. An incident is one trace.
//!
//! A span is created once, when it has ended, and after its parent, so no span of a trace ever lacks its parent. Each has
//! the resource of its own service, so one trace shows every service of an incident. Pure: no clock, no I/O; a replay
//! creates the same spans with the same ids.

#![forbid(unsafe_code)]

mod attributes;
mod causes;
mod id;
mod resource;

use std::{
    borrow::Cow,
    collections::HashMap,
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
    event::{Episode, Event, Instant, Level, MomentKind, Stretch},
    queue::Kind,
    sample::{Target, TargetId},
};

/// Maximum number of services remembered per incident that are on a wait chain but have no episode of their own.
const MAX_CHAIN_SERVICES: usize = 256;

/// Finished spans of one watched service, parents first.
#[derive(Clone, Debug)]
pub struct Batch {
    pub resource: Arc<Resource>,
    pub spans: Vec<SpanData>,
}

/// Converts a stream of events to finished spans.
pub struct Spans {
    host: Host,
    scope: InstrumentationScope,
    targets: HashMap<TargetId, Arc<Resource>>,
    /// By incident id.
    open: HashMap<String, Incident>,
    orphans: u64,
}

/// An incident whose root span was created.
struct Incident {
    trace: TraceId,
    root: SpanId,
    /// By id of the episode.
    onsets: HashMap<String, Onset>,
    /// Services on a wait chain that have no episode: the last span of each.
    chain_spans: HashMap<TargetId, SpanId>,
    /// The number of onsets created.
    created: u32,
}

/// An episode whose onset span was created. It may be kept until its incident closes: later spans may link to it.
struct Onset {
    target: TargetId,
    /// The target's resource when the episode opened: the target may have exited when the last span is created.
    resource: Arc<Resource>,
    /// The index among the incident's onsets.
    index: u32,
    has_ended: bool,
}

impl Incident {
    fn open(&self, episode: &str) -> Option<&Onset> {
        self.onsets.get(episode).filter(|onset| !onset.has_ended)
    }

    /// Keeps one ended episode per service, so that a long incident does not grow without bound.
    fn end(&mut self, episode: &str) {
        let Some(onset) = self.onsets.get_mut(episode) else {
            return;
        };
        onset.has_ended = true;
        let target = onset.target;
        let others = self.onsets.iter().filter(|(id, _)| *id != episode);
        let mut ended = others.filter(|(_, it)| it.target == target && it.has_ended);
        if ended.next().is_some() {
            self.onsets.remove(episode);
        }
    }

    fn add_chain_span(&mut self, target: TargetId, span: SpanId) {
        if self.chain_spans.len() < MAX_CHAIN_SERVICES || self.chain_spans.contains_key(&target) {
            self.chain_spans.insert(target, span);
        }
    }
}

impl Spans {
    /// A converter whose spans name this host.
    pub fn new(host: Host) -> Self {
        let scope = InstrumentationScope::builder("tailback")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Self {
            host,
            scope,
            targets: HashMap::new(),
            open: HashMap::new(),
            orphans: 0,
        }
    }

    /// The spans that `event` completes.
    pub fn take(&mut self, event: &Event) -> Vec<Batch> {
        match event {
            Event::Targets { targets, .. } => {
                self.targets = targets
                    .iter()
                    .map(|target| (target.id, self.describe(target)))
                    .collect();
                Vec::new()
            }
            Event::IncidentOpened {
                id,
                target,
                onset,
                at,
                first,
            } => {
                let root = self.incident(id, *target, *onset, *at, *first);
                root.into_iter().collect()
            }
            Event::EpisodeOpened(episode) => self.onset(episode),
            Event::Stretch(stretch) => self.stretch(stretch),
            Event::Cause(stretch) => self.cause(stretch),
            Event::Episode(episode) if !episode.ongoing => self.saturation(episode),
            Event::IncidentClosed { id, .. } => {
                self.open.remove(id);
                Vec::new()
            }
            Event::Episode(_)
            | Event::Notice { .. }
            | Event::Queue(_)
            | Event::Level { .. }
            | Event::Agent { .. } => Vec::new(),
        }
    }

    /// The number of spans not created because their parent never was.
    pub fn orphans(&self) -> u64 {
        self.orphans
    }

    /// Opens the incident and creates its root span, unless that was done already.
    fn incident(
        &mut self,
        id: &str,
        target: TargetId,
        onset: Instant,
        at: Instant,
        first: Kind,
    ) -> Option<Batch> {
        if self.open.contains_key(id) {
            return None;
        }
        let incident = Incident {
            trace: trace_id(id),
            root: span_id(&[id, "incident"]),
            onsets: HashMap::new(),
            chain_spans: HashMap::new(),
            created: 0,
        };
        let span = Draft {
            trace: incident.trace,
            id: incident.root,
            parent: SpanId::INVALID,
            name: "queue.incident".into(),
            from: onset,
            to: at,
        };
        let attributes = Attributes::default().text("tailback.queue.kind", first.name());
        self.open.insert(id.to_owned(), incident);
        let span = span.finish(&self.scope, attributes);
        Some(batch(self.resource_of(target), vec![span]))
    }

    fn onset(&mut self, episode: &Episode) -> Vec<Batch> {
        let Episode {
            incident: id,
            key,
            onset: began,
            start,
            ..
        } = episode;
        let root = self.incident(id, key.target, *began, *start, key.kind);
        let known = self.targets.get(&key.target).cloned();
        let unknown = self.resource_of(key.target);
        let Some(incident) = self
            .open
            .get_mut(id)
            .filter(|incident| !incident.onsets.contains_key(&episode.id))
        else {
            return self.orphan();
        };
        let before = incident.onsets.values().find(|it| it.target == key.target);
        let before = before.map(|onset| Arc::clone(&onset.resource));
        let resource = known.or(before).unwrap_or(unknown);
        let onset = Onset {
            target: key.target,
            resource: Arc::clone(&resource),
            index: incident.created,
            has_ended: false,
        };
        incident.onsets.insert(episode.id.clone(), onset);
        incident.created += 1;
        let span = Draft {
            trace: incident.trace,
            id: onset_id(&episode.id),
            parent: incident.root,
            name: format!("queue.onset {}", key.kind.name()).into(),
            from: *began,
            to: *start,
        };
        let onset = span.finish(&self.scope, Attributes::default().onset(episode));
        let onset = batch(resource, vec![onset]);
        root.into_iter().chain([onset]).collect()
    }

    fn stretch(&mut self, stretch: &Stretch) -> Vec<Batch> {
        let Stretch {
            incident: id,
            episode,
            key,
            level,
            ..
        } = stretch;
        let incident = self.open.get(id).filter(|_| *level != Level::Ok);
        let Some((incident, onset)) =
            incident.and_then(|incident| Some((incident, incident.open(episode)?)))
        else {
            return self.orphan();
        };
        let span = Draft {
            trace: incident.trace,
            id: span_id(&[episode, "level", &stretch.index.to_string()]),
            parent: onset_id(episode),
            name: format!("queue.level {} {}", key.kind.name(), level.name()).into(),
            from: stretch.from,
            to: stretch.to,
        };
        let mut span = span.finish(&self.scope, Attributes::default().stretch(stretch));
        span.status = status(key.kind, stretch.losses);
        vec![batch(Arc::clone(&onset.resource), vec![span])]
    }

    fn saturation(&mut self, episode: &Episode) -> Vec<Batch> {
        let Episode {
            incident: id, key, ..
        } = episode;
        let links = self.links(id, key.target, episode.verdict.as_deref());
        let Some((trace, onset)) = self
            .open
            .get(id)
            .and_then(|incident| Some((incident.trace, incident.open(&episode.id)?)))
        else {
            return self.orphan();
        };
        let resource = Arc::clone(&onset.resource);
        let span = Draft {
            trace,
            id: span_id(&[&episode.id, "saturation"]),
            parent: onset_id(&episode.id),
            name: format!("queue.saturation {}", key.kind.name()).into(),
            from: episode.start,
            to: episode.end,
        };
        let mut span = span.finish(&self.scope, Attributes::default().episode(episode));
        span.events = events(episode);
        span.links = links;
        span.status = status(key.kind, episode.losses);
        if let Some(incident) = self.open.get_mut(id) {
            incident.end(&episode.id);
        }
        vec![batch(resource, vec![span])]
    }

    /// The resource of a target as last reported.
    fn resource_of(&self, target: TargetId) -> Arc<Resource> {
        self.targets.get(&target).map_or_else(
            || {
                self.describe(&Target {
                    id: target,
                    ..Target::default()
                })
            },
            Arc::clone,
        )
    }

    fn describe(&self, target: &Target) -> Arc<Resource> {
        Arc::new(resource::resource(target, &self.host))
    }

    fn orphan(&mut self) -> Vec<Batch> {
        self.orphans += 1;
        Vec::new()
    }
}

fn batch(resource: Arc<Resource>, spans: Vec<SpanData>) -> Batch {
    Batch { resource, spans }
}

/// The id of the onset span, the parent of all other spans of an episode.
fn onset_id(episode: &str) -> SpanId {
    span_id(&[episode, "onset"])
}

/// The fields that differ between spans, except for the attributes.
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

/// The wall-clock time of `at`, counted from `start` with the monotonic clock: a clock adjustment does not distort a span.
fn after(start: Instant, at: Instant) -> SystemTime {
    wall(start) + Duration::from_nanos(at.mono_ns.saturating_sub(start.mono_ns))
}

/// Error status if work was lost.
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
            let (name, attributes) = match moment.kind {
                MomentKind::Level(Level::Warn) => ("level.warn", none),
                MomentKind::Level(Level::Critical) => ("level.critical", none),
                MomentKind::Level(Level::Full) => ("level.full", none),
                // The return to ok is `recovered`.
                MomentKind::Level(Level::Ok) => return None,
                MomentKind::Loss(count) => ("loss", none.count("tailback.losses", count)),
                MomentKind::Forecast(ns) => ("forecast.full", none.time_to_full(Some(ns))),
                MomentKind::Cause(cause) => {
                    ("cause.changed", none.text("tailback.cause", cause.name()))
                }
                MomentKind::Recovered => ("recovered", none),
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
