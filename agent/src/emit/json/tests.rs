use serde_json::json;

use super::{super::churn::MAX_LINES, *};
use crate::{
    emit::fixture::{self, INCIDENT, SHOP, at, cause, episode, shop, targets},
    event::{
        Activity, Level,
        explain::{Check, Comparison, Condition, Explanation, RuleOutcome, RuleReport, Unit},
    },
    queue::Kind,
    sample::{Distribution, ExactWait, ExactWaitKind, Notice, WaitParty, WorstWait},
};

fn lines(events: &[Event]) -> Vec<Value> {
    let mut out = Vec::new();
    let mut json = Json::new(&mut out);
    for event in events {
        json.emit(event).unwrap();
    }
    drop(json);
    parsed(&out)
}

fn parsed(out: &[u8]) -> Vec<Value> {
    let lines = std::str::from_utf8(out).unwrap().lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn known_targets() -> Targets {
    match targets() {
        Event::Targets { targets, .. } => targets
            .into_iter()
            .map(|target| (target.id, target))
            .collect(),
        _ => Targets::new(),
    }
}

fn diagnosis(episode: &Episode) -> Value {
    let mut out = Vec::new();
    diagnoses(&mut out, [episode].into_iter(), &known_targets()).unwrap();
    parsed(&out).remove(0)
}

#[test]
fn a_diagnosis_has_the_documented_keys() {
    let object = diagnosis(&shop());
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    assert_eq!(keys[0], "type");
    let expected = json!({
        "type": "diagnosis",
        "id": "e1",
        "trace_id": INCIDENT,
        "ongoing": true,
        "target": "shop",
        "pid": 4711,
        "kind": "accept",
        "name": "127.0.0.1:8080",
        "level_max": "full",
        "driven_by": "consumer",
        "cause": "downstream_slow",
        "share": 0.97,
        "culprit": {
            "kind": "process",
            "target": "postgres",
            "pid": 812,
            "name": "postgres (812)",
            "endpoint": "127.0.0.1:5432",
        },
        "root": "lock_contention",
        "runner_up": { "cause": "undersized_limit", "share": 0.21 },
        "confidence": "high",
        "shares": { "downstream": 0.97, "idle": 0.02, "on_cpu": 0.01 },
        "samples": 3120,
        "evidence": shop().verdict.unwrap().evidence,
        "advice": shop().verdict.unwrap().advice,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&object[key], value, "{key}");
    }
    assert_eq!(
        object["path"][2],
        json!({
            "target": "postgres",
            "pid": 812,
            "name": "postgres (812)",
            "state": "idle in a transaction for at least 8.2 s",
            "cause": "lock_contention",
        })
    );
    assert_eq!(object["messages"][0]["lead_ns"], 9_000_000_000_u64);
    assert_eq!(object["messages"][0]["count"], 23);
}

#[test]
fn an_episode_has_the_same_keys_as_its_diagnosis() {
    let written = lines(&[targets(), Event::Episode(Box::new(shop()))]);
    let mut episode = written.last().unwrap().clone();
    assert_eq!(episode["type"], "episode");
    episode["type"] = "diagnosis".into();
    assert_eq!(episode, diagnosis(&shop()));
}

#[test]
fn the_keys_of_events_are_those_of_the_documentation() {
    let state = full_state();
    let written = lines(&[
        full_targets(),
        Event::Queue(state.clone()),
        Event::Level {
            state,
            from: Level::Warn,
            to: Level::Full,
            episode: "e1".to_owned(),
        },
        Event::Cause(Box::new(cause(&full_episode(), 0, at(10), at(20)))),
        Event::Episode(Box::new(full_episode())),
        Event::Notice {
            at: at(21),
            notice: Notice {
                code: "too_many_queues".to_owned(),
                text: "…".to_owned(),
            },
        },
        Event::Agent {
            at: at(22),
            report: AgentReport::default(),
        },
    ]);
    for name in [
        "target", "queue", "level", "cause", "episode", "notice", "agent",
    ] {
        let objects: Vec<Value> = written
            .iter()
            .filter(|line| line["type"] == name)
            .cloned()
            .collect();
        reference::assert_documented(name, &objects);
    }
    reference::assert_documented("diagnosis", &[diagnosis(&full_episode())]);
    let mut out = Vec::new();
    no_baseline(&mut out, &[fixture::no_baseline()], &known_targets()).unwrap();
    reference::assert_documented("no_baseline", &parsed(&out));
}

#[test]
fn targets_that_come_and_go_take_few_lines() {
    let events: Vec<Event> = (0..30).map(|second| fixture::churn(second, 50)).collect();
    let objects = lines(&events);
    let of = |kind: &str| -> Vec<Value> {
        let objects = objects.iter().filter(|object| object["type"] == kind);
        objects.cloned().collect()
    };
    // The first list is printed whole.
    assert_eq!(of("target").len(), 53 + 3 * MAX_LINES);
    let summaries = of("targets");
    reference::assert_documented("targets", &summaries);
    let started: Vec<u64> = summaries
        .iter()
        .filter_map(|summary| summary["started"].as_u64())
        .collect();
    assert_eq!(started, [9 * 50 - 20, 500 - 20]);
    assert_eq!(summaries[0]["watched"], 53);
    // One that has not changed is not printed again.
    let shops = objects.iter().filter(|object| object["target"] == "shop");
    assert_eq!(shops.count(), 1);
}

#[test]
fn few_exited_targets_are_kept() {
    let mut json = Json::new(Vec::new());
    for second in 0..100 {
        json.emit(&fixture::churn(second, 50)).unwrap();
    }
    assert_eq!(json.targets.len(), 53 + MAX_EXITED);
}

/// A service about which everything is known.
fn full_targets() -> Event {
    let Event::Targets { at, mut targets } = targets() else {
        unreachable!("they are an event of this kind");
    };
    let full = Target {
        is_neighbour: true,
        container: Some("c0ffee".to_owned()),
        cgroup: Some("/shop.service".to_owned()),
        ..Target::clone(&targets[0])
    };
    targets[0] = Arc::new(full);
    Event::Targets { at, targets }
}

/// A queue about which everything is known.
fn full_state() -> QueueState {
    QueueState {
        at: at(9),
        key: shop().key,
        reading: Reading {
            depth: 7,
            limit: Some(100),
            fill: Some(0.07),
            wait_ns: Some(1),
            oldest_age_ns: Some(2),
            ages_ns: vec![2, 1],
            worst: Some("fd 12 from 10.0.0.9:41234".to_owned()),
            ..Reading::default()
        },
        score: 0.4,
        level: Level::Ok,
        arrivals_per_s: Some(3.0),
        departures_per_s: Some(2.0),
        time_to_full_ns: Some(4),
    }
}

/// An episode and a verdict about which everything is known.
fn full_episode() -> Episode {
    let mut verdict = Verdict {
        explanation: Some(Arc::new(explanation())),
        ..fixture::verdict()
    };
    if let Some(culprit) = &mut verdict.culprit {
        culprit.container = Some("c0ffee".to_owned());
    }
    Episode {
        wait_p99_ns: Some(1_200_000_000),
        worst: Some("fd 12 from 10.0.0.9:41234".to_owned()),
        verdict: Some(Arc::new(verdict)),
        ..shop()
    }
}

fn explanation() -> Explanation {
    Explanation {
        queue: shop().key,
        window_ns: 20_000_000_000,
        threads: 4,
        samples: 3_120,
        main_activity: Some(Activity::Downstream),
        rules: vec![RuleReport {
            cause: Cause::DownstreamSlow,
            rule: "threads wait for responses",
            applies_to: "main activity downstream".to_owned(),
            outcome: RuleOutcome::Chosen,
            checks: vec![Check {
                name: "samples of the threads",
                value: Some(3_120.0),
                unit: Unit::Count,
                condition: Some(Condition {
                    comparison: Comparison::AtLeast,
                    threshold: 32.0,
                    holds: true,
                }),
            }],
        }],
    }
}

#[test]
fn unknown_values_are_absent() {
    let young = diagnosis(&episode("e1", SHOP, Kind::Accept, "q"));
    for key in [
        "cause", "share", "culprit", "root", "path", "shares", "messages",
    ] {
        assert!(young.get(key).is_none(), "{key}: {young}");
    }
    assert_eq!(
        young["evidence"],
        "up to 101 of 100 connections; longest wait 2.3 s"
    );
}

#[test]
fn a_cause_is_written_when_first_known_and_when_it_changes() {
    let mut other = shop();
    let mut verdict = Verdict::clone(other.verdict.as_ref().unwrap());
    verdict.cause = Cause::UndersizedLimit;
    verdict.culprit = None;
    other.verdict = Some(Arc::new(verdict));
    let cause_event =
        |episode: &Episode, from, to| Event::Cause(Box::new(cause(episode, 0, at(from), at(to))));
    let written = lines(&[
        cause_event(&shop(), 10, 10),
        cause_event(&shop(), 10, 40),
        cause_event(&other, 40, 50),
    ]);
    let causes: Vec<_> = written.iter().map(|line| line["cause"].as_str()).collect();
    assert_eq!(causes, [Some("downstream_slow"), Some("undersized_limit")]);
    assert_eq!(written[1]["type"], "cause");
    assert_eq!(written[1]["from_unix_ns"], at(40).unix_ns);
    assert_eq!(written[1]["to_unix_ns"], at(50).unix_ns);
    assert_eq!(written[1]["episode"], "e1");
    assert!(written[1].get("culprit").is_none());
    assert_eq!(written[0]["culprit"]["pid"], 812);
}

#[test]
fn a_queue_without_a_baseline_is_written_with_its_numbers() {
    let object_of = |queue: NoBaseline| -> Value {
        let mut out = Vec::new();
        no_baseline(&mut out, &[queue], &known_targets()).unwrap();
        parsed(&out).remove(0)
    };
    let expected = json!({
        "type": "no_baseline", "target": "gateway", "pid": 90, "kind": "inflight", "name": ":8000",
        "depth": 60, "unit": "requests", "median_age_ns": 12_000_000_000_u64,
        "oldest_age_ns": 25_000_000_000_u64,
        "calls": {
            "endpoint": "127.0.0.1:9000", "process": "python3 (812)", "outstanding": 31,
            "connections": 32,
        },
    });
    assert_eq!(object_of(fixture::no_baseline()), expected);
    let alone = NoBaseline {
        calls: None,
        ..fixture::no_baseline()
    };
    assert!(object_of(alone).get("calls").is_none());
}

#[test]
fn an_exact_wait_has_the_keys_of_the_documentation() {
    let party = |tid| WaitParty {
        tgid: tid,
        tid,
        comm: "backup".to_owned(),
    };
    let wait = |kind| ExactWait {
        target: 1,
        tgid: 4711,
        kind,
        call: Some(0),
        object: Some(7),
        path: Some("/var/log/shop".to_owned()),
        distribution: Distribution {
            count: 3,
            total_ns: 600,
            max_ns: 400,
            waits: vec![(100, 2), (400, 1)],
        },
        worst: Some(WorstWait {
            wait_ns: 400,
            culprit: Some(party(20)),
            culprit_ns: 300,
            waker: Some(party(30)),
            ..WorstWait::default()
        }),
    };
    let targets = [(1, Arc::new(Target::default()))].into();
    let kinds = [ExactWaitKind::Preempted, ExactWaitKind::BlockedIo];
    let waits = kinds.map(wait);
    let mut out = Vec::new();
    let named = waits.iter().map(|wait| (wait, "read".to_owned()));
    exact_waits(&mut out, named, &targets).unwrap();
    let lines = String::from_utf8(out).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<Value> = lines.collect();
    assert_eq!(lines[0]["after"], "preemption");
    assert_eq!(
        (&lines[1]["call"], &lines[1]["io"]),
        (&"read".into(), &true.into())
    );
    assert_eq!(
        (&lines[1]["mean_ns"], &lines[1]["p99_ns"]),
        (&200.into(), &400.into())
    );
    reference::assert_documented("exact_wait", &lines);
}
