//! Checks on every kernel: `tailback doctor` passes, and the agent measures queues of a known state correctly.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    clock, control_groups, machine,
    protocol::{ACCURACY, CHECKS, PLAN},
};

type Check = fn() -> Result<()>;

/// The checks by name, as `protocol` lists them.
pub fn all() -> impl Iterator<Item = (&'static str, Check)> {
    let checks: [Check; CHECKS.len()] = [
        machine::modules_are_loaded,
        doctor,
        clock::steps_change_nothing,
        control_groups::limits_are_read_without_mounts,
    ];
    CHECKS.iter().copied().zip(checks)
}

/// `tailback doctor` finds no problem. Its report of capabilities is passed on.
fn doctor() -> Result<()> {
    for line in agent(&["doctor", "--json"])?.lines() {
        println!("{PLAN} {line}");
    }
    Ok(())
}

/// Passes on the output of the program in `tests/accuracy` line by line, so that it survives a kernel crash. The host
/// judges it.
pub fn accuracy() -> Result<()> {
    let mut program = Command::new("/accuracy")
        .stdout(Stdio::piped())
        .spawn()
        .context("start /accuracy")?;
    let stdout = program.stdout.take().context("take its output")?;
    for line in BufReader::new(stdout).lines() {
        println!("{ACCURACY} {}", line.context("read its output")?);
    }
    program.wait().context("wait for /accuracy")?;
    Ok(())
}

/// Runs the agent and returns its output. On failure, its messages (perhaps a verifier log) go to the console in full and
/// into the error in short.
pub fn agent(args: &[&str]) -> Result<String> {
    let what = || format!("tailback {}", args.join(" "));
    let output = Command::new("/tailback")
        .args(args)
        .output()
        .with_context(what)?;
    if output.status.success() {
        return String::from_utf8(output.stdout).with_context(what);
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    said.lines().for_each(|line| println!("  {line}"));
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let (first, last) = (
        lines.next().unwrap_or_default(),
        lines.next_back().unwrap_or_default(),
    );
    bail!("{}: {}: {first} ... {last}", what(), output.status)
}
