//! Threads that wait for a lock: the cause is what its holder does.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{load::Load, ports, redis::Redis};

use crate::{
    play::{Culprit, Play},
    programs::{Program, load},
};

const REQUESTS_PER_S: f64 = 30.0;

/// A threaded server in C, and its address.
pub fn convoy(mode: &str, threads: u32, before: &[&str]) -> Result<(Program, SocketAddr)> {
    let port = ports::free()?;
    let args = [port.to_string(), mode.to_owned(), threads.to_string()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let server = Program::c("convoy", include_str!("apps/convoy.c"), before, &args)?;
    // The listener exists before the threads do.
    server.number("writer")?;
    server.number("keeper")?;
    Ok((server, ports::local(port)))
}

/// Watches the healthy server, then plants and removes the fault.
pub fn trouble(play: &mut Play, server: &Program, load: &Load, culprit: Culprit) -> Result<()> {
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(culprit);
    server.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(load));
    server.process.signal(Signal::USR2)?;
    play.recover()
}

pub fn holder_computes(play: &mut Play) -> Result<()> {
    let (server, address) = convoy("compute", 4, &[])?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let keeper = server.number("keeper")?;
    trouble(play, &server, &load, Culprit::thread(keeper))
}

pub fn holder_waits(play: &mut Play) -> Result<()> {
    let redis = Redis::start()?;
    let (server, address) = convoy(&format!("call={}", redis.port()), 4, &[])?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    // Redis is slow throughout, but is not called before the fault is planted.
    let hog = redis.hog(Duration::from_millis(400), Duration::from_millis(2))?;
    let culprit = Culprit::server(redis.process().pid(), redis.port());
    trouble(play, &server, &load, culprit)?;
    hog.stop()
}

/// Two threads each hold the lock that the other waits for. Only ending the process resolves it.
pub fn deadlock(play: &mut Play) -> Result<()> {
    let (server, address) = convoy("deadlock", 8, &[])?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let culprit = Culprit::process(server.pid());
    let both = [server.number("keeper")?, server.number("writer")?];
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(culprit.and(both));
    server.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(server);
    play.recover()
}

/// The interpreter's global lock.
pub fn interpreter(play: &mut Play) -> Result<()> {
    let port = ports::free()?;
    let text = include_str!("apps/threads.py");
    let server = Program::python("threads", text, &["socket"], &[&port.to_string(), "4"])?;
    server
        .process
        .wait_line("listening", crate::programs::DEADLINE)?;
    let load = load(ports::local(port), "/", REQUESTS_PER_S)?;
    // Ownership changes two hundred times a second.
    let culprit = Culprit::process(server.pid()).or("interpreter");
    trouble(play, &server, &load, culprit)
}
