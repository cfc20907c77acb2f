//! The status as a table for people.

use std::{fmt::Write as _, fs};

use serde_json::Value;

use crate::{
    collect::unix_ns,
    signal::{names::directory_of, readers::Reader, stream::SOCKET},
    text::{bounded, duration, pad, width as width_of},
};

/// Longest name of a queue in a cell, in bytes.
const MAX_NAME_BYTES: usize = 40;
/// Consumers of a page that are named; the others are counted.
const NAMED_CONSUMERS: usize = 3;

pub(super) fn report(
    agent: &anyhow::Result<Value>,
    process: &anyhow::Result<Value>,
    readers: &[Reader],
) -> String {
    let mut text = String::new();
    match agent {
        Ok(agent) => agent_report(&mut text, agent, readers),
        Err(error) => {
            let _ = writeln!(text, "agent     {error:#}: signals have failed open");
        }
    }
    match process {
        Ok(process) => {
            let agent = agent.as_ref().ok();
            adapters_report(
                &mut text,
                process,
                agent.map(|agent| list(&agent["targets"])),
            );
        }
        Err(_) => {
            text += "\nadapters  not running: no adapter is configured in [signal], or the process was stopped\n";
        }
    }
    text
}

fn agent_report(text: &mut String, agent: &Value, readers: &[Reader]) {
    let report = &agent["agent"];
    let cost = match (report["cpu_share"].as_f64(), report["rss_bytes"].as_u64()) {
        (Some(share), Some(bytes)) => format!(
            ", {:.1}% of a core, {}",
            share * 100.0,
            crate::text::bytes(bytes)
        ),
        _ => String::new(),
    };
    let _ = writeln!(
        text,
        "agent     PID {}, version {}, last sample {} ago{cost}",
        agent["pid"],
        word(&agent["version"]),
        duration(agent["last_sample_age_ns"].as_u64().unwrap_or(0)),
    );
    if agent["sampling"] == false {
        *text += "          agent is not sampling (hung?): signals have failed open\n";
    }
    config_report(text, &agent["config"]);
    hooks_report(text, &agent["hooks"]);
    let pages = &agent["pages"];
    let not_written =
        pages["failed"].as_u64().unwrap_or(0) + pages["over_limit"].as_u64().unwrap_or(0);
    let not_written = match not_written {
        0 => String::new(),
        n => format!(" ({n} not published)"),
    };
    let _ = writeln!(
        text,
        "pages     {} in {}{not_written}",
        pages["written"],
        word(&agent["directory"])
    );
    let targets = list(&agent["targets"]);
    let rows = targets.iter().map(|target| {
        let worst = &target["worst"];
        let limit = worst["limit"]
            .as_u64()
            .map_or_else(String::new, |limit| format!(" of {limit}"));
        let worst = match worst["kind"].as_str() {
            Some(kind) if target["score"].as_f64() > Some(0.0) => {
                format!(
                    "{kind} {}: {}{limit}",
                    bounded(word(&worst["name"]), MAX_NAME_BYTES),
                    worst["depth"]
                )
            }
            _ => "-".to_owned(),
        };
        let consumers: Vec<String> = readers
            .iter()
            .filter(|reader| reader.target == word(&target["directory"]))
            .map(|reader| format!("{} ({})", reader.name, reader.pid))
            .collect();
        [
            word(&target["directory"]).to_owned(),
            target["pid"].to_string(),
            word(&target["level"]).to_owned(),
            format!("{:.2}", target["score"].as_f64().unwrap_or(0.0)),
            admit(target),
            duration(target["oldest_age_ns"].as_u64().unwrap_or(0)),
            worst,
            if consumers.is_empty() {
                "-".to_owned()
            } else {
                first_few(&consumers)
            },
        ]
    });
    table(
        text,
        [
            "SERVICE",
            "PID",
            "LEVEL",
            "SCORE",
            "ADMIT",
            "OLDEST",
            "WORST QUEUE",
            "PAGE MAPPED BY",
        ],
        rows,
    );
    controllers_report(text, targets);
    let subscribers = list(&agent["subscribers"]);
    let stream = &agent["stream"];
    let disconnected: Vec<String> = [
        ("rejected", "rejected"),
        ("too_slow", "disconnected as too slow"),
        ("invalid_commands", "invalid commands"),
    ]
    .iter()
    .filter_map(|(key, words)| {
        stream[key]
            .as_u64()
            .filter(|count| *count > 0)
            .map(|count| format!("{count} {words}"))
    })
    .collect();
    let disconnected = if disconnected.is_empty() {
        String::new()
    } else {
        format!(" ({})", disconnected.join(", "))
    };
    let _ = writeln!(
        text,
        "\nstream    {} subscribers at {}/{SOCKET}{disconnected}",
        subscribers.len(),
        word(&agent["directory"])
    );
    let rows = subscribers.iter().map(|subscriber| {
        let pid = subscriber["pid"].as_u64();
        let name = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        [
            name.map_or_else(|| "-".to_owned(), |name| name.trim_end().to_owned()),
            pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            subscriber["target"].as_str().unwrap_or("all").to_owned(),
            word(&subscriber["min_level"]).to_owned(),
            subscriber["lines"].to_string(),
            ago(subscriber["since_unix_ns"].as_u64()),
        ]
    });
    table(
        text,
        ["NAME", "PID", "SERVICE", "MIN LEVEL", "LINES", "SINCE"],
        rows,
    );
}

/// The configuration file, if the agent has one.
fn config_report(text: &mut String, config: &Value) {
    let Some(file) = config["file"].as_str() else {
        return;
    };
    let loaded = ago(config["loaded_unix_ns"].as_u64());
    let _ = writeln!(text, "config    {file}, loaded {loaded}");
    if let Some(error) = config["error"].as_str() {
        let _ = writeln!(
            text,
            "          REJECTED since then, the loaded one is in force: {error}"
        );
    }
    let waiting: Vec<&str> = list(&config["needs_restart"]).iter().map(word).collect();
    if !waiting.is_empty() {
        let _ = writeln!(
            text,
            "          in force only after a restart: {}",
            waiting.join(", ")
        );
    }
}

/// The hooks, unless the tier is glance.
fn hooks_report(text: &mut String, hooks: &Value) {
    let Some(is_attached) = hooks["attached"].as_bool() else {
        return;
    };
    let percent = |key: &str| format!("{:.2}%", hooks[key].as_f64().unwrap_or(0.0) * 100.0);
    let (state, key, share) = if is_attached {
        ("attached", "cpu_share", "of the machine's CPU time")
    } else {
        (
            "not attached",
            "expected_cpu_share",
            "of the machine's CPU time expected",
        )
    };
    let _ = writeln!(
        text,
        "hooks     {state}: {}; {} {share}, budget {}",
        word(&hooks["reason"]),
        percent(key),
        percent("cpu_budget"),
    );
    for hook in list(&hooks["programs"]) {
        let (runs, cpu_ns) = (hook["runs"].as_u64(), hook["cpu_ns"].as_u64());
        let (runs, cpu_ns) = (runs.unwrap_or(0), cpu_ns.unwrap_or(0));
        let mean = cpu_ns
            .checked_div(runs)
            .map_or_else(String::new, |ns| format!(", {ns} ns each"));
        let _ = writeln!(
            text,
            "          {} {} runs, {} of CPU time{mean}",
            word(&hook["name"]),
            crate::text::count(runs),
            duration(cpu_ns),
        );
    }
    let lost = list(&hooks["lost"]).iter();
    let lost = lost.filter(|loss| loss["count"].as_u64() > Some(0));
    let lost: Vec<String> = lost
        .map(|loss| {
            format!(
                "{} {}",
                loss["count"],
                word(&loss["reason"]).replace('_', " ")
            )
        })
        .collect();
    if !lost.is_empty() {
        let _ = writeln!(text, "          not measured: {}", lost.join(", "));
    }
}

/// The state of each admission controller that does not admit all work.
fn controllers_report(text: &mut String, targets: &[Value]) {
    let active = targets.iter().flat_map(|target| {
        let controllers = list(&target["controllers"]).iter();
        let active = controllers.filter(|controller| controller["mode"] != "open");
        active.map(move |controller| (target, controller))
    });
    let rows: Vec<_> = active
        .map(|(target, controller)| {
            let percent = |key: &str| {
                let ratio = controller[key].as_f64();
                ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.0}%", ratio * 100.0))
            };
            let time = |key: &str| {
                let ns = controller[key].as_u64();
                ns.map_or_else(|| "-".to_owned(), duration)
            };
            [
                word(&target["directory"]).to_owned(),
                format!(
                    "{} {}",
                    word(&controller["kind"]),
                    bounded(word(&controller["name"]), MAX_NAME_BYTES)
                ),
                word(&controller["mode"]).to_owned(),
                percent("admit_ratio"),
                percent("equilibrium_admit_ratio"),
                percent("utilization"),
                time("standing_delay_ns"),
                time("target_delay_ns"),
                word(&controller["reason"]).to_owned(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        *text += "\nadmission controllers\n";
    }
    table(
        text,
        [
            "SERVICE",
            "QUEUE",
            "MODE",
            "ADMIT",
            "EQUILIBRIUM",
            "UTILIZATION",
            "STANDING DELAY",
            "TARGET",
            "REASON",
        ],
        rows.into_iter(),
    );
}

/// `published`: the services that the agent publishes; `None` if no agent is running.
fn adapters_report(text: &mut String, process: &Value, published: Option<&[Value]>) {
    let _ = writeln!(
        text,
        "\nadapters  PID {}, up for {} s",
        process["pid"], process["uptime_s"]
    );
    let adapters = list(&process["adapters"]);
    let is_published = |service: &str| {
        let directory = directory_of(service);
        published.is_none_or(|services| services.iter().any(|of| of["directory"] == *directory))
    };
    let rows = adapters.iter().map(|adapter| {
        let reply = match adapter["failure"].as_str() {
            Some(failure) => format!("FAILED: {failure}"),
            None if !adapter["target"].as_str().is_none_or(is_published)
                && !is_warned_of_its_service(adapter) =>
            {
                format!("{} (no such service)", word(&adapter["last_reply"]))
            }
            None => word(&adapter["last_reply"]).to_owned(),
        };
        [
            word(&adapter["adapter"]).to_owned(),
            word(&adapter["at"]).to_owned(),
            adapter["target"].as_str().unwrap_or("all").to_owned(),
            adapter["connections"].to_string(),
            adapter["replies"].to_string(),
            last_exchange(adapter),
            reply,
        ]
    });
    table(
        text,
        [
            "ADAPTER",
            "AT",
            "SERVICE",
            "CONNECTED",
            "REPLIES",
            "LAST",
            "LAST REPLY",
        ],
        rows,
    );
    for adapter in adapters {
        for warning in list(&adapter["warnings"]) {
            let _ = writeln!(
                text,
                "  ! {} {}: {}\n      to fix it: {}",
                word(&adapter["adapter"]),
                word(&adapter["at"]),
                word(&warning["text"]),
                word(&warning["remedy"])
            );
        }
    }
    let lost: Vec<String> = adapters
        .iter()
        .flat_map(|adapter| {
            ["rejected", "closed"].into_iter().filter_map(|key| {
                let count = adapter[key].as_u64().filter(|count| *count > 0)?;
                let (name, at) = (word(&adapter["adapter"]), word(&adapter["at"]));
                Some(format!("{name} {at}: {count} {key}"))
            })
        })
        .collect();
    if !lost.is_empty() {
        let _ = writeln!(text, "  connections not served: {}", lost.join(", "));
    }
}

/// Whether one of the adapter's warnings, which are printed below the table, reports that its service is missing.
fn is_warned_of_its_service(adapter: &Value) -> bool {
    let warnings = list(&adapter["warnings"]);
    let mut codes = warnings.iter().map(|warning| &warning["code"]);
    codes.any(|code| code == "no_such_service")
}

/// When the last reply was sent; for HAProxy, also its check interval; for a file, when it was last read.
fn last_exchange(adapter: &Value) -> String {
    let mut text = ago(adapter["last_unix_ns"].as_u64());
    let intervals = list(&adapter["checks"]).iter();
    // The client that asked last.
    let latest = intervals.min_by_key(|client| client["last_age_ns"].as_u64());
    if let Some(interval_ns) = latest.and_then(|client| client["interval_ns"].as_u64()) {
        text += &format!(", every {}", duration(interval_ns));
    }
    if adapter["reads"].is_object() {
        text += &match adapter["reads"]["last_age_ns"].as_u64() {
            Some(age_ns) => format!(", read {} ago", duration(age_ns)),
            None => ", never read".to_owned(),
        };
    }
    text
}

/// The admission signals: `62%, max 6 in service, max wait 10 ms`.
fn admit(target: &Value) -> String {
    let mut text = format!(
        "{:.0}%",
        target["admit_ratio"].as_f64().unwrap_or(1.0) * 100.0
    );
    if let Some(limit) = target["concurrency_limit"].as_u64() {
        text += &format!(", max {limit} in service");
    }
    if let Some(limit_ns) = target["max_queue_wait_ns"].as_u64() {
        text += &format!(", max wait {}", duration(limit_ns));
    }
    text
}

fn ago(unix_ns_then: Option<u64>) -> String {
    unix_ns_then.map_or_else(
        || "never".to_owned(),
        |then| format!("{} ago", duration(unix_ns().saturating_sub(then))),
    )
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The first few names, and the number of the others.
fn first_few(names: &[String]) -> String {
    match names.len().saturating_sub(NAMED_CONSUMERS) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..NAMED_CONSUMERS].join(", ")),
    }
}

/// Writes a table; nothing if it has no rows.
fn table<const N: usize>(
    text: &mut String,
    headers: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) {
    let rows: Vec<[String; N]> = rows.collect();
    if rows.is_empty() {
        return;
    }
    let headers = headers.map(str::to_owned);
    let width = |column: usize| {
        let cells = rows
            .iter()
            .chain([&headers])
            .map(|row| width_of(&row[column]));
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in [&headers].into_iter().chain(&rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| pad(cell, width))
            .collect();
        let _ = writeln!(text, "  {}", cells.join("  ").trim_end());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_report_names_consumers_and_last_replies() {
        let agent = json!({
            "pid": 7, "version": "0.1.0", "directory": "/run/tailback", "last_sample_age_ns": 40_000_000,
            "config": {"file": "/etc/t.toml", "loaded_unix_ns": unix_ns() - 60_000_000_000, "reloads": 0, "rejected": 1,
                "error": "line 2: unknown field", "needs_restart": ["otlp"]},
            "pages": {"written": 1, "failed": 0, "over_limit": 0},
            "targets": [{"directory": "shop", "pid": 42, "level": "critical", "score": 0.93, "admit_ratio": 0.62,
                "concurrency_limit": 6, "max_queue_wait_ns": 10_000_000, "oldest_age_ns": 120_000_000,
                "controllers": [
                    {"kind": "accept", "name": ":80", "mode": "draining", "reason": "standing delay above target",
                        "admit_ratio": 0.62, "equilibrium_admit_ratio": 0.7, "utilization": 0.99,
                        "target_delay_ns": 5_000_000, "standing_delay_ns": 90_000_000},
                    {"kind": "recv", "name": ":80", "mode": "open", "reason": "no overload", "admit_ratio": 1.0}],
                "worst": {"kind": "accept", "name": ":80", "depth": 9, "limit": 100}}],
            "subscribers": [], "stream": {"rejected": 0, "too_slow": 2, "invalid_commands": 0},
        });
        let process = json!({"pid": 8, "uptime_s": 60, "adapters": [
            {"adapter": "haproxy", "at": "127.0.0.1:9401", "target": "shop", "last_reply": "up ready 62%", "replies": 9, "connections": 0,
                "last_unix_ns": unix_ns() - 5_000_000_000, "rejected": 0, "closed": 4,
                "checks": [{"from": "127.0.0.1", "last_age_ns": 5_000_000_000_u64, "interval_ns": 10_000_000_000_u64}],
                "warnings": [{"code": "slow_checks", "text": "checks every 10 s", "remedy": "set `agent-inter 200ms`"}]},
            {"adapter": "envoy", "at": "/run/p", "target": "shop", "last_reply": "no limit", "replies": 1, "connections": 0,
                "reads": {"count": 3, "last_age_ns": 2_000_000_000_u64}},
            {"adapter": "haproxy", "at": "127.0.0.1:9402", "target": "shpo", "last_reply": "up ready 100%", "replies": 9, "connections": 0}]});
        let readers = [Reader {
            pid: 43,
            name: "uwsgi".to_owned(),
            target: "shop".to_owned(),
        }];
        let text = report(&Ok(agent), &Ok(process), &readers);
        for words in [
            "PID 7",
            "last sample 40 ms ago",
            "critical",
            "config    /etc/t.toml, loaded 60 s ago\n          REJECTED since then, the loaded one is in force: line 2: unknown field\n",
            "          in force only after a restart: otlp\n",
            "62%, max 6 in service, max wait 10 ms",
            "accept :80: 9 of 100",
            "draining  62%    70%          99%          90 ms           5.0 ms  standing delay above target\n",
            "uwsgi (43)",
            "2 disconnected as too slow",
            "up ready 62%\n",
            "5.0 s ago, every 10 s  up",
            "never, read 2.0 s ago",
            "  ! haproxy 127.0.0.1:9401: checks every 10 s\n      to fix it: set `agent-inter 200ms`\n",
            "  connections not served: haproxy 127.0.0.1:9401: 4 closed\n",
            "up ready 100% (no such service)\n",
            "never",
        ] {
            assert!(text.contains(words), "{words}:\n{text}");
        }
    }
}
