//! The agent says the same wherever it runs: on the host, in a container beside the service, or as a node agent, with private and
//! with host control group namespaces. What it cannot see there, it names. What the services of a node are called, and who gets a name.

mod capabilities;
mod chart;
mod doctor;
mod image;
mod names;
mod node;
mod systemd;
mod verdicts;

use std::{path::Path, process::Command, time::Duration};

use anyhow::Result;
use serde_json::Value;
use tailback_tests::{
    agent,
    container::Container,
    load::{Load, Plan, Spacing},
    needs, ports,
    process::{End, Process},
    program,
    skip::skip,
};

/// Deadline of each wait. Podman takes seconds on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
const SERVICE: &str = include_str!("service.py");
/// The capabilities that the agent needs, and the one that lets it read files of other users.
const CAPABILITIES: [&str; 4] = ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH"];
/// Further ones that the adapter process of an agent of root needs, for some adapters.
const OF_ADAPTERS: [&str; 4] = ["SETUID", "KILL", "DAC_OVERRIDE", "NET_BIND_SERVICE"];
/// Hides the control groups that podman mounts.
const NO_CGROUPS: &str = "--mount=type=tmpfs,destination=/sys/fs/cgroup,notmpcopyup";
/// Like [`NO_CGROUPS`], but podman copies the hidden files into the tmpfs. The agent must not believe the copies.
const FALSE_CGROUPS: &str = "--mount=type=tmpfs,destination=/sys/fs/cgroup";

/// Whether containers can run here. If not, `test` is reported as skipped.
fn allowed(test: &str) -> bool {
    if !needs::met(test, &["podman", "python3"]) {
        return false;
    }
    match Container::check_can_run(&["--network=host"]) {
        Ok(()) => true,
        Err(error) => {
            skip(test, &format!("podman cannot run here: {error:#}"));
            false
        }
    }
}

/// A service in a container, under load.
struct Service {
    // Dropped in this order.
    _load: Load,
    _process: Process,
    container: Container,
    port: u16,
}

impl Service {
    /// `options` are podman's: the limits.
    fn start(kind: &str, per_s: f64, options: &[&str]) -> Result<Self> {
        let container = Container::new()?;
        std::fs::write(container.root().join("service.py"), SERVICE)?;
        let port = ports::free()?;
        let options = [&["--network=host"], options].concat();
        let before = container.before(&options)?;
        let mut command = Command::new(&before[0]);
        command
            .args(&before[1..])
            .args(["/usr/bin/python3", "/service.py", kind])
            .args([&port.to_string(), "2"]);
        let process = Process::start("the service", &mut command)?;
        process.wait_line("listening", DEADLINE)?;
        let load = Load::start(Plan {
            to: ports::local(port),
            path: "/".to_owned(),
            per_s,
            spacing: Spacing::Poisson { seed: 7 },
            duration: Duration::from_secs(120),
            timeout: Duration::from_secs(30),
            max_in_flight: 500,
        })?;
        Ok(Self {
            _load: load,
            _process: process,
            container,
            port,
        })
    }
}

/// Runs the agent in a container with these options of podman, and only these capabilities.
fn contained(
    options: &[&str],
    capabilities: &[&str],
    arguments: &[&str],
) -> Result<(Container, Process)> {
    let container = Container::new()?;
    program::copy(&agent::binary()?, &container.root().join("tailback"))?;
    let added = format!("--cap-add={}", capabilities.join(","));
    // The seccomp profile of older podman versions allows bpf(2) with CAP_SYS_ADMIN only.
    let mut all = vec![
        "--security-opt=seccomp=unconfined",
        "--cap-drop=ALL",
        "--env=RUNTIME_DIRECTORY=/tmp",
    ];
    if !capabilities.is_empty() {
        all.push(&added);
    }
    if !options.iter().any(|option| option.starts_with("--network")) {
        all.push("--network=host");
    }
    all.extend(options);
    let before = container.before(&all)?;
    let mut command = Command::new(&before[0]);
    command
        .args(&before[1..])
        .arg(Path::new("/tailback"))
        .args(arguments);
    let process = Process::start("the agent", &mut command)?;
    Ok((container, process))
}

/// All capabilities but one.
fn without(lost: &str) -> Vec<&'static str> {
    let all = CAPABILITIES.into_iter().chain(OF_ADAPTERS);
    // CAP_DAC_OVERRIDE also allows what CAP_DAC_READ_SEARCH does.
    all.filter(|name| *name != lost && !(lost == "DAC_READ_SEARCH" && *name == "DAC_OVERRIDE"))
        .collect()
}

/// Waits until the agent ends. Returns how, and the JSON lines that it printed.
fn json_lines(process: &Process) -> Result<(End, Vec<Value>)> {
    let end = process.wait_end(DEADLINE)?;
    process.lines().wait_end(DEADLINE)?;
    let lines = process.lines().all().into_iter();
    let values = lines.filter_map(|line| serde_json::from_str(&line.text).ok());
    Ok((end, values.collect()))
}
