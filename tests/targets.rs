//! Whom the agent finds: services of many processes, in namespaces and cgroups, that come, change and go.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent, Event},
    cgroup::Cgroup,
    lines::Stream,
    look::{Look, number},
    needs,
    network::Network,
    ports,
    process::{End, Process},
    program,
    service::{Pace, Service},
    skip::skip,
    ss,
    temp::TempDir,
    wait,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
const SOON: Duration = Duration::from_secs(20);
/// Within this, a new process is found.
const FOUND: Duration = Duration::from_secs(1);

/// A service that takes one connection and is then busy for a minute: the rest wait.
struct Busy {
    service: Service,
    _pace: Pace,
}

impl Busy {
    fn start(command: &mut Command, address: &str, args: &[&str]) -> Result<Self> {
        let pace = Pace::new(Duration::from_secs(60))?;
        let file = pace.file().display().to_string();
        let mut words = vec!["take", "--listen", address, "--pace", &file];
        words.extend(args);
        Ok(Self {
            service: Service::start(command, &words)?,
            _pace: pace,
        })
    }

    fn usual(args: &[&str]) -> Result<Self> {
        Self::start(&mut Command::new(SUBJECT), "127.0.0.1:0", args)
    }

    fn address(&self) -> SocketAddr {
        self.service.address()
    }

    fn pid(&self) -> u32 {
        self.service.pid()
    }
}

fn connect(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let one = |_| TcpStream::connect(to).with_context(|| format!("connect to {to}"));
    (0..count).map(one).collect()
}

/// Until so many wait at a port.
fn wait_for_depth(port: u16, depth: u64) -> Result<()> {
    ss::wait_for(None, port, &format!("{depth} to wait"), |waiting| {
        waiting == depth
    })
    .map(drop)
}

/// That there is one target of so many processes with this one accept queue, as `ss` sees it.
fn check_one_target(look: &Look, address: SocketAddr, processes: u64, sockets: u64) -> Result<()> {
    let targets: Vec<&Value> = look.targets().collect();
    let queues: Vec<&Value> = look.queues("accept").collect();
    println!(
        "{} target(s), processes {:?}, accept queues {:?}",
        targets.len(),
        targets
            .iter()
            .map(|target| &target["processes"])
            .collect::<Vec<_>>(),
        queues
            .iter()
            .map(|queue| format!("{} {} of {}", queue["name"], queue["depth"], queue["limit"]))
            .collect::<Vec<_>>(),
    );
    ensure!(targets.len() == 1, "{targets:?}");
    ensure!(
        number(targets[0], "processes")? == processes,
        "{}",
        targets[0]
    );
    ensure!(queues.len() == 1, "{queues:?}");
    ensure!(queues[0]["name"] == address.to_string(), "{}", queues[0]);
    let (depth, limit) = ss::sums(None, address.port())?;
    ensure!(
        number(queues[0], "depth")? == depth,
        "ss says {depth}: {}",
        queues[0]
    );
    ensure!(
        number(queues[0], "limit")? == limit,
        "ss says {limit}: {}",
        queues[0]
    );
    ensure!(
        queues[0]["sockets"].as_f64() == Some(sockets as f64),
        "{}",
        queues[0]
    );
    Ok(())
}

#[test]
fn workers_that_share_a_listener_are_one_target_and_their_queue_counts_once() -> Result<()> {
    const TEST: &str = "workers_that_share_a_listener_are_one_target_and_their_queue_counts_once";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    // Of more than 32 processes the agent walks the whole machine instead of each.
    for workers in [4, 40] {
        let busy = Busy::usual(&["--workers", &workers.to_string()])?;
        let port = busy.address().port();
        let _clients = connect(busy.address(), workers as usize + 6)?;
        wait_for_depth(port, 6)?;
        for args in [
            ["--pid", &busy.pid().to_string()],
            ["--port", &port.to_string()],
        ] {
            let look = Look::at(&args)?;
            check_one_target(&look, busy.address(), workers, 1)?;
            let target = look.targets().next().context("no target")?;
            ensure!(number(target, "pid")? == u64::from(busy.pid()), "{target}");
        }
    }
    Ok(())
}

#[test]
fn sockets_of_one_reuseport_group_are_one_queue_with_summed_depth() -> Result<()> {
    const TEST: &str = "sockets_of_one_reuseport_group_are_one_queue_with_summed_depth";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let address = ports::local(ports::free()?);
    let services: Vec<Busy> = (0..3)
        .map(|_| {
            let args = ["--reuseport", "--backlog", "50"];
            Busy::start(&mut Command::new(SUBJECT), &address.to_string(), &args)
        })
        .collect::<Result<_>>()?;
    // Each takes one of those that the kernel gave it.
    let _clients = connect(address, 60)?;
    wait_for_depth(address.port(), 57)?;
    let port = address.port().to_string();
    check_one_target(&Look::at(&["--port", &port])?, address, 3, 3)?;
    // Named one by one, they are the same target.
    let pids: Vec<String> = services.iter().map(|busy| busy.pid().to_string()).collect();
    let args = ["--pid", &pids[0], "--pid", &pids[1], "--pid", &pids[2]];
    check_one_target(&Look::at(&args)?, address, 3, 3)
}

#[test]
fn services_on_one_port_of_two_addresses_are_two_targets() -> Result<()> {
    const TEST: &str = "services_on_one_port_of_two_addresses_are_two_targets";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let port = ports::free()?;
    let folder = TempDir::new("two")?;
    let mut services = Vec::new();
    for host in 1..=2 {
        let program = program::renamed(SUBJECT, &folder, &format!("service-{host}"))?;
        let address = format!("127.0.0.{host}:{port}");
        services.push(Busy::start(&mut Command::new(program), &address, &[])?);
    }
    let look = Look::at(&["--port", &port.to_string()])?;
    for queue in look.queues("accept") {
        println!("{} of {} {}", queue["name"], queue["target"], queue["pid"]);
    }
    for busy in &services {
        let queue = look.queue("accept", &busy.address().to_string())?;
        ensure!(
            number(queue, "pid")? == u64::from(busy.pid()),
            "not of process {}: {queue}",
            busy.pid()
        );
    }
    Ok(())
}

#[test]
fn a_service_is_found_by_name_executable_port_and_configuration() -> Result<()> {
    const TEST: &str = "a_service_is_found_by_name_executable_port_and_configuration";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let folder = TempDir::new("names")?;
    // `comm` keeps 15 bytes of it.
    let program = program::renamed(SUBJECT, &folder, "front-desk-of-the-test")?;
    let busy = Busy::start(
        &mut Command::new(&program),
        "127.0.0.1:0",
        &["--backlog", "20"],
    )?;
    let (address, pid) = (busy.address(), busy.pid());
    let _clients = connect(address, 5)?;
    wait_for_depth(address.port(), 4)?;
    let config = |line: &str| {
        folder.write(
            "tailback.toml",
            &format!("[[target]]\nservice_name = \"desk\"\n{line}\n"),
        )
    };
    let exe = program.display().to_string();
    for args in [
        ["--name", "front-desk-of-t"],
        ["--name", "front-d?sk-*-test"],
        ["--name", &exe],
        ["--port", &address.port().to_string()],
    ] {
        println!("{}:", args.join(" "));
        let look = Look::at(&args)?;
        check_one_target(&look, address, 1, 1)?;
        let queue = look.queue("accept", &address.to_string())?;
        ensure!(
            queue["target"] == "front-desk-of-the-test" && number(queue, "pid")? == u64::from(pid),
            "{queue}"
        );
    }
    for line in [
        format!("port = {}", address.port()),
        format!("pid = {pid}"),
        "name = \"front-desk*\"".to_owned(),
    ] {
        println!("[[target]] {line}:");
        let look = Look::at(&["--config", &config(&line)?.display().to_string()])?;
        check_one_target(&look, address, 1, 1)?;
        ensure!(look.queue("accept", &address.to_string())?["target"] == "desk");
    }
    // Together with the rest of the machine it is a target of its own.
    let look = Look::at(&["--all"])?;
    let queue = look.queue("accept", &address.to_string())?;
    println!(
        "--all: {} targets, ours has {} waiting",
        look.targets().count(),
        queue["depth"]
    );
    ensure!(
        number(queue, "depth")? == 4 && number(queue, "pid")? == u64::from(pid),
        "{queue}"
    );
    Ok(())
}

#[test]
fn a_service_is_found_by_its_cgroup() -> Result<()> {
    const TEST: &str = "a_service_is_found_by_its_cgroup";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let cgroup = match Cgroup::new() {
        Ok(cgroup) => cgroup,
        Err(error) => {
            skip(TEST, &format!("{error:#}"));
            return Ok(());
        }
    };
    let busy = Busy::usual(&[])?;
    cgroup.take_in(busy.pid())?;
    let _clients = connect(busy.address(), 3)?;
    wait_for_depth(busy.address().port(), 2)?;
    let absolute = cgroup.path().display().to_string();
    let relative = cgroup
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let rooted = format!("/{relative}");
    for path in [&absolute, &relative, &rooted] {
        println!("--cgroup {path}:");
        check_one_target(&Look::at(&["--cgroup", path])?, busy.address(), 1, 1)?;
    }
    Ok(())
}

/// An agent that can pay for looks as frequent as usual, whatever else the machine is busy with.
fn run_well_off(whom: [&str; 2], folder: &TempDir) -> Result<Agent> {
    let config = folder.write("tailback.toml", "cpu_budget = 0.05\n")?;
    let config = config.display().to_string();
    Agent::run(whom.iter().chain(&["--config", &config]))
}

fn target_of(event: &Event, pid: u32) -> bool {
    event.is("target") && event.number("pid") == Some(f64::from(pid))
}

#[test]
fn a_new_process_is_found_within_a_second_and_its_end_is_noticed() -> Result<()> {
    const TEST: &str = "a_new_process_is_found_within_a_second_and_its_end_is_noticed";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let folder = TempDir::new("new")?;
    let program = program::renamed(SUBJECT, &folder, "night-shift")?;
    let agent = run_well_off(["--name", "night-shift"], &folder)?;
    let is_waiting =
        |event: &Event| event.is("notice") && event.text("code") == "waiting_for_target";
    agent.wait_for("that it waits", SOON, is_waiting)?;
    for round in 0..4 {
        let mark = agent.mark();
        let begun = Instant::now();
        let busy = Busy::start(&mut Command::new(&program), "127.0.0.1:0", &[])?;
        let pid = busy.pid();
        let found =
            agent.wait_since(mark, "the new process", SOON, |event| target_of(event, pid))?;
        let found = found.at - begun;
        // It is watched, not only known: a queue of it that is in trouble is told.
        let _clients = connect(busy.address(), 3)?;
        agent.wait_since(mark, "its queue", SOON, |event| {
            event.is("level") && event.text("name") == busy.address().to_string()
        })?;
        let address = busy.address().to_string();
        let ended = Instant::now();
        busy.service.into_process().signal(Signal::KILL)?;
        let closed = agent.wait_since(mark, "the end of its episode", SOON, |event| {
            event.is("episode")
                && event.text("name") == address
                && event.value.get("ongoing").is_none()
        })?;
        agent.wait_since(mark, "that it waits again", SOON, is_waiting)?;
        println!(
            "round {round}: found after {found:?}, its end after {:?}",
            closed.at - ended
        );
        ensure!(found <= FOUND, "it was found after {found:?} only");
    }
    agent.process().check_running()
}

#[test]
fn a_process_that_executes_something_else_is_named_anew() -> Result<()> {
    const TEST: &str = "a_process_that_executes_something_else_is_named_anew";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let folder = TempDir::new("exec")?;
    let go = folder.path().join("go");
    let script = format!(
        "until [ -e {} ]; do sleep 0.02; done; exec {SUBJECT} spin --threads 1",
        go.display()
    );
    let shell = Process::start("sh", Command::new("sh").args(["-c", &script]))?;
    let pid = shell.pid();
    let agent = run_well_off(["--pid", &pid.to_string()], &folder)?;
    let before = agent.wait_for("the shell", SOON, |event| target_of(event, pid))?;
    let mark = agent.mark();
    let begun = Instant::now();
    folder.write("go", "")?;
    let after = agent.wait_since(mark, "the new program", SOON, |event| {
        target_of(event, pid) && event.text("exe") == "tailback-subject"
    })?;
    println!(
        "{} became {} after {:?}",
        before.text("exe"),
        after.text("exe"),
        after.at - begun
    );
    ensure!(
        after.at - begun <= FOUND + Duration::from_millis(100),
        "that took long"
    );
    Ok(())
}

#[test]
fn a_service_in_another_network_namespace_is_seen() -> Result<()> {
    const TEST: &str = "a_service_in_another_network_namespace_is_seen";
    if !needs::met(TEST, &["ip", "nsenter", "unshare"]) {
        return Ok(());
    }
    // The same address in two networks, with 7 waiting here and 3 there.
    let networks = [Network::new()?, Network::new()?];
    let mut kept = Vec::new();
    for (network, count) in networks.iter().zip([7, 3]) {
        let busy = Busy::start(&mut network.command(SUBJECT)?, "127.0.0.1:8080", &[])?;
        let clients = network.inside(|| connect(busy.address(), count + 1))?;
        kept.push((busy, clients, count as u64));
    }
    for (busy, _, count) in &kept {
        let pid = busy.pid().to_string();
        let depth = || -> Result<u64> {
            let look = Look::at(&["--pid", &pid])?;
            number(look.queue("accept", "127.0.0.1:8080")?, "depth")
        };
        // The service may still be about to take the one that it takes.
        wait::until("the depth", SOON, || Ok((depth()? == *count).then_some(())))?;
        println!("--pid {pid}: {count} wait");
    }
    let look = Look::at(&["--port", "8080"])?;
    let depths: Vec<(&Value, &Value)> = look
        .queues("accept")
        .map(|queue| (&queue["pid"], &queue["depth"]))
        .collect();
    println!("--port 8080: {depths:?}");
    for (busy, _, count) in &kept {
        let ours = look
            .queues("accept")
            .find(|queue| queue["pid"] == busy.pid());
        let ours = ours.with_context(|| format!("nothing of process {}", busy.pid()))?;
        ensure!(number(ours, "depth")? == *count, "{ours}");
    }
    Ok(())
}

/// The child of a process, as this namespace numbers it.
fn child_of(parent: u32) -> Result<u32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    wait::until("a child", SOON, || {
        let children = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        Ok(children
            .split_whitespace()
            .next()
            .and_then(|child| child.parse().ok()))
    })
}

/// A busy service that is process 1 of a pid namespace of its own, its /proc included.
fn in_own_pids() -> Result<(Busy, u32)> {
    let mut unshare = Command::new(program::need(&["unshare"])?);
    unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child", SUBJECT]);
    let busy = Busy::start(&mut unshare, "127.0.0.1:0", &["--workers", "2"])?;
    let outside = child_of(busy.pid())?;
    Ok((busy, outside))
}

#[test]
fn a_service_in_a_child_pid_namespace_is_known_by_its_number_outside() -> Result<()> {
    const TEST: &str = "a_service_in_a_child_pid_namespace_is_known_by_its_number_outside";
    if !needs::met(TEST, &["ss", "unshare"]) {
        return Ok(());
    }
    let (busy, outside) = in_own_pids()?;
    let _clients = connect(busy.address(), 6)?;
    wait_for_depth(busy.address().port(), 4)?;
    for args in [
        ["--pid", &outside.to_string()],
        ["--port", &busy.address().port().to_string()],
    ] {
        let look = Look::at(&args)?;
        check_one_target(&look, busy.address(), 2, 1)?;
        let target = look.targets().next().context("no target")?;
        ensure!(number(target, "pid")? == u64::from(outside), "{target}");
        ensure!(target["exe"] == "tailback-subject", "{target}");
    }
    Ok(())
}

#[test]
fn an_agent_inside_a_pid_namespace_numbers_processes_as_its_own_proc_does() -> Result<()> {
    const TEST: &str = "an_agent_inside_a_pid_namespace_numbers_processes_as_its_own_proc_does";
    if !needs::met(TEST, &["nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let (busy, outside) = in_own_pids()?;
    let _clients = connect(busy.address(), 6)?;
    wait_for_depth(busy.address().port(), 4)?;
    let inside = |args: &[&str]| -> Result<Command> {
        let mut command = Command::new(program::need(&["nsenter"])?);
        command
            .args(["--pid", "--mount", "--target", &outside.to_string(), "--"])
            .arg(agent::binary()?)
            .args(args);
        Ok(command)
    };
    let port = busy.address().port().to_string();
    for args in [
        ["--pid", "1"],
        ["--port", &port],
        ["--name", "tailback-subj*"],
    ] {
        println!("{}, inside:", args.join(" "));
        let look = Look::with(&mut inside(&["sample", "--json", args[0], args[1]])?)?;
        check_one_target(&look, busy.address(), 2, 1)?;
        let target = look.targets().next().context("no target")?;
        ensure!(number(target, "pid")? == 1, "{target}");
        ensure!(target["exe"] == "tailback-subject", "{target}");
        ensure!(target["target"] == "tailback-subject", "{target}");
        let threads = look.queue("runqueue", "threads")?;
        ensure!(threads["threads"].as_f64() == Some(2.0), "{threads}");
    }
    // What is outside does not exist for it.
    let none = Process::start(
        "tailback",
        &mut inside(&["sample", "--pid", &std::process::id().to_string()])?,
    )?;
    ensure!(
        none.wait_end(SOON)? == End::Code(4),
        "{:?}",
        none.lines().all()
    );
    // The agent that goes on running sees trouble in there too.
    let agent = Agent::start(&mut inside(&["run", "--json", "--pid", "1"])?)?;
    agent.wait_for("the queue that stands", SOON, |event| {
        event.is("level")
            && event.text("name") == busy.address().to_string()
            && event.number("pid") == Some(1.0)
    })?;
    Ok(())
}

#[test]
fn a_number_that_another_process_is_given_is_not_the_process_that_was_named() -> Result<()> {
    const TEST: &str = "a_number_that_another_process_is_given_is_not_the_process_that_was_named";
    if !needs::met(TEST, &["unshare"]) {
        return Ok(());
    }
    // In a pid namespace of its own the test decides which number comes next.
    let tailback = agent::binary()?;
    let script = format!(
        "{SUBJECT} spin --threads 1 >&2 & first=$!
         {} run --json --pid $first & agent=$!
         while ! read line < \"$0\"; do sleep 0.01; done
         kill -9 $first; wait $first 2>/dev/null
         echo $((first - 1)) > /proc/sys/kernel/ns_last_pid
         sleep 1000 & second=$!
         echo \"numbers $first $second\" >&2
         wait $agent",
        tailback.display()
    );
    let folder = TempDir::new("reuse")?;
    let go = folder.path().join("go");
    let mut unshare = Command::new(program::need(&["unshare"])?);
    unshare.args([
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "sh",
        "-c",
        &script,
    ]);
    unshare.arg(&go);
    let agent = Agent::start(&mut unshare)?;
    let first = agent.wait_for("the first process", SOON, |event| event.is("target"))?;
    let mark = agent.mark();
    folder.write("go", "go\n")?;
    let line = agent.process().wait_line("numbers", SOON)?;
    let numbers: Vec<&str> = line.text.split(' ').skip(1).collect();
    if numbers[0] != numbers[1] {
        skip(
            TEST,
            &format!("another process took the number: {}", line.text),
        );
        return Ok(());
    }
    let after = agent.wait_since(
        mark,
        "that the process has ended, or that it is another",
        SOON,
        |event| event.is("notice") || event.is("target"),
    )?;
    println!(
        "{} was {}; after it: {}",
        numbers[0],
        first.text("exe"),
        after.value
    );
    ensure!(
        after.text("code") == "target_ended",
        "it watches a stranger: {}",
        after.value
    );
    Ok(())
}

#[test]
fn threads_and_files_that_come_and_go_do_no_harm() -> Result<()> {
    const TEST: &str = "threads_and_files_that_come_and_go_do_no_harm";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let mut churn = Command::new(SUBJECT);
    let churn = Process::start("churn", churn.args(["churn", "--per-s", "200"]))?;
    churn.wait_line("churning", SOON)?;
    let agent = Agent::run(["--pid", &churn.pid().to_string(), "--interval", "20ms"])?;
    agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
    churn.wait_line("800 rounds", SOON)?;
    churn.check_running()?;
    agent.process().check_running()?;
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(SOON)?;
    let said = agent.process().lines().all();
    let errors: Vec<&str> = said
        .iter()
        .filter(|line| line.stream == Stream::Stderr)
        .map(|line| line.text.as_str())
        .collect();
    let levels: Vec<Event> = agent
        .events()?
        .into_iter()
        .filter(|event| event.is("level"))
        .collect();
    println!(
        "800 threads, each with a pipe, a listener and a connection: the agent ended with {end:?}, said {} lines",
        said.len()
    );
    ensure!(
        end == End::Code(0) && errors.is_empty(),
        "{end:?}: {errors:?}"
    );
    ensure!(
        levels.iter().all(|event| event.text("kind") == "runqueue"),
        "{:?}",
        levels.first().map(|event| &event.value)
    );
    Ok(())
}

#[test]
fn processes_that_come_and_go_do_no_harm() -> Result<()> {
    const TEST: &str = "processes_that_come_and_go_do_no_harm";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let folder = TempDir::new("storm")?;
    let program = program::renamed(SUBJECT, &folder, "mayfly")?;
    let agent = Agent::run(["--name", "mayfly", "--interval", "20ms"])?;
    agent.wait_for("that it waits", SOON, |event| event.is("notice"))?;
    // Some live for as long as a look takes, some for longer.
    for round in 0..60_u64 {
        let mayflies: Vec<Process> = (0..3)
            .map(|_| {
                Process::start(
                    "mayfly",
                    Command::new(&program).args(["spin", "--threads", "1"]),
                )
            })
            .collect::<Result<_>>()?;
        // The load's own spacing.
        thread::sleep(Duration::from_millis(round % 7 * 8));
        drop(mayflies);
    }
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(SOON)?;
    let errors: Vec<String> = agent
        .process()
        .lines()
        .all()
        .into_iter()
        .filter(|line| line.stream == Stream::Stderr)
        .map(|line| line.text)
        .collect();
    let found = agent
        .events()?
        .iter()
        .filter(|event| event.is("target"))
        .count();
    println!("180 processes came and went: {found} target lines, the agent ended with {end:?}");
    ensure!(
        end == End::Code(0) && errors.is_empty(),
        "{end:?}: {errors:?}"
    );
    Ok(())
}
