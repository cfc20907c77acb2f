//! `tailback status`: published signals of the running agent, its adapter process, and connected consumers.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use clap::Args;
use serde_json::{Value, json};

use super::{Failure, exit_code::Outcome};
use crate::{
    adapters::agent as socket,
    collect::unix_ns,
    config::Config,
    signal::names::directory_of,
    text::{bounded, duration, pad, width as width_of},
};

/// Name of the agent's socket in the directory of pages.
const AGENT_SOCKET: &str = "agent.sock";
/// Longest name of a queue in a cell, in bytes.
const MAX_NAME_BYTES: usize = 40;
/// Consumers of a page that are named; the others are counted.
const NAMED_CONSUMERS: usize = 3;

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The agent's configuration file, if it sets [signal] directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON, one object per line: the agent, the adapter process, each process that maps a page
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options
        .config
        .as_deref()
        .map_or_else(|| Ok(Config::default()), Config::read);
    let directory = config.map_err(Failure::usage)?.signal.directory();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime
        .context("cannot connect to the agent")
        .map_err(Failure::bug)?;
    let (agent, process) = runtime.block_on(async {
        tokio::join!(
            socket::ask(&directory, "status"),
            socket::ask_adapter_process(&directory)
        )
    });
    let parse =
        |text: String| serde_json::from_str::<Value>(&text).context("invalid JSON in the reply");
    let agent = agent.and_then(parse);
    let process = process.and_then(parse);
    if let (Err(error), Err(_)) = (&agent, &process) {
        return Err(Failure::no_target(anyhow!(
            "no running agent found at {} ({}): start one with `tailback run`, or pass its --config",
            directory.join(AGENT_SOCKET).display(),
            error.root_cause()
        )));
    }
    // The adapter process maps every page; it is not a consumer itself.
    let own_pid = process
        .as_ref()
        .ok()
        .and_then(|process| process["pid"].as_u64());
    let mut readers = readers(&directory);
    readers.retain(|reader| Some(u64::from(reader.pid)) != own_pid);
    let text = if options.json {
        let objects = [&agent, &process].into_iter().flatten().cloned();
        objects
            .chain(readers.iter().map(Reader::object))
            .fold(String::new(), |text, object| format!("{text}{object}\n"))
    } else {
        report(&agent, &process, &readers)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::stdout)
}

/// A process that maps a service's page.
struct Reader {
    pid: u32,
    name: String,
    target: String,
}

impl Reader {
    fn object(&self) -> Value {
        json!({"type": "reader", "pid": self.pid, "name": self.name, "target": self.target})
    }
}

/// The processes that map a page, in any container and under any path: found by the file's device and inode. A process
/// that reads the page as a file, as the Node library has to, cannot be seen.
fn readers(directory: &Path) -> Vec<Reader> {
    let mut pages: Vec<((u64, u64), String)> = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if let Ok(metadata) = fs::metadata(entry.path().join("page")) {
            let name = entry.file_name().to_string_lossy().into_owned();
            pages.push(((metadata.dev(), metadata.ino()), name));
        }
    }
    let mut readers = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // The process has exited, or we may not read its maps.
        let Ok(maps) = fs::read_to_string(process.path().join("maps")) else {
            continue;
        };
        let mapped: BTreeSet<(u64, u64)> = maps.lines().filter_map(mapping).collect();
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        readers.extend(pages.iter().filter(|(page, _)| mapped.contains(page)).map(
            |(_, target)| Reader {
                pid,
                name: name.trim_end().to_owned(),
                target: target.clone(),
            },
        ));
    }
    readers
}

/// Device and inode of a shared read-only mapping, from a line of `/proc/PID/maps`.
fn mapping(line: &str) -> Option<(u64, u64)> {
    // 7f… -7f… r--s 00000000 00:19 1234   /run/tailback/shop/page
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (access, _, device, inode) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    if access != "r--s" {
        return None;
    }
    let (major, minor) = device.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    Some((device, inode.parse().ok()?))
}

fn report(
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
        duration(agent["last_tick_age_ns"].as_u64().unwrap_or(0)),
    );
    if agent["sampling"] == false {
        *text += "          agent is not sampling (hung?): signals have failed open\n";
    }
    let pages = &agent["pages"];
    let not_written =
        pages["failed"].as_u64().unwrap_or(0) + pages["over_limit"].as_u64().unwrap_or(0);
    let not_written = match not_written {
        0 => String::new(),
        n => format!(" ({n} could not be written)"),
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
        ("refused", "rejected"),
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
        "\nstream    {} subscribers at {}/{AGENT_SOCKET}{disconnected}",
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
            None if !adapter["target"].as_str().is_none_or(is_published) => {
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
            ago(adapter["last_unix_ns"].as_u64()),
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
    use super::*;

    #[test]
    fn a_shared_read_only_mapping_is_a_reader() {
        let line = "7f3a00000000-7f3a00001000 r--s 00000000 00:19 1234    /run/tailback/shop/page";
        assert_eq!(mapping(line), Some((rustix::fs::makedev(0, 0x19), 1234)));
        assert_eq!(
            mapping(&line.replace("r--s", "rw-s")),
            None,
            "the agent's own mapping"
        );
        assert_eq!(mapping(""), None);
    }

    #[test]
    fn the_report_names_consumers_and_last_replies() {
        let agent = json!({
            "pid": 7, "version": "0.1.0", "directory": "/run/tailback", "last_tick_age_ns": 40_000_000,
            "pages": {"written": 1, "failed": 0, "over_limit": 0},
            "targets": [{"directory": "shop", "pid": 42, "level": "critical", "score": 0.93, "admit_ratio": 0.62,
                "concurrency_limit": 6, "max_queue_wait_ns": 10_000_000, "oldest_age_ns": 120_000_000,
                "controllers": [
                    {"kind": "accept", "name": ":80", "mode": "draining", "reason": "standing delay above target",
                        "admit_ratio": 0.62, "equilibrium_admit_ratio": 0.7, "utilization": 0.99,
                        "target_delay_ns": 5_000_000, "standing_delay_ns": 90_000_000},
                    {"kind": "recv", "name": ":80", "mode": "open", "reason": "no overload", "admit_ratio": 1.0}],
                "worst": {"kind": "accept", "name": ":80", "depth": 9, "limit": 100}}],
            "subscribers": [], "stream": {"refused": 0, "too_slow": 2, "invalid_commands": 0}, "agent": null,
        });
        let process = json!({"pid": 8, "uptime_s": 60, "adapters": [
            {"adapter": "haproxy", "at": "127.0.0.1:9401", "target": "shop", "last_reply": "up ready 62%", "replies": 9, "connections": 0},
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
            "62%, max 6 in service, max wait 10 ms",
            "accept :80: 9 of 100",
            "draining  62%    70%          99%          90 ms           5.0 ms  standing delay above target\n",
            "uwsgi (43)",
            "2 disconnected as too slow",
            "up ready 62%\n",
            "up ready 100% (no such service)\n",
            "never",
        ] {
            assert!(text.contains(words), "{words}:\n{text}");
        }
    }
}
