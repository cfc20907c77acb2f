//! The service makes no progress: it is stopped, busy with one task, or blocked on its output.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    ports,
    process::Process,
    program,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
};

use crate::{
    cpu::{self, CpuGroup},
    gateway::Uvicorn,
    play::{Culprit, Play},
    programs::{app, family, load, steady_load, uwsgi_is_full},
};

/// SIGSTOP for the master and the workers.
pub fn stopped(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 200))?;
    let load = load(uwsgi.address(), "/sleep/50", 25.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.healthy()?;
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family));
    uwsgi.process().signal_group(Signal::STOP)?;
    let held = play.hold();
    play.removing(Some(&load));
    uwsgi.process().signal_group(Signal::CONT)?;
    held?;
    play.recover()
}

/// Requests compute reports inside the event loop, which is blocked most of the time.
pub fn event_loop(play: &mut Play) -> Result<()> {
    reports(play, 0.7)
}

/// The same every 2.5 s: the accept queue drains in between.
pub fn event_loop_at_times(play: &mut Play) -> Result<()> {
    reports(play, 0.4)
}

fn reports(play: &mut Play, per_s: f64) -> Result<()> {
    // It has a CPU to itself, so that other load cannot prolong the report.
    let group = CpuGroup::new("loop", cpu::HIGH_CPU_SHARES)?;
    let text = include_str!("apps/loop.py");
    let server = Uvicorn::start_within(&group.before(), "loop", text, &[])?;
    let address = ports::local(server.port);
    let usual = load(address, "/", 30.0)?;
    play.watch_pid(server.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(server.process.pid()));
    let reports = steady_load(address, "/report", per_s)?;
    play.hold()?;
    play.removing(Some(&usual));
    reports.stop()?;
    play.recover()
}

/// The service logs into a pipe whose reader is stopped.
pub fn output(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("output")?;
    let fifo = directory.path().join("log");
    let made = Command::new("mkfifo").arg(&fifo).status();
    ensure!(made.context("start mkfifo")?.success(), "mkfifo failed");
    let mut reader = Command::new(program::need(&["cat"])?);
    let reader = Process::start("cat", reader.arg(&fifo))?;
    let mut service = app(4, 200);
    service.args.clear();
    let uwsgi = Uwsgi::start_app(&App {
        output: Some(fifo),
        ..service
    })?;
    let long = format!("/sleep/20?{}", "x".repeat(1500));
    let load = load(uwsgi.address(), &long, 40.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(reader.lines(), uwsgi_is_full);
    play.healthy()?;
    play.planted(Culprit::process(reader.pid()));
    reader.freeze()?;
    play.hold()?;
    play.removing(Some(&load));
    reader.thaw()?;
    play.recover()
}
