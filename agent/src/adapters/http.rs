//! The HTTP adapter: pressure as JSON, events, readiness and health, metrics, and the [live page](super::live).

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use http::{
    HeaderMap, Method, Request, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS},
};
use http_body_util::{Either, Full, channel::Channel};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use tailback_page::{Entry, Pressure, layout::INBOUND};
use tokio::{sync::Notify, time::timeout};

use super::{
    Shared, agent,
    hosts::Hosts,
    listen::{Endpoint, Slot, Slots},
    live as live_page, metrics_format,
};
use crate::signal::exposition::{self, Exposition};

/// Concurrent connections.
const MAX_CONNECTIONS: usize = 256;
/// Time limit for a client to send the head of a request, and to read an event.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of comments in an event stream, which reveal that a client is gone.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Why the agent counts as dead.
const NOT_SAMPLING: &str =
    "no sample for 10 s (or three sampling intervals, if longer): the agent hangs or is gone\n";

pub(super) type Body = Either<Full<Bytes>, Channel<Bytes, io::Error>>;

/// Serves until dropped.
pub async fn serve(endpoint: Endpoint, hosts: Hosts, shared: Arc<Shared>) {
    let (listener, stats) = endpoint.listen().await;
    let slots = Slots::new(MAX_CONNECTIONS);
    let hosts = Arc::new(hosts);
    loop {
        let (stream, slot) = listener.accept_within(&slots, &stats).await;
        let (stats, shared, hosts) = (Arc::clone(&stats), Arc::clone(&shared), Arc::clone(&hosts));
        tokio::spawn(async move {
            let connection = stats.connection();
            let (slot, is_stuck) = (Arc::new(slot), Arc::new(Notify::new()));
            let answer = |request: Request<Incoming>| {
                let (stats, shared, is_stuck) = (
                    Arc::clone(&stats),
                    Arc::clone(&shared),
                    Arc::clone(&is_stuck),
                );
                let busy = Busy::new(&slot);
                let refused = hosts.refused(slot.peer(), &request);
                async move {
                    let (path, response) = match refused {
                        Some(host) => ("?", refuse(&host)),
                        None => answer(&request, &shared, is_stuck, busy).await,
                    };
                    stats.replied(&format!("{path} {}", response.status().as_u16()));
                    Ok::<_, Infallible>(response)
                }
            };
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(TIMEOUT);
            // An error is the client's: it disconnected, or does not speak HTTP.
            let service = hyper::service::service_fn(answer);
            tokio::select! {
                _ = builder.serve_connection(TokioIo::new(stream), service) => {}
                () = is_stuck.notified() => stats.closed(),
                () = slot.revoked() => {}
            }
            drop((connection, slot));
        });
    }
}

/// Marks a connection as busy until it is dropped.
struct Busy(Arc<Slot>);

impl Busy {
    fn new(slot: &Arc<Slot>) -> Self {
        slot.set_busy(true);
        Self(Arc::clone(slot))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

/// The response, and the path for the statistics: one of the list below or `?`.
async fn answer(
    request: &Request<Incoming>,
    shared: &Arc<Shared>,
    is_stuck: Arc<Notify>,
    busy: Busy,
) -> (&'static str, Response<Body>) {
    let query = request.uri().query().unwrap_or_default();
    let target = parameter(query, "target");
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let text = "only GET and HEAD are supported\n";
        return ("?", plain(StatusCode::METHOD_NOT_ALLOWED, text));
    }
    if let Some(file) = live_page::file(request.uri().path()) {
        return file;
    }
    match request.uri().path() {
        "/live" => ("/live", live_state(shared).await),
        "/pressure" => ("/pressure", json_of(&pressure(shared, target.as_deref()))),
        "/ready" => ("/ready", ready(shared, target.as_deref())),
        "/livez" => ("/livez", live(shared)),
        "/readyz" => ("/readyz", publishing(shared, target.as_deref()).await),
        "/metrics" => ("/metrics", metrics(shared, request.headers()).await),
        "/status" => ("/status", status(shared).await),
        "/events" => (
            "/events",
            events(
                shared,
                target,
                parameter(query, "min_level"),
                is_stuck,
                busy,
            )
            .await,
        ),
        _ => (
            "?",
            plain(
                StatusCode::NOT_FOUND,
                "not found; endpoints: / /live /pressure /events /ready /status /metrics /livez /readyz; ?target=NAME selects one service\n",
            ),
        ),
    }
}

/// The response to a request that is for another host.
fn refuse(host: &str) -> Response<Body> {
    let host = host.escape_default();
    plain(
        StatusCode::FORBIDDEN,
        format!(
            "not served for the host \"{host}\", so that web pages cannot read this address (DNS rebinding): use localhost or an IP address, or add the name to allowed_hosts in [signal.http]\n"
        ),
    )
}

/// The pressure of the requested service, published or not; without a name, of every published one.
fn pressures(shared: &Shared, target: Option<&str>) -> Vec<(String, Pressure)> {
    match target {
        Some(name) => vec![(name.to_owned(), shared.pressure(name))],
        None => shared.pages.alive(|_| true),
    }
}

fn pressure(shared: &Shared, target: Option<&str>) -> Value {
    let mut objects: Vec<Value> = pressures(shared, target)
        .into_iter()
        .map(|(name, pressure)| {
            let entries = shared.pages.page(&name).entries();
            pressure_object(&name, &pressure, &entries)
        })
        .collect();
    match target {
        Some(_) => objects.pop().unwrap_or_default(),
        None => Value::Array(objects),
    }
}

fn pressure_object(name: &str, pressure: &Pressure, entries: &[Entry]) -> Value {
    let mut object = json!({
        "target": name,
        "alive": pressure.alive,
        "pid": pressure.pid,
        "level": pressure.level_name(),
        "score": pressure.score,
        "admit_ratio": pressure.admit_ratio,
        "load": pressure.load,
        "cpu": pressure.cpu,
        "oldest_age_ns": pressure.oldest_age.as_nanos() as u64,
        "retry_after_ms": pressure.retry_after.as_millis() as u64,
        "queues": entries.iter().map(queue).collect::<Vec<_>>(),
    });
    if let Some(limit) = pressure.concurrency_limit {
        object["concurrency_limit"] = limit.into();
    }
    let times = [
        ("max_queue_wait_ns", pressure.max_queue_wait),
        ("time_to_full_ns", pressure.time_to_full),
    ];
    for (key, time) in times {
        if let Some(time) = time {
            object[key] = (time.as_nanos() as u64).into();
        }
    }
    object
}

fn queue(entry: &Entry) -> Value {
    let mut object = Map::new();
    object.insert("kind".to_owned(), entry.kind_name().into());
    object.insert("id".to_owned(), format!("{:08x}", entry.id).into());
    object.insert("inbound".to_owned(), (entry.flags & INBOUND != 0).into());
    object.insert("depth".to_owned(), entry.depth.into());
    let mut put_some = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            object.insert(key.to_owned(), value);
        }
    };
    put_some("limit", entry.limit.map(Value::from));
    put_some("arrivals_per_s", entry.arrivals_per_s.map(Value::from));
    put_some("departures_per_s", entry.departures_per_s.map(Value::from));
    put_some(
        "p99_ns",
        entry.p99.map(|p99| (p99.as_nanos() as u64).into()),
    );
    object.insert(
        "standing_delay_ns".to_owned(),
        (entry.standing_delay.as_nanos() as u64).into(),
    );
    object.insert(
        "oldest_age_ns".to_owned(),
        (entry.oldest_age.as_nanos() as u64).into(),
    );
    object.insert("score".to_owned(), entry.score.into());
    object.insert("losses".to_owned(), entry.losses.into());
    object.into()
}

/// Not ready if every requested service is drained.
fn ready(shared: &Shared, target: Option<&str>) -> Response<Body> {
    let all = pressures(shared, target);
    let is_drained = !all.is_empty() && all.iter().all(|(name, _)| shared.is_drained(name));
    if !is_drained {
        return plain(StatusCode::OK, "ready\n");
    }
    let mut response = plain(StatusCode::SERVICE_UNAVAILABLE, "full\n");
    let seconds = all
        .iter()
        .map(|(_, pressure)| pressure.retry_after_seconds())
        .max();
    response
        .headers_mut()
        .insert(RETRY_AFTER, seconds.unwrap_or(1).into());
    response
}

/// Liveness of the agent, for an orchestrator that restarts it: its loop completes samples, whatever it finds.
fn live(shared: &Shared) -> Response<Body> {
    if shared.pages.is_agent_alive() {
        plain(StatusCode::OK, "ok\n")
    } else {
        plain(StatusCode::SERVICE_UNAVAILABLE, NOT_SAMPLING)
    }
}

/// Readiness of the agent: it samples, and not all pages of the services that it has found have failed. With a name: the page
/// of that service is published.
async fn publishing(shared: &Shared, target: Option<&str>) -> Response<Body> {
    let unavailable = |text: String| plain(StatusCode::SERVICE_UNAVAILABLE, text);
    if !shared.pages.is_agent_alive() {
        return unavailable(NOT_SAMPLING.to_owned());
    }
    if let Some(name) = target {
        let pressure = shared.pressure(name);
        return if pressure.alive && pressure.pid != 0 {
            plain(StatusCode::OK, "ok: the page is published\n")
        } else {
            unavailable("no page of this service is published\n".to_owned())
        };
    }
    let agent = match agent::status(&shared.pages.directory).await {
        Ok(agent) => agent,
        Err(error) => return unavailable(format!("the agent does not reply: {error:#}\n")),
    };
    let number = |key: &str| agent["pages"][key].as_u64().unwrap_or(0);
    let (written, missing) = (number("written"), number("failed") + number("over_limit"));
    if agent["sampling"] != true {
        unavailable("no sample is published yet, or the last one has expired\n".to_owned())
    } else if written == 0 && missing > 0 {
        unavailable(format!("none of {missing} pages can be written\n"))
    } else {
        plain(
            StatusCode::OK,
            format!("ok: {written} pages published, {missing} not\n"),
        )
    }
}

/// The metrics of the agent, if it runs, and of the adapters.
async fn metrics(shared: &Shared, headers: &HeaderMap) -> Response<Body> {
    let directory = &shared.pages.directory;
    if metrics_format::is_protobuf(headers) {
        let of_agent = agent::ask_metrics_as_protobuf(directory).await;
        let own = shared.metrics(of_agent.is_ok()).protobuf();
        let mut messages = of_agent.unwrap_or_else(|_| agent_down().protobuf());
        messages.extend(own);
        return typed(StatusCode::OK, exposition::PROTOBUF, messages);
    }
    let of_agent = agent::ask(directory, "metrics").await;
    let own = shared.metrics(of_agent.is_ok()).text();
    let text = of_agent.unwrap_or_else(|_| agent_down().text());
    typed(StatusCode::OK, exposition::TEXT, text + &own)
}

fn agent_down() -> Exposition {
    let mut all = Exposition::default();
    crate::signal::metrics::agent_up(&mut all, false);
    all
}

async fn status(shared: &Shared) -> Response<Body> {
    let agent = agent::status(&shared.pages.directory).await;
    json_of(&statuses(agent.ok(), shared.status().await))
}

/// What the live page shows.
async fn live_state(shared: &Shared) -> Response<Body> {
    let view = agent::ask(&shared.pages.directory, "live").await.ok();
    let text = live_page::state(view.as_deref(), &shared.status().await);
    typed(StatusCode::OK, "application/json", text)
}

/// The status of the agent, if it runs, and of the adapter process.
fn statuses(agent: Option<Value>, adapter_process: Value) -> Value {
    let mut object = Map::new();
    object.extend(agent.map(|agent| ("agent".to_owned(), agent)));
    object.insert("adapter_process".to_owned(), adapter_process);
    object.into()
}

/// The agent's events as server-sent events. The stream ends with the agent; browsers reconnect by themselves.
async fn events(
    shared: &Shared,
    target: Option<String>,
    min_level: Option<String>,
    is_stuck: Arc<Notify>,
    busy: Busy,
) -> Response<Body> {
    let mut request = Map::new();
    if let Some(target) = target {
        request.insert("target".to_owned(), target.into());
    }
    if let Some(level) = min_level {
        request.insert("min_level".to_owned(), level.into());
    }
    let mut lines = match agent::subscribe(&shared.pages.directory, &Value::Object(request)).await {
        Ok(lines) => lines,
        Err(error) => {
            let mut response = plain(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("no agent: {error:#}\n"),
            );
            response.headers_mut().insert(RETRY_AFTER, 1.into());
            return response;
        }
    };
    let (mut sender, body) = Channel::new(16);
    tokio::spawn(async move {
        let _busy = busy;
        let mut keep_alive = tokio::time::interval(KEEP_ALIVE_INTERVAL);
        loop {
            let text = tokio::select! {
                line = lines.next() => match line {
                    Some(line) => format!("data: {line}\n\n"),
                    None => return,
                },
                _ = keep_alive.tick() => ":\n\n".to_owned(),
            };
            match timeout(TIMEOUT, sender.send_data(text.into())).await {
                Ok(Ok(())) => {}
                // The client is gone.
                Ok(Err(_)) => return,
                // The client does not read: free its slot.
                Err(_) => return is_stuck.notify_one(),
            }
        }
    });
    let mut response = Response::new(Either::Right(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (key == name).then(|| percent_decode_str(value).decode_utf8_lossy().into_owned())
    })
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    typed(status, "text/plain; charset=utf-8", text)
}

fn json_of(value: &Value) -> Response<Body> {
    typed(StatusCode::OK, "application/json", format!("{value}\n"))
}

pub(super) fn typed(
    status: StatusCode,
    kind: &'static str,
    text: impl Into<Bytes>,
) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(text.into())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::json::reference::assert_documented;

    #[test]
    fn the_keys_of_pressure_are_those_of_the_documentation() {
        let second = Duration::from_secs(1);
        let pressure = Pressure {
            concurrency_limit: Some(6),
            max_queue_wait: Some(second),
            time_to_full: Some(second),
            ..Pressure::NONE
        };
        let entry = Entry {
            kind: 0,
            flags: INBOUND,
            id: 1,
            depth: 1,
            limit: Some(1),
            standing_delay: second,
            p99: Some(second),
            oldest_age: second,
            score: 1.0,
            arrivals_per_s: Some(1),
            departures_per_s: Some(1),
            losses: 1,
        };
        assert_documented("/pressure", &[pressure_object("shop", &pressure, &[entry])]);
    }
}
