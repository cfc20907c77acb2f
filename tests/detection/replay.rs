//! A recording replays to the same output as the live run.

use std::{fs, net::TcpStream, process::Command};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{self},
    lines::Stream,
    needs,
    process::{End, Process},
    sockets,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, alone, service, watch};

/// Lines of the standard output of a process.
fn stdout(process: &Process) -> Vec<String> {
    let lines = process.lines().all().into_iter();
    lines
        .filter(|line| line.stream == Stream::Stdout)
        .map(|line| line.text)
        .collect()
}

#[test]
fn a_recorded_incident_replays_byte_for_byte() -> Result<()> {
    const TEST: &str = "a_recorded_incident_replays_byte_for_byte";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let _alone = alone();
    let directory = TempDir::new("replay")?;
    let file = directory.path().join("incident.tb").display().to_string();
    let config = directory.write(
        "tailback.toml",
        "[detect.accept]\nwarn = 0.6\nclear_after = \"500ms\"\n",
    )?;
    let config = config.display().to_string();
    let service = service(&["drain", "--listen", "127.0.0.1:0", "--backlog", "5"])?;
    let agent = watch(service.pid(), &["--record", &file, "--config", &config])?;
    let clients = |count: usize| -> Result<Vec<TcpStream>> {
        (0..count)
            .map(|_| sockets::begin_connect(service.address()))
            .collect()
    };
    // One incident with losses that is over, and one that is still open when the recording ends.
    service.process().freeze()?;
    let first = clients(20)?;
    agent.wait_for("full", DEADLINE, |event| event.text("to") == "full")?;
    service.process().thaw()?;
    agent.wait_for("the end of the episode", DEADLINE, |event| {
        event.is("episode") && event.value.get("ongoing").is_none()
    })?;
    drop(first);
    service.process().freeze()?;
    let second = clients(3)?;
    let mark = agent.mark();
    agent.wait_since(mark, "the second incident", DEADLINE, |event| {
        event.is("level")
    })?;
    agent.wait_for("its own cost", DEADLINE, |event| event.is("agent"))?;
    agent.process().signal(Signal::TERM)?;
    ensure!(
        agent.process().wait_end(DEADLINE)? == End::Code(0),
        "the agent failed"
    );
    drop(second);

    // It may end before its last line is read.
    agent.process().lines().wait_end(DEADLINE)?;
    let live = stdout(agent.process());
    let mut replay = Command::new(agent::binary()?);
    let replay = Process::start(
        "replay",
        replay.args(["replay", &file, "--json", "--config", &config]),
    )?;
    ensure!(
        replay.wait_end(DEADLINE)? == End::Code(0),
        "the replay failed"
    );
    wait::until("all lines of the replay", DEADLINE, || {
        Ok((stdout(&replay).len() >= live.len()).then_some(()))
    })?;
    let replayed = stdout(&replay);
    println!(
        "{} lines, {} bytes, recorded in {} bytes",
        live.len(),
        live.iter().map(|line| line.len() + 1).sum::<usize>(),
        fs::metadata(&file)?.len()
    );
    let of_type = |name: &str| {
        live.iter()
            .filter(|line| line.contains(&format!("\"type\":\"{name}\"")))
            .count()
    };
    ensure!(
        of_type("level") >= 3 && of_type("episode") >= 2,
        "no incident was recorded: {live:#?}"
    );
    for (live, replayed) in live.iter().zip(&replayed) {
        ensure!(live == replayed, "live:   {live}\nreplay: {replayed}");
    }
    ensure!(
        live.len() == replayed.len(),
        "{} lines live, {} replayed",
        live.len(),
        replayed.len()
    );
    Ok(())
}
