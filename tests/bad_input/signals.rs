//! Termination by signals.

use std::{
    fs,
    net::TcpListener,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    ports,
    process::{End, Process},
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, Stuck, allowed, end, idle, json, run, tailback};

/// Maximum time from the signal to the exit, without a collector to wait for.
const EXIT_DEADLINE: Duration = Duration::from_secs(4);

#[test]
fn a_signal_ends_run_in_time_and_reports_open_episodes() -> Result<()> {
    if !allowed("a_signal_ends_run_in_time_and_reports_open_episodes") {
        return Ok(());
    }
    let stuck = Stuck::new()?;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let agent = stuck.watched(&[])?;
        let sent = Instant::now();
        agent.process().signal(signal)?;
        agent.process().wait_end(EXIT_DEADLINE)?;
        println!("{signal:?}: exited after {:?}", sent.elapsed());
        let output = end(agent.process())?;
        output.check(0, &[])?;
        let lines = json(&output.out)?;
        let last = lines.last().context("no output")?;
        ensure!(
            last["type"] == "episode" && last["ongoing"] == true,
            "{last}"
        );
        ensure!(
            last["kind"] == "pipe" && last["level_max"] == "full",
            "{last}"
        );
    }
    let mut command = tailback(&["run", "--pid", &stuck.pid])?;
    let agent = Process::start("tailback", &mut command)?;
    agent.wait_line("full", DEADLINE)?;
    agent.signal(Signal::TERM)?;
    let output = end(&agent)?;
    output.check(0, &[])?;
    for word in ["ongoing for", "max 16 of 16", "warned", "advice"] {
        ensure!(output.text().contains(word), "{word}: {}", output.text());
    }
    Ok(())
}

#[test]
fn a_signal_ends_record_and_the_recording_replays() -> Result<()> {
    if !allowed("a_signal_ends_record_and_the_recording_replays") {
        return Ok(());
    }
    let (directory, process) = (TempDir::new("recording")?, idle()?);
    let file = directory.path().join("file");
    let (pid, out) = (process.pid().to_string(), file.to_string_lossy());
    let mut command = tailback(&["record", "--pid", &pid, "--out", &out])?;
    let agent = Process::start("tailback", &mut command)?;
    // The first samples are on disk.
    wait::until("samples on disk", DEADLINE, || {
        let len = fs::metadata(&file).map_or(0, |file| file.len());
        Ok((len > 100).then_some(()))
    })?;
    agent.signal(Signal::INT)?;
    agent.wait_end(EXIT_DEADLINE)?;
    end(&agent)?.check(0, &["samples to"])?;
    run(&["replay", &out])?.check(0, &[])
}

#[test]
fn an_unreachable_collector_does_not_block_exit_and_the_loss_is_reported() -> Result<()> {
    if !allowed("an_unreachable_collector_does_not_block_exit_and_the_loss_is_reported") {
        return Ok(());
    }
    let stuck = Stuck::new()?;
    let url = format!("http://127.0.0.1:{}", ports::free()?);
    let agent = stuck.watched(&["--otlp", &url])?;
    agent.wait_for("the unreachable collector", DEADLINE, |event| {
        event.is("notice") && event.text("text").contains("cannot be reached")
    })?;
    agent.process().signal(Signal::TERM)?;
    // The episode is printed first; only then the collector gets a last chance.
    agent.process().wait_line("\"episode\"", EXIT_DEADLINE)?;
    // It waits for 5 s. A request to the collector would time out after 10 s.
    agent.process().wait_end(Duration::from_secs(9))?;
    end(agent.process())?.check(0, &[&url, "spans delivered", "dropped", "refused"])
}

#[test]
fn a_second_signal_exits_immediately() -> Result<()> {
    if !allowed("a_second_signal_exits_immediately") {
        return Ok(());
    }
    let stuck = Stuck::new()?;
    // A collector that accepts connections and never responds, so that the agent has something to wait for.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", silent.local_addr()?);
    let agent = stuck.watched(&["--otlp", &url])?;
    let sent = Instant::now();
    // Repeated, because two pending signals are delivered as one.
    let end = wait::until("the end", DEADLINE, || {
        if let Some(end) = agent.process().ended()? {
            return Ok(Some(end));
        }
        agent.process().signal(Signal::INT)?;
        Ok(None)
    })?;
    ensure!(end == End::Code(130), "{end:?}");
    ensure!(sent.elapsed() < EXIT_DEADLINE, "{:?}", sent.elapsed());
    Ok(())
}
