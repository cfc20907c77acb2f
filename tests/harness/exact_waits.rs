//! Waits of known length, and the agent's own account of those that its hooks measured.

use std::{fs::File, io::Write as _, path::Path, process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    agent::{HOOKS, attached_hooks, binary},
    lines::unix_ns,
    process::{End, Process},
    random::Random,
    temp::TempDir,
    wait,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
/// Times that [`write_times`] writes.
pub const READS: usize = 400;

/// Waits until an agent has attached its hooks, and measures.
pub fn wait_attached(agent: &Process, attached: fn(u32) -> usize) -> Result<()> {
    wait::until("the hooks to be attached", DEADLINE, || {
        agent.check_running()?;
        Ok((attached(agent.pid()) == HOOKS).then_some(()))
    })
}

/// Starts `diagnose` with its hooks attached, about one process. It ends with [`measured`].
pub fn diagnose(pid: u32, directory: &TempDir) -> Result<Process> {
    // The budget is raised so that other load does not detach them.
    let config = directory
        .write("diagnose.toml", "hook_budget = 0.5\n")
        .context("write the configuration")?;
    let mut command = Command::new(binary()?);
    command.args(["diagnose", "--json", "--tier", "watch", "--for", "10min"]);
    command.args(["--pid", &pid.to_string(), "--config"]);
    let agent = Process::start("tailback", command.arg(&config))?;
    wait_attached(&agent, attached_hooks)?;
    Ok(agent)
}

/// Ends `diagnose`. Returns the waits of this process that it has measured.
pub fn measured(agent: &Process, pid: u32) -> Result<Vec<Value>> {
    ensure!(
        attached_hooks(agent.pid()) == HOOKS,
        "the hooks were detached before the end: {:?}",
        agent.lines().all()
    );
    // So that the second in which the last waits ended is read.
    thread::sleep(Duration::from_secs(2));
    agent.signal(Signal::INT)?;
    let end = agent.wait_end(DEADLINE)?;
    agent.lines().wait_end(DEADLINE)?;
    let lines = agent.lines().all();
    ensure!(
        end == End::Code(0),
        "tailback ended with {end:?}: {lines:?}"
    );
    let values = lines
        .iter()
        .filter_map(|line| serde_json::from_str(&line.text).ok());
    let is_wait = |value: &Value| value["type"] == "exact_wait" && value["tgid"] == pid;
    Ok(values.filter(is_wait).collect())
}

/// Writes the time into the FIFO again and again, so that each read blocks for 2 to 10 ms. A `Random` decides.
pub fn write_times(to: &Path) -> Result<()> {
    let mut fifo = File::options().write(true).open(to)?;
    let mut random = Random::new(7);
    for _ in 0..READS {
        thread::sleep(Duration::from_micros(2_000 + random.below(8_000) as u64));
        fifo.write_all(&unix_ns().to_le_bytes())?;
    }
    Ok(())
}
