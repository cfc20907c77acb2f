//! Threads that wait for a lock: the cause is what its holder does.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{load::Load, ports, process::Process, program, redis::Redis, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    pools::Java,
    programs::{DEADLINE, Program, load},
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
    server.process.wait_line("listening", DEADLINE)?;
    let load = load(ports::local(port), "/", REQUESTS_PER_S)?;
    // Ownership changes two hundred times a second.
    let culprit = Culprit::process(server.pid()).or("interpreter");
    trouble(play, &server, &load, culprit)
}

/// A server that takes `ms` to answer, and `slow_ms` after SIGUSR1.
fn called(ms: u32, slow_ms: u32) -> Result<(Program, u16)> {
    let port = ports::free()?;
    let args = [port.to_string(), ms.to_string(), slow_ms.to_string()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = include_str!("apps/called.py");
    let called = Program::python("called", text, &["socket"], &args)?;
    called.process.wait_line("listening", DEADLINE)?;
    Ok((called, port))
}

/// A monitor of the JVM is held over a call, and the call becomes slow. The threads would keep up without the monitor. Those that
/// wait for it are parked at an address each.
pub fn monitor(play: &mut Play) -> Result<()> {
    let (called, port) = called(2, 120)?;
    let java = Java::monitor(port)?;
    let load = load(java.address, "/", REQUESTS_PER_S)?;
    play.watch_pid(java.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(java.process.pid()));
    called.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    called.process.signal(Signal::USR2)?;
    play.recover()
}

/// A service with a thread for each request, and the server that it calls.
fn locked_calls(ms: u32) -> Result<(Program, SocketAddr, Program)> {
    let (called, called_port) = called(ms, ms)?;
    let port = ports::free()?;
    let args = [port.to_string(), called_port.to_string()];
    let text = include_str!("apps/locked.py");
    let server = Program::python("locked", text, &["socket"], &[&args[0], &args[1]])?;
    server.process.wait_line("listening", DEADLINE)?;
    Ok((server, ports::local(port), called))
}

/// Calls that were made at the same time are made one after the other, under a lock. Each is as fast as before.
pub fn locked_call(play: &mut Play) -> Result<()> {
    let (server, address, _called) = locked_calls(50)?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let culprit = Culprit::process(server.pid());
    trouble(play, &server, &load, culprit)
}

/// Healthy: a lock is held over calls, and waited for now and then.
pub fn short_locked_calls(play: &mut Play) -> Result<()> {
    let (server, address, _called) = locked_calls(12)?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    server.process.signal(Signal::USR1)?;
    play.watch_pid(server.pid())?;
    crate::control::observed(play, load)
}

/// Sixteen threads of Ruby share one lock, and each request computes for much longer than before.
pub fn of_ruby(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("puma")?;
    let config = directory.write("config.ru", include_str!("apps/config.ru"))?;
    let ms = directory.write("ms", "4")?;
    let port = ports::free()?;
    let mut command = Command::new(program::need(&["puma"])?);
    command
        .args(["--threads", "16:16", "--environment", "production"])
        .args(["--bind", &format!("tcp://127.0.0.1:{port}?backlog=128")])
        .arg(config)
        .env("APP_MS", &ms);
    let puma = Process::start("puma", &mut command)?;
    puma.wait_response(ports::local(port), DEADLINE)?;
    let load = load(ports::local(port), "/", 50.0)?;
    play.watch_pid(puma.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(puma.pid()).or("interpreter"));
    directory.write("ms", "30")?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(10.0)?;
    directory.write("ms", "4")?;
    play.recover()
}

/// The same in OCaml.
pub fn of_ocaml(play: &mut Play) -> Result<()> {
    let port = ports::free()?;
    let text = include_str!("apps/turns.ml");
    let server = Program::ocaml("turns", text, &[&port.to_string()])?;
    server.process.wait_line("listening", DEADLINE)?;
    let load = load(ports::local(port), "/", 50.0)?;
    let culprit = Culprit::process(server.pid()).or("interpreter");
    trouble(play, &server, &load, culprit)
}
