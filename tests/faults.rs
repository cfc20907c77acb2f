//! Targets that vanish while they are monitored: processes, namespaces, cgroups, containers, descriptors. The agent keeps
//! running, reports what happened, and leaks no descriptor.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process::{self, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{Agent, Event, MAX_CPU_SHARE},
    cgroup::Cgroup,
    container::Container,
    lines::Stream,
    needs,
    network::Network,
    ports,
    process::{End, Process},
    program,
    sample::{Sample, number},
    service::Service,
    skip::skip,
    sockets,
    temp::TempDir,
    wait,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// A service with `waiting` connections that it does not accept.
fn jam(command: &mut Command, address: &str, waiting: u32) -> Result<Service> {
    let waiting = waiting.to_string();
    Service::start(
        command,
        &["jam", "--listen", address, "--waiting", &waiting],
    )
}

/// Number of the agent's descriptors by type: `socket`, `anon_inode:bpf_link`, `/proc/7/ns/net` …
fn open_files(agent: &Agent) -> Result<BTreeMap<String, usize>> {
    let directory = format!("/proc/{}/fd", agent.process().pid());
    let mut kinds = BTreeMap::new();
    for file in fs::read_dir(&directory).with_context(|| format!("read {directory}"))? {
        // The descriptor was closed in between.
        let Ok(link) = fs::read_link(file?.path()) else {
            continue;
        };
        let link = link.display().to_string();
        let kind = link.split(":[").next().unwrap_or(&link).to_owned();
        *kinds.entry(kind).or_default() += 1;
    }
    Ok(kinds)
}

/// Descriptors that stay open for 1.5 s. A scan has its iterator open only while it runs.
fn permanently_open(agent: &Agent) -> Result<BTreeMap<String, usize>> {
    let mut kept = open_files(agent)?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1_500) {
        let now = open_files(agent)?;
        kept.retain(|kind, count| {
            *count = (*count).min(now.get(kind).copied().unwrap_or(0));
            *count > 0
        });
        // Polling interval of the measuring period.
        thread::sleep(Duration::from_millis(5));
    }
    Ok(kept)
}

/// Waits until the agent has no more descriptors of any type than before.
fn check_no_leak(agent: &Agent, before: &BTreeMap<String, usize>) -> Result<()> {
    let mut after = BTreeMap::new();
    let closed = wait::until("the agent to close its descriptors", DEADLINE, || {
        after = open_files(agent)?;
        let had = |kind| before.get(kind).copied().unwrap_or(0);
        let grown = after.iter().any(|(kind, count)| *count > had(kind));
        Ok((!grown).then_some(()))
    });
    println!("open: {before:?} before, {after:?} after");
    closed
}

fn is_waiting(event: &Event) -> bool {
    event.is("notice") && event.text("code") == "waiting_for_target"
}

/// Stops the agent. Its exit code must be 0 and its standard error empty.
fn check_clean_exit(agent: &Agent) -> Result<()> {
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(DEADLINE)?;
    let lines = agent.process().lines().all().into_iter();
    let errors: Vec<String> = lines
        .filter(|line| line.stream == Stream::Stderr)
        .map(|line| line.text)
        .collect();
    ensure!(
        end == End::Code(0) && errors.is_empty(),
        "{end:?}: {errors:?}"
    );
    Ok(())
}

#[test]
fn a_killed_target_leaves_no_descriptor_open_in_the_agent() -> Result<()> {
    const TEST: &str = "a_killed_target_leaves_no_descriptor_open_in_the_agent";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let directory = TempDir::new("killed")?;
    let program = program::renamed(SUBJECT, &directory, "short-lived")?;
    let agent = Agent::run(["--name", "short-lived", "--interval", "20ms"])?;
    agent.wait_for("that it waits for a target", DEADLINE, is_waiting)?;
    let before = open_files(&agent)?;
    for _ in 0..5 {
        let mark = agent.mark();
        let service = jam(&mut Command::new(&program), "127.0.0.1:0", 3)?;
        let name = service.address().to_string();
        agent.wait_since(mark, "its queue", DEADLINE, |event| {
            event.is("level") && event.text("name") == name
        })?;
        service.into_process().signal(Signal::KILL)?;
        agent.wait_since(
            mark,
            "that it waits for a target again",
            DEADLINE,
            is_waiting,
        )?;
        let ended = |event: &Event| {
            event.is("episode")
                && event.text("name") == name
                && event.value.get("ongoing").is_none()
        };
        agent.wait_since(mark, "the end of its episode", DEADLINE, ended)?;
    }
    check_no_leak(&agent, &before)?;
    check_clean_exit(&agent)
}

#[test]
fn a_vanished_network_namespace_is_survived_and_released() -> Result<()> {
    const TEST: &str = "a_vanished_network_namespace_is_survived_and_released";
    if !needs::met(TEST, &["ip", "nsenter", "unshare"]) {
        return Ok(());
    }
    let directory = TempDir::new("vanishing")?;
    let program = program::renamed(SUBJECT, &directory, "far-away")?;
    let agent = Agent::run(["--name", "far-away", "--interval", "20ms"])?;
    agent.wait_for("that it waits for a target", DEADLINE, is_waiting)?;
    let before = open_files(&agent)?;
    for round in 0..5 {
        let mark = agent.mark();
        let network = Network::new()?;
        // The same address every time, in a new network.
        let program = program.display().to_string();
        let service = jam(&mut network.command(&program)?, "127.0.0.1:8080", 3 + round)?;
        let level = agent.wait_since(mark, "its queue", DEADLINE, |event| {
            event.is("level") && event.text("name") == "127.0.0.1:8080"
        })?;
        ensure!(
            level.number("depth") == Some(f64::from(3 + round)),
            "{}",
            level.value
        );
        // Both at once, at any point of a sample.
        drop((service, network));
        agent.wait_since(
            mark,
            "that it waits for a target again",
            DEADLINE,
            is_waiting,
        )?;
    }
    check_no_leak(&agent, &before)?;
    check_clean_exit(&agent)
}

#[test]
fn a_cgroup_that_is_removed_and_recreated_is_found_again() -> Result<()> {
    const TEST: &str = "a_cgroup_that_is_removed_and_recreated_is_found_again";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let cgroup = match Cgroup::new() {
        Ok(cgroup) => cgroup,
        Err(error) => {
            skip(TEST, &format!("{error:#}"));
            return Ok(());
        }
    };
    let path = cgroup.path().display().to_string();
    let agent = Agent::run(["--cgroup", &path, "--interval", "20ms"])?;
    agent.wait_for("that it waits for a target", DEADLINE, is_waiting)?;
    let before = open_files(&agent)?;
    for round in 0..4 {
        let mark = agent.mark();
        let service = jam(&mut Command::new(SUBJECT), "127.0.0.1:0", 2)?;
        cgroup.add_process(service.pid())?;
        let name = service.address().to_string();
        agent.wait_since(
            mark,
            &format!("the queue of round {round}"),
            DEADLINE,
            |event| event.is("level") && event.text("name") == name,
        )?;
        drop(service);
        wait::until("the cgroup to be removed", DEADLINE, || {
            Ok(fs::remove_dir(cgroup.path()).ok())
        })?;
        agent.wait_since(
            mark,
            "that it waits for a target again",
            DEADLINE,
            is_waiting,
        )?;
        fs::create_dir(cgroup.path())?;
    }
    check_no_leak(&agent, &before)?;
    check_clean_exit(&agent)
}

#[test]
fn a_service_that_forks_200_times_per_second_costs_little_and_leaks_nothing() -> Result<()> {
    const TEST: &str = "a_service_that_forks_200_times_per_second_costs_little_and_leaks_nothing";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let mut spawner = Command::new(SUBJECT);
    let spawner = Process::start(
        "the spawner",
        spawner.args(["short-lived", "--per-s", "200"]),
    )?;
    spawner.wait_line("spawning", DEADLINE)?;
    let agent = Agent::run(["--pid", &spawner.pid().to_string()])?;
    agent.wait_for("its target", DEADLINE, |event| event.is("target"))?;
    // The first report covers the start, and any may cover a pause of the machine.
    let share = |event: &Event| event.number("cpu_share").unwrap_or(f64::NAN);
    let report = agent.wait_for("that it keeps its budget", 3 * DEADLINE, |event| {
        event.is("agent") && share(event) <= MAX_CPU_SHARE
    })?;
    let died = spawner.lines().all().len().saturating_sub(1) * 100;
    let share = share(&report);
    println!("{died} short-lived processes; the agent used {share:.4} of a core");
    // While the spawner is stopped, the open descriptors do not change.
    let settled = |what: &str| -> Result<BTreeMap<String, usize>> {
        spawner.freeze()?;
        let mut before = permanently_open(&agent)?;
        wait::until(what, DEADLINE, || {
            let now = permanently_open(&agent)?;
            let is_same = now == before;
            before = now;
            Ok(is_same.then(|| before.clone()))
        })
    };
    let first = settled("the agent to settle")?;
    spawner.thaw()?;
    let mark = spawner.lines().count();
    let more = spawner
        .lines()
        .wait("300 more", mark + 2, DEADLINE, |_| Some(()));
    more?;
    let second = settled("the agent to settle again")?;
    println!("open: {first:?}, later {second:?}");
    // A focused service has one iterator per process. Their number is bounded.
    const LINK: &str = "anon_inode:bpf_link";
    const MAX_LINKS: usize = 48;
    let without = |mut open: BTreeMap<String, usize>| {
        let links = open.remove(LINK);
        (open, links.is_some_and(|links| links <= MAX_LINKS))
    };
    let (first, second) = (without(first), without(second));
    ensure!(first.1 && second.1, "more than {MAX_LINKS} iterators");
    ensure!(first.0 == second.0);
    spawner.thaw()?;
    check_clean_exit(&agent)
}

#[test]
fn a_reused_descriptor_is_not_mistaken_for_its_old_queue() -> Result<()> {
    const TEST: &str = "a_reused_descriptor_is_not_mistaken_for_its_old_queue";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let agent = Agent::run(["--pid", &process::id().to_string(), "--interval", "20ms"])?;
    agent.wait_for("its target", DEADLINE, |event| event.is("target"))?;
    let listener = sockets::listen(ports::local(0), 10, false)?;
    let address = listener.local_addr()?;
    let connection = |bytes: usize| -> Result<(TcpStream, TcpStream)> {
        let mut client = TcpStream::connect(address)?;
        sockets::reset_on_close(&client)?;
        let (server, _) = listener.accept()?;
        client.write_all(&vec![0; bytes])?;
        Ok((client, server))
    };
    // One descriptor number is, in turn and without a pause: a connection with many unread bytes, one with few, a pipe, a
    // listener.
    let slot = OwnedFd::from(listener.try_clone()?);
    let number_of = slot.as_raw_fd();
    let mut slot = Some(slot);
    let (begun, mut rounds) = (Instant::now(), 0_u64);
    while begun.elapsed() < Duration::from_secs(4) {
        drop(slot.take());
        let (file, kept): (OwnedFd, Option<TcpStream>) = match rounds % 4 {
            0 => {
                let (client, server) = connection(50_000)?;
                (server.into(), Some(client))
            }
            1 => {
                let (client, server) = connection(10)?;
                (server.into(), Some(client))
            }
            2 => (io::pipe()?.0.into(), None),
            _ => (TcpListener::bind("127.0.0.1:0")?.into(), None),
        };
        slot = Some(file);
        drop(kept);
        rounds += 1;
    }
    drop(slot);
    let (_client, server) = connection(10)?;
    println!(
        "descriptor {number_of} was reused {rounds} times; the last connection is {}",
        server.as_raw_fd()
    );
    let sample = Sample::of_process(process::id())?;
    let queue = sample.queue("recv", &format!(":{}", address.port()))?;
    ensure!(number(queue, "depth")? == 10, "{queue}");
    // No connection ever had more than 50,000 unread bytes.
    for event in agent.events()? {
        let ours = event.text("name") == format!(":{}", address.port());
        let depths = ["depth", "depth_max"].map(|key| event.number(key).unwrap_or(0.0));
        let too_deep = depths.iter().any(|depth| *depth > 50_000.0);
        ensure!(!ours || !too_deep, "{}", event.value);
    }
    check_clean_exit(&agent)
}

// --- containers ---

#[test]
fn a_container_is_named_and_its_removal_is_survived() -> Result<()> {
    const TEST: &str = "a_container_is_named_and_its_removal_is_survived";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    if program::find(&["podman"]).is_none() {
        skip(TEST, "podman is not installed");
        return Ok(());
    }
    let options = ["--network=none", "--cpus", "0.5", "--memory", "64m"];
    if let Err(error) = Container::check_can_run(&options) {
        skip(TEST, &format!("podman cannot run here: {error:#}"));
        return Ok(());
    }
    let container = Container::new()?;
    program::copy(Path::new(SUBJECT), &container.root().join("subject"))?;
    let before = container.before(&options)?;
    let jam = ["jam", "--listen", "127.0.0.1:8080", "--waiting", "5"];
    let mut podman = Command::new(&before[0]);
    podman.args(&before[1..]).arg("/subject").args(jam);
    let run = Process::start("podman", &mut podman)?;
    run.wait_line("listening ", DEADLINE)?;
    let id = container.id()?;
    let sample = Sample::of(&["--pid", &container.pid()?.to_string()])?;
    let target = sample.targets().next().context("no target")?;
    println!("{target}");
    ensure!(target["container"] == *id, "its id is {id}: {target}");
    ensure!(target["processes"] == 1, "{target}");
    let queue = sample.queue("accept", "127.0.0.1:8080")?;
    ensure!(number(queue, "depth")? == 5, "{queue}");
    ensure!(number(sample.queue("fd", "open files")?, "limit")? == 1024);
    // Selected by its cgroup it is the same target. It is monitored until its removal, then the agent waits for it.
    let cgroup = target["cgroup"].as_str().context("no cgroup")?.to_owned();
    let by_cgroup = Sample::of(&["--cgroup", &cgroup])?;
    ensure!(number(by_cgroup.queue("accept", "127.0.0.1:8080")?, "depth")? == 5);
    let agent = Agent::run(["--cgroup", &cgroup, "--interval", "20ms"])?;
    agent.wait_for("its queue", DEADLINE, |event| {
        event.is("level") && event.text("name") == "127.0.0.1:8080"
    })?;
    drop(container);
    agent.wait_for("that it waits for a target", DEADLINE, is_waiting)?;
    agent.wait_for("the end of its episode", DEADLINE, |event| {
        event.is("episode") && event.value.get("ongoing").is_none()
    })?;
    check_clean_exit(&agent)
}
