//! The adapters, each with its real consumer.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::Agent,
    load::{Load, Plan, Spacing},
    needs, ports,
    process::Process,
    program,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::{
    prometheus::Prometheus,
    stage::{DEADLINE, LONG_TTL, Stage, get, jam},
};

/// Maximum time, after a change of the page, until consumers that poll an adapter have seen it: 0.4 s, and the pauses of a busy
/// machine.
const POLL_DELAY: Duration = Duration::from_secs(5);

/// A WSGI application that is slow while a file exists.
const SHOP: &str = r"
import os, time
def application(environ, start_response):
    time.sleep(0.4 if os.path.exists(os.environ['SLOW']) else 0.01)
    start_response('200 OK', [])
    return [b'sold']
";

/// Two workers, which take 0.4 s for a request while `slow` exists, and 10 ms otherwise.
pub fn shop(slow: &Path) -> Result<Uwsgi> {
    Uwsgi::start_app(&App {
        text: SHOP,
        env: vec![("SLOW", slow.display().to_string())],
        workers: 2,
        backlog: 100,
        args: vec!["--disable-logging".to_owned()],
        before: Vec::new(),
        output: None,
        log: None,
    })
}

/// HAProxy in front of two servers, with agent checks for their weights.
struct Balancer {
    _process: Process,
    front: SocketAddr,
    temp: TempDir,
}

impl Balancer {
    fn start(servers: [(SocketAddr, u16); 2]) -> Result<Self> {
        let temp = TempDir::new("balancer")?;
        let front = ports::local(ports::free()?);
        let [(a, check_a), (b, check_b)] = servers;
        let server = |name: &str, address: SocketAddr, check: u16| {
            format!(
                " server {name} {address} weight 100 check inter 500ms agent-check agent-addr 127.0.0.1 agent-port {check} \
                 agent-inter 200ms agent-send \"weight=100\\n\"\n"
            )
        };
        let config = format!(
            "global\n stats socket {} mode 600 level admin\n\
             defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
             frontend front\n bind {front}\n default_backend back\n\
             backend back\n balance roundrobin\n{}{}",
            temp.path().join("stats").display(),
            server("a", a, check_a),
            server("b", b, check_b)
        );
        let config = temp.write("haproxy.cfg", &config)?;
        let mut command = Command::new(program::need(&["haproxy"])?);
        let process = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
        wait::until("a response from HAProxy", DEADLINE, || {
            process.check_running()?;
            Ok(get(front, "/").ok())
        })?;
        Ok(Self {
            _process: process,
            front,
            temp,
        })
    }

    /// Current weight of a server, from HAProxy's stats.
    fn weight(&self, server: &str) -> Result<u64> {
        let mut stream = UnixStream::connect(self.temp.path().join("stats"))?;
        stream.write_all(b"show stat json\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let stats: Value = serde_json::from_str(&text)?;
        for row in stats.as_array().context("no list")? {
            let fields = row.as_array().context("no list")?;
            let of = |name: &str| {
                fields
                    .iter()
                    .find(|field| field["field"]["name"] == name)
                    .map(|field| &field["value"]["value"])
            };
            if of("svname").and_then(Value::as_str) == Some(server) {
                return of("uweight").and_then(Value::as_u64).context("no weight");
            }
        }
        bail!("HAProxy has no server {server}: {text}")
    }
}

#[test]
fn haproxy_shifts_weight_from_a_slow_server_and_restores_it_even_when_the_agent_is_killed()
-> Result<()> {
    const TEST: &str =
        "haproxy_shifts_weight_from_a_slow_server_and_restores_it_even_when_the_agent_is_killed";
    if !needs::met(TEST, &["haproxy", "uwsgi-core"]) {
        return Ok(());
    }
    let temp = TempDir::new("two-shops")?;
    let slow = temp.path().join("slow");
    let (a, b) = (shop(&slow)?, shop(Path::new("/nonexistent"))?);
    let (check_a, check_b) = (ports::free()?, ports::free()?);
    let more = format!(
        "[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{check_a}\"\n\
         [[signal.haproxy]]\ntarget = \"other\"\nlisten = \"127.0.0.1:{check_b}\"\n\
         [[target]]\nport = {}\nservice_name = \"other\"\n",
        b.port()
    );
    let stage = Stage::start(a.port(), &more)?;
    let balancer = Balancer::start([(a.address(), check_a), (b.address(), check_b)])?;
    let load = Load::start(Plan {
        to: balancer.front,
        path: "/".to_owned(),
        per_s: 40.0,
        spacing: Spacing::Even,
        duration: Duration::from_secs(120),
        timeout: Duration::from_secs(20),
        max_in_flight: 500,
    })?;
    let weights = || Ok::<_, anyhow::Error>((balancer.weight("a")?, balancer.weight("b")?));
    wait::until("full weights", DEADLINE, || {
        Ok((weights()? == (100, 100)).then_some(()))
    })?;

    fs::write(&slow, "")?;
    let crossed = stage.wait("an admit ratio below 1", |pressure| {
        pressure.admit_ratio < 0.9
    });
    let crossed = crossed.map(|_| Instant::now())?;
    wait::until("reduced weight of the slow server", DEADLINE, || {
        Ok((weights()?.0 < 90).then_some(()))
    })?;
    let moved = crossed.elapsed();
    println!(
        "weight shifted {moved:?} after the level change: {:?}",
        weights()?
    );
    ensure!(
        moved < stage.ttl()? + POLL_DELAY,
        "weight shifted {moved:?} after the level change"
    );
    wait::until("full weight of the other server", DEADLINE, || {
        Ok((weights()?.1 == 100).then_some(()))
    })?;

    // Killed under overload: the page is no longer renewed, and HAProxy itself would keep the last weight.
    stage.agent.process().signal(Signal::KILL)?;
    let killed = Instant::now();
    wait::until("full weight after the agent was killed", DEADLINE, || {
        Ok((weights()?.0 == 100).then_some(()))
    })?;
    let took = killed.elapsed();
    println!("weight restored {took:?} after the kill");
    ensure!(took < stage.ttl()? + POLL_DELAY, "{took:?}");

    // A new agent and its adapter process take over.
    let config = stage.config.clone();
    let agent = Agent::run([Path::new("--config"), &config])?;
    wait::until("reduced weight from the next agent", DEADLINE, || {
        Ok((weights()?.0 < 90).then_some(()))
    })?;
    fs::remove_file(&slow)?;
    let recovered = Instant::now();
    wait::until_ok("full weight after the recovery", DEADLINE, || {
        let weight = weights()?.0;
        ensure!(weight == 100, "{weight}: {:?}", stage.pressure());
        Ok(())
    })?;
    println!("full weight {:?} after the recovery", recovered.elapsed());
    load.stop()?;
    drop(agent);
    Ok(())
}

#[test]
fn every_adapter_fails_open_within_the_ttl_when_the_agent_hangs() -> Result<()> {
    const TEST: &str = "every_adapter_fails_open_within_the_ttl_when_the_agent_hangs";
    if !needs::met(TEST, &["prometheus", "promtool"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 101)?;
    let temp = TempDir::new("signal")?;
    let socket = temp.path().join("pressure.sock");
    let check = ports::free()?;
    // Longer than a pause of the machine: the level would rise a second time.
    let more = format!(
        "ttl = \"5s\"\n[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{check}\"\nmaxconn = 40\n\
         [[signal.pressure_socket]]\ntarget = \"shop\"\npath = \"{}\"\n\
         [[signal.group]]\ntargets = [\"shop\"]\nmin_ready = 0\n",
        socket.display()
    );
    let stage = Stage::start_in(temp, service.address().port(), &more)?;
    let mut watcher = UnixStream::connect(&socket)?;
    watcher.write_all(b"full")?;
    watcher.set_read_timeout(Some(DEADLINE))?;
    let haproxy = || {
        let mut text = String::new();
        std::net::TcpStream::connect(ports::local(check))?.read_to_string(&mut text)?;
        Ok::<_, anyhow::Error>(text)
    };
    // Nothing is ever accepted: the level is critical and the admit ratio at its floor.
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.level == 3 && pressure.admit_ratio <= 0.05
    })?;
    ensure!(
        watcher.read(&mut [0; 8])? == 1,
        "one byte per level increase"
    );
    // On a busy machine the page may briefly go stale.
    let metrics = wait::until_ok("all adapters to report it", DEADLINE, || {
        ensure!(haproxy()? == "drain\n", "{}", haproxy()?);
        let (head, _) = stage.get("/ready?target=shop")?;
        ensure!(head.starts_with("HTTP/1.1 503"), "{head}");
        let (_, body) = stage.get("/pressure?target=shop")?;
        let pressure: Value = serde_json::from_str(&body)?;
        ensure!(
            pressure["queues"][0]["kind"] == "accept"
                && pressure["queues"][0]["depth"] == 101
                && pressure["max_queue_wait_ns"].as_u64() > Some(0),
            "{pressure}"
        );
        let (_, metrics) = stage.get("/metrics")?;
        ensure!(
            metrics.contains("tailback_admit_ratio{target=\"shop\"} 0.05")
                && metrics.contains("tailback_shedding{target=\"shop\"} 1")
                && metrics.contains("tailback_max_queue_wait_seconds{target=\"shop\"} 0.0"),
            "{metrics}"
        );
        Ok(metrics)
    })?;
    ensure!(
        metrics.contains("tailback_adapter_replies_total{adapter=\"haproxy\""),
        "{metrics}"
    );
    promtool(&metrics)?;
    recorded(stage.http)?;

    stage.agent.process().freeze()?;
    let frozen = Instant::now();
    let open = || -> Result<bool> {
        Ok(haproxy()? == "up ready 100% maxconn:40\n"
            && stage
                .get("/ready?target=shop")?
                .0
                .starts_with("HTTP/1.1 200")
            && !stage.pressure().alive)
    };
    wait::until("all adapters to fail open", DEADLINE, || {
        Ok(open()?.then_some(()))
    })?;
    let took = frozen.elapsed();
    println!("all adapters open {took:?} after the agent was stopped");
    ensure!(took < stage.ttl()? + POLL_DELAY, "{took:?}");
    // The agent does not respond: the metrics report that instead of waiting.
    ensure!(stage.get("/metrics")?.1.contains("tailback_agent_up 0"));

    stage.agent.process().thaw()?;
    stage.wait("the pressure to return", |pressure| pressure.level >= 2)?;
    Ok(())
}

/// Checks the format with promtool.
fn promtool(metrics: &str) -> Result<()> {
    let temp = TempDir::new("metrics")?;
    let file = temp.write("metrics", metrics)?;
    let output = Command::new(program::need(&["promtool"])?)
        .args(["check", "metrics"])
        .stdin(fs::File::open(file)?)
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success() && errors.trim().is_empty(),
        "promtool: {errors}"
    );
    Ok(())
}

/// Checks the values that an autoscaler would read from a Prometheus with our rules.
fn recorded(metrics: SocketAddr) -> Result<()> {
    let prometheus = Prometheus::start(metrics)?;
    wait::until_ok("the recorded values of the service", DEADLINE, || {
        // It accepts nothing: the load is capped at 2.
        let load = prometheus.value("tailback:load:mean{service=\"shop\"}")?;
        ensure!(load == Some(2.0), "{load:?}");
        let admit = prometheus.value("tailback:admit:min{service=\"shop\"}")?;
        ensure!(admit == Some(0.05), "{admit:?}");
        let depth = prometheus.value("tailback_queue_depth{kind=\"accept\"}")?;
        ensure!(depth == Some(101.0), "{depth:?}");
        Ok(())
    })
}

#[test]
fn a_full_service_is_unready_only_where_the_operator_allows_it() -> Result<()> {
    const TEST: &str = "a_full_service_is_unready_only_where_the_operator_allows_it";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    // One connection more than its backlog: full.
    let service = jam("127.0.0.1:0", 101)?;
    let port = service.address().port();
    for (group, status) in [
        ("", "HTTP/1.1 200"),
        ("[[signal.group]]\ntargets = [\"shop\"]\n", "HTTP/1.1 200"),
        (
            "[[signal.group]]\ntargets = [\"shop\"]\nmin_ready = 0\n",
            "HTTP/1.1 503",
        ),
    ] {
        let stage = Stage::start(port, &format!("{LONG_TTL}{group}"))?;
        stage.wait("level full", |pressure| pressure.level == 3)?;
        let (head, _) = stage.get("/ready?target=shop")?;
        ensure!(head.starts_with(status), "with {group:?}: {head}");
        ensure!(
            status.ends_with("200") || head.contains("retry-after: "),
            "{head}"
        );
    }
    Ok(())
}

#[test]
fn events_are_streamed_over_http_and_over_the_unix_socket() -> Result<()> {
    const TEST: &str = "events_are_streamed_over_http_and_over_the_unix_socket";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let port = ports::free()?;
    let idle = jam(&format!("127.0.0.1:{port}"), 0)?;
    let stage = Stage::start(port, "")?;
    let mut http = std::net::TcpStream::connect(stage.http)?;
    write!(
        http,
        "GET /events?target=shop&min_level=warn HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )?;
    let mut unix = UnixStream::connect(stage.directory.join("agent.sock"))?;
    unix.write_all(b"{\"target\": \"shop\", \"min_level\": \"critical\"}\n")?;
    wait::until("both subscriptions", DEADLINE, || {
        Ok((stage.status()?["agent"]["subscribers"]
            .as_array()
            .is_some_and(|all| all.len() == 2))
        .then_some(()))
    })?;
    drop(idle);
    let _service = jam(&format!("127.0.0.1:{port}"), 20)?;
    for (name, text) in [
        ("http", read_until(&mut http, "\"to\":\"critical\"")?),
        ("unix", read_until(&mut unix, "\"to\":\"critical\"")?),
    ] {
        ensure!(
            text.contains("\"type\":\"pressure\""),
            "the current state must come first ({name}): {text}"
        );
        ensure!(text.contains("\"type\":\"level\""), "{name}: {text}");
        ensure!(
            (name == "http") == text.contains("data: {"),
            "{name}: {text}"
        );
    }
    Ok(())
}

fn read_until(stream: &mut impl std::io::Read, end: &str) -> Result<String> {
    let mut text = String::new();
    let mut part = [0; 4096];
    let began = Instant::now();
    while !text.contains(end) {
        let read = stream.read(&mut part)?;
        ensure!(
            read > 0 && began.elapsed() < DEADLINE,
            "the stream ended or timed out before {end}: {text}"
        );
        text += &String::from_utf8_lossy(&part[..read]);
    }
    Ok(text)
}
