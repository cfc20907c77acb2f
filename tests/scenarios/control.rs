//! Healthy controls: none of them may have an episode.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use tailback_tests::{
    idle::Idle,
    lines::Lines,
    load::{Load, Request},
    nginx::Nginx,
    process::Process,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::{
    limits::Bursts,
    play::Play,
    programs::{DEADLINE, app, load, with_children},
};

/// How long each is watched.
const OBSERVATION_TIME: Duration = Duration::from_secs(12);

/// Checks that every request was answered: otherwise the service was not healthy.
fn well(load: Load) -> Result<()> {
    let done = load.done();
    let failed = done.iter().find(|request| !request.ok());
    ensure!(!done.is_empty(), "nothing was answered");
    ensure!(failed.is_none(), "a request failed: {failed:?}");
    load.stop().map(|_: Vec<Request>| ())
}

/// Watches a service under this load, which it serves well.
pub fn observed(play: &Play, load: Load) -> Result<()> {
    observed_for(OBSERVATION_TIME, play, load)
}

/// The same for this time.
pub fn observed_for(time: Duration, play: &Play, load: Load) -> Result<()> {
    play.lasts(time)?;
    well(load)
}

/// Watches a service under its usual load.
pub fn stays_healthy(play: &mut Play, pid: u32, load: Load) -> Result<()> {
    play.watch_pid(pid)?;
    observed(play, load)
}

/// Workers take turns at accepting, with a mutex in shared memory.
pub fn accept_mutex(play: &mut Play) -> Result<()> {
    let mut service = app(4, 100);
    service.args.push("--thunder-lock".to_owned());
    let uwsgi = Uwsgi::start_app(&service)?;
    let load = load(uwsgi.address(), "/sleep/100", 24.0)?;
    stays_healthy(play, uwsgi.process().pid(), load)
}

/// Capacity: 4 workers / 100 ms = 40 requests a second. Load: 28.
pub fn busy(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 100))?;
    let load = load(uwsgi.address(), "/sleep/100", 28.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.lasts(OBSERVATION_TIME)?;
    well(load)
}

/// A burst of 30 takes 0.4 s to serve; one arrives every 1.5 s.
pub fn bursty(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 100))?;
    let _bursts = Bursts::start(
        uwsgi.address(),
        "/sleep/50",
        30,
        Duration::from_millis(1500),
    );
    play.watch_pid(uwsgi.process().pid())?;
    play.lasts(OBSERVATION_TIME)
}

/// A producer faster than gzip: the pipe between them is full all the time, as intended.
pub fn batch(play: &mut Play) -> Result<()> {
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "yes 'a line of the batch' | exec nice gzip -9 >/dev/null",
    ]);
    let job = Process::start("the batch job", &mut command)?;
    // The shell is the parent of producer and consumer, so both are watched.
    let pids: Vec<String> = wait::until("both ends of the pipe", DEADLINE, || {
        let pids = with_children(job.pid())?;
        Ok((pids.len() == 3).then_some(pids))
    })?
    .iter()
    .flat_map(|pid| ["--pid".to_owned(), pid.to_string()])
    .collect();
    play.watch(&pids.iter().map(String::as_str).collect::<Vec<_>>())?;
    play.lasts(OBSERVATION_TIME)
}

/// 10,000 idle connections, and a few active callers.
pub fn idle(play: &mut Play) -> Result<()> {
    let nginx = Nginx::start_with(1, |words| {
        words.extend(["-g".to_owned(), "worker_rlimit_nofile 19000;".to_owned()]);
    })?;
    let idle = Idle::open(nginx.address(), 10_000)?;
    let load = load(nginx.address(), "/", 20.0)?;
    play.watch_pid(nginx.process().pid())?;
    play.lasts(OBSERVATION_TIME)?;
    drop(idle);
    well(load)
}

/// Workers are replaced one by one under load.
pub fn rolling_restart(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("reload")?;
    let touch = directory.write("touch", "")?;
    let mut service = app(4, 100);
    service.args.push("--lazy-apps".to_owned());
    service
        .args
        .push(format!("--touch-chain-reload={}", touch.display()));
    let uwsgi = Uwsgi::start_app(&service)?;
    let load = load(uwsgi.address(), "/sleep/50", 15.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.lasts(OBSERVATION_TIME / 4)?;
    directory.write("touch", "now")?;
    let lines: &Lines = uwsgi.process().lines();
    lines.wait("the last worker to be replaced", 0, DEADLINE, |line| {
        line.text.contains("chain reloading complete").then_some(())
    })?;
    play.lasts(OBSERVATION_TIME / 4)?;
    well(load)
}

/// Each request takes a second, and there are enough workers for the load.
pub fn slow_by_design(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&App { ..app(12, 100) })?;
    let load = load(uwsgi.address(), "/sleep/1000", 4.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.lasts(OBSERVATION_TIME)?;
    well(load)
}
