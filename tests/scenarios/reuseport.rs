//! Several listening sockets of one address (SO_REUSEPORT): one worker does not accept, and only its own queue fills.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use tailback_tests::{load::Load, nginx::Nginx, ports, process::children_of};

use crate::{
    control,
    play::{Culprit, Play},
    programs::{DEADLINE, Program, load},
};

const WORKERS: u32 = 4;
const REQUESTS_PER_S: f64 = 60.0;

/// A service whose workers each have a listening socket, and its address.
fn service(mode: &str) -> Result<(Program, SocketAddr)> {
    let port = ports::free()?;
    let (at, workers) = (port.to_string(), WORKERS.to_string());
    let text = include_str!("apps/reuseport.py");
    let server = Program::python("reuseport", text, &["asyncio"], &[&at, &workers, mode])?;
    let lines = server.process.lines();
    let mut listening = 0;
    lines.wait("all workers to listen", 0, DEADLINE, |line| {
        listening += u32::from(line.text.starts_with("worker"));
        (listening == WORKERS).then_some(())
    })?;
    Ok((server, ports::local(port)))
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("pid 0")?;
    kill_process(pid, signal).context("signal a worker")
}

/// Sends one worker a signal that begins the trouble, and later one that ends it.
fn trouble(play: &mut Play, load: &Load, pid: u32, (begin, end): (Signal, Signal)) -> Result<()> {
    let worker = *children_of(pid)?.first().context("no worker")?;
    play.watch_pid(pid)?;
    play.healthy()?;
    play.planted(Culprit::process(worker));
    signal(worker, begin)?;
    let held = play.hold();
    play.removing(Some(load));
    signal(worker, end)?;
    held?;
    play.recover()
}

/// One request occupies one of the workers.
fn occupied(play: &mut Play, mode: &str) -> Result<()> {
    let (server, address) = service(mode)?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    trouble(play, &load, server.pid(), (Signal::USR1, Signal::USR2))
}

pub fn computing(play: &mut Play) -> Result<()> {
    occupied(play, "compute")
}

pub fn sleeping(play: &mut Play) -> Result<()> {
    occupied(play, "sleep")
}

/// nginx's master opens a socket for each worker, and all of them inherit all sockets. One worker is stopped.
pub fn nginx(play: &mut Play) -> Result<()> {
    let nginx = Nginx::start_with_sockets(WORKERS)?;
    let load = load(nginx.address(), "/", REQUESTS_PER_S)?;
    let pid = nginx.process().pid();
    trouble(play, &load, pid, (Signal::STOP, Signal::CONT))
}

/// Healthy: each worker serves what the kernel assigns to it.
pub fn even(play: &mut Play) -> Result<()> {
    let nginx = Nginx::start_with_sockets(WORKERS)?;
    let load = load(nginx.address(), "/", 200.0)?;
    control::stays_healthy(play, nginx.process().pid(), load)
}
