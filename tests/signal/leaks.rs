//! Clients of the adapters that never close their connections, or never read: others still get their response, and the number
//! of connections and the memory stay bounded.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{grpc::build, needs, ports, process::Process, program, temp::TempDir, wait};

use crate::{
    readers::run,
    stage::{DEADLINE, LONG_TTL, Stage, get, jam},
};

/// The first adapter of this kind, from the status of the adapter process.
fn adapter(stage: &Stage, kind: &str) -> Result<Value> {
    let status = stage.status()?;
    let adapters = status["adapter_process"]["adapters"].as_array();
    let found = adapters
        .into_iter()
        .flatten()
        .find(|adapter| adapter["adapter"] == kind);
    Ok(found.context("no such adapter")?.clone())
}

#[test]
fn health_checkers_that_never_close_do_not_keep_others_from_their_response() -> Result<()> {
    const TEST: &str = "health_checkers_that_never_close_do_not_keep_others_from_their_response";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 5)?;
    let check = ports::free()?;
    let more = format!(
        "{LONG_TTL}[[signal.haproxy]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{check}\"\n"
    );
    let stage = Stage::start(service.address().port(), &more)?;
    let ask = |to: SocketAddr, request: &str, response: &str| -> Result<TcpStream> {
        let mut stream = TcpStream::connect(to)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(request.as_bytes())?;
        let mut text = vec![0; response.len()];
        stream.read_exact(&mut text)?;
        ensure!(text == response.as_bytes(), "{:?}", text.escape_ascii());
        Ok(stream)
    };
    let mut held = Vec::new();
    for index in 0..600 {
        let request = "GET /ready HTTP/1.1\r\nHost: x\r\n\r\n";
        let stream = ask(stage.http, request, "HTTP/1.1 200");
        held.push(stream.with_context(|| format!("probe {index}"))?);
        let stream = ask(ports::local(check), "", "up ready 100%\n");
        held.push(stream.with_context(|| format!("agent-check {index}"))?);
    }
    let began = Instant::now();
    let (head, _) = get(stage.http, "/ready")?;
    println!("a new probe is answered in {:?}", began.elapsed());
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let http = adapter(&stage, "http")?;
    ensure!(
        http["connections"].as_u64() <= Some(257) && http["closed"].as_u64() >= Some(300),
        "{http}"
    );
    let haproxy = adapter(&stage, "haproxy")?;
    ensure!(
        haproxy["closed"].as_u64() >= Some(500) && haproxy["rejected"] == 0,
        "{haproxy}"
    );
    let (_, metrics) = stage.get("/metrics")?;
    ensure!(
        metrics.contains("tailback_adapter_closed_total{adapter=\"http\""),
        "{metrics}"
    );
    drop(held);
    Ok(())
}

/// Connects to a pressure socket and prints a line for each notification.
const WATCHER: &str = r"
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
print('connected', flush=True)
while s.recv(1):
    print('notified', flush=True)
";

#[test]
fn a_process_that_leaks_pressure_sockets_loses_its_own_not_those_of_others() -> Result<()> {
    const TEST: &str = "a_process_that_leaks_pressure_sockets_loses_its_own_not_those_of_others";
    if !needs::met(TEST, &["python3"]) {
        return Ok(());
    }
    let port = ports::free()?;
    let idle = jam(&format!("127.0.0.1:{port}"), 0)?;
    let temp = TempDir::new("signal")?;
    let socket = temp.path().join("pressure.sock");
    let more = format!(
        "{LONG_TTL}[[signal.pressure_socket]]\ntarget = \"shop\"\npath = \"{}\"\n",
        socket.display()
    );
    let stage = Stage::start_in(temp, port, &more)?;
    let mut python = Command::new(program::need(&["python3"])?);
    let watcher = Process::start("watcher", python.args(["-c", WATCHER]).arg(&socket))?;
    watcher.wait_line("connected", DEADLINE)?;
    let leaked: Vec<UnixStream> = (0..600)
        .map(|_| UnixStream::connect(&socket))
        .collect::<Result<_, _>>()?;
    wait::until_ok("closed connections", DEADLINE, || {
        let status = adapter(&stage, "pressure_socket")?;
        ensure!(
            status["closed"].as_u64() >= Some(340) && status["connections"].as_u64() <= Some(256),
            "{status}"
        );
        Ok(())
    })?;
    drop(idle);
    let _service = jam(&format!("127.0.0.1:{port}"), 101)?;
    watcher.wait_line("notified", DEADLINE)?;
    drop(leaked);
    Ok(())
}

/// Resident memory of a process, bytes.
fn memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmRSS")?
        .parse()?;
    Ok(kb << 10)
}

#[test]
fn orca_clients_that_do_not_read_or_ask_too_often_are_bounded() -> Result<()> {
    const TEST: &str = "orca_clients_that_do_not_read_or_ask_too_often_are_bounded";
    if !needs::met(TEST, &["go"]) {
        return Ok(());
    }
    /// Time until the flow control window, 64 KiB, is full of reports at the shortest interval; and the time limit.
    const FULL_WINDOW: Duration = Duration::from_secs(90);
    /// Streams that are not read, four per connection.
    const STREAMS: u32 = 200;
    let temp = TempDir::new("consumers")?;
    let program = build(&temp, "reports")?;
    let service = jam("127.0.0.1:0", 20)?;
    let port = ports::free()?;
    let more =
        format!("{LONG_TTL}[[signal.orca]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{port}\"\n");
    let stage = Stage::start(service.address().port(), &more)?;
    let address = format!("127.0.0.1:{port}");
    let started = |mode: &str, streams: u32| {
        let mut command = Command::new(&program);
        command.args([&address, mode, &streams.to_string()]);
        command
    };

    // At once: the connection is gone soon.
    run(&mut started("close", 1_000))?;
    wait::until("no connection", DEADLINE, || {
        Ok((adapter(&stage, "orca")?["connections"] == 0).then_some(()))
    })?;

    // It asks for one report per millisecond and gets one per 100 ms.
    wait::unless_paused(|| {
        let output = run(&mut started("count", 1))?;
        let reports: u32 = output.trim().parse().context(output)?;
        println!("{reports} reports in 2 s");
        ensure!((15..=22).contains(&reports), "{reports} reports in 2 s");
        Ok(())
    })?;
    let status = adapter(&stage, "orca")?;
    ensure!(status["raised_intervals"].as_u64() >= Some(1), "{status}");

    let before = memory(stage.adapter_process()?)?;
    let client = Process::start("reports", &mut started("hold", STREAMS))?;
    client.wait_line("held", DEADLINE)?;
    let began = Instant::now();
    let mut most = 0;
    wait::until_ok("the end of all connections", FULL_WINDOW, || {
        most = most.max(memory(stage.adapter_process()?)?);
        let status = adapter(&stage, "orca")?;
        ensure!(
            status["closed"].as_u64() >= Some(u64::from(STREAMS / 4)),
            "{status}"
        );
        Ok(())
    })?;
    let grown = most.saturating_sub(before);
    println!(
        "{STREAMS} unread streams: {} KiB more, closed after {:?}",
        grown >> 10,
        began.elapsed()
    );
    ensure!(grown < 32 << 20, "{grown} bytes for {STREAMS} streams");
    // Others are still served.
    wait::unless_paused(|| {
        ensure!(run(&mut started("count", 1))?.trim().parse::<u32>()? >= 15);
        Ok(())
    })
}
