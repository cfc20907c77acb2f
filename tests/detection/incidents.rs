//! Unhealthy queues are detected, and so is their recovery.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{agent::Event, needs, ss};

use crate::{DEADLINE, alone, service, stop, watch};

/// Writes to one connection ten times per second and opens a new connection five times per second.
fn send_traffic(to: SocketAddr, mut writer: TcpStream, done: &AtomicBool) -> Result<()> {
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
fn a_stopped_consumer_and_its_recovery_are_detected_without_departures() -> Result<()> {
    const TEST: &str = "a_stopped_consumer_and_its_recovery_are_detected_without_departures";
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
    ss::wait_for(None, port, "an accepted connection", |waiting| waiting == 0)?;
    let done = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        let load = scope.spawn(|| send_traffic(service.address(), writer, &done));
        let incident = || -> Result<()> {
            let is = |event: &Event, kind: &str, name: &str| {
                event.is("level") && event.text("kind") == kind && event.text("name") == name
            };
            service.process().freeze()?;
            let stopped = Instant::now();
            for (kind, name) in [("accept", &accept), ("recv", &recv)] {
                let level =
                    agent.wait_for(&format!("that {kind} leaves ok"), DEADLINE, |event| {
                        is(event, kind, name)
                    })?;
                println!(
                    "{kind}: {} {:?} after the stop, depth {}, oldest {} ns",
                    level.text("to"),
                    level.at - stopped,
                    level.value["depth"],
                    level.value["oldest_age_ns"],
                );
                ensure!(level.text("from") == "ok", "{}", level.value);
                ensure!(
                    level.at - stopped < Duration::from_secs(8),
                    "the level came late"
                );
            }
            let mark = agent.mark();
            service.process().thaw()?;
            let resumed = Instant::now();
            for (kind, name) in [("accept", &accept), ("recv", &recv)] {
                let level =
                    agent.wait_since(mark, &format!("that {kind} is ok"), DEADLINE, |event| {
                        is(event, kind, name) && event.text("to") == "ok"
                    })?;
                let episode = agent.wait_since(
                    mark,
                    &format!("the episode of {kind}"),
                    DEADLINE,
                    |event| {
                        event.is("episode")
                            && event.text("kind") == kind
                            && event.text("name") == name
                            && event.value.get("ongoing").is_none()
                    },
                )?;
                println!(
                    "{kind}: ok {:?} after it resumed; {}",
                    level.at - resumed,
                    episode.text("evidence")
                );
            }
            Ok(())
        };
        let result = incident();
        done.store(true, Ordering::Relaxed);
        load.join().expect("the load does not panic")?;
        result
    });
    result?;
    stop(&agent).map(drop)
}

#[test]
fn an_unread_pipe_and_an_unread_connection_are_detected() -> Result<()> {
    const TEST: &str = "an_unread_pipe_and_an_unread_connection_are_detected";
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
    // The capacity of a pipe is 64 KiB.
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
        let level = agent.wait_for(
            &format!("that {kind} {name} is {level}"),
            DEADLINE,
            |event| {
                event.is("level")
                    && event.text("kind") == kind
                    && event.text("name") == name
                    && [level, "full"].contains(&event.text("to"))
            },
        )?;
        println!(
            "{kind}: {} {:?} after it began, {} of {}; {}",
            level.text("to"),
            level.at - begun,
            level.value["depth"],
            level.value["limit"],
            level.text("worst"),
        );
        ensure!(
            level.at - begun < Duration::from_secs(8),
            "the level came late"
        );
    }
    drop((reader, server));
    stop(&agent).map(drop)
}
