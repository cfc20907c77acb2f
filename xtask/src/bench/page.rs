//! Cost of reading the page, and whether readers ever see a torn page.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tailback_tests::{process::Process, program, temp::TempDir, wait};

use super::{
    figure::{Figure, Goal, Report},
    statistics::Spread,
};
use crate::{command::Cmd, tools};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(10);
/// Renewal interval of the page, as with the agent.
const RENEWAL_INTERVAL: &str = "100ms";

#[derive(clap::Args)]
pub struct Args {
    /// Reads of a page that is written continuously
    #[arg(long, default_value_t = 1_000_000_000)]
    reads: u64,
    /// Calls of admit_ratio() on a page that is renewed ten times per second
    #[arg(long, default_value_t = 20_000_000)]
    asks: u64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let temp = TempDir::new("page")?;
    for (language, reader) in [("C", c(&temp)?), ("Rust", rust()?)] {
        let writer = writer(&temp, &[])?;
        report.progress(&format!(
            "{language}: {} reads, written continuously …",
            args.reads
        ));
        let output = run(&reader, &temp, args.reads)?;
        report.progress(output.trim());
        let torn = number(&output, "torn ")?;
        report.add(figure(
            language,
            "torn pages, of all reads",
            "torn",
            "",
            torn,
            Goal::at_most(0.0, &Spread::exact(torn)),
        ));
        drop(writer);
        let writer = self::writer(&temp, &["--every", RENEWAL_INTERVAL])?;
        let output = run(&reader, &temp, args.asks)?;
        report.progress(output.trim());
        let ns = output
            .split(" per read")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let ns: f64 = ns
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("no time in {output:?}"))?;
        report.add(figure(
            language,
            "admit_ratio()",
            "admit",
            "ns",
            ns,
            Goal::at_most(10.0, &Spread::exact(ns)),
        ));
        drop(writer);
    }
    Ok(())
}

fn writer(temp: &TempDir, args: &[&str]) -> Result<Process> {
    // The page of the previous writer is stale.
    let _ = std::fs::remove_file(temp.path().join("page"));
    let mut command = Command::new(super::agent()?);
    let writer = Process::start(
        "the writer",
        command.arg("bench-page").args(args).arg(temp.path()),
    )?;
    wait::until("the page", DEADLINE, || {
        writer.check_running()?;
        let page = std::fs::read(temp.path().join("page")).unwrap_or_default();
        Ok(page.starts_with(b"TAILBACK").then_some(()))
    })?;
    Ok(writer)
}

fn c(temp: &TempDir) -> Result<PathBuf> {
    let directory = tools::root().join("deploy/readers/c");
    let built = temp.path().join("torture");
    let mut gcc = Command::new(program::need(&["gcc"])?);
    gcc.args(["-std=c11", "-O2", "-I"])
        .arg(&directory)
        .arg(directory.join("examples/torture.c"));
    let status = gcc.arg("-o").arg(&built).status().context("start gcc")?;
    if !status.success() {
        bail!("gcc torture.c: {status}");
    }
    Ok(built)
}

fn rust() -> Result<PathBuf> {
    let build = [
        "build",
        "--release",
        "--package",
        "tailback-page",
        "--example",
        "torture",
    ];
    Cmd::new("cargo")
        .current_dir(tools::root())
        .args(build)
        .output()?;
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| tools::root().join("target"), PathBuf::from);
    Ok(target.join("release/examples/torture"))
}

fn run(reader: &PathBuf, temp: &TempDir, reads: u64) -> Result<String> {
    let output = Command::new(reader)
        .arg(temp.path().join("page"))
        .args(["header", &reads.to_string()])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.is_empty() {
        bail!(
            "{}: {}",
            reader.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(text)
}

fn number(output: &str, after: &str) -> Result<f64> {
    let word = output
        .split(after)
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next());
    word.and_then(|word| word.parse().ok())
        .with_context(|| format!("no {after:?} in {output:?}"))
}

fn figure(
    language: &str,
    what: &str,
    key: &str,
    unit: &'static str,
    value: f64,
    goal: Goal,
) -> Figure {
    Figure {
        what: format!("{language}: {what}"),
        keys: json!({"bench": "page", "language": language, "measured": key}),
        unit,
        value: Spread::exact(value),
        spread: "one run",
        goal: Some(goal),
    }
}
