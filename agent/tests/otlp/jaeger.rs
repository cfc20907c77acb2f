//! A real Jaeger shows an incident from its opening, and the trace is complete at every step.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::Value;
use tailback::{
    emit::{
        otlp::Exporter,
        spans::{Host, Spans},
    },
    event::{DrivenBy, Episode, Event, Instant, Level, Moment, MomentKind, Stretch},
    queue::{Kind, QueueId, QueueKey},
    sample::Target,
};
use tailback_tests::{
    jaeger::{self, Jaeger},
    ports, skip, wait,
};

use crate::{
    collector::DEADLINE,
    spans::{config, notices, wait_settled},
};

pub const SECOND: u64 = 1_000_000_000;
const START: u64 = 1_790_000_000;

pub fn at(seconds: u64) -> Instant {
    Instant {
        mono_ns: seconds * SECOND,
        unix_ns: (START + seconds) * SECOND,
    }
}

/// A remote address after `-> `, a local address, or any other name.
pub fn queue_id(name: &str) -> QueueId {
    match (name.strip_prefix("-> "), name.parse()) {
        (Some(remote), _) => QueueId::Remote(remote.parse().unwrap()),
        (None, Ok(local)) => QueueId::Local(local),
        (None, Err(_)) => QueueId::Pool(name.into()),
    }
}

fn key(kind: Kind, name: &str) -> Arc<QueueKey> {
    Arc::new(QueueKey::new(1, kind, queue_id(name)))
}

pub fn episode(incident: &str, id: &str, kind: Kind, name: &str, losses: u64) -> Episode {
    let happenings = [
        MomentKind::Level(Level::Warn),
        MomentKind::Forecast(2 * SECOND),
        MomentKind::Level(Level::Critical),
        MomentKind::Level(Level::Full),
        MomentKind::Loss(losses),
        MomentKind::Recovered,
    ];
    let happenings = happenings
        .into_iter()
        .filter(|what| losses > 0 || !matches!(what, MomentKind::Loss(_)));
    Episode {
        id: id.to_owned(),
        incident: incident.to_owned(),
        key: key(kind, name),
        onset: at(5),
        start: at(8),
        end: at(20),
        ongoing: false,
        level_max: Level::Full,
        score_max: 1.25,
        depth: 0,
        depth_max: 101,
        empty_share: 0.0,
        limit: Some(100),
        unit: Kind::Accept.unit(),
        wait_p50_ns: Some(40_000_000),
        wait_p99_ns: Some(900_000_000),
        wait_max_ns: Some(SECOND),
        arrivals: Some(700),
        departures: Some(600),
        losses,
        arrival_rate: Some(70.5),
        service_rate: Some(60.25),
        baseline_arrival_rate: None,
        baseline_service_rate: None,
        driven_by: DrivenBy::Consumer,
        time_to_full_ns: Some(4_200_000_000),
        lead_ns: Some(4 * SECOND),
        worst: None,
        depths: Vec::new(),
        evidence: "600 departures to 700 arrivals: the consumer is slow.".to_owned(),
        advice: "Check what the workers wait for.".to_owned(),
        verdict: None,
        moments: happenings
            .zip(8..)
            .map(|(kind, second)| Moment {
                at: at(second),
                kind,
            })
            .collect(),
        moments_dropped: 0,
        measured_waits: Vec::new(),
    }
}

fn stretch(incident: &str, id: &str, level: Level, index: u32, losses: u64) -> Event {
    Event::Stretch(Stretch {
        episode: id.to_owned(),
        incident: incident.to_owned(),
        key: key(Kind::Accept, "0.0.0.0:8080"),
        level,
        from: at(8 + u64::from(index)),
        to: at(9 + u64::from(index)),
        index,
        depth_max: 100,
        limit: Some(100),
        score_max: 1.0,
        wait_max_ns: Some(SECOND),
        losses,
        time_to_full_ns: None,
    })
}

/// Two queues of one service, one of which loses work. Each event has the expected number of spans after it.
fn story(incident: &str) -> Vec<(Event, usize)> {
    let target = Target {
        id: 1,
        name: "shop".to_owned(),
        pid: 4242,
        start_ns: 7,
        exe: "uwsgi-core".to_owned(),
        container: Some("c0ffee".to_owned()),
        attributes: vec![(
            "deployment.environment.name".to_owned(),
            "prod\n\x1b[2J".to_owned(),
        )],
        ..Target::default()
    };
    // Episode ids are unique per incident.
    let (first, second) = (
        format!("{}a", &incident[..15]),
        format!("{}b", &incident[..15]),
    );
    let accept = episode(incident, &first, Kind::Accept, "0.0.0.0:8080", 7);
    let send = episode(incident, &second, Kind::Send, "-> 10.0.0.5:6379", 0);
    let opened = |episode: &Episode| {
        Event::EpisodeOpened(Box::new(Episode {
            ongoing: true,
            ..episode.clone()
        }))
    };
    let id = || incident.to_owned();
    vec![
        (
            Event::Targets {
                at: at(0),
                targets: vec![Arc::new(target)],
            },
            0,
        ),
        (
            Event::IncidentOpened {
                id: id(),
                target: 1,
                onset: at(5),
                at: at(8),
                first: Kind::Accept,
            },
            1,
        ),
        (opened(&accept), 2),
        (stretch(incident, &first, Level::Warn, 0, 0), 3),
        (opened(&send), 4),
        (stretch(incident, &first, Level::Full, 1, 7), 5),
        (stretch(incident, &first, Level::Critical, 2, 0), 6),
        (Event::Episode(Box::new(accept)), 7),
        (Event::Episode(Box::new(send)), 8),
        (
            Event::IncidentClosed {
                id: id(),
                target: 1,
                at: at(20),
            },
            8,
        ),
    ]
}

fn spans() -> Spans {
    Spans::new(Host {
        id: "0123456789abcdef".to_owned(),
        name: "node-1".to_owned(),
        ip: "192.0.2.7".to_owned(),
        ..Host::default()
    })
}

/// Sends the spans of each event and waits until Jaeger shows them. Asserts at every poll that the trace is complete. Returns
/// the last trace.
pub fn send_story(
    exporter: &Exporter,
    jaeger: &Jaeger,
    incident: &str,
    story: Vec<(Event, usize)>,
) -> Value {
    let mut spans = spans();
    let mut shown = Value::Null;
    for (event, count) in story {
        spans
            .take(&event)
            .into_iter()
            .for_each(|batch| exporter.send(batch));
        let whole = || {
            let trace = jaeger.trace(incident)?;
            trace.iter().for_each(assert_whole);
            let there = trace.as_ref().map_or(0, |trace| list(trace, "spans").len());
            Ok((there == count).then(|| trace.unwrap_or_default()))
        };
        shown = wait::until(&format!("{count} spans in Jaeger"), DEADLINE, whole).unwrap();
    }
    shown
}

pub fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Asserts that every parent and every linked span exists, that span ids are unique, and that there is one root.
pub fn assert_whole(trace: &Value) {
    let spans = list(trace, "spans");
    let ids: BTreeSet<_> = spans.iter().map(id).collect();
    assert_eq!(ids.len(), spans.len(), "duplicate span id");
    let mut roots = 0;
    for span in spans {
        let parents = references(span, "CHILD_OF");
        roots += usize::from(parents.is_empty());
        assert!(parents.len() <= 1, "{span}");
        for other in parents.iter().chain(&references(span, "FOLLOWS_FROM")) {
            assert!(ids.contains(other), "{span} refers to a missing span");
        }
        assert!(span["warnings"].is_null(), "{span}");
    }
    assert_eq!(roots, 1);
}

pub fn id(span: &Value) -> String {
    span["spanID"].as_str().unwrap().to_owned()
}

/// Ids of the spans that this one refers to: `CHILD_OF` is the parent, `FOLLOWS_FROM` are links.
pub fn references(span: &Value, kind: &str) -> Vec<String> {
    list(span, "references")
        .iter()
        .filter(|reference| reference["refType"] == kind)
        .map(id)
        .collect()
}

/// Tags of a span or process, as `key=value`.
pub fn tags(of: &Value) -> BTreeSet<String> {
    let text = |tag: &Value| match &tag["value"] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    list(of, "tags")
        .iter()
        .map(|tag| format!("{}={}", tag["key"].as_str().unwrap(), text(tag)))
        .collect()
}

fn set(expected: &[&str]) -> BTreeSet<String> {
    expected.iter().map(|tag| (*tag).to_owned()).collect()
}

/// The only span with this name.
fn named<'a>(trace: &'a Value, name: &str) -> &'a Value {
    let mut found = list(trace, "spans")
        .iter()
        .filter(|span| span["operationName"] == name);
    let span = found
        .next()
        .unwrap_or_else(|| panic!("no {name} in {trace}"));
    assert!(found.next().is_none());
    span
}

fn assert_documented_format(trace: &Value, incident: &str) {
    let episode = format!("tailback.episode.id={}a", &incident[..15]);
    let scope = format!("otel.scope.version={}", env!("CARGO_PKG_VERSION"));
    let common = ["otel.scope.name=tailback", &scope, "span.kind=internal"];

    let root = named(trace, "queue.incident");
    let mut expected = set(&common);
    expected.extend(set(&["tailback.queue.kind=accept"]));
    assert_eq!(tags(root), expected);
    assert_eq!(
        (root["startTime"].as_u64(), root["duration"].as_u64()),
        (Some((START + 5) * 1_000_000), Some(3_000_000))
    );

    let network = [
        "tailback.queue.kind=accept",
        "tailback.queue.name=0.0.0.0:8080",
        "network.transport=tcp",
        "network.local.address=0.0.0.0",
        "network.local.port=8080",
        &episode,
        "tailback.queue.limit=100",
    ];
    let mut expected = set(&common);
    expected.extend(set(&network));
    expected.extend(set(&["tailback.time_to_full_ms=4200"]));
    assert_eq!(tags(named(trace, "queue.onset accept")), expected);

    let saturation = named(trace, "queue.saturation accept");
    let lost = [
        "error=true",
        "otel.status_code=ERROR",
        "error.type=work_lost",
        "tailback.losses=7",
    ];
    expected.extend(set(&lost));
    expected.extend(set(&[
        "otel.status_description=7 connections refused or dropped",
        "tailback.queue.level.max=full",
        "tailback.queue.depth.max=101",
        "tailback.queue.score.max=1.25",
        "tailback.wait.p50_ns=40000000",
        "tailback.wait.p99_ns=900000000",
        "tailback.wait.max_ns=1000000000",
        "tailback.arrivals=700",
        "tailback.departures=600",
        "tailback.arrival_rate=70.5",
        "tailback.service_rate=60.25",
        "tailback.evidence=600 departures to 700 arrivals: the consumer is slow.",
        "tailback.advice=Check what the workers wait for.",
    ]));
    assert_eq!(tags(saturation), expected);
    let times = (
        saturation["startTime"].as_u64(),
        saturation["duration"].as_u64(),
    );
    assert_eq!(times, (Some((START + 8) * 1_000_000), Some(12_000_000)));
    let events: Vec<_> = list(saturation, "logs")
        .iter()
        .map(|log| {
            let field = |key: &str| {
                let found = list(log, "fields").iter().find(|field| field["key"] == key);
                found.map(|field| field["value"].clone())
            };
            let count = field("tailback.losses").or_else(|| field("tailback.time_to_full_ms"));
            (
                field("event").unwrap(),
                count,
                log["timestamp"].as_u64().unwrap() / 1_000_000 - START,
            )
        })
        .collect();
    let expected = [
        ("level.warn", None, 8),
        ("forecast.full", Some(2000), 9),
        ("level.critical", None, 10),
        ("level.full", None, 11),
        ("loss", Some(7), 12),
        ("recovered", None, 13),
    ];
    assert_eq!(
        events,
        expected.map(|(name, count, at)| (name.into(), count.map(Into::into), at))
    );

    let errors = list(trace, "spans")
        .iter()
        .filter(|span| tags(span).contains("error=true"));
    let errors: BTreeSet<_> = errors
        .map(|span| span["operationName"].as_str().unwrap())
        .collect();
    assert_eq!(
        errors,
        BTreeSet::from(["queue.level accept full", "queue.saturation accept"])
    );

    let peer = tags(named(trace, "queue.saturation send"));
    for tag in [
        "network.peer.address=10.0.0.5",
        "network.peer.port=6379",
        "server.address=10.0.0.5",
        "tailback.losses=0",
    ] {
        assert!(peer.contains(tag), "{peer:?}");
    }
    let names: BTreeSet<_> = list(trace, "spans")
        .iter()
        .map(|span| span["operationName"].as_str().unwrap())
        .collect();
    let all = [
        "queue.incident",
        "queue.level accept critical",
        "queue.level accept full",
        "queue.level accept warn",
        "queue.onset accept",
        "queue.onset send",
        "queue.saturation accept",
        "queue.saturation send",
    ];
    assert_eq!(names, BTreeSet::from(all));
}

fn assert_resource_of_the_service(trace: &Value) {
    let processes: Vec<_> = trace["processes"].as_object().unwrap().values().collect();
    let [process] = processes[..] else {
        panic!("{processes:?}")
    };
    assert_eq!(process["serviceName"], "shop");
    let tags = tags(process);
    let instance = tags
        .iter()
        .find(|tag| tag.starts_with("service.instance.id="))
        .unwrap();
    let expected = [
        "container.id=c0ffee",
        "deployment.environment.name=prod\\n\\u{1b}[2J",
        "host.id=0123456789abcdef",
        "host.name=node-1",
        "ip=192.0.2.7",
        "process.executable.name=uwsgi-core",
        "process.pid=4242",
        instance,
    ];
    assert_eq!(tags, set(&expected));
}

/// Starts Jaeger; `None` if it is not installed, and `test` is reported as skipped.
pub fn start(test: &str) -> Option<Jaeger> {
    if jaeger::find().is_none() {
        skip::skip(test, "Jaeger is not installed: cargo xtask setup");
        return None;
    }
    Some(Jaeger::start().unwrap())
}

#[test]
fn jaeger_shows_a_growing_incident_complete_at_every_step_over_http_and_grpc() {
    let test = "jaeger_shows_a_growing_incident_complete_at_every_step_over_http_and_grpc";
    let Some(jaeger) = start(test) else { return };
    let grpc = jaeger.otlp_grpc().replace("http://", "grpc://");
    for (url, incident) in [
        (jaeger.otlp_http(), "0af7651916cd43dd8448eb211c80319c"),
        (grpc, "00f067aa0ba902b7a3ce929d0e0e4736"),
    ] {
        for gzip in [false, true] {
            let incident = if gzip {
                incident.replacen('0', "1", 1)
            } else {
                incident.to_owned()
            };
            let mut config = config(&url);
            config.gzip = gzip;
            let exporter = Exporter::start(&config).unwrap();
            let trace = send_story(&exporter, &jaeger, &incident, story(&incident));
            assert_documented_format(&trace, &incident);
            assert_resource_of_the_service(&trace);
            let stats = wait_settled(&exporter);
            assert_eq!((stats.delivered, stats.requests), (8, 8));
            assert!(notices(&exporter).is_empty());
        }
    }
}

#[test]
fn jaeger_started_late_shows_the_whole_incident() {
    let test = "jaeger_started_late_shows_the_whole_incident";
    if jaeger::find().is_none() {
        return skip::skip(test, "Jaeger is not installed: cargo xtask setup");
    }
    let port = ports::free().unwrap();
    let exporter = Exporter::start(&config(&format!("http://{}", ports::local(port)))).unwrap();
    let incident = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut spans = spans();
    for (event, _) in story(incident) {
        spans
            .take(&event)
            .into_iter()
            .for_each(|batch| exporter.send(batch));
    }
    let tried = || Ok(Some(()).filter(|()| exporter.stats().retries > 0));
    wait::until("a retry", DEADLINE, tried).unwrap();
    let jaeger = Jaeger::start_on(Some(port)).unwrap();
    assert_eq!(wait_settled(&exporter).delivered, 8);
    let trace = jaeger.trace(incident).unwrap().unwrap();
    assert_whole(&trace);
    assert_documented_format(&trace, incident);
}
