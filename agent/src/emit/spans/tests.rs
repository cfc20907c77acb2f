use std::collections::HashSet;

use opentelemetry::trace::SpanKind;

use super::*;
use crate::{
    event::{MeasuredKind, MeasuredWaits, Moment},
    queue::QueueKey,
    sample::WaitParty,
};

const INCIDENT: &str = "0af7651916cd43dd8448eb211c80319c";
const SECOND: u64 = 1_000_000_000;

fn at(seconds: u64) -> Instant {
    Instant {
        mono_ns: seconds * SECOND,
        unix_ns: (1_700_000_000 + seconds) * SECOND,
    }
}

fn targets() -> Event {
    let target = |id, name: &str| {
        Arc::new(Target {
            id,
            name: name.into(),
            pid: 10 + id,
            exe: name.into(),
            ..Target::default()
        })
    };
    Event::Targets {
        at: at(0),
        targets: vec![target(1, "shop"), target(2, "cart")],
    }
}

fn incident_opened() -> Event {
    Event::IncidentOpened {
        id: INCIDENT.into(),
        target: 1,
        onset: at(5),
        at: at(8),
        first: Kind::Accept,
    }
}

fn key(kind: Kind, name: &str) -> Arc<QueueKey> {
    Arc::new(QueueKey::new(1, kind, name.into()))
}

fn episode(id: &str, kind: Kind) -> Episode {
    Episode {
        id: id.into(),
        incident: INCIDENT.into(),
        key: key(kind, "0.0.0.0:8080"),
        onset: at(5),
        start: at(8),
        end: at(20),
        ongoing: false,
        level_max: Level::Full,
        score_max: 1.5,
        depth: 0,
        depth_max: 101,
        empty_share: 0.0,
        limit: Some(100),
        unit: kind.unit(),
        wait_p50_ns: Some(5),
        wait_p99_ns: None,
        wait_max_ns: Some(9),
        arrivals: Some(700),
        departures: Some(600),
        losses: 0,
        arrival_rate: Some(70.0),
        service_rate: None,
        baseline_arrival_rate: None,
        baseline_service_rate: None,
        driven_by: crate::event::DrivenBy::Consumer,
        time_to_full_ns: Some(4_200_000_000),
        lead_ns: None,
        worst: None,
        depths: vec![],
        evidence: "It filled.".into(),
        advice: "Drain it.".into(),
        verdict: None,
        moments: vec![],
        moments_dropped: 0,
        measured_waits: Vec::new(),
    }
}

fn opened(id: &str, kind: Kind) -> Event {
    Event::EpisodeOpened(Box::new(Episode {
        ongoing: true,
        ..episode(id, kind)
    }))
}

fn stretch(id: &str, level: Level, index: u32, losses: u64) -> Event {
    Event::Stretch(Stretch {
        episode: id.into(),
        incident: INCIDENT.into(),
        key: key(Kind::Accept, "0.0.0.0:8080"),
        level,
        from: at(8 + u64::from(index)),
        to: at(9 + u64::from(index)),
        index,
        depth_max: 80,
        limit: Some(100),
        score_max: 0.8,
        wait_max_ns: None,
        losses,
        time_to_full_ns: None,
    })
}

fn ended(episode: Episode) -> Event {
    Event::Episode(Box::new(episode))
}

/// All spans of a stream, and the resource's service name of each.
fn spans_of(events: &[Event]) -> Vec<(String, SpanData)> {
    let mut spans = Spans::new(Host::default());
    let batches = events.iter().flat_map(|event| spans.take(event));
    let each = batches.flat_map(|batch| {
        let service = batch
            .resource
            .get(&"service.name".into())
            .unwrap()
            .to_string();
        batch
            .spans
            .into_iter()
            .map(move |span| (service.clone(), span))
    });
    let all = each.collect();
    assert_eq!(spans.orphans(), 0);
    all
}

fn story() -> Vec<Event> {
    vec![
        targets(),
        incident_opened(),
        opened("e1", Kind::Accept),
        stretch("e1", Level::Warn, 0, 0),
        opened("e2", Kind::Recv),
        stretch("e1", Level::Full, 1, 3),
        ended(Episode {
            ongoing: true,
            ..episode("e1", Kind::Accept)
        }),
        stretch("e1", Level::Warn, 2, 0),
        ended(Episode {
            losses: 3,
            ..episode("e1", Kind::Accept)
        }),
        ended(episode("e2", Kind::Recv)),
        Event::IncidentClosed {
            id: INCIDENT.into(),
            target: 1,
            at: at(21),
        },
    ]
}

fn names(spans: &[(String, SpanData)]) -> Vec<&str> {
    spans.iter().map(|(_, span)| span.name.as_ref()).collect()
}

fn attribute(span: &SpanData, key: &str) -> Option<String> {
    span.attributes
        .iter()
        .find(|kv| kv.key.as_str() == key)
        .map(|kv| kv.value.to_string())
}

#[test]
fn a_trace_goes_from_the_incident_to_its_last_episode() {
    let expected = [
        "queue.incident",
        "queue.onset accept",
        "queue.level accept warn",
        "queue.onset recv",
        "queue.level accept full",
        "queue.level accept warn",
        "queue.saturation accept",
        "queue.saturation recv",
    ];
    assert_eq!(names(&spans_of(&story())), expected);
}

#[test]
fn every_span_is_sent_once_and_after_its_parent() {
    let mut seen = HashSet::new();
    for (_, span) in spans_of(&story()) {
        assert_eq!(span.span_context.trace_id().to_string(), INCIDENT);
        let parent = span.parent_span_id;
        assert!(
            parent == SpanId::INVALID || seen.contains(&parent),
            "{} has no parent yet",
            span.name
        );
        assert_eq!(parent == SpanId::INVALID, span.name == "queue.incident");
        assert!(span.span_context.is_valid());
        assert!(
            seen.insert(span.span_context.span_id()),
            "{} is there twice",
            span.name
        );
    }
}

#[test]
fn level_and_saturation_spans_are_children_of_their_queues_onset() {
    let spans = spans_of(&story());
    let id = |i: usize| spans[i].1.span_context.span_id();
    let parents: Vec<_> = spans.iter().map(|(_, span)| span.parent_span_id).collect();
    let none = SpanId::INVALID;
    assert_eq!(
        parents,
        [none, id(0), id(1), id(0), id(1), id(1), id(1), id(3)]
    );
}

#[test]
fn a_replay_creates_the_same_spans() {
    assert_eq!(spans_of(&story()), spans_of(&story()));
}

#[test]
fn spans_cover_the_time_of_what_they_describe() {
    let spans = spans_of(&story());
    let covers = |i: usize, from: u64, to: u64| {
        let span = &spans[i].1;
        assert_eq!(
            (span.start_time, span.end_time),
            (wall(at(from)), wall(at(to))),
            "{}",
            span.name
        );
        assert_eq!(span.span_kind, SpanKind::Internal);
        assert_eq!(span.instrumentation_scope.name(), "tailback");
        assert_eq!(
            span.instrumentation_scope.version(),
            Some(env!("CARGO_PKG_VERSION"))
        );
    };
    covers(0, 5, 8); // first sign to opening
    covers(1, 5, 8); // first sign to warning
    covers(2, 8, 9); // the stretch
    covers(6, 8, 20); // the whole episode
}

#[test]
fn a_clock_set_back_does_not_end_a_span_before_its_start() {
    let end = Instant {
        mono_ns: at(20).mono_ns,
        unix_ns: 1,
    };
    let spans = spans_of(&[
        targets(),
        opened("e1", Kind::Accept),
        ended(Episode {
            end,
            ..episode("e1", Kind::Accept)
        }),
    ]);
    assert_eq!(spans[2].1.end_time, wall(at(20)));
}

#[test]
fn status_is_error_only_if_work_was_lost() {
    let spans = spans_of(&story());
    let errors: Vec<_> = spans
        .iter()
        .filter(|(_, span)| span.status != Status::Unset)
        .collect();
    assert_eq!(errors.len(), 2);
    let lost = Status::Error {
        description: "3 connections refused or dropped".into(),
    };
    for (_, span) in errors {
        assert_eq!(span.status, lost, "{}", span.name);
        assert_eq!(attribute(span, "error.type").as_deref(), Some("work_lost"));
        assert_eq!(attribute(span, "tailback.losses").as_deref(), Some("3"));
    }
    assert_eq!(attribute(&spans[2].1, "error.type"), None);
    assert_eq!(
        attribute(&spans[2].1, "tailback.losses").as_deref(),
        Some("0")
    );
}

#[test]
fn the_saturation_span_has_all_numbers_of_the_episode() {
    let spans = spans_of(&story());
    let pairs = spans[6]
        .1
        .attributes
        .iter()
        .map(|kv| (kv.key.to_string(), kv.value.to_string()));
    let expected = [
        ("tailback.queue.kind", "accept"),
        ("tailback.queue.name", "0.0.0.0:8080"),
        ("network.transport", "tcp"),
        ("network.local.address", "0.0.0.0"),
        ("network.local.port", "8080"),
        ("tailback.episode.id", "e1"),
        ("tailback.queue.level.max", "full"),
        ("tailback.queue.depth.max", "101"),
        ("tailback.queue.limit", "100"),
        ("tailback.queue.score.max", "1.5"),
        ("tailback.wait.p50_ns", "5"),
        ("tailback.wait.max_ns", "9"),
        ("tailback.arrivals", "700"),
        ("tailback.departures", "600"),
        ("tailback.arrival_rate", "70"),
        ("tailback.time_to_full_ms", "4200"),
        ("tailback.losses", "3"),
        ("error.type", "work_lost"),
        ("tailback.evidence", "It filled."),
        ("tailback.advice", "Drain it."),
    ];
    let expected = expected.map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(pairs.collect::<Vec<_>>(), expected);
}

#[test]
fn the_saturation_span_has_the_waits_that_hooks_measured() {
    let waits = |kind, culprit| MeasuredWaits {
        kind,
        count: 40,
        mean_ns: 3,
        p50_ns: 2,
        p99_ns: 8,
        max_ns: 9,
        culprit,
    };
    let culprit = WaitParty {
        tgid: 70,
        tid: 77,
        comm: "backup".to_owned(),
    };
    let spans = spans_of(&[
        targets(),
        opened("e1", Kind::Accept),
        ended(Episode {
            measured_waits: vec![
                waits(MeasuredKind::Cpu, Some((culprit, 7))),
                waits(MeasuredKind::Io, None),
            ],
            ..episode("e1", Kind::Accept)
        }),
    ]);
    let attributes = spans[2].1.attributes.iter();
    let pairs = attributes.map(|kv| (kv.key.to_string(), kv.value.to_string()));
    let pairs: Vec<(String, String)> = pairs.filter(|(key, _)| key.contains("_wait.")).collect();
    let expected = [
        ("tailback.cpu_wait.count", "40"),
        ("tailback.cpu_wait.mean_ns", "3"),
        ("tailback.cpu_wait.p50_ns", "2"),
        ("tailback.cpu_wait.p99_ns", "8"),
        ("tailback.cpu_wait.max_ns", "9"),
        ("tailback.cpu_wait.culprit", "backup (77)"),
        ("tailback.cpu_wait.culprit_ns", "7"),
        ("tailback.io_wait.count", "40"),
        ("tailback.io_wait.mean_ns", "3"),
        ("tailback.io_wait.p50_ns", "2"),
        ("tailback.io_wait.p99_ns", "8"),
        ("tailback.io_wait.max_ns", "9"),
    ];
    assert_eq!(pairs, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
}

#[test]
fn changes_within_an_episode_are_span_events() {
    let happenings = [
        MomentKind::Forecast(2_500_000_000),
        MomentKind::Level(Level::Warn),
        MomentKind::Level(Level::Critical),
        MomentKind::Level(Level::Full),
        MomentKind::Loss(7),
        MomentKind::Level(Level::Ok),
        MomentKind::Recovered,
    ];
    let moments = happenings
        .into_iter()
        .zip(8..)
        .map(|(kind, second)| Moment {
            at: at(second),
            kind,
        });
    let moments = moments.collect();
    let spans = spans_of(&[
        targets(),
        opened("e1", Kind::Accept),
        ended(Episode {
            moments,
            moments_dropped: 4,
            ..episode("e1", Kind::Accept)
        }),
    ]);
    let events = &spans[2].1.events;
    let names: Vec<_> = events.iter().map(|event| event.name.as_ref()).collect();
    let expected = [
        "forecast.full",
        "level.warn",
        "level.critical",
        "level.full",
        "loss",
        "recovered",
    ];
    assert_eq!(names, expected);
    assert_eq!(
        events[0].attributes,
        [KeyValue::new("tailback.time_to_full_ms", 2500)]
    );
    assert_eq!(events[4].attributes, [KeyValue::new("tailback.losses", 7)]);
    assert_eq!(events[1].timestamp, wall(at(9)));
    assert_eq!(events.dropped_count, 4);
}

#[test]
fn spans_keep_the_resource_of_an_exited_target() {
    let mut story = story();
    story.insert(
        4,
        Event::Targets {
            at: at(9),
            targets: vec![],
        },
    );
    assert!(
        spans_of(&story)
            .iter()
            .all(|(service, _)| service == "shop")
    );
}

#[test]
fn an_episode_of_an_unknown_incident_creates_the_root_span() {
    let spans = spans_of(&[targets(), opened("e1", Kind::Accept), incident_opened()]);
    assert_eq!(names(&spans), ["queue.incident", "queue.onset accept"]);
}

#[test]
fn a_span_without_a_parent_is_counted_and_not_created() {
    let mut spans = Spans::new(Host::default());
    for event in [
        targets(),
        stretch("unknown", Level::Warn, 0, 0),
        ended(episode("unknown", Kind::Accept)),
        incident_opened(),
        stretch("unknown", Level::Warn, 0, 0),
    ] {
        let made = spans.take(&event).len();
        assert_eq!(
            made,
            usize::from(matches!(event, Event::IncidentOpened { .. }))
        );
    }
    assert_eq!(spans.orphans(), 3);
}

#[test]
fn an_episode_ends_once() {
    let mut spans = Spans::new(Host::default());
    let events = [targets(), opened("e1", Kind::Accept)];
    let made = events.iter().flat_map(|event| spans.take(event));
    assert_eq!(made.count(), 2);
    assert_eq!(spans.take(&ended(episode("e1", Kind::Accept))).len(), 1);
    assert!(spans.take(&ended(episode("e1", Kind::Accept))).is_empty());
    assert_eq!(spans.orphans(), 1);
}

#[test]
fn a_closed_incident_is_forgotten() {
    let mut spans = Spans::new(Host::default());
    for event in story() {
        spans.take(&event);
    }
    assert!(spans.open.is_empty());
}
