//! Misbehaving clients and adapter processes, which must not affect the agent.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tailback_tests::{needs, ports, wait};

use crate::stage::{DEADLINE, Stage, jam};

#[test]
fn invalid_commands_get_an_error_that_names_the_valid_ones() -> Result<()> {
    const TEST: &str = "invalid_commands_get_an_error_that_names_the_valid_ones";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 5)?;
    let stage = Stage::start(service.address().port(), "")?;
    for garbage in [
        "hello\n",
        "{\"targt\": \"shop\"}\n",
        "{\"min_level\": \"high\"}\n",
        "\0\u{1}\n",
        "[]\n",
    ] {
        let response = stage.send_line(garbage)?;
        ensure!(
            response.contains("\"type\":\"error\"") && response.contains("min_level"),
            "{garbage:?}: {response}"
        );
    }
    let long = "x".repeat(1 << 20);
    let mut stream = UnixStream::connect(stage.directory.join("agent.sock"))?;
    // The agent closes the connection at its line limit.
    let _ = stream.write_all(long.as_bytes());
    let status = stage.status()?;
    ensure!(
        status["agent"]["stream"]["invalid_commands"].as_u64() >= Some(5),
        "{status}"
    );
    for garbage in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(stage.http)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(garbage.as_bytes())?;
        let mut response = [0; 16];
        let read = stream.read(&mut response)?;
        ensure!(
            response[..read].starts_with(b"HTTP/1.1 40"),
            "{garbage:?}: {:?}",
            &response[..read]
        );
    }
    Ok(())
}

#[test]
fn a_thousand_idle_connections_and_slow_readers_do_not_delay_the_agent() -> Result<()> {
    const TEST: &str = "a_thousand_idle_connections_and_slow_readers_do_not_delay_the_agent";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let port = ports::free()?;
    let service = jam(&format!("127.0.0.1:{port}"), 5)?;
    let stage = Stage::start(port, "")?;
    let socket = stage.directory.join("agent.sock");
    let mut held = Vec::new();
    for index in 0..1_000 {
        let mut stream = UnixStream::connect(&socket)?;
        // Half of the clients subscribe and never read; half send nothing.
        if index % 2 == 0 {
            let _ = stream.write_all(b"{}\n");
        }
        held.push(stream);
    }
    let mut connections = Vec::new();
    for _ in 0..1_000 {
        connections.push(TcpStream::connect(stage.http)?);
    }
    // The page is renewed all the time: no sample waits for a client.
    let page = tailback_page::Page::open(stage.page());
    for _ in 0..200 {
        // On a busy machine the page may briefly go stale.
        wait::until("a renewed page", Duration::from_secs(4), || {
            Ok(page.pressure().alive.then_some(()))
        })?;
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(connections);
    let status = wait::until("a response after they disconnected", DEADLINE, || {
        Ok(stage.status().ok())
    })?;
    drop(held);
    println!("{}", status["adapter_process"]);
    wait::until("a free slot on the stream", DEADLINE, || {
        // Until the agent has noticed that they are closed, it rejects this connection, too: unread, which resets it.
        let Ok(response) = stage.send_line("{\"ask\": \"status\"}\n") else {
            return Ok(None);
        };
        let status: serde_json::Value = serde_json::from_str(&response).unwrap_or_default();
        let rejected = status["stream"]["rejected"].as_u64().unwrap_or(0);
        Ok((rejected > 800).then_some(()))
    })?;
    drop(service);
    Ok(())
}

#[test]
fn a_killed_adapter_process_is_restarted() -> Result<()> {
    const TEST: &str = "a_killed_adapter_process_is_restarted";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 5)?;
    let stage = Stage::start(service.address().port(), "")?;
    let killed = stage.adapter_process()?;
    let pid = Pid::from_raw(killed.cast_signed()).expect("a pid");
    kill_process(pid, Signal::KILL)?;
    let next = wait::until("another adapter process", DEADLINE, || {
        Ok(stage.adapter_process().ok().filter(|next| *next != killed))
    })?;
    ensure!(next != killed);
    stage
        .agent
        .wait_for("the end of the adapter process", DEADLINE, |event| {
            event.text("code") == "adapter_process_exited"
        })?;
    Ok(())
}

#[test]
fn a_hanging_adapter_process_is_replaced() -> Result<()> {
    const TEST: &str = "a_hanging_adapter_process_is_replaced";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 0)?;
    let stage = Stage::start(service.address().port(), "")?;
    let first = stage.adapter_process()?;
    let mark = stage.agent.mark();
    let pid = Pid::from_raw(i32::try_from(first)?).context("no pid")?;
    kill_process(pid, Signal::STOP)?;
    // Health checks every 5 s with a 2 s timeout; three must fail.
    const DETECTION_TIME: Duration = Duration::from_secs(60);
    stage.agent.wait_since(
        mark,
        "the hanging adapter process",
        DETECTION_TIME,
        |event| event.text("code") == "adapter_process_hung",
    )?;
    let second = wait::until("another adapter process", DEADLINE, || {
        Ok(stage.adapter_process().ok())
    })?;
    ensure!(first != second, "process {first} still responds");
    Ok(())
}
