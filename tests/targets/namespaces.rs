//! Targets and agents in other network and pid namespaces.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    needs,
    network::Network,
    process::{End, Process},
    program,
    sample::{Sample, number},
    wait,
};

use crate::{Busy, DEADLINE, SUBJECT, check_one_target, connect, wait_for_depth};

#[test]
fn a_service_in_another_network_namespace_is_sampled() -> Result<()> {
    const TEST: &str = "a_service_in_another_network_namespace_is_sampled";
    if !needs::met(TEST, &["ip", "nsenter", "unshare"]) {
        return Ok(());
    }
    // The same address in two networks, with depths 7 and 3.
    let networks = [Network::new()?, Network::new()?];
    let mut kept = Vec::new();
    for (network, count) in networks.iter().zip([7, 3]) {
        let busy = Busy::start(&mut network.command(SUBJECT)?, "127.0.0.1:8080", &[])?;
        let clients = network.inside(|| connect(busy.address(), count + 1))?;
        kept.push((busy, clients, count as u64));
    }
    for (busy, _, count) in &kept {
        let pid = busy.pid().to_string();
        let depth = || -> Result<u64> {
            let sample = Sample::of(&["--pid", &pid])?;
            number(sample.queue("accept", "127.0.0.1:8080")?, "depth")
        };
        // The service may not have accepted its first connection yet.
        wait::until("the depth", DEADLINE, || {
            Ok((depth()? == *count).then_some(()))
        })?;
        println!("--pid {pid}: depth {count}");
    }
    let sample = Sample::of(&["--port", "8080"])?;
    let depths: Vec<(&Value, &Value)> = sample
        .queues("accept")
        .map(|queue| (&queue["pid"], &queue["depth"]))
        .collect();
    println!("--port 8080: {depths:?}");
    for (busy, _, count) in &kept {
        let ours = sample
            .queues("accept")
            .find(|queue| queue["pid"] == busy.pid());
        let ours = ours.with_context(|| format!("no queue of process {}", busy.pid()))?;
        ensure!(number(ours, "depth")? == *count, "{ours}");
    }
    Ok(())
}

/// Pid of the child of a process, in this namespace.
fn child_of(parent: u32) -> Result<u32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    wait::until("a child", DEADLINE, || {
        let children = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        Ok(children
            .split_whitespace()
            .next()
            .and_then(|child| child.parse().ok()))
    })
}

/// Starts a busy service as process 1 of its own pid namespace with its own /proc. Returns its pid outside too.
fn in_own_pid_namespace() -> Result<(Busy, u32)> {
    let mut unshare = Command::new(program::need(&["unshare"])?);
    unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child", SUBJECT]);
    let busy = Busy::start(&mut unshare, "127.0.0.1:0", &["--workers", "2"])?;
    let outside = child_of(busy.pid())?;
    Ok((busy, outside))
}

#[test]
fn a_service_in_a_child_pid_namespace_is_known_by_its_outer_pid() -> Result<()> {
    const TEST: &str = "a_service_in_a_child_pid_namespace_is_known_by_its_outer_pid";
    if !needs::met(TEST, &["ss", "unshare"]) {
        return Ok(());
    }
    let (busy, outside) = in_own_pid_namespace()?;
    let _clients = connect(busy.address(), 6)?;
    wait_for_depth(busy.address().port(), 4)?;
    for args in [
        ["--pid", &outside.to_string()],
        ["--port", &busy.address().port().to_string()],
    ] {
        let sample = Sample::of(&args)?;
        check_one_target(&sample, busy.address(), 2, 1)?;
        let target = sample.targets().next().context("no target")?;
        ensure!(number(target, "pid")? == u64::from(outside), "{target}");
        ensure!(target["exe"] == "tailback-subject", "{target}");
    }
    Ok(())
}

#[test]
fn an_agent_inside_a_pid_namespace_uses_the_pids_of_its_own_proc() -> Result<()> {
    const TEST: &str = "an_agent_inside_a_pid_namespace_uses_the_pids_of_its_own_proc";
    if !needs::met(TEST, &["nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let (busy, outside) = in_own_pid_namespace()?;
    let _clients = connect(busy.address(), 6)?;
    wait_for_depth(busy.address().port(), 4)?;
    let inside = |args: &[&str]| -> Result<Command> {
        let mut command = Command::new(program::need(&["nsenter"])?);
        command
            .args(["--pid", "--mount", "--target", &outside.to_string(), "--"])
            .arg(agent::binary()?)
            .args(args);
        Ok(command)
    };
    let port = busy.address().port().to_string();
    for args in [
        ["--pid", "1"],
        ["--port", &port],
        ["--name", "tailback-subj*"],
    ] {
        println!("{}, inside:", args.join(" "));
        let sample = Sample::from_command(&mut inside(&["sample", "--json", args[0], args[1]])?)?;
        check_one_target(&sample, busy.address(), 2, 1)?;
        let target = sample.targets().next().context("no target")?;
        ensure!(number(target, "pid")? == 1, "{target}");
        ensure!(target["exe"] == "tailback-subject", "{target}");
        ensure!(target["target"] == "tailback-subject", "{target}");
        let threads = sample.queue("runqueue", "threads")?;
        ensure!(threads["threads"].as_f64() == Some(2.0), "{threads}");
    }
    // Processes outside do not exist for it.
    let none = Process::start(
        "tailback",
        &mut inside(&["sample", "--pid", &std::process::id().to_string()])?,
    )?;
    ensure!(
        none.wait_end(DEADLINE)? == End::Code(4),
        "{:?}",
        none.lines().all()
    );
    // A running agent detects the queue inside too.
    let agent = Agent::start(&mut inside(&["run", "--json", "--pid", "1"])?)?;
    agent.wait_for("the level of the queue", DEADLINE, |event| {
        event.is("level")
            && event.text("name") == busy.address().to_string()
            && event.number("pid") == Some(1.0)
    })?;
    Ok(())
}
