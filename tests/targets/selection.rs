//! Selecting targets by pid, name, executable, port, cgroup and configuration.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{
    cgroup::Cgroup,
    needs, ports, program,
    sample::{Sample, number},
    skip::skip,
    temp::TempDir,
};

use crate::{Busy, SUBJECT, check_one_target, connect, wait_for_depth};

#[test]
fn workers_that_share_a_listener_are_one_target_with_one_queue() -> Result<()> {
    const TEST: &str = "workers_that_share_a_listener_are_one_target_with_one_queue";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    // For more than 32 processes the agent scans the whole machine instead of each process.
    for workers in [4, 40] {
        let busy = Busy::on_any_port(&["--workers", &workers.to_string()])?;
        let port = busy.address().port();
        let _clients = connect(busy.address(), workers as usize + 6)?;
        wait_for_depth(port, 6)?;
        for args in [
            ["--pid", &busy.pid().to_string()],
            ["--port", &port.to_string()],
        ] {
            let sample = Sample::of(&args)?;
            check_one_target(&sample, busy.address(), workers, 1)?;
            let target = sample.targets().next().context("no target")?;
            ensure!(number(target, "pid")? == u64::from(busy.pid()), "{target}");
        }
    }
    Ok(())
}

#[test]
fn sockets_of_one_reuseport_group_are_one_queue_with_summed_depth() -> Result<()> {
    const TEST: &str = "sockets_of_one_reuseport_group_are_one_queue_with_summed_depth";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let address = ports::local(ports::free()?);
    let services: Vec<Busy> = (0..3)
        .map(|_| {
            let args = ["--reuseport", "--backlog", "50"];
            Busy::start(&mut Command::new(SUBJECT), &address.to_string(), &args)
        })
        .collect::<Result<_>>()?;
    // Each service accepts one of the connections that the kernel assigned to it.
    let _clients = connect(address, 60)?;
    wait_for_depth(address.port(), 57)?;
    let port = address.port().to_string();
    check_one_target(&Sample::of(&["--port", &port])?, address, 3, 3)?;
    // Selected by their pids they are the same target.
    let pids: Vec<String> = services.iter().map(|busy| busy.pid().to_string()).collect();
    let args = ["--pid", &pids[0], "--pid", &pids[1], "--pid", &pids[2]];
    check_one_target(&Sample::of(&args)?, address, 3, 3)
}

#[test]
fn services_on_the_same_port_of_two_addresses_are_two_targets() -> Result<()> {
    const TEST: &str = "services_on_the_same_port_of_two_addresses_are_two_targets";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let port = ports::free()?;
    let directory = TempDir::new("two")?;
    let mut services = Vec::new();
    for host in 1..=2 {
        let program = program::renamed(SUBJECT, &directory, &format!("service-{host}"))?;
        let address = format!("127.0.0.{host}:{port}");
        services.push(Busy::start(&mut Command::new(program), &address, &[])?);
    }
    let sample = Sample::of(&["--port", &port.to_string()])?;
    for queue in sample.queues("accept") {
        println!("{} of {} {}", queue["name"], queue["target"], queue["pid"]);
    }
    for busy in &services {
        let queue = sample.queue("accept", &busy.address().to_string())?;
        ensure!(
            number(queue, "pid")? == u64::from(busy.pid()),
            "not of process {}: {queue}",
            busy.pid()
        );
    }
    Ok(())
}

#[test]
fn a_service_is_found_by_name_executable_port_and_configuration() -> Result<()> {
    const TEST: &str = "a_service_is_found_by_name_executable_port_and_configuration";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let directory = TempDir::new("names")?;
    // `comm` keeps only its first 15 bytes.
    let program = program::renamed(SUBJECT, &directory, "front-desk-of-the-test")?;
    let busy = Busy::start(
        &mut Command::new(&program),
        "127.0.0.1:0",
        &["--backlog", "20"],
    )?;
    let (address, pid) = (busy.address(), busy.pid());
    let _clients = connect(address, 5)?;
    wait_for_depth(address.port(), 4)?;
    let config = |line: &str| {
        directory.write(
            "tailback.toml",
            &format!("[[target]]\nservice_name = \"desk\"\n{line}\n"),
        )
    };
    let exe = program.display().to_string();
    for args in [
        ["--name", "front-desk-of-t"],
        ["--name", "front-d?sk-*-test"],
        ["--name", &exe],
        ["--port", &address.port().to_string()],
    ] {
        println!("{}:", args.join(" "));
        let sample = Sample::of(&args)?;
        check_one_target(&sample, address, 1, 1)?;
        let queue = sample.queue("accept", &address.to_string())?;
        ensure!(
            queue["target"] == "front-desk-of-the-test" && number(queue, "pid")? == u64::from(pid),
            "{queue}"
        );
    }
    for line in [
        format!("port = {}", address.port()),
        format!("pid = {pid}"),
        "name = \"front-desk*\"".to_owned(),
    ] {
        println!("[[target]] {line}:");
        let sample = Sample::of(&["--config", &config(&line)?.display().to_string()])?;
        check_one_target(&sample, address, 1, 1)?;
        ensure!(sample.queue("accept", &address.to_string())?["target"] == "desk");
    }
    // With --all it is still a target of its own.
    let sample = Sample::of(&["--all"])?;
    let queue = sample.queue("accept", &address.to_string())?;
    println!(
        "--all: {} targets, ours with depth {}",
        sample.targets().count(),
        queue["depth"]
    );
    ensure!(
        number(queue, "depth")? == 4 && number(queue, "pid")? == u64::from(pid),
        "{queue}"
    );
    Ok(())
}

#[test]
fn a_service_is_found_by_its_cgroup() -> Result<()> {
    const TEST: &str = "a_service_is_found_by_its_cgroup";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let cgroup = match Cgroup::new() {
        Ok(cgroup) => cgroup,
        Err(error) => {
            skip(TEST, &format!("{error:#}"));
            return Ok(());
        }
    };
    let busy = Busy::on_any_port(&[])?;
    cgroup.add_process(busy.pid())?;
    let _clients = connect(busy.address(), 3)?;
    wait_for_depth(busy.address().port(), 2)?;
    let absolute = cgroup.path().display().to_string();
    let relative = cgroup
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let rooted = format!("/{relative}");
    for path in [&absolute, &relative, &rooted] {
        println!("--cgroup {path}:");
        check_one_target(&Sample::of(&["--cgroup", path])?, busy.address(), 1, 1)?;
    }
    Ok(())
}
