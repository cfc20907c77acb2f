//! An agent that is killed, and one that hangs.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{param::clock_ticks_per_second, process::Signal};
use tailback_tests::wait;

use super::updates::{TTL, kill};
use crate::stage::{Agent, DEADLINE, Stage};

/// Until the first liveness probe, as the chart has it: `initialDelaySeconds`.
const FIRST_PROBE: Duration = Duration::from_secs(90);
/// An agent that hangs is killed within this time: 10 s until it counts as such, two probes 10 s apart, a grace period of 10 s, and
/// some seconds of the kubelet.
const RESTART_DEADLINE: Duration = Duration::from_secs(60);
/// The kubelet's first restart follows at once, the next after 10 s.
const BACK_OFF: Duration = Duration::from_secs(30);
/// Maximum time from a report of the reader until it is read here, through the kubelet.
const REPORT_DELAY: Duration = Duration::from_secs(2);

/// Waits until the kubelet has restarted the container, and the agent publishes again.
fn wait_restart(stage: &Stage, before: &Agent, deadline: Duration) -> Result<()> {
    wait::until_ok("the restart of the agent", deadline, || {
        let now = stage.agent()?;
        ensure!(now.pod == before.pod, "it is another pod");
        ensure!(
            now.restarts == before.restarts + 1,
            "{} restarts",
            now.restarts
        );
        Ok(())
    })?;
    stage.wait_agent().map(drop)
}

/// Checks in a pod that its page expires within its time to live, and is renewed by the next agent.
fn check_fails_open(
    stage: &Stage,
    pid: u32,
    signal: Signal,
    before: &Agent,
    deadline: Duration,
) -> Result<()> {
    let watch = stage.watch("jammed")?;
    // A new agent needs some seconds to find the overload.
    wait::until_ok("an admit ratio below 1", DEADLINE, || {
        let page = stage.page("jammed")?;
        let ratio = page["admit_ratio"].as_f64();
        ensure!(ratio.is_some_and(|ratio| ratio < 1.0), "{page}");
        Ok(())
    })?;
    let mark = watch.mark();
    let began = Instant::now();
    kill(pid, signal)?;
    let expired = watch.wait(false, mark)?;
    let took = began.elapsed();
    ensure!(
        took < TTL + REPORT_DELAY,
        "the page expired {took:?} after the signal"
    );
    ensure!(
        expired["admit_ratio"] == 1.0,
        "it does not fail open: {expired}"
    );
    wait_restart(stage, before, deadline)?;
    watch.wait(true, watch.mark())?;
    eprintln!("    the page expired {took:?} after the signal");
    eprintln!(
        "    renewed {:?} after the signal, expired for {:?}",
        began.elapsed(),
        watch.longest_expired()?
    );
    Ok(())
}

pub fn killed(stage: &Stage) -> Result<()> {
    let agent = stage.wait_agent()?;
    let pid = agent.pid("agent")?;
    check_fails_open(stage, pid, Signal::KILL, &agent, BACK_OFF + DEADLINE)
}

pub fn hung(stage: &Stage) -> Result<()> {
    let agent = stage.wait_agent()?;
    let pid = agent.pid("agent")?;
    // The kubelet does not probe a container that has just started.
    wait::until("the first liveness probe", FIRST_PROBE + DEADLINE, || {
        Ok((age(pid)? > FIRST_PROBE).then_some(()))
    })?;
    check_fails_open(stage, pid, Signal::STOP, &agent, RESTART_DEADLINE)
}

/// The time since a process was started.
fn age(pid: u32) -> Result<Duration> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).context("read the start of the agent")?;
    // The 20th field after the name, which may contain any characters.
    let start = stat
        .rsplit(") ")
        .next()
        .and_then(|fields| fields.split(' ').nth(19));
    let ticks: f64 = start.context("no start time")?.parse()?;
    let uptime = fs::read_to_string("/proc/uptime").context("read the uptime")?;
    let uptime: f64 = uptime.split(' ').next().context("no uptime")?.parse()?;
    let started = ticks / clock_ticks_per_second() as f64;
    Ok(Duration::from_secs_f64((uptime - started).max(0.0)))
}
