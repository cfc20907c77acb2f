//! INC

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

use crate::{SOON, alone, ended, service, watch};

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
