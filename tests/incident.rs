//! End-to-end tests without scripted parts: a live queue of a real process, the agent, and a real Jaeger.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    collections::BTreeSet,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{self, Command},
    sync::{PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    jaeger::{self, Jaeger},
    load::{Load, Plan, Request, Spacing},
    needs, python, skip,
    temp::TempDir,
    wait,
    workloads::FlashSale,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
const SERVICE: &str = "shop-under-test";

/// The tests that monitor this process may run together (readers). The test whose clients run in this process must run alone
/// (writer): its servers would be their neighbours and appear in their traces.
static PROCESS: RwLock<()> = RwLock::new(());

/// Re-reports open episodes every second, so that the trace grows during the test.
const REPEAT_OFTEN: &str = "[detect.all]\nrepeat_interval = \"1s\"\n";

fn config(dir: &TempDir) -> PathBuf {
    let target = format!(
        "[[target]]\npid = {}\nservice_name = \"{SERVICE}\"\n",
        process::id()
    );
    // The budget is raised so that other load does not detach the hooks.
    let text = format!("tier = \"watch\"\nhook_budget = 0.5\n{REPEAT_OFTEN}{target}");
    dir.write("tailback.toml", &text).unwrap()
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

/// Asserts that every parent and every linked span exists, that span ids are unique, that there is one root, and that all spans
/// belong to these services.
fn assert_whole(trace: &Value, services: &[&str]) {
    let ids: Vec<&str> = list(trace, "spans")
        .iter()
        .filter_map(|span| span["spanID"].as_str())
        .collect();
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert_eq!(
        ids.len(),
        unique.len(),
        "duplicate span: {:?}",
        names(trace)
    );
    let roots = list(trace, "spans")
        .iter()
        .filter(|span| list(span, "references").is_empty());
    let roots: Vec<&Value> = roots.map(|span| &span["operationName"]).collect();
    assert_eq!(roots, ["queue.incident"]);
    for span in list(trace, "spans") {
        for reference in list(span, "references") {
            let other = reference["spanID"].as_str().unwrap();
            assert!(
                unique.contains(other),
                "{} refers to a missing span ({})",
                span["operationName"],
                reference["refType"]
            );
        }
        assert!(list(span, "warnings").is_empty(), "{span}");
    }
    for process in trace["processes"].as_object().unwrap().values() {
        let service = process["serviceName"].as_str().unwrap();
        assert!(services.contains(&service), "{service}");
    }
}

/// The trace with the onset of this accept queue, if there is one. Asserts that it is complete.
fn trace(jaeger: &Jaeger, queue: &str) -> Option<Value> {
    let traces = jaeger.traces(SERVICE).unwrap();
    let trace = traces
        .into_iter()
        .find(|trace| count(trace, "queue.onset accept", queue) == 1)?;
    // The target is this process, which also calls Jaeger: a slow Jaeger may appear in the trace.
    assert_whole(&trace, &[SERVICE, "jaeger"]);
    Some(trace)
}

/// Number of spans with this name about the queue. The tests share one process and so one target: its trace contains the
/// other test's listener too.
fn count(trace: &Value, name: &str, queue: &str) -> usize {
    list(trace, "spans")
        .iter()
        .filter(|span| span["operationName"] == name && is_about(span, queue))
        .count()
}

fn is_about(span: &Value, queue: &str) -> bool {
    tag(span, "tailback.queue.name") == Some(queue)
}

fn tag<'a>(span: &'a Value, key: &str) -> Option<&'a str> {
    let tags = list(span, "tags");
    tags.iter().find(|tag| tag["key"] == key)?["value"].as_str()
}

fn incident_over(test: &str, protocol: &str, endpoint: impl Fn(&Jaeger) -> String) {
    if jaeger::find().is_none() {
        skip::skip(test, "no Jaeger: `cargo xtask setup` builds it");
        return;
    }
    let _watched = PROCESS.read().unwrap_or_else(PoisonError::into_inner);
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
        .wait_for("the target", DEADLINE, |event| event.is("target"))
        .unwrap();

    // Nothing accepts, so a standing queue forms.
    let clients: Vec<TcpStream> = (0..5)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let of_listener = |event: &agent::Event| event.text("name") == queue;
    agent
        .wait_for("the warning", DEADLINE, |event| {
            event.is("level") && of_listener(event)
        })
        .unwrap();
    let opened = wait::until("the incident in Jaeger", DEADLINE, || {
        Ok(trace(&jaeger, &queue))
    })
    .unwrap();
    let incidents = names(&opened);
    let incidents = incidents.iter().filter(|name| **name == "queue.incident");
    assert_eq!(incidents.count(), 1);
    // It grows during the episode: two more level spans.
    let before = count(&opened, "queue.level accept critical", &queue);
    let grown = wait::until("the trace to grow", DEADLINE, || {
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
        .wait_for("the end of the episode", DEADLINE, |event| {
            event.is("episode") && of_listener(event) && event.value.get("ongoing").is_none()
        })
        .unwrap();
    let whole = wait::until("the whole trace", DEADLINE, || {
        Ok(trace(&jaeger, &queue)
            .filter(|trace| count(trace, "queue.saturation accept", &queue) == 1))
    })
    .unwrap();
    assert_eq!(whole["traceID"].as_str().unwrap(), episode.text("trace_id"));
    let spans = named(&whole, "queue.saturation accept");
    let span = spans.into_iter().find(|span| is_about(span, &queue));
    assert_has_measured_waits(span.unwrap());
    println!(
        "{protocol}: {} spans when it opened, {} later, {} at the end",
        names(&opened).len(),
        names(&grown).len(),
        names(&whole).len()
    );
}

/// This process polls Jaeger, so its threads wait for a CPU several times a second.
fn assert_has_measured_waits(span: &Value) {
    let number = |key: &str| {
        let tag = list(span, "tags").iter().find(|tag| tag["key"] == key);
        let tag = tag.unwrap_or_else(|| panic!("no {key} in {span}"));
        tag["value"].as_u64().unwrap()
    };
    let [count, mean, p50, p99, max] = ["count", "mean_ns", "p50_ns", "p99_ns", "max_ns"]
        .map(|name| number(&format!("tailback.cpu_wait.{name}")));
    println!(
        "{count} waits for a CPU: mean {mean} ns, p50 {p50} ns, p99 {p99} ns, longest {max} ns"
    );
    assert!(count > 1 && mean > 0 && p50 > 0);
    assert!(mean <= max && p50 <= p99 && p99 <= max);
}

#[test]
fn a_live_incident_is_visible_in_jaeger_from_its_opening_over_http() {
    incident_over(
        "a_live_incident_is_visible_in_jaeger_from_its_opening_over_http",
        "http/protobuf",
        Jaeger::otlp_http,
    );
}

#[test]
fn a_live_incident_is_visible_in_jaeger_from_its_opening_over_grpc() {
    incident_over(
        "a_live_incident_is_visible_in_jaeger_from_its_opening_over_grpc",
        "grpc",
        Jaeger::otlp_grpc,
    );
}

/// Spans with this name.
fn named<'a>(trace: &'a Value, name: &str) -> Vec<&'a Value> {
    let spans = list(trace, "spans").iter();
    spans.filter(|span| span["operationName"] == name).collect()
}

fn service<'a>(trace: &'a Value, span: &Value) -> &'a str {
    let process = span["processID"].as_str().unwrap();
    let name = &trace["processes"][process]["serviceName"];
    name.as_str().unwrap()
}

/// Spans that a span links to.
fn linked<'a>(trace: &'a Value, span: &Value) -> Vec<&'a Value> {
    let links = list(span, "references")
        .iter()
        .filter(|reference| reference["refType"] == "FOLLOWS_FROM");
    let found = links.map(|link| {
        let same = |span: &&Value| span["spanID"] == link["spanID"];
        list(trace, "spans").iter().find(same).unwrap()
    });
    found.collect()
}

/// An open loop of 20 sales per second.
fn buyers(sale: &FlashSale) -> Load {
    Load::start(Plan {
        to: sale.uwsgi.address(),
        path: FlashSale::PATH.to_owned(),
        per_s: 20.0,
        spacing: Spacing::Poisson { seed: 7 },
        duration: Duration::from_secs(90),
        timeout: Duration::from_secs(30),
        max_in_flight: 2000,
    })
    .unwrap()
}

#[test]
fn a_flash_sale_is_one_trace_in_jaeger_that_names_the_session_holding_the_row_lock() {
    let test = "a_flash_sale_is_one_trace_in_jaeger_that_names_the_session_holding_the_row_lock";
    if !needs::met(test, &["uwsgi-core", "psql"]) {
        return;
    }
    if let Err(missing) = python::with(&["psycopg2"]) {
        return skip::skip(test, &missing.to_string());
    }
    if jaeger::find().is_none() {
        return skip::skip(test, "no Jaeger: `cargo xtask setup` builds it");
    }
    const CAUSE: &str = "queue.cause downstream_slow";
    let _calling = PROCESS.write().unwrap_or_else(PoisonError::into_inner);
    let jaeger = Jaeger::start().unwrap();
    let sale = FlashSale::start(4, 100).unwrap();
    let load = buyers(&sale);
    let dir = TempDir::new("incident").unwrap();
    let queue = sale.uwsgi.address().to_string();
    let mut command = Command::new(agent::binary().unwrap());
    command
        .args(["run", "--json", "--port", &sale.uwsgi.port().to_string()])
        .arg("--config")
        .arg(dir.write("tailback.toml", REPEAT_OFTEN).unwrap())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", jaeger.otlp_http())
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
    let agent = Agent::start(&mut command).unwrap();
    let target = agent.wait_for("the target", DEADLINE, |event| event.is("target"));
    let uwsgi = target.unwrap().text("target").to_owned();
    let watched = load.done().len();
    wait::until("100 successful sales", DEADLINE, || {
        let done = load.done();
        assert!(done.iter().all(Request::ok), "a sale failed");
        Ok((done.len() >= watched + 100).then_some(()))
    })
    .unwrap();

    let planted_us = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_micros() as u64;
    let holder = sale.hold_the_row().unwrap();
    let backend = holder.backend;
    let ours = |event: &agent::Event| event.text("name") == queue;
    let episode = agent
        .wait_for("the holder of the row lock", DEADLINE, |event| {
            let culprit = &event.value["culprit"]["pid"];
            event.is("episode") && ours(event) && *culprit == backend
        })
        .unwrap();
    let postgres = episode.value["culprit"]["target"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_ne!(postgres, uwsgi);
    let id = episode.text("trace_id").to_owned();
    let services = [uwsgi.as_str(), postgres.as_str()];
    // Asserts completeness at every poll, even early ones.
    let current = || -> Option<Value> {
        let trace = jaeger.trace(&id).unwrap()?;
        assert_whole(&trace, &services);
        Some(trace)
    };
    let names_holder = |span: &Value| {
        let culprit = tag(span, "tailback.cause.culprit").unwrap_or_default();
        culprit.contains(&format!("({backend})"))
    };
    let opened = wait::until("the incident in Jaeger", DEADLINE, || {
        Ok(current().filter(|trace| count(trace, "queue.onset accept", &queue) == 1))
    })
    .unwrap();
    // It grows during the episode.
    let before = list(&opened, "spans").len();
    wait::until("the trace to grow", DEADLINE, || {
        Ok(current().filter(|trace| list(trace, "spans").len() >= before + 4))
    })
    .unwrap();
    drop(holder);
    let over = agent.wait_for("the end of the episode", DEADLINE, |event| {
        event.is("episode") && ours(event) && event.value.get("ongoing").is_none()
    });
    assert_eq!(over.unwrap().text("trace_id"), id);
    let whole = wait::until("the whole trace", DEADLINE, || {
        Ok(current().filter(|trace| count(trace, "queue.saturation accept", &queue) == 1))
    })
    .unwrap();

    // One trace, found under both service names.
    for name in services {
        let traces = jaeger.traces(name).unwrap();
        // Not one that was over before, as of a pause of the machine.
        let lasts = |trace: &&Value| {
            list(trace, "spans").iter().any(|span| {
                let [start, took] = ["startTime", "duration"].map(|key| span[key].as_u64());
                start.unwrap_or(0) + took.unwrap_or(0) >= planted_us
            })
        };
        let ids: Vec<&str> = traces
            .iter()
            .filter(lasts)
            .filter_map(|trace| trace["traceID"].as_str())
            .collect();
        assert_eq!(ids, [id.as_str()], "the traces of {name}");
    }
    let listed: BTreeSet<String> = jaeger.services().unwrap().into_iter().collect();
    assert_eq!(listed, BTreeSet::from(services.map(str::to_owned)));
    // The incident belongs to the service whose queue filled, and links to the one that blocks it.
    let [incident] = named(&whole, "queue.incident")[..] else {
        panic!("not one incident: {:?}", names(&whole));
    };
    assert_eq!(service(&whole, incident), uwsgi);
    let mut of_queue = named(&whole, CAUSE);
    of_queue.extend(named(&whole, "queue.saturation accept"));
    of_queue.retain(|span| is_about(span, &queue) && names_holder(span));
    assert!(of_queue.len() >= 2, "{:?}", names(&whole));
    for span in of_queue {
        assert_eq!(service(&whole, span), uwsgi);
        let linked = linked(&whole, span);
        let of: Vec<&str> = linked.iter().map(|span| service(&whole, span)).collect();
        assert_eq!(of, [postgres.as_str()], "{span}");
    }
    println!("{} spans", list(&whole, "spans").len());
}
