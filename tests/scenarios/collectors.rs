//! Garbage collectors that take the CPU, because live objects nearly fill the heap's limit.

use std::process::Command;

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{ports, process::Process, temp::TempDir};

use crate::{
    play::{Culprit, Play},
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
