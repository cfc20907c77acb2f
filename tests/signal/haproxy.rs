//! HAProxy set up in ways that would make an agent-check harmful or useless, and HAProxy that is reloaded or stopped.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::Agent,
    needs, ports,
    process::{Process, children_of},
    program,
    temp::TempDir,
    wait,
};

use crate::stage::{DEADLINE, LONG_TTL, Stage, get, jam};

/// The options of a server line as the guide has them.
const GUIDE: &str = "weight 100 agent-inter 200ms agent-send \"weight=100\\n\"";

/// HAProxy with a master process, and a backend whose servers have agent-checks.
struct Checked {
    master: Process,
    front: SocketAddr,
    stats: PathBuf,
    _temp: TempDir,
}

impl Checked {
    /// Servers `s0`, `s1`, … at one address, each with the port of its agent-check and its options.
    fn start(address: SocketAddr, servers: &[(u16, &str)]) -> Result<Self> {
        let temp = TempDir::new("checked")?;
        let front = ports::local(ports::free()?);
        let stats = temp.path().join("stats");
        let mut config = format!(
            "global\n stats socket {} mode 600 level admin\n\
             defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
             frontend front\n bind {front}\n default_backend back\n\
             backend back\n balance roundrobin\n",
            stats.display()
        );
        for (index, (port, options)) in servers.iter().enumerate() {
            config += &format!(
                " server s{index} {address} {options} agent-check agent-addr 127.0.0.1 agent-port {port}\n"
            );
        }
        let config = temp.write("haproxy.cfg", &config)?;
        let mut command = Command::new(program::need(&["haproxy"])?);
        let master = Process::start("HAProxy", command.arg("-W").arg("-f").arg(config))?;
        let checked = Self {
            master,
            front,
            stats,
            _temp: temp,
        };
        wait::until("HAProxy's stats socket", DEADLINE, || {
            checked.master.check_running()?;
            Ok(checked.server("s0").ok())
        })?;
        Ok(checked)
    }

    /// Sends a command to the stats socket of the current worker.
    fn ask(&self, command: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.stats)?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The fields of a server in `show servers state`.
    fn server(&self, name: &str) -> Result<HashMap<String, String>> {
        let text = self.ask("show servers state")?;
        let mut lines = text.lines().filter(|line| line.contains(' '));
        let names = lines.next().context("no header")?;
        let names = names.trim_start_matches("# ").split(' ').map(str::to_owned);
        let row = lines.find(|line| line.split(' ').nth(3) == Some(name));
        let row = row.with_context(|| format!("no server {name}: {text}"))?;
        Ok(names.zip(row.split(' ').map(str::to_owned)).collect())
    }

    /// The weight in use.
    fn weight(&self, name: &str) -> Result<u32> {
        Ok(self.server(name)?["srv_uweight"].parse()?)
    }

    fn wait_weight(&self, name: &str, weight: u32) -> Result<Duration> {
        let began = Instant::now();
        wait::until_ok(&format!("weight {weight}"), DEADLINE, || {
            let now = self.weight(name)?;
            ensure!(now == weight, "the weight is {now}");
            Ok(())
        })?;
        Ok(began.elapsed())
    }

    /// The process ids of the workers, oldest first.
    fn workers(&self) -> Result<Vec<u32>> {
        children_of(self.master.pid())
    }
}

fn haproxy_section(port: u16) -> String {
    format!("[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{port}\"\n")
}

/// The adapter at a port, from the status of the adapter process.
fn adapter(stage: &Stage, port: u16) -> Result<Value> {
    let status = stage.status()?;
    let adapters = status["adapter_process"]["adapters"].as_array();
    let at = format!("127.0.0.1:{port}");
    let found = adapters
        .into_iter()
        .flatten()
        .find(|adapter| adapter["at"] == *at);
    Ok(found.context("no such adapter")?.clone())
}

/// The codes of an adapter's warnings.
fn codes(adapter: &Value) -> Vec<String> {
    let warnings = adapter["warnings"].as_array().into_iter().flatten();
    let codes = warnings.map(|warning| warning["code"].as_str().unwrap_or_default().to_owned());
    codes.collect()
}

fn wait_codes(stage: &Stage, port: u16, expected: &[&str]) -> Result<Value> {
    wait::until_ok(&format!("the warnings {expected:?}"), DEADLINE, || {
        let adapter = adapter(stage, port)?;
        ensure!(codes(&adapter) == expected, "{adapter}");
        Ok(adapter)
    })
}

#[test]
fn a_reloaded_or_restarted_haproxy_gets_the_weight_again_at_once() -> Result<()> {
    const TEST: &str = "a_reloaded_or_restarted_haproxy_gets_the_weight_again_at_once";
    if !needs::met(TEST, &["haproxy"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 101)?;
    let port = ports::free()?;
    let more = format!("{LONG_TTL}{}", haproxy_section(port));
    let stage = Stage::start(service.address().port(), &more)?;
    let haproxy = Checked::start(service.address(), &[(port, GUIDE)])?;
    haproxy.wait_weight("s0", 5)?;

    // A request that the service never answers keeps the old worker alive.
    let mut pending = TcpStream::connect(haproxy.front)?;
    pending.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let old = haproxy.workers()?;
    haproxy.master.signal(Signal::USR2)?;
    let all = wait::until("a new worker beside the old one", DEADLINE, || {
        let all = haproxy.workers()?;
        Ok((all.len() == 2).then_some(all))
    })?;
    wait::until("the new worker's stats socket", DEADLINE, || {
        let info = haproxy.ask("show info").unwrap_or_default();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid: "));
        let is_new = pid.is_some_and(|pid| !old.iter().any(|old| *pid == old.to_string()));
        Ok(is_new.then_some(()))
    })?;
    let took = haproxy.wait_weight("s0", 5)?;
    println!("weight {took:?} after the new worker listens");
    ensure!(took < Duration::from_secs(5), "{took:?}");

    // The old worker lingers but no longer checks: the interval stays that of one.
    let before = adapter(&stage, port)?["replies"].as_u64();
    let began = Instant::now();
    wait::until("20 further checks", DEADLINE, || {
        let replies = adapter(&stage, port)?["replies"].as_u64();
        Ok((replies >= before.map(|before| before + 20)).then_some(()))
    })?;
    let interval = began.elapsed() / 20;
    println!("one check each {interval:?}");
    ensure!(interval > Duration::from_millis(150), "{interval:?}");
    ensure!(
        haproxy.workers()? == all,
        "the old worker ended: {:?}",
        haproxy.workers()
    );
    let status = adapter(&stage, port)?;
    ensure!(codes(&status).is_empty(), "{status}");
    // Two late checks are forgotten after some more.
    wait::until_ok("the interval of one worker", DEADLINE, || {
        let status = adapter(&stage, port)?;
        let checks = status["checks"].as_array().context("no checks")?;
        let interval_ns = checks[0]["interval_ns"].as_u64();
        ensure!(
            checks.len() == 1
                && checks[0]["weight"] == 100
                && (150_000_000..450_000_000).contains(&interval_ns.unwrap_or(0)),
            "{status}"
        );
        Ok(())
    })?;
    drop(pending);

    drop(haproxy);
    wait_codes(&stage, port, &["checks_stopped"])?;
    let haproxy = Checked::start(service.address(), &[(port, GUIDE)])?;
    let took = haproxy.wait_weight("s0", 5)?;
    println!("weight {took:?} after the restart");
    wait_codes(&stage, port, &[])?;
    Ok(())
}

#[test]
fn a_haproxy_that_checks_rarely_or_declares_no_weight_keeps_all_its_traffic_and_is_reported()
-> Result<()> {
    const TEST: &str =
        "a_haproxy_that_checks_rarely_or_declares_no_weight_keeps_all_its_traffic_and_is_reported";
    if !needs::met(TEST, &["haproxy"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 101)?;
    let [default, slow, light, mixed, unweighted] = [
        ports::free()?,
        ports::free()?,
        ports::free()?,
        ports::free()?,
        ports::free()?,
    ];
    let sections = [default, slow, light, mixed, unweighted].map(haproxy_section);
    let more = format!("{LONG_TTL}{}", sections.concat());
    let stage = Stage::start(service.address().port(), &more)?;
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.admit_ratio <= 0.05
    })?;
    let haproxy = Checked::start(
        service.address(),
        &[
            (default, "weight 100 agent-send \"weight=100\\n\""),
            (
                slow,
                "weight 100 agent-inter 10s agent-send \"weight=100\\n\"",
            ),
            (
                light,
                "weight 10 agent-inter 200ms agent-send \"weight=10\\n\"",
            ),
            (mixed, "agent-inter 200ms"),
        ],
    )?;
    let other = Checked::start(service.address(), &[(unweighted, "agent-inter 200ms")])?;
    // What these replies avoid: HAProxy rounds down, and sends nothing to a weight of 0.
    // Its next check, after 200 ms, would set the weight again.
    other.ask("disable agent back/s0")?;
    other.ask("set weight back/s0 99%")?;
    ensure!(other.weight("s0")? == 0, "HAProxy no longer rounds down");
    let (head, _) = get(other.front, "/")?;
    ensure!(head.starts_with("HTTP/1.1 503"), "{head}");
    other.ask("enable agent back/s0")?;

    wait_codes(&stage, default, &["slow_checks"])?;
    wait_codes(&stage, slow, &["slow_checks"])?;
    wait_codes(&stage, unweighted, &["weight_unknown"])?;
    wait_codes(&stage, light, &["coarse_weight"])?;
    // Beside others, HAProxy does not complete the checks of a server without `agent-send`.
    wait_codes(&stage, mixed, &["no_checks"])?;
    haproxy.wait_weight("s2", 1)?;
    for (server, weight) in [("s0", 100), ("s1", 100), ("s3", 1)] {
        let now = haproxy.weight(server)?;
        ensure!(now == weight, "{server}: {now}");
    }
    other.wait_weight("s0", 1)?;
    let tailback = |args: &[&str]| -> Result<String> {
        let mut command = Command::new(tailback_tests::agent::binary()?);
        command.args(args).arg("--config").arg(&stage.config);
        let output = command.output()?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    wait::until_ok("all warnings in status and doctor", DEADLINE, || {
        for command in ["status", "doctor"] {
            let text = tailback(&[command])?;
            for words in [
                // 2.0 s and 10 s; longer if the machine was busy when a check was due.
                "checks every 2.",
                "checks every 1",
                "s: too slow",
                "`agent-inter 200ms`",
                "does not declare the server's weight",
                "`weight 100 agent-send \"weight=100\\n\"`",
                "never below 10%",
            ] {
                ensure!(text.contains(words), "{words}:\n{text}");
            }
        }
        Ok(())
    })?;
    // On a busy machine the adapter process may not reply within 2 s.
    wait::until_ok("the warnings in the JSON", DEADLINE, || {
        let doctor = tailback(&["doctor", "--json"])?;
        let lines: Vec<Value> = doctor
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let warnings = |port: u16| {
            let name = format!("haproxy 127.0.0.1:{port}");
            let of_port = lines.iter().filter(|line| line["name"] == *name);
            of_port
                .map(|line| (line["state"].to_string(), line["code"].to_string()))
                .collect::<Vec<_>>()
        };
        ensure!(
            warnings(slow) == [("\"warning\"".to_owned(), "\"slow_checks\"".to_owned())],
            "{doctor}"
        );
        ensure!(
            tailback(&["status", "--json"])?.contains("\"code\":\"weight_unknown\""),
            "no warning in the JSON"
        );
        Ok(())
    })
}

#[test]
fn an_adapter_of_no_service_or_of_several_is_reported() -> Result<()> {
    const TEST: &str = "an_adapter_of_no_service_or_of_several_is_reported";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let [a, b] = [jam("127.0.0.1:0", 5)?, jam("127.0.0.1:0", 5)?];
    let [shop, nobody] = [ports::free()?, ports::free()?];
    let more = format!(
        "{LONG_TTL}{}{}[[target]]\nport = {}\nservice_name = \"shop\"\n",
        haproxy_section(shop),
        haproxy_section(nobody).replace("shop", "nobody"),
        b.address().port()
    );
    let stage = Stage::start(a.address().port(), &more)?;
    let status = wait_codes(&stage, shop, &["same_name"])?;
    ensure!(
        status["warnings"][0]["text"]
            .as_str()
            .is_some_and(|text| text.contains("2 services are called shop (shop, shop@")),
        "{status}"
    );
    wait_codes(&stage, nobody, &["no_such_service"])?;
    Ok(())
}

#[test]
fn an_agent_that_returns_under_overload_reduces_the_weight_again_at_once() -> Result<()> {
    const TEST: &str = "an_agent_that_returns_under_overload_reduces_the_weight_again_at_once";
    if !needs::met(TEST, &["haproxy"]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 101)?;
    let port = ports::free()?;
    let more = format!("ttl = \"8s\"\n{}", haproxy_section(port));
    let stage = Stage::start(service.address().port(), &more)?;
    let haproxy = Checked::start(service.address(), &[(port, GUIDE)])?;
    haproxy.wait_weight("s0", 5)?;
    let first = stage.adapter_process()?;
    stage.agent.process().signal(Signal::KILL)?;
    let killed = Instant::now();
    haproxy.wait_weight("s0", 100)?;
    println!("full weight {:?} after the kill", killed.elapsed());
    let returned = Instant::now();
    let agent = Agent::run([Path::new("--config"), &stage.config])?;
    let page = tailback_page::Page::open(stage.page());
    wait::until("the page", DEADLINE, || {
        Ok(page.pressure().alive.then_some(()))
    })?;
    println!(
        "the page is renewed {:?} after the start",
        returned.elapsed()
    );
    wait::until("an admit ratio below 1", DEADLINE, || {
        Ok((page.pressure().admit_ratio < 1.0).then_some(()))
    })?;
    println!(
        "the admit ratio falls {:?} after the start",
        returned.elapsed()
    );
    haproxy.wait_weight("s0", 5)?;
    println!("the weight falls {:?} after the start", returned.elapsed());
    // The second adapter process takes over without a reply of 100% in between.
    let second = wait::until("the second adapter process", DEADLINE, || {
        Ok(stage.adapter_process().ok().filter(|pid| *pid != first))
    })?;
    ensure!(second != first);
    let mut highest = 0;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        highest = highest.max(haproxy.weight("s0")?);
    }
    ensure!(highest == 5, "the takeover raised the weight to {highest}");
    drop(agent);
    Ok(())
}
