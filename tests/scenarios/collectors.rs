//! Garbage collectors that take the CPU, because live objects nearly fill the heap's limit.

use std::process::Command;

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{http, ports, process::Process, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    pools::{HEAP_MB, Java},
    programs::{DEADLINE, go, load},
};

/// The live heap of a Go service reaches its memory limit: the collector runs all the time, beside the requests.
pub fn of_go(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("heap")?;
    let binary = go(&directory, "heap", include_str!("apps/heap.go"))?;
    let port = ports::free()?;
    let mut command = Command::new(&binary);
    command
        .args([&port.to_string(), "112"])
        .env("GOMEMLIMIT", "110MiB")
        .env("GOGC", "off");
    let service = Process::start("heap", &mut command)?;
    service.wait_line("listening", DEADLINE)?;
    let load = load(ports::local(port), "/", 300.0)?;
    play.watch_pid(service.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(service.pid()));
    service.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(20.0)?;
    service.signal(Signal::USR2)?;
    play.recover()
}

/// A JVM keeps 83 of 96 MB: each request that it serves takes a full collection or two.
pub fn of_java(play: &mut Play) -> Result<()> {
    keep(play, &Java::heap(HEAP_MB)?, 83)
}

/// A JVM keeps 1,450 of 1,800 MB: a full collection takes about a second, and the accept queue drains between two of them.
pub fn pauses_of_java(play: &mut Play) -> Result<()> {
    keep(play, &Java::heap(1800)?, 1450)
}

fn keep(play: &mut Play, java: &Java, mb: u32) -> Result<()> {
    let load = load(java.address, "/", 40.0)?;
    play.watch_pid(java.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(java.process.pid()));
    http::get(java.address, &format!("/keep/{mb}"), DEADLINE)?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(20.0)?;
    http::get(java.address, "/drop", DEADLINE)?;
    play.recover()
}
