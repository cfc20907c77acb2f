//! What must be told, and what must not: planted troubles on real servers, and servers that are well.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{self, Agent, Event},
    lines::Stream,
    load::{Load, Plan, Spacing},
    needs,
    network::Network,
    nginx::Nginx,
    process::{End, Process},
    program,
    redis::Redis,
    service::{Pace, Service},
    sockets, ss,
    temp::TempDir,
    wait,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
const SOON: Duration = Duration::from_secs(20);

/// The loads must not disturb each other.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent on one service. It has looked once.
fn watch(pid: u32, args: &[&str]) -> Result<Agent> {
    let pid = pid.to_string();
    let agent = Agent::run(["--pid", &pid].iter().chain(args))?;
    agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
    Ok(agent)
}

fn service(args: &[&str]) -> Result<Service> {
    Service::start(&mut Command::new(SUBJECT), args)
}

/// Ends the agent, and returns all that it said.
fn ended(agent: &Agent) -> Result<Vec<Event>> {
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(SOON)?;
    ensure!(end == End::Code(0), "the agent ended with {end:?}");
    let events = agent.events()?;
    check_order(&events)?;
    Ok(events)
}

/// What holds of every stream: a level begins where the last one ended, within an episode that is told in the end.
fn check_order(events: &[Event]) -> Result<()> {
    let mut levels: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut last_ns = 0;
    for event in events {
        if let Some(ns) = event.value["time_unix_ns"].as_u64() {
            ensure!(ns >= last_ns, "told out of order: {}", event.value);
            last_ns = ns;
        }
        if !event.is("level") {
            continue;
        }
        let queue = (event.text("kind").to_owned(), event.text("name").to_owned());
        let before = levels.insert(queue, event.text("to").to_owned());
        ensure!(
            before.as_deref().unwrap_or("ok") == event.text("from"),
            "it comes from where it was not: {}",
            event.value
        );
        let episode = event.text("episode");
        ensure!(
            events
                .iter()
                .any(|event| event.is("episode") && event.text("id") == episode),
            "no episode {episode}, though {}",
            event.value
        );
    }
    Ok(())
}

/// No queue of these left ok.
fn check_silence(events: &[Event], kinds: &[&str]) -> Result<()> {
    let levels: Vec<&Event> = events.iter().filter(|event| event.is("level")).collect();
    let loud = levels
        .iter()
        .filter(|event| kinds.contains(&event.text("kind")));
    let loud: Vec<String> = loud.map(|event| event.value.to_string()).collect();
    println!(
        "levels told of {}: {}; of other kinds: {}",
        kinds.join(", "),
        loud.len(),
        levels.len() - loud.len()
    );
    ensure!(loud.is_empty(), "{}", loud.join("\n"));
    Ok(())
}

/// Those that a busy machine cannot make wait.
const NOT_RUNQUEUE: [&str; 4] = ["accept", "recv", "send", "pipe"];

#[test]
fn a_burst_that_drains_is_no_episode() -> Result<()> {
    const TEST: &str = "a_burst_that_drains_is_no_episode";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    // 60 connections take 120 ms.
    let pace = Pace::new(Duration::from_millis(2))?;
    let pace_file = pace.file().display().to_string();
    let service = service(&[
        "take",
        "--listen",
        "127.0.0.1:0",
        "--backlog",
        "100",
        "--pace",
        &pace_file,
    ])?;
    let agent = watch(service.pid(), &[])?;
    let port = service.address().port();
    let mut deepest = 0;
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        let begun = Instant::now();
        let clients: Vec<TcpStream> = (0..60)
            .map(|_| sockets::begin_connect(service.address()))
            .collect::<Result<_>>()?;
        deepest = deepest.max(ss::sums(None, port)?.0);
        ss::wait_for(None, port, "the burst to drain", |waiting| waiting == 0)?;
        longest = longest.max(begun.elapsed());
        drop(clients);
        // The load's own spacing.
        thread::sleep(Duration::from_millis(250));
    }
    println!(
        "bursts of 60 on a backlog of 100: up to {deepest} seen waiting, drained within {longest:?}"
    );
    ensure!(deepest > 20, "that was no burst");
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_nginx_that_is_well_gives_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_nginx_that_is_well_gives_no_episode";
    if !needs::met(TEST, &["nginx", "wrk"]) {
        return Ok(());
    }
    let _alone = alone();
    let nginx = Nginx::start(2)?;
    let agent = watch(nginx.process().pid(), &[])?;
    let before = nginx.requests()?;
    let load = Load::start(Plan {
        to: nginx.address(),
        path: "/".to_owned(),
        per_s: 300.0,
        spacing: Spacing::Poisson { seed: 3 },
        lasts: Duration::from_secs(6),
        timeout: Duration::from_secs(5),
        at_once: 500,
    })?;
    let done = load.finish_plan()?;
    let well = done.iter().filter(|request| request.ok()).count();
    println!("open loop: {well} of {} requests answered", done.len());

    let url = format!("http://{}/", nginx.address());
    let mut wrk = Command::new(program::need(&["wrk"])?);
    let wrk = Process::start("wrk", wrk.args(["-c", "4", "-t", "1", "-d", "5s", &url]))?;
    ensure!(wrk.wait_end(SOON)? == End::Code(0), "wrk failed");
    let served = nginx.requests()? - before;
    println!("open and closed loop: {served} requests served");
    ensure!(
        well == done.len() && served > 3_000,
        "that was no healthy, busy server"
    );
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}

#[test]
fn a_busy_redis_that_is_well_gives_no_episode() -> Result<()> {
    const TEST: &str = "a_busy_redis_that_is_well_gives_no_episode";
    if !needs::met(TEST, &["redis-server", "redis-benchmark"]) {
        return Ok(());
    }
    let _alone = alone();
    let redis = Redis::start()?;
    let agent = watch(redis.process().pid(), &[])?;
    let mut benchmark = Command::new(program::need(&["redis-benchmark"])?);
    benchmark.args([
        "-p",
        &redis.port().to_string(),
        "-c",
        "50",
        "-n",
        "150000",
        "-t",
        "set,get",
        "-q",
    ]);
    let begun = Instant::now();
    let benchmark = Process::start("redis-benchmark", &mut benchmark)?;
    ensure!(
        benchmark.wait_end(Duration::from_secs(60))? == End::Code(0),
        "redis-benchmark failed"
    );
    println!("300,000 commands of 50 clients in {:?}", begun.elapsed());
    check_silence(&ended(&agent)?, &NOT_RUNQUEUE)
}

/// Bytes come on one connection, ten times a second, and further connections, five times a second.
fn talk(to: SocketAddr, mut writer: TcpStream, done: &AtomicBool) -> Result<()> {
    let mut others = Vec::new();
    let mut round: u64 = 0;
    while !done.load(Ordering::Relaxed) {
        writer.write_all(&[b'x'; 500]).context("write")?;
        if round.is_multiple_of(2) {
            others.push(TcpStream::connect(to).context("connect")?);
        }
        round += 1;
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_stopped_consumer_is_seen_though_nothing_is_dequeued_and_its_recovery_too() -> Result<()> {
    const TEST: &str = "a_stopped_consumer_is_seen_though_nothing_is_dequeued_and_its_recovery_too";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    let service = service(&["drain", "--listen", "127.0.0.1:0", "--backlog", "100"])?;
    let recv = format!(":{}", service.address().port());
    let accept = service.address().to_string();
    let agent = watch(service.pid(), &[])?;
    let writer = TcpStream::connect(service.address()).context("connect")?;
    let port = service.address().port();
    ss::wait_for(None, port, "the connection to be accepted", |waiting| {
        waiting == 0
    })?;
    let done = AtomicBool::new(false);
    let told = thread::scope(|scope| {
        let load = scope.spawn(|| talk(service.address(), writer, &done));
        let story = || -> Result<()> {
            let is = |event: &Event, kind: &str, name: &str| {
                event.is("level") && event.text("kind") == kind && event.text("name") == name
            };
            service.process().freeze()?;
            let stopped = Instant::now();
            for (kind, name) in [("accept", &accept), ("recv", &recv)] {
                let told =
                    agent.wait_for(&format!("that {kind} is in trouble"), SOON, |event| {
                        is(event, kind, name)
                    })?;
                println!(
                    "{kind}: {} {:?} after the stop, depth {}, oldest {} ns",
                    told.text("to"),
                    told.at - stopped,
                    told.value["depth"],
                    told.value["oldest_age_ns"],
                );
                ensure!(told.text("from") == "ok", "{}", told.value);
                ensure!(told.at - stopped < Duration::from_secs(4), "that came late");
            }
            let mark = agent.mark();
            service.process().thaw()?;
            let resumed = Instant::now();
            for (kind, name) in [("accept", &accept), ("recv", &recv)] {
                let told =
                    agent.wait_since(mark, &format!("that {kind} is well"), SOON, |event| {
                        is(event, kind, name) && event.text("to") == "ok"
                    })?;
                let episode =
                    agent.wait_since(mark, &format!("the episode of {kind}"), SOON, |event| {
                        event.is("episode")
                            && event.text("kind") == kind
                            && event.text("name") == name
                            && event.value.get("ongoing").is_none()
                    })?;
                println!(
                    "{kind}: ok {:?} after it went on; {}",
                    told.at - resumed,
                    episode.text("evidence")
                );
            }
            Ok(())
        };
        let told = story();
        done.store(true, Ordering::Relaxed);
        load.join().expect("the load does not panic")?;
        told
    });
    told?;
    ended(&agent).map(drop)
}

#[test]
fn a_pipe_and_a_connection_that_nobody_reads_are_seen() -> Result<()> {
    const TEST: &str = "a_pipe_and_a_connection_that_nobody_reads_are_seen";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let _alone = alone();
    let (reader, mut writer) = std::io::pipe().context("make a pipe")?;
    let pipe = fs::read_link(format!("/proc/self/fd/{}", reader.as_raw_fd()))?;
    let pipe = pipe.display().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr()?;
    let mut client = TcpStream::connect(address).context("connect")?;
    let (server, _) = listener.accept().context("accept")?;
    let agent = watch(std::process::id(), &[])?;
    let begun = Instant::now();
    // 64 KiB are all that a pipe holds.
    writer.write_all(&[b'x'; 65_536])?;
    client.set_nonblocking(true)?;
    while client.write(&[b'x'; 65_536]).is_ok() {}
    let send = format!("-> {address}");
    let recv = format!(":{}", address.port());
    for (kind, name, level) in [
        ("pipe", &pipe, "full"),
        ("send", &send, "critical"),
        ("recv", &recv, "critical"),
    ] {
        let told = agent.wait_for(&format!("that {kind} {name} is {level}"), SOON, |event| {
            event.is("level")
                && event.text("kind") == kind
                && event.text("name") == name
                && [level, "full"].contains(&event.text("to"))
        })?;
        println!(
            "{kind}: {} {:?} after it began, {} of {}; {}",
            told.text("to"),
            told.at - begun,
            told.value["depth"],
            told.value["limit"],
            told.text("worst"),
        );
        ensure!(told.at - begun < Duration::from_secs(4), "that came late");
    }
    drop((reader, server));
    ended(&agent).map(drop)
}

/// What happens after ten quiet seconds.
enum Trouble {
    /// Requests come at this rate, a second.
    Surge(f64),
    /// A request takes so long.
    Slow(Duration),
}

/// A service that can do 50 requests a second gets 25, then `trouble` until 70 wait, then 15. Answers what its episode is
/// said to be driven by.
fn driven_by(trouble: &Trouble) -> Result<String> {
    const USUAL: Duration = Duration::from_millis(20);
    // Where nobody else's connections count.
    let network = Network::new()?;
    let pace = Pace::new(USUAL)?;
    let pace_file = pace.file().display().to_string();
    let service = Service::start(
        &mut network.command(SUBJECT)?,
        &[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--backlog",
            "400",
            "--pace",
            &pace_file,
        ],
    )?;
    let agent = watch(service.pid(), &[])?;
    let load = network.inside(|| {
        Load::start(Plan {
            to: service.address(),
            path: "/".to_owned(),
            per_s: 25.0,
            spacing: Spacing::Even,
            lasts: Duration::from_secs(60),
            timeout: Duration::from_secs(30),
            at_once: 1000,
        })
    })?;
    wait::until("250 answers", SOON, || {
        Ok((load.done().len() >= 250).then_some(()))
    })?;
    ensure!(
        !agent
            .events()?
            .iter()
            .any(|event| event.is("level") && event.text("kind") == "accept"),
        "it was in trouble before the trouble"
    );
    match *trouble {
        Trouble::Surge(per_s) => load.set_rate(per_s)?,
        Trouble::Slow(work) => pace.set(work)?,
    }
    let begun = Instant::now();
    let warned = agent.wait_for("that the accept queue is in trouble", SOON, |event| {
        event.is("level") && event.text("kind") == "accept"
    })?;
    println!(
        "{} {:?} after the trouble began: depth {}, in {}/s, out {}/s",
        warned.text("to"),
        warned.at - begun,
        warned.value["depth"],
        warned.value["arrivals_per_s"],
        warned.value["departures_per_s"],
    );
    ss::wait_for(
        Some(&network),
        service.address().port(),
        "70 to wait",
        |waiting| waiting >= 70,
    )?;
    pace.set(USUAL)?;
    load.set_rate(15.0)?;
    let episode = agent.wait_for("the end of the episode", SOON, |event| {
        event.is("episode")
            && event.text("kind") == "accept"
            && event.value.get("ongoing").is_none()
    })?;
    println!(
        "driven by {}: {}",
        episode.text("driven_by"),
        episode.text("evidence")
    );
    ended(&agent)?;
    Ok(episode.text("driven_by").to_owned())
}

#[test]
fn a_surge_is_told_to_be_driven_by_the_producer() -> Result<()> {
    const TEST: &str = "a_surge_is_told_to_be_driven_by_the_producer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    let by = driven_by(&Trouble::Surge(75.0))?;
    ensure!(by == "producer", "it is said to be driven by {by}");
    Ok(())
}

#[test]
fn a_slow_service_is_told_to_be_driven_by_the_consumer() -> Result<()> {
    const TEST: &str = "a_slow_service_is_told_to_be_driven_by_the_consumer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    let by = driven_by(&Trouble::Slow(Duration::from_millis(80)))?;
    ensure!(by == "consumer", "it is said to be driven by {by}");
    Ok(())
}

/// All that a program wrote to its standard output.
fn stdout(process: &Process) -> Vec<String> {
    let lines = process.lines().all().into_iter();
    lines
        .filter(|line| line.stream == Stream::Stdout)
        .map(|line| line.text)
        .collect()
}

#[test]
fn a_recorded_incident_replays_to_the_same_bytes() -> Result<()> {
    const TEST: &str = "a_recorded_incident_replays_to_the_same_bytes";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let _alone = alone();
    let folder = TempDir::new("replay")?;
    let file = folder.path().join("incident.tb").display().to_string();
    let config = folder.write(
        "tailback.toml",
        "[detect.accept]\nwarn = 0.6\nclear = \"500ms\"\n",
    )?;
    let config = config.display().to_string();
    let service = service(&["drain", "--listen", "127.0.0.1:0", "--backlog", "5"])?;
    let agent = watch(service.pid(), &["--record", &file, "--config", &config])?;
    let clients = |count: usize| -> Result<Vec<TcpStream>> {
        (0..count)
            .map(|_| sockets::begin_connect(service.address()))
            .collect()
    };
    // One incident with losses that is over, one that is still open when the recording ends.
    service.process().freeze()?;
    let first = clients(20)?;
    agent.wait_for("full", SOON, |event| event.text("to") == "full")?;
    service.process().thaw()?;
    agent.wait_for("the end of the episode", SOON, |event| {
        event.is("episode") && event.value.get("ongoing").is_none()
    })?;
    drop(first);
    service.process().freeze()?;
    let second = clients(3)?;
    let mark = agent.mark();
    agent.wait_since(mark, "the second incident", SOON, |event| event.is("level"))?;
    agent.wait_for("what it cost", SOON, |event| event.is("agent"))?;
    agent.process().signal(Signal::TERM)?;
    ensure!(
        agent.process().wait_end(SOON)? == End::Code(0),
        "the agent failed"
    );
    drop(second);

    let live = stdout(agent.process());
    let mut replay = Command::new(agent::binary()?);
    let replay = Process::start(
        "replay",
        replay.args(["replay", &file, "--json", "--config", &config]),
    )?;
    ensure!(replay.wait_end(SOON)? == End::Code(0), "the replay failed");
    wait::until("all of the replay's lines", SOON, || {
        Ok((stdout(&replay).len() >= live.len()).then_some(()))
    })?;
    let replayed = stdout(&replay);
    println!(
        "{} lines, {} bytes, recorded in {} bytes",
        live.len(),
        live.iter().map(|line| line.len() + 1).sum::<usize>(),
        fs::metadata(&file)?.len()
    );
    let of_type = |name: &str| {
        live.iter()
            .filter(|line| line.contains(&format!("\"type\":\"{name}\"")))
            .count()
    };
    ensure!(
        of_type("level") >= 3 && of_type("episode") >= 2,
        "that was no incident: {live:#?}"
    );
    for (live, replayed) in live.iter().zip(&replayed) {
        ensure!(live == replayed, "live:   {live}\nreplay: {replayed}");
    }
    ensure!(
        live.len() == replayed.len(),
        "{} lines live, {} replayed",
        live.len(),
        replayed.len()
    );
    Ok(())
}
