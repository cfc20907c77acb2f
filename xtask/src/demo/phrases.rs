//! Turns Tailback's JSON events into sentences.

use std::time::Duration;

use serde_json::Value;

use super::timeline::Colour;

/// `WARN      shop: 12 of 100 wait to be accepted, the oldest for 95 ms; full in 9.1 s`
pub fn level(event: &Value) -> String {
    let level = text(event, "to");
    let mut text_so_far = format!("{:<9} {}", level.to_uppercase(), queue(event));
    if let Some(oldest) = duration(event, "oldest_age_ns").filter(|oldest| !oldest.is_zero()) {
        text_so_far += &format!(", the oldest for {}", duration_text(oldest));
    }
    let rises = rank(level) > rank(text(event, "from"));
    if let Some(left) = duration(event, "time_to_full_ns").filter(|_| rises && level != "full") {
        text_so_far += &format!("; full in {}", duration_text(left));
    }
    text_so_far
}

/// `CAUSE     shop: downstream_slow, postgres (812)`
pub fn cause(event: &Value) -> String {
    let (cause, culprit) = (text(event, "cause"), text(&event["culprit"], "name"));
    let named = if culprit.is_empty() {
        String::new()
    } else {
        format!(", {culprit}")
    };
    format!("{:<9} {}: {cause}{named}", "CAUSE", text(event, "target"))
}

fn rank(level: &str) -> Option<usize> {
    ["ok", "warn", "critical", "full"]
        .iter()
        .position(|name| *name == level)
}

pub fn colour(level: &str) -> Colour {
    match level {
        "ok" => Colour::Green,
        "warn" => Colour::Yellow,
        "critical" => Colour::Magenta,
        "full" => Colour::Red,
        _ => Colour::Plain,
    }
}

/// `shop: 12 of 100 wait to be accepted`
pub fn queue(event: &Value) -> String {
    format!("{}: {}", text(event, "target"), depth(event))
}

/// Depth and place of a queue.
fn depth(event: &Value) -> String {
    let (name, unit) = (text(event, "name"), text(event, "unit"));
    let amount = |key| {
        number(event, key).map(|amount| match unit {
            "bytes" => bytes(amount),
            _ => format!("{amount:.0}"),
        })
    };
    let depth = amount("depth").unwrap_or("?".to_owned());
    let of = amount("limit").map_or(String::new(), |limit| format!(" of {limit}"));
    match text(event, "kind") {
        "accept" => format!("{depth}{of} wait to be accepted"),
        "inflight" => format!("{depth} requests in flight at {name}"),
        "downstream" => format!("{depth} calls outstanding {name}"),
        "recv" => format!("{depth}{of} wait to be read ({name})"),
        "send" => format!("{depth}{of} wait for the peer to take them ({name})"),
        kind if matches!(unit, "" | "bytes") => format!("{kind} {name}: {depth}{of}"),
        kind => format!("{kind} {name}: {depth}{of} {unit}"),
    }
}

/// `127 kB`
fn bytes(amount: f64) -> String {
    match amount {
        amount if amount >= 1e6 => format!("{:.1} MB", amount / 1e6),
        amount if amount >= 1e3 => format!("{:.0} kB", amount / 1e3),
        amount => format!("{amount:.0} B"),
    }
}

/// Summarizes a sample of all queues.
pub fn sample(queues: &[Value]) -> String {
    let not_ok = queues.iter().filter(|queue| text(queue, "level") != "ok");
    match not_ok.count() {
        0 => format!("{} queues, all ok", queues.len()),
        not_ok => format!("{} queues, {not_ok} not ok", queues.len()),
    }
}

/// Rows (name, text) of the closing summary of an episode.
pub fn summary(episode: &Value) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let mut row = |name: &'static str, text: String| rows.push((name, text));
    let depths: Vec<f64> = episode["depths"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect();
    if !depths.is_empty() {
        row("depth", sparkline(&depths, number(episode, "limit")));
    }
    let times = (
        number(episode, "start_unix_ns"),
        number(episode, "end_unix_ns"),
    );
    if let (Some(start), Some(end)) = times {
        row(
            "lasted",
            duration_text(Duration::from_nanos((end - start).max(0.0) as u64)),
        );
    }
    if let Some(lead) = duration(episode, "lead_ns") {
        let forecast = duration(episode, "time_to_full_ns").map_or(String::new(), |forecast| {
            format!("; its forecast was {}", duration_text(forecast))
        });
        row(
            "warned",
            format!("{} before it was full{forecast}", duration_text(lead)),
        );
    }
    match text(episode, "driven_by") {
        "" | "unknown" => {}
        "both" => row("driven by", "producer and consumer".to_owned()),
        driven => row("driven by", format!("the {driven}")),
    }
    let cause = text(episode, "cause");
    if !cause.is_empty() {
        let share = number(episode, "share").map_or(String::new(), |share| {
            format!(", {:.0}% of its workers' time", share * 100.0)
        });
        row("cause", format!("{cause}{share}"));
    }
    let culprit = text(&episode["culprit"], "name");
    if !culprit.is_empty() {
        row("culprit", culprit.to_owned());
    }
    rows
}

/// A sparkline: one block per value, scaled to the limit or the maximum.
fn sparkline(values: &[f64], limit: Option<f64>) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let top = limit
        .unwrap_or_default()
        .max(values.iter().copied().fold(0.0, f64::max))
        .max(1.0);
    let block = |value: &f64| BLOCKS[((value / top * 7.0).round() as usize).min(7)];
    values.iter().map(block).collect()
}

/// A duration with two or three digits.
pub fn duration_text(duration: Duration) -> String {
    let s = duration.as_secs_f64();
    match s {
        s if s >= 99.95 => format!("{s:.0} s"),
        s if s >= 0.9995 => format!("{s:.1} s"),
        s => format!("{:.0} ms", s * 1e3),
    }
}

/// Explains where to see the trace. `command` starts this demo.
pub fn trace_hint(
    endpoint: Option<&str>,
    service: &str,
    trace: Option<&str>,
    command: &str,
) -> Vec<String> {
    const PORT: u16 = 16686;
    match endpoint {
        Some(endpoint) => {
            let page = format!("http://{}:{PORT}", host(endpoint));
            let mut rows = vec![
                format!("The incident was sent to {endpoint} as a trace of the service {service}."),
                format!("Jaeger UI, on its default port: {page}/search?service={service}"),
            ];
            rows.extend(trace.map(|id| format!("This trace: {page}/trace/{id}")));
            rows
        }
        None => vec![
            "To see the incident as a trace in Jaeger:".to_owned(),
            format!("    docker run --rm -p {PORT}:{PORT} -p 4318:4318 jaegertracing/jaeger"),
            format!("    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 {command}"),
            format!("    and open http://127.0.0.1:{PORT}/search?service={service}"),
        ],
    }
}

/// The host of a URL, without port, path and user.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or(rest);
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    match host.rsplit_once(':') {
        // The colons of an IPv6 address are within brackets.
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

pub fn text<'a>(event: &'a Value, key: &str) -> &'a str {
    event.get(key).and_then(Value::as_str).unwrap_or_default()
}

pub fn number(event: &Value, key: &str) -> Option<f64> {
    event.get(key).and_then(Value::as_f64)
}

fn duration(event: &Value, key: &str) -> Option<Duration> {
    event
        .get(key)
        .and_then(Value::as_u64)
        .map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_warning_has_depth_age_and_time_to_full() {
        let mut event = json!({
            "target": "shop", "kind": "accept", "from": "ok", "to": "warn", "depth": 12, "limit": 100,
            "oldest_age_ns": 95_400_000, "time_to_full_ns": 9_120_000_000_u64,
        });
        assert_eq!(
            level(&event),
            "WARN      shop: 12 of 100 wait to be accepted, the oldest for 95 ms; full in 9.1 s"
        );
        event["to"] = "full".into();
        assert!(level(&event).ends_with("95 ms"));
    }

    #[test]
    fn a_falling_level_has_no_forecast() {
        let event = json!({
            "target": "shop", "kind": "accept", "from": "critical", "to": "warn", "depth": 12, "limit": 100,
            "time_to_full_ns": 1,
        });
        let expected = "WARN      shop: 12 of 100 wait to be accepted";
        assert_eq!(level(&event), expected);
    }

    #[test]
    fn unknown_values_are_omitted() {
        let event = json!({
            "target": "shop", "kind": "pipe", "name": "fd 1", "to": "warn", "depth": 5_000, "unit": "bytes",
        });
        assert_eq!(level(&event), "WARN      shop: pipe fd 1: 5 kB");
        assert!(summary(&json!({"driven_by": "unknown", "evidence": ""})).is_empty());
        let event = json!({"target": "shop", "cause": "unknown"});
        assert_eq!(cause(&event), "CAUSE     shop: unknown");
    }

    #[test]
    fn a_cause_includes_its_culprit() {
        let culprit = json!({"pid": 812, "name": "postgres (812)"});
        let event = json!({"target": "shop", "cause": "downstream_slow", "culprit": culprit});
        let expected = "CAUSE     shop: downstream_slow, postgres (812)";
        assert_eq!(cause(&event), expected);
    }

    #[test]
    fn a_summary_compares_lead_time_and_forecast() {
        let episode = json!({"lead_ns": 7_400_000_000_u64, "time_to_full_ns": 5_000_000_000_u64});
        let expected = "7.4 s before it was full; its forecast was 5.0 s";
        assert_eq!(summary(&episode), [("warned", expected.to_owned())]);
    }

    #[test]
    fn blocks_are_scaled_to_the_limit() {
        assert_eq!(sparkline(&[0.0, 50.0, 100.0, 101.0], Some(100.0)), "▁▄██");
        assert_eq!(sparkline(&[0.0, 2.0], None), "▁█");
    }

    #[test]
    fn the_host_is_found_in_any_endpoint() {
        for (url, want) in [
            ("http://127.0.0.1:4318", "127.0.0.1"),
            (
                "https://u:p@collector.example/otlp?x=1",
                "collector.example",
            ),
            ("http://[::1]:4317/", "[::1]"),
            ("http://[::1]", "[::1]"),
            ("collector:4317", "collector"),
        ] {
            assert_eq!(host(url), want);
        }
    }
}
