//! A real Jaeger shows an incident across several services as one trace. Each service appears under its own name, and the
//! victims link to the root cause.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::Value;
use tailback::{
    cause::Cause,
    emit::otlp::Exporter,
    event::{
        Activity, CauseStretch, Confidence, Culprit, CulpritKind, DrivenBy, Episode, Event, Hop,
        Instant, Verdict,
    },
    queue::{Kind, QueueKey},
    sample::{Target, TargetId},
};
use tailback_tests::wait;

use crate::{
    collector::DEADLINE,
    jaeger::{assert_whole, at, episode, id, list, queue_id, references, send_story, start, tags},
    spans::{config, notices, wait_settled},
};

const INCIDENT: &str = "5b8aa5a2d2c872e8321cf37308d69df2";
const SHOP: TargetId = 1;
const GATEWAY: TargetId = 2;
const POSTGRES: TargetId = 3;

fn targets() -> Event {
    let target = |id, name: &str| {
        Arc::new(Target {
            id,
            name: name.to_owned(),
            pid: 4_000 + id,
            ..Target::default()
        })
    };
    Event::Targets {
        at: at(0),
        targets: vec![
            target(SHOP, "jam-shop"),
            target(GATEWAY, "jam-gateway"),
            target(POSTGRES, "jam-postgres"),
        ],
    }
}

fn hop(target: TargetId, name: &str, state: &str, cause: Cause) -> Hop {
    Hop {
        target: Some(target),
        pid: Some(4_000 + target),
        name: name.to_owned(),
        state: state.to_owned(),
        cause,
    }
}

fn verdict(path: Vec<Hop>) -> Arc<Verdict> {
    Arc::new(Verdict {
        cause: Cause::DownstreamSlow,
        share: Some(0.75),
        confidence: Confidence::High,
        runner_up: None,
        driven_by: DrivenBy::Consumer,
        culprit: Some(Culprit {
            kind: CulpritKind::Process,
            target: Some(POSTGRES),
            pid: Some(4_003),
            name: "postgres (4003)".to_owned(),
            endpoint: Some("127.0.0.1:5432".to_owned()),
            container: None,
        }),
        root: None,
        path,
        shares: vec![(Activity::Downstream, 0.75), (Activity::Idle, 0.25)],
        samples: 400,
        evidence: "3 of 4 workers wait for 127.0.0.1:5432.".to_owned(),
        advice: "End the transaction of postgres (4003).".to_owned(),
        explanation: None,
        messages: Vec::new(),
    })
}

fn of(id: &str, target: TargetId, kind: Kind, name: &str, path: &[Hop]) -> Episode {
    Episode {
        key: Arc::new(QueueKey::new(target, kind, queue_id(name))),
        verdict: (!path.is_empty()).then(|| verdict(path.to_vec())),
        ..episode(INCIDENT, id, kind, name, 0)
    }
}

fn opened(episode: &Episode) -> Event {
    Event::EpisodeOpened(Box::new(Episode {
        ongoing: true,
        verdict: None,
        ..episode.clone()
    }))
}

fn cause(episode: &Episode, index: u32, from: Instant, to: Instant) -> Event {
    Event::Cause(Box::new(CauseStretch {
        episode: episode.id.clone(),
        incident: INCIDENT.to_owned(),
        key: Arc::clone(&episode.key),
        verdict: episode.verdict.clone().unwrap(),
        from,
        to,
        index,
    }))
}

/// The gateway waits for the shop, and the shop for the database, whose own queue opens later. Each event has the expected
/// number of spans after it.
fn story() -> Vec<(Event, usize)> {
    let path = [
        hop(
            GATEWAY,
            "nginx (4002)",
            "waits for :8080",
            Cause::DownstreamSlow,
        ),
        hop(
            SHOP,
            "uwsgi (4001)",
            "waits for :5432",
            Cause::DownstreamSlow,
        ),
        hop(
            POSTGRES,
            "postgres (4003)",
            "idle in transaction",
            Cause::LockContention,
        ),
    ];
    let shop = of(
        "5b8aa5a2d2c872e8",
        SHOP,
        Kind::Accept,
        "127.0.0.1:8080",
        &path[1..],
    );
    let gateway = of(
        "321cf37308d69df2",
        GATEWAY,
        Kind::Accept,
        "0.0.0.0:80",
        &path,
    );
    let database = of("d2c872e8321cf373", POSTGRES, Kind::Lock, "0x7f00", &[]);
    vec![
        (targets(), 0),
        (
            Event::IncidentOpened {
                id: INCIDENT.to_owned(),
                target: SHOP,
                onset: at(5),
                at: at(8),
                first: Kind::Accept,
            },
            1,
        ),
        (opened(&shop), 2),
        (opened(&gateway), 3),
        // The shop has an episode of its own, the database has not: one span for the database, one for the gateway.
        (cause(&gateway, 0, at(9), at(12)), 5),
        (cause(&shop, 0, at(9), at(12)), 7),
        (opened(&database), 8),
        (cause(&shop, 1, at(12), at(15)), 9),
        (Event::Episode(Box::new(database)), 10),
        (Event::Episode(Box::new(shop)), 11),
        (Event::Episode(Box::new(gateway)), 12),
        (
            Event::IncidentClosed {
                id: INCIDENT.to_owned(),
                target: SHOP,
                at: at(20),
            },
            12,
        ),
    ]
}

/// Spans of this service and name, sorted by start time.
fn of_service<'a>(trace: &'a Value, service: &str, name: &str) -> Vec<&'a Value> {
    let named = |span: &&Value| {
        let process = span["processID"].as_str().unwrap();
        span["operationName"] == name && trace["processes"][process]["serviceName"] == service
    };
    let mut spans: Vec<_> = list(trace, "spans").iter().filter(named).collect();
    spans.sort_by_key(|span| span["startTime"].as_u64());
    spans
}

#[test]
fn jaeger_shows_a_jam_of_several_services_as_one_trace_with_links_to_the_root_cause() {
    let test = "jaeger_shows_a_jam_of_several_services_as_one_trace_with_links_to_the_root_cause";
    let Some(jaeger) = start(test) else { return };
    let exporter = Exporter::start(&config(&jaeger.otlp_http())).unwrap();
    let trace = send_story(&exporter, &jaeger, INCIDENT, story());
    assert_eq!(wait_settled(&exporter).delivered, 12);
    assert!(notices(&exporter).is_empty());
    assert_whole(&trace);

    let services = ["jam-gateway", "jam-postgres", "jam-shop"].map(str::to_owned);
    let processes = trace["processes"].as_object().unwrap().values();
    let named: BTreeSet<_> = processes
        .map(|process| process["serviceName"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(named, BTreeSet::from(services.clone()));
    let listed = || {
        let listed = jaeger.services()?;
        Ok(Some(()).filter(|()| services.iter().all(|name| listed.contains(name))))
    };
    wait::until("all services in Jaeger", DEADLINE, listed).unwrap();

    let [root] = of_service(&trace, "jam-shop", "queue.incident")[..] else {
        panic!("{trace}")
    };
    let one = |service: &str, name: &str| {
        let [span] = of_service(&trace, service, name)[..] else {
            panic!("{service} {name}: {trace}")
        };
        span
    };
    let shop = one("jam-shop", "queue.onset accept");
    let gateway = one("jam-gateway", "queue.onset accept");
    let database = one("jam-postgres", "queue.onset lock");
    for onset in [shop, gateway, database] {
        assert_eq!(references(onset, "CHILD_OF"), [id(root)]);
    }

    // While the database has no episode of its own, spans under its name are the root cause.
    let root_causes = of_service(&trace, "jam-postgres", "queue.cause lock_contention");
    let parents: BTreeSet<_> = root_causes
        .iter()
        .flat_map(|span| references(span, "CHILD_OF"))
        .collect();
    assert_eq!(root_causes.len(), 2);
    assert_eq!(parents, BTreeSet::from([id(shop), id(gateway)]));
    let causes = of_service(&trace, "jam-shop", "queue.cause downstream_slow");
    assert_eq!(causes.len(), 2);
    let [early] = &references(causes[0], "FOLLOWS_FROM")[..] else {
        panic!("{:?}", causes[0])
    };
    assert!(root_causes.iter().any(|span| id(span) == *early));
    // Later the links go to its onset, even after its episode is over.
    assert_eq!(references(causes[1], "FOLLOWS_FROM"), [id(database)]);
    for service in ["jam-shop", "jam-gateway"] {
        let whole = one(service, "queue.saturation accept");
        assert_eq!(references(whole, "FOLLOWS_FROM"), [id(database)]);
        let tags = tags(whole);
        for tag in [
            "tailback.cause=downstream_slow",
            "tailback.cause.share=0.75",
            "tailback.cause.culprit=postgres (4003) at 127.0.0.1:5432",
            "tailback.evidence=3 of 4 workers wait for 127.0.0.1:5432.",
            "tailback.advice=End the transaction of postgres (4003).",
        ] {
            assert!(tags.contains(tag), "{tag}: {tags:?}");
        }
    }
}
