//! One service, and agents in all places at the same time.

use std::{
    collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, path::PathBuf, process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent,
    container::Container,
    needs,
    process::{End, Process},
    program,
    skip::skip,
    temp::TempDir,
    wait,
};

use crate::{CAPABILITIES, FALSE_CGROUPS, NO_CGROUPS, Service, allowed, contained, json_lines};

/// What an agent says of one service.
struct Report {
    place: &'static str,
    verdicts: Vec<Value>,
}

impl Report {
    /// Of an agent that was started with `diagnose --json`, when it has ended.
    fn when_ended(place: &'static str, agent: &Process) -> Result<Self> {
        let (end, lines) = json_lines(agent)?;
        ensure!(end == End::Code(0), "{place}: {end:?}, {lines:#?}");
        let verdicts = lines.into_iter().filter(|line| line["cause"].is_string());
        Ok(Self {
            place,
            verdicts: verdicts.collect(),
        })
    }

    /// The verdicts with this cause. Their absence is an error that shows all.
    fn of(&self, cause: &str) -> Result<Vec<&Value>> {
        let found: Vec<&Value> = self
            .verdicts
            .iter()
            .filter(|verdict| verdict["cause"] == cause)
            .collect();
        ensure!(
            !found.is_empty(),
            "{}: no {cause}, but {:#?}",
            self.place,
            self.verdicts
        );
        Ok(found)
    }

    fn causes(&self) -> BTreeSet<&str> {
        let causes = self
            .verdicts
            .iter()
            .map(|verdict| verdict["cause"].as_str());
        causes.map(Option::unwrap_or_default).collect()
    }
}

/// Asks agents in all places at the same time.
fn ask_everywhere(service: &Service) -> Result<Vec<Report>> {
    let port = service.port.to_string();
    let arguments = ["diagnose", "--port", &port, "--for", "8s", "--json"];
    let beside = format!("--pid=container:{}", service.container.name());
    let hidden = ["--cgroupns=private", NO_CGROUPS];
    let places: [(&'static str, Vec<&str>); 4] = [
        (
            "beside it, without control groups",
            [&[beside.as_str()], &hidden[..]].concat(),
        ),
        (
            "beside it, in the host's control group namespace",
            vec![&beside, "--cgroupns=host"],
        ),
        (
            "node agent in a private control group namespace",
            vec!["--pid=host", "--cgroupns=private"],
        ),
        (
            "node agent in the host's control group namespace",
            vec!["--pid=host", "--cgroupns=host"],
        ),
    ];
    let mut command = Command::new(agent::binary()?);
    let on_host = Process::start("the agent", command.args(arguments))?;
    let mut agents: Vec<(&'static str, Option<Container>, Process)> =
        vec![("on the host", None, on_host)];
    for (place, options) in places {
        let (container, process) = contained(&options, &CAPABILITIES, &arguments)?;
        agents.push((place, Some(container), process));
    }
    let reports = agents
        .iter()
        .map(|(place, _, process)| Report::when_ended(place, process));
    reports.collect()
}

#[test]
fn a_cpu_quota_is_the_cause_everywhere() -> Result<()> {
    if !allowed("a_cpu_quota_is_the_cause_everywhere") {
        return Ok(());
    }
    let service = Service::start("compute", 20.0, &["--cpus=0.2"])?;
    wait::unless_paused(|| check_quota(&service))
}

/// The quota is the only cause in all places.
fn check_quota(service: &Service) -> Result<()> {
    for report in ask_everywhere(service)? {
        let verdicts = report.of("cpu_throttled")?;
        ensure!(
            report.causes() == ["cpu_throttled"].into(),
            "{}: {:?}",
            report.place,
            report.causes()
        );
        for verdict in verdicts {
            ensure!(
                verdict["confidence"] == "high",
                "{}: {verdict}",
                report.place
            );
            let evidence = verdict["evidence"].as_str().unwrap_or_default();
            ensure!(
                evidence.contains("its quota is 0.20 CPUs"),
                "{}: {verdict}",
                report.place
            );
        }
    }
    Ok(())
}

/// The disk that temporary directories are on, by its numbers. `None`: there is none behind them, and the test is skipped.
fn disk(test: &str) -> Result<Option<String>> {
    let directory = TempDir::new("disk")?;
    let device = fs::metadata(directory.path())?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let Ok(link) = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        skip(test, "no block device behind temporary directories");
        return Ok(None);
    };
    // Limits are on whole disks.
    let disk = if link.join("partition").exists() {
        link.parent()
            .context("a partition without a disk")?
            .to_owned()
    } else {
        link
    };
    let name = disk.file_name().context("a disk without a name")?;
    Ok(Some(format!("/dev/{}", name.to_string_lossy())))
}

#[test]
fn the_memory_limit_of_the_service_is_the_cause_everywhere() -> Result<()> {
    const TEST: &str = "the_memory_limit_of_the_service_is_the_cause_everywhere";
    if !allowed(TEST) {
        return Ok(());
    }
    let Some(disk) = disk(TEST)? else {
        return Ok(());
    };
    // Slows reads down, so that reading evicted pages again matters.
    let reads = format!("--device-read-iops={disk}:2000");
    let limits = ["--memory=48m", "--memory-swap=48m", &reads];
    let service = Service::start("look-up", 5.0, &limits)?;
    wait::unless_paused(|| check_memory(&service))
}

/// The limit of the service's own control group is the cause in all places.
fn check_memory(service: &Service) -> Result<()> {
    let mut on_host = None;
    for report in ask_everywhere(service)? {
        let verdicts = report.of("memory_stalled")?;
        // The queue for memory itself fills only if the kernel counts its waits for the disk as stalls.
        let of_queue = verdicts.iter().find(|verdict| verdict["kind"] == "accept");
        let verdict = of_queue.with_context(|| format!("{}: {verdicts:?}", report.place))?;
        // Of its own control group, not of the machine: 48 MiB.
        let evidence = verdict["evidence"].as_str().unwrap_or_default();
        ensure!(
            evidence.contains("limit of 50.3 MB"),
            "{}: {verdict}",
            report.place
        );
        ensure!(
            evidence.contains("had been evicted"),
            "{}: {verdict}",
            report.place
        );
        ensure!(
            !evidence.contains("hidden from the agent"),
            "{}: {verdict}",
            report.place
        );
        let confidence = verdict["confidence"].clone();
        ensure!(
            confidence == "high" || confidence == "medium",
            "{}: {verdict}",
            report.place
        );
        let expected = on_host.get_or_insert_with(|| confidence.clone());
        ensure!(confidence == *expected, "not {expected}, but {verdict}");
    }
    Ok(())
}

#[test]
fn io_limits_are_part_of_the_answer_everywhere() -> Result<()> {
    const TEST: &str = "io_limits_are_part_of_the_answer_everywhere";
    if !allowed(TEST) {
        return Ok(());
    }
    let Some(disk) = disk(TEST)? else {
        return Ok(());
    };
    let limit = format!("--device-write-iops={disk}:20");
    let service = Service::start("write", 30.0, &[&limit])?;
    let name = disk.trim_start_matches("/dev/");
    wait::unless_paused(|| {
        for report in ask_everywhere(&service)? {
            for verdict in report.of("disk_slow")? {
                let evidence = verdict["evidence"].as_str().unwrap_or_default();
                let expected = format!("its control group allows 20 writes/s on {name}");
                ensure!(evidence.contains(&expected), "{}: {verdict}", report.place);
                ensure!(
                    verdict["confidence"] == "high",
                    "{}: {verdict}",
                    report.place
                );
            }
        }
        Ok(())
    })?;
    // So does an agent that runs, although it has dropped its privileges by then.
    let port = service.port.to_string();
    let beside = format!("--pid=container:{}", service.container.name());
    let options = [beside.as_str(), "--cgroupns=private", NO_CGROUPS];
    let arguments = ["run", "--port", &port, "--json", "--duration", "10s"];
    let (_container, process) = contained(&options, &CAPABILITIES, &arguments)?;
    let (_, events) = json_lines(&process)?;
    let expected = format!("its control group allows 20 writes/s on {name}");
    let is_shown = |event: &Value| {
        let evidence = event["evidence"].as_str();
        event["type"] == "episode" && evidence.is_some_and(|text| text.contains(&expected))
    };
    ensure!(events.iter().any(is_shown), "{events:?}");
    drop(service);

    // Neither the service's container nor the agent's has control groups: the limit is hidden, not absent.
    let service = Service::start("write", 30.0, &[&limit, FALSE_CGROUPS])?;
    let port = service.port.to_string();
    let beside = format!("--pid=container:{}", service.container.name());
    let options = [beside.as_str(), "--cgroupns=private", NO_CGROUPS];
    let arguments = ["diagnose", "--port", &port, "--for", "8s", "--json"];
    let (_container, process) = contained(&options, &CAPABILITIES, &arguments)?;
    let report = Report::when_ended("beside it, all control groups hidden", &process)?;
    for verdict in report.of("disk_slow")? {
        let evidence = verdict["evidence"].as_str().unwrap_or_default();
        ensure!(
            evidence.contains("hidden from the agent: the I/O limits"),
            "{verdict}"
        );
        ensure!(verdict["confidence"] == "low", "{verdict}");
    }
    let (_container, process) = contained(&options, &CAPABILITIES, &["doctor", "--json"])?;
    let (_, checks) = json_lines(&process)?;
    let check = checks
        .iter()
        .find(|check| check["name"] == "limits of services")
        .context("no such check")?;
    ensure!(check["state"] == "failed", "{check}");
    ensure!(
        check["why"]
            .as_str()
            .unwrap_or_default()
            .contains("I/O limits of /"),
        "{check}"
    );
    for remedy in [
        "hostPath: {path: /sys/fs/cgroup}",
        "--volume /sys/fs/cgroup:/sys/fs/cgroup:ro",
    ] {
        ensure!(
            check["remedy"]
                .as_str()
                .unwrap_or_default()
                .contains(remedy),
            "{check}"
        );
    }
    Ok(())
}

/// Mounts a file of the service's container over one of its control group's files, as the owner of the container can.
fn cover(service: &Service, file: &str, with: &str) -> Result<()> {
    let pid = service.container.pid()?.to_string();
    let mut command = Command::new(program::need(&["nsenter"])?);
    command.args(["--target", &pid, "--mount", "--", "/usr/bin/mount"]);
    let output = command.args(["--bind", with, file]).output()?;
    ensure!(
        output.status.success(),
        "mount {with} over {file}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn files_mounted_over_a_control_group_neither_block_the_agent_nor_deceive_it() -> Result<()> {
    const TEST: &str = "files_mounted_over_a_control_group_neither_block_the_agent_nor_deceive_it";
    if !allowed(TEST) || !needs::met(TEST, &["nsenter", "mkfifo"]) {
        return Ok(());
    }
    let Some(disk) = disk(TEST)? else {
        return Ok(());
    };
    let limit = format!("--device-write-iops={disk}:20");
    let service = Service::start("write", 30.0, &[&limit])?;
    let numbers = fs::read_to_string(format!(
        "/sys/class/block/{}/dev",
        disk.trim_start_matches("/dev/")
    ))?;
    let numbers = numbers.trim();
    // A FIFO that nobody writes to: whoever opens it waits.
    let root = service.container.root();
    let made = Command::new(program::need(&["mkfifo"])?)
        .arg(root.join("fifo"))
        .status()?;
    ensure!(made.success(), "mkfifo: {made}");
    let v1 = root_of(&service)?.join("sys/fs/cgroup/blkio").is_dir();
    if v1 {
        fs::write(root.join("false"), format!("{numbers} 7\n"))?;
        let files = "/sys/fs/cgroup/blkio/blkio.throttle";
        cover(&service, &format!("{files}.write_iops_device"), "/false")?;
        cover(&service, &format!("{files}.read_iops_device"), "/fifo")?;
        cover(&service, "/sys/fs/cgroup/memory/memory.stat", "/fifo")?;
    } else {
        fs::write(root.join("false"), format!("{numbers} wiops=7\n"))?;
        cover(&service, "/sys/fs/cgroup/io.max", "/false")?;
        cover(&service, "/sys/fs/cgroup/io.pressure", "/fifo")?;
        cover(&service, "/sys/fs/cgroup/memory.stat", "/fifo")?;
    }
    // The service's own mounts are the only ones that the agent can reach.
    let port = service.port.to_string();
    let beside = format!("--pid=container:{}", service.container.name());
    let options = [beside.as_str(), "--cgroupns=private", NO_CGROUPS];
    let arguments = ["diagnose", "--port", &port, "--for", "8s", "--json"];
    let (_container, process) = contained(&options, &CAPABILITIES, &arguments)?;
    let report = Report::when_ended("beside it, files of its control group covered", &process)?;
    for verdict in report.of("disk_slow")? {
        let evidence = verdict["evidence"].as_str().unwrap_or_default();
        ensure!(
            evidence.contains("hidden from the agent: the I/O limits"),
            "{verdict}"
        );
        ensure!(!evidence.contains("7 writes/s"), "{verdict}");
        ensure!(verdict["confidence"] == "low", "{verdict}");
    }
    Ok(())
}

/// The root directory of the service's container, with what is mounted there.
fn root_of(service: &Service) -> Result<PathBuf> {
    Ok(PathBuf::from(format!(
        "/proc/{}/root",
        service.container.pid()?
    )))
}

#[test]
fn an_agent_in_the_services_own_container_sees_its_quota() -> Result<()> {
    const TEST: &str = "an_agent_in_the_services_own_container_sees_its_quota";
    if !allowed(TEST) || !needs::met(TEST, &["nsenter"]) {
        return Ok(());
    }
    let service = Service::start("compute", 20.0, &["--cpus=0.2", "--cgroupns=private"])?;
    program::copy(
        &agent::binary()?,
        &service.container.root().join("tailback"),
    )?;
    let pid = service.container.pid()?.to_string();
    let port = service.port.to_string();
    wait::unless_paused(|| check_own_quota(&pid, &port))
}

/// An agent in the container of this process sees its quota.
fn check_own_quota(pid: &str, port: &str) -> Result<()> {
    let mut command = Command::new(program::need(&["nsenter"])?);
    command.env("RUNTIME_DIRECTORY", "/tmp");
    command.args(["--target", pid, "--mount", "--pid", "--cgroup", "--"]);
    command.args(["/tailback", "diagnose", "--port", port]);
    let process = Process::start("the agent", command.args(["--for", "8s", "--json"]))?;
    let report = Report::when_ended("in its own container", &process)?;
    for verdict in report.of("cpu_throttled")? {
        ensure!(verdict["confidence"] == "high", "{verdict}");
        let evidence = verdict["evidence"].as_str().unwrap_or_default();
        ensure!(evidence.contains("its quota is 0.20 CPUs"), "{verdict}");
    }
    Ok(())
}

#[test]
fn a_healthy_service_is_healthy_everywhere() -> Result<()> {
    if !allowed("a_healthy_service_is_healthy_everywhere") {
        return Ok(());
    }
    // Limits that are not reached.
    let limits = ["--cpus=1.5", "--memory=256m"];
    let service = Service::start("compute", 5.0, &limits)?;
    wait::unless_paused(|| check_healthy(&service))
}

fn check_healthy(service: &Service) -> Result<()> {
    for report in ask_everywhere(service)? {
        ensure!(
            report.verdicts.is_empty(),
            "{}: {:#?}",
            report.place,
            report.verdicts
        );
    }
    Ok(())
}
