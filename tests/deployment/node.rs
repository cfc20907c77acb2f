//! `run --all` on a node: what is a service, what it is called, and how much is printed about a node with many short-lived processes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent::{Agent, Event},
    cgroup::Cgroup,
    container::{Container, PodLink},
    needs, ports,
    process::Process,
    service::Service,
    temp::TempDir,
    wait,
};

use crate::{CAPABILITIES, DEADLINE, allowed, contained};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");

/// Age at which a process that does not listen is a service.
const SETTLED: Duration = Duration::from_millis(5_500);

/// A web server in a container, which calls itself `shop`.
fn web() -> Result<(Container, Process)> {
    let container = Container::new()?;
    let port = ports::free()?.to_string();
    let before = container.before(&["--network=host", "--env=OTEL_SERVICE_NAME=shop"])?;
    let mut command = Command::new(&before[0]);
    // The shell is the first process; the server is its child.
    let script = format!("/usr/bin/python3 -u -m http.server {port} & echo started; wait");
    command
        .args(&before[1..])
        .args(["/usr/bin/sh", "-c", &script]);
    let process = Process::start("the container", &mut command)?;
    process.wait_line("started", DEADLINE)?;
    wait::until_ok("the container", DEADLINE, || {
        ensure!(container.pid()? > 0);
        Ok(())
    })?;
    Ok((container, process))
}

/// The latest line about each service, by its name.
fn services(lines: &[Value]) -> BTreeMap<String, Value> {
    let targets = lines.iter().filter(|line| line["type"] == "target");
    targets
        .filter_map(|line| Some((line["target"].as_str()?.to_owned(), line.clone())))
        .collect()
}

fn values(events: &[Event]) -> Vec<Value> {
    events.iter().map(|event| event.value.clone()).collect()
}

#[test]
fn a_node_agent_names_containers_and_units() -> Result<()> {
    if !allowed("a_node_agent_names_containers_and_units") {
        return Ok(());
    }
    let (pod, _pod_process) = web()?;
    let _link = PodLink::new(&format!("shop-0_test_web-{}.log", pod.id()?))?;
    let (plain, _plain_process) = web()?;
    // A unit, as systemd makes its group: two programs, of which one listens.
    let unit = format!("tailback-test-{}.service", std::process::id());
    let group = Cgroup::below_system_slice(&unit)?;
    let prefix = group.prefix();
    let mut command = Command::new(&prefix[0]);
    command.args(&prefix[1..]).arg(SUBJECT);
    let _listens = Service::start(
        &mut command,
        &[
            "jam",
            "--listen",
            "127.0.0.1:0",
            "--backlog",
            "10",
            "--waiting",
            "1",
        ],
    )?;
    let mut command = Command::new(&prefix[0]);
    let _helper = Process::start(
        "the helper",
        command.args(&prefix[1..]).args(["sleep", "1000"]),
    )?;
    let expected = [
        ("test/shop-0/web", 2),
        (plain.name(), 2),
        (unit.trim_end_matches(".service"), 2),
    ];
    // All of them are services before the first agent starts, so that its first list, to which no bound applies, has them.
    thread::sleep(SETTLED);
    let has_all = |lines: &[Value]| {
        let services = services(lines);
        expected.iter().all(|(name, processes)| {
            services
                .get(*name)
                .is_some_and(|service| service["processes"] == *processes)
        })
    };
    // No process of a container is another service, and what runs beside it is none.
    let ids = [pod.id()?, plain.id()?];
    let check = |place: &str, lines: &[Value]| {
        let services = services(lines);
        println!("{place}: {:?}", services.keys().collect::<Vec<_>>());
        for (name, service) in services {
            let is_ours = ids.iter().any(|id| service["container"] == id.as_str());
            let is_expected = expected.iter().any(|(expected, _)| *expected == name);
            ensure!(!is_ours || is_expected, "{place}: {service}");
            // Tests beside this one start containers, too: for a moment, a new conmon is still in podman's own group.
            let pid = service["pid"].as_u64().context("no pid")?;
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments);
            let runs_ours = ids.iter().any(|id| arguments.contains(id.as_str()));
            ensure!(
                service["comm"] != "conmon" || !runs_ours,
                "{place}: {service}"
            );
        }
        Ok(())
    };

    let agent = Agent::run(["--all"])?;
    let on_host = wait::until("all services", DEADLINE, || {
        agent.process().check_running()?;
        let lines = values(&agent.events()?);
        Ok(has_all(&lines).then_some(lines))
    })?;
    check("on the host", &on_host)?;

    // In a container, the kubelet's links and podman's files are those of the node.
    let options = ["--pid=host", "--cgroupns=private"];
    let (_container, node_agent) = contained(&options, &CAPABILITIES, &["run", "--all", "--json"])?;
    let in_container = wait::until("all services, seen from a container", DEADLINE, || {
        node_agent.check_running()?;
        let lines = node_agent.lines().all().into_iter();
        let lines: Vec<Value> = lines
            .filter_map(|line| serde_json::from_str(&line.text).ok())
            .collect();
        Ok(has_all(&lines).then_some(lines))
    })?;
    check("in a container", &in_container)?;

    let page = agent.run_directory().join("pods/test_shop-0_web/page");
    wait::until("the page of the pod", DEADLINE, || {
        Ok(page.exists().then_some(()))
    })?;
    Ok(())
}

/// Processes started per second, and for how long.
const STORM_PER_S: u64 = 50;
const STORM: Duration = Duration::from_secs(20);
/// Fewer processes mean nothing: where they start slowly, the storm goes on.
const MIN_STARTED: usize = 500;
/// Most lines about services in an interval, without their summary.
const LINES_PER_INTERVAL: usize = 20;
/// Length of an interval, s: see `targets` in docs/reference/json.md.
const INTERVAL_S: usize = 10;
/// The pages that the agent may publish.
const MAX_PAGES: usize = 8;

/// Starts processes with names of their own. Each tenth listens, and lives for a second.
fn storm(directory: &TempDir) -> Result<usize> {
    let begun = Instant::now();
    let mut children: Vec<(Instant, Child)> = Vec::new();
    let mut count = 0;
    while begun.elapsed() < STORM || count < MIN_STARTED {
        let program = directory.path().join(format!("storm-{count}"));
        std::os::unix::fs::symlink(SUBJECT, &program)?;
        let listens = count % 10 == 0;
        let mut command = Command::new(&program);
        if listens {
            command.args([
                "jam",
                "--listen",
                "127.0.0.1:0",
                "--backlog",
                "1",
                "--waiting",
                "0",
            ]);
        } else {
            command.args(["park", "--threads", "1"]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let lives = Duration::from_millis(if listens { 1_000 } else { 20 });
        children.push((Instant::now() + lives, child));
        count += 1;
        let due = begun + Duration::from_millis(1_000 * count as u64 / STORM_PER_S);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let (ended, living) = children
            .into_iter()
            .partition(|(end, _)| *end <= Instant::now());
        children = living;
        end(ended)?;
    }
    end(children)?;
    Ok(count)
}

fn end(children: Vec<(Instant, Child)>) -> Result<()> {
    for (_, mut child) in children {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn directories(run: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(run)?.flatten();
    Ok(entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect())
}

#[test]
fn output_is_bounded_while_processes_come_and_go() -> Result<()> {
    const TEST: &str = "output_is_bounded_while_processes_come_and_go";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let temp = TempDir::new("storm")?;
    for output in [&["--json"][..], &[]] {
        let port = ports::free()?;
        let text = format!(
            "cpu_budget = 0.05\n[signal]\nmax_pages = {MAX_PAGES}\n[signal.http]\nlisten = \"127.0.0.1:{port}\"\n"
        );
        let config = temp.write("tailback.toml", &text)?.display().to_string();
        let mut command = Command::new(tailback_tests::agent::binary()?);
        command
            .arg("run")
            .args(output)
            .args(["--all", "--config", &config]);
        let run = TempDir::new("run")?;
        command.env("RUNTIME_DIRECTORY", run.path());
        let process = Process::start("tailback", &mut command)?;
        // No bound applies to the first list. It is complete when services are published and no line is added.
        let mut seen = 0;
        wait::until_ok("the first list", DEADLINE, || {
            process.check_running()?;
            ensure!(metrics(port)?.contains("tailback_target_info{"));
            let count = process.lines().count();
            ensure!(std::mem::replace(&mut seen, count) == count && count > 0);
            Ok(())
        })?;
        let programs = TempDir::new("programs")?;
        let mark = process.lines().count();
        let begun = Instant::now();
        let started = storm(&programs)?;
        // As many as it may have touched.
        let intervals = begun.elapsed().as_secs() as usize / INTERVAL_S + 2;
        let lines = process.lines().since(mark);
        let about: Vec<&str> = lines
            .iter()
            .map(|line| line.text.as_str())
            .filter(|text| {
                [
                    "\"type\":\"target",
                    "  watching",
                    "  exited",
                    "  services",
                    "storm-",
                ]
                .iter()
                .any(|word| text.contains(word))
            })
            .collect();
        let pages = directories(run.path())?.len();
        // None while a sample is late.
        let metrics = wait::until_ok("the metrics of services", DEADLINE, || {
            let metrics = metrics(port)?;
            ensure!(metrics.contains("target=\""), "{metrics}");
            Ok(metrics)
        })?;
        let series = metrics
            .lines()
            .filter(|line| line.contains("target=\""))
            .count();
        println!(
            "{started} processes in {STORM:?}: {} lines in all, {} about services, {pages} directories, {series} series of services",
            lines.len(),
            about.len()
        );
        let most = intervals * (LINES_PER_INTERVAL + 1);
        ensure!(!about.is_empty() && about.len() <= most, "{about:#?}");
        let notices = lines
            .iter()
            .filter(|line| line.text.contains("duplicate service name"));
        ensure!(notices.count() <= 1);
        // Those with a page and those that are kept for a restart, each twice, and that of pods.
        ensure!(pages <= 4 * MAX_PAGES + 1, "{pages} directories");
        // A few families for each service that is there now, none for those that are gone.
        let storms = metrics.matches("storm-").count();
        ensure!(storms < 20 * 30, "{storms} series of short-lived processes");
        ensure!(series > 0, "{metrics}");
        process.check_running()?;
    }
    Ok(())
}

fn metrics(port: u16) -> Result<String> {
    let response = tailback_tests::http::get(ports::local(port), "/metrics", DEADLINE)?;
    String::from_utf8(response.body).context("metrics are not UTF-8")
}
