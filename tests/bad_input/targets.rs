//! Missing, invalid, late and vanished targets.

use std::{fs, process::Command};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_tests::{ports, process::Process, program, temp::TempDir};

use crate::{DEADLINE, Stuck, allowed, end, idle, json, run, tailback};

#[test]
fn a_missing_target_is_a_usage_error_with_a_hint() -> Result<()> {
    for args in [
        &["run"][..],
        &["sample"],
        &["record", "--out", "/dev/null"],
        &["run", "--json"],
    ] {
        run(args)?.check(2, &["no target", "--pid", "--name", "--all", "[[target]]"])?;
    }
    Ok(())
}

#[test]
fn an_invalid_target_option_is_rejected_by_name() -> Result<()> {
    for (option, value) in [
        ("--pid", "-1"),
        ("--pid", "x"),
        ("--pid", "99999999999"),
        ("--port", "70000"),
        ("--port", ""),
    ] {
        run(&["run", &format!("{option}={value}")])?.check(2, &[option, "--help"])?;
    }
    run(&["run", "--pids", "1"])?.check(2, &["--pids", "--pid"])?;
    Ok(())
}

#[test]
fn a_nonexistent_process_exits_with_4() -> Result<()> {
    if !allowed("a_nonexistent_process_exits_with_4") {
        return Ok(());
    }
    let directory = TempDir::new("keep")?;
    let kept = directory.write("kept", "an earlier recording")?;
    let kept_path = kept.to_string_lossy();
    for args in [
        &["sample", "--pid", "4999999"][..],
        &["run", "--pid", "4999999"],
        &["sample", "--pid", "0"],
        &["diagnose", "--pid", "4999999"],
        &["diagnose", "--pid", "4999999", "--json", "--check"],
        &["run", "--pid", "4999999", "--record", &kept_path],
        &["record", "--pid", "4999999", "--out", &kept_path],
    ] {
        run(args)?.check(4, &["no such process", args[2]])?;
    }
    // The existing file was not overwritten.
    ensure!(fs::read_to_string(&kept)? == "an earlier recording");
    Ok(())
}

#[test]
fn a_sample_without_matching_process_exits_with_4() -> Result<()> {
    if !allowed("a_sample_without_matching_process_exits_with_4") {
        return Ok(());
    }
    let port = ports::free()?.to_string();
    for target in [
        ["--name", "no-such-service"],
        ["--port", &port],
        ["--cgroup", "/no/such/cgroup"],
    ] {
        let args = ["sample", target[0], target[1]];
        run(&args)?.check(4, &["no process matches", target[0], target[1]])?;
    }
    Ok(())
}

#[test]
fn a_diagnosis_without_matching_process_exits_with_4() -> Result<()> {
    if !allowed("a_diagnosis_without_matching_process_exits_with_4") {
        return Ok(());
    }
    let output = run(&["diagnose", "--name", "no-such-service"])?;
    output.check(4, &["no process matches", "no-such-service"])
}

#[test]
fn a_diagnosis_that_finds_nothing_reports_its_coverage_and_exits_with_0() -> Result<()> {
    if !allowed("a_diagnosis_that_finds_nothing_reports_its_coverage_and_exits_with_0") {
        return Ok(());
    }
    let idle = idle()?;
    let pid = idle.pid().to_string();
    let args = ["diagnose", "--pid", &pid, "--for", "2s", "--check"];
    let output = run(&args)?;
    output.check(0, &[])?;
    // No progress output without a terminal.
    ensure!(output.err.is_empty(), "{:?}", output.err);
    let [line] = &output.out[..] else {
        anyhow::bail!("{:?}", output.out);
    };
    ensure!(line.starts_with("All queues are ok. Observed"), "{line}");
    ensure!(line.contains("Observed 1 service, "), "{line}");
    ensure!(line.contains(", 1 thread for "), "{line}");
    let output = run(&[&args[..], &["--json"]].concat())?;
    output.check(0, &[])?;
    ensure!(output.text().is_empty(), "{}", output.text());
    Ok(())
}

#[test]
fn a_check_that_finds_a_full_queue_exits_with_1_and_names_it() -> Result<()> {
    if !allowed("a_check_that_finds_a_full_queue_exits_with_1_and_names_it") {
        return Ok(());
    }
    let stuck = Stuck::new()?;
    let args = ["diagnose", "--pid", &stuck.pid, "--for", "3s"];
    let output = run(&args)?;
    output.check(0, &[])?;
    let head = output.out.first().map_or("", String::as_str);
    ensure!(
        head.starts_with("FULL      ") && head.contains(" pipe "),
        "{head}"
    );
    ensure!(
        output.text().contains("1 queue is not ok."),
        "{}",
        output.text()
    );

    let checked = run(&[&args[..], &["--check", "--json"]].concat())?;
    checked.check(1, &["--check", " pipe ", "(full)"])?;
    let found = json(&checked.out)?;
    let [diagnosis] = &found[..] else {
        anyhow::bail!("{found:?}");
    };
    ensure!(diagnosis["type"] == "diagnosis", "{diagnosis}");
    ensure!(
        diagnosis["kind"] == "pipe" && diagnosis["level_max"] == "full",
        "{diagnosis}"
    );
    Ok(())
}

#[test]
fn run_waits_for_a_name_without_match_and_reports_it() -> Result<()> {
    if !allowed("run_waits_for_a_name_without_match_and_reports_it") {
        return Ok(());
    }
    let directory = TempDir::new("late")?;
    let late = directory.path().join("comes-late");
    program::copy(&program::need(&["sleep"])?, &late)?;
    let pattern = late.to_string_lossy();
    let mut command = tailback(&["run", "--name", &pattern, "--duration", "60s"])?;
    let agent = Process::start("tailback", &mut command)?;
    let line = agent.wait_line("waiting for one to start", DEADLINE)?;
    ensure!(line.text.contains(&*pattern), "{}", line.text);
    let process = Process::start("comes-late", Command::new(&late).arg("1000"))?;
    let line = agent.wait_line("watching", DEADLINE)?;
    let pid = format!("(pid {}", process.pid());
    ensure!(line.text.contains(&pid), "{}", line.text);
    agent.signal(Signal::TERM)?;
    end(&agent)?.check(0, &[])
}

#[test]
fn a_target_that_ends_is_reported_and_the_agent_keeps_running() -> Result<()> {
    if !allowed("a_target_that_ends_is_reported_and_the_agent_keeps_running") {
        return Ok(());
    }
    for as_json in [false, true] {
        let victim = idle()?;
        let pid = victim.pid().to_string();
        let mut command = tailback(&["run", "--pid", &pid, "--duration", "60s"])?;
        let agent = Process::start("tailback", command.args(as_json.then_some("--json")))?;
        agent.wait_line(&pid, DEADLINE)?;
        drop(victim);
        agent.wait_line(&format!("process {pid} has ended"), DEADLINE)?;
        if !as_json {
            agent.wait_line("exited", DEADLINE)?;
        }
        agent.check_running()?;
        agent.signal(Signal::TERM)?;
        let output = end(&agent)?;
        output.check(0, &[])?;
        if as_json {
            json(&output.out)?;
        }
    }
    Ok(())
}
