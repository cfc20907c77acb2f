//! The whole path, nothing scripted: a live queue of a real process, the agent, and the real Jaeger.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    fs,
    net::{TcpListener, TcpStream},
    process::{self, Command},
    time::Duration,
};

use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    jaeger::{self, Jaeger},
    skip,
    temp::TempDir,
    wait,
};

const PATIENCE: Duration = Duration::from_secs(20);
const SERVICE: &str = "shop-under-test";

/// Parts of a stretch are told every second, so that the trace grows while we look.
fn config(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.path().join("tailback.toml");
    let text = format!(
        "[detect.all]\ntell_every = \"1s\"\n[[target]]\npid = {}\ncalled = \"{SERVICE}\"\n",
        process::id()
    );
    fs::write(&path, text).unwrap();
    path
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn names(trace: &Value) -> Vec<&str> {
    list(trace, "spans")
        .iter()
        .filter_map(|span| span["operationName"].as_str())
        .collect()
}

/// No span without its parent, none twice, all of the service.
fn assert_whole(trace: &Value) {
    let ids: Vec<&str> = list(trace, "spans")
        .iter()
        .filter_map(|span| span["spanID"].as_str())
        .collect();
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert_eq!(
        ids.len(),
        unique.len(),
        "a span stands twice: {:?}",
        names(trace)
    );
    for span in list(trace, "spans") {
        for reference in list(span, "references") {
            let parent = reference["spanID"].as_str().unwrap();
            assert!(
                unique.contains(parent),
                "{} has no parent yet",
                span["operationName"]
            );
        }
        assert!(list(span, "warnings").is_empty(), "{span}");
    }
    for process in trace["processes"].as_object().unwrap().values() {
        assert_eq!(process["serviceName"], SERVICE);
    }
}

/// The one trace that holds the onset of this accept queue, whole at this moment.
fn trace(jaeger: &Jaeger, queue: &str) -> Option<Value> {
    let traces = jaeger.traces(SERVICE).unwrap();
    let trace = traces
        .into_iter()
        .find(|trace| count(trace, "queue.onset accept", queue) == 1)?;
    assert_whole(&trace);
    Some(trace)
}

/// How many spans of this name are about the queue. The tests of this file share one process, thus one target, and
/// its trace holds the other test's listener as well.
fn count(trace: &Value, name: &str, queue: &str) -> usize {
    list(trace, "spans")
        .iter()
        .filter(|span| span["operationName"] == name && is_about(span, queue))
        .count()
}

fn is_about(span: &Value, queue: &str) -> bool {
    list(span, "tags")
        .iter()
        .any(|tag| tag["key"] == "tailback.queue.name" && tag["value"] == queue)
}

fn incident_over(test: &str, protocol: &str, endpoint: impl Fn(&Jaeger) -> String) {
    if jaeger::find().is_none() {
        skip::skip(test, "no Jaeger: `cargo xtask setup` builds it");
        return;
    }
    let jaeger = Jaeger::start().unwrap();
    let dir = TempDir::new("incident").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let queue = address.to_string();
    let mut command = Command::new(agent::binary().unwrap());
    command
        .args(["run", "--json", "--config"])
        .arg(config(&dir))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint(&jaeger))
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol);
    let agent = Agent::start(&mut command).unwrap();
    agent
        .wait_for("the target", PATIENCE, |event| event.is("target"))
        .unwrap();

    // Nobody accepts: the queue stands.
    let clients: Vec<TcpStream> = (0..5)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let of_listener = |event: &agent::Event| event.text("name") == queue;
    agent
        .wait_for("the warning", PATIENCE, |event| {
            event.is("level") && of_listener(event)
        })
        .unwrap();
    let opened = wait::until("the incident in Jaeger", PATIENCE, || {
        Ok(trace(&jaeger, &queue))
    })
    .unwrap();
    let incidents = names(&opened);
    let incidents = incidents.iter().filter(|name| **name == "queue.incident");
    assert_eq!(incidents.count(), 1);
    // It grows while it lasts: two more parts of the stretch.
    let before = count(&opened, "queue.level accept critical", &queue);
    let grown = wait::until("the trace to grow", PATIENCE, || {
        Ok(trace(&jaeger, &queue)
            .filter(|trace| count(trace, "queue.level accept critical", &queue) >= before + 2))
    })
    .unwrap();
    assert_eq!(
        count(&grown, "queue.saturation accept", &queue),
        0,
        "it is not over"
    );

    for _ in &clients {
        listener.accept().unwrap();
    }
    let episode = agent
        .wait_for("the end of the episode", PATIENCE, |event| {
            event.is("episode") && of_listener(event) && event.value.get("ongoing").is_none()
        })
        .unwrap();
    let whole = wait::until("the whole trace", PATIENCE, || {
        Ok(trace(&jaeger, &queue)
            .filter(|trace| count(trace, "queue.saturation accept", &queue) == 1))
    })
    .unwrap();
    assert_eq!(whole["traceID"].as_str().unwrap(), episode.text("trace_id"));
    println!(
        "{protocol}: {} spans when it opened, {} later, {} at the end",
        names(&opened).len(),
        names(&grown).len(),
        names(&whole).len()
    );
}

#[test]
fn a_live_incident_stands_in_jaeger_from_its_opening_on_over_http() {
    incident_over(
        "a_live_incident_stands_in_jaeger_from_its_opening_on_over_http",
        "http/protobuf",
        Jaeger::otlp_http,
    );
}

#[test]
fn a_live_incident_stands_in_jaeger_from_its_opening_on_over_grpc() {
    incident_over(
        "a_live_incident_stands_in_jaeger_from_its_opening_on_over_grpc",
        "grpc",
        Jaeger::otlp_grpc,
    );
}
