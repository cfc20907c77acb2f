//! What it costs to ask the page, and whether anyone ever sees a torn one.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tailback_tests::{process::Process, program, temp::TempDir, wait};

use super::{
    figure::{Figure, Goal, Report},
    statistics::Spread,
};
use crate::{command::Cmd, tools};

const SOON: Duration = Duration::from_secs(10);
/// Of a page that is renewed as the agent does it.
const TICK: &str = "100ms";

#[derive(clap::Args)]
pub struct Args {
    /// Reads of a page that is written without a break
    #[arg(long, default_value_t = 1_000_000_000)]
    reads: u64,
    /// Asks of a page that is renewed ten times a second
    #[arg(long, default_value_t = 20_000_000)]
    asks: u64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let temp = TempDir::new("page")?;
    for (language, reader) in [("C", c(&temp)?), ("Rust", rust()?)] {
        let writer = writer(&temp, &[])?;
        report.progress(&format!(
            "{language}: {} reads, written without a break …",
            args.reads
        ));
        let said = run(&reader, &temp, args.reads)?;
        report.progress(said.trim());
        let torn = number(&said, "torn ")?;
        report.add(figure(
            language,
            "torn pages, of all reads",
            "torn",
            "",
            torn,
            Goal::at_most(0.0, &Spread::exact(torn)),
        ));
        drop(writer);
        let writer = self::writer(&temp, &["--every", TICK])?;
        let said = run(&reader, &temp, args.asks)?;
        report.progress(said.trim());
        let ns = said
            .split(" per read")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let ns: f64 = ns
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("no time in {said:?}"))?;
        report.add(figure(
            language,
            "admit()",
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
    // That of the writer before is stale.
    let _ = std::fs::remove_file(temp.path().join("page"));
    let mut command = Command::new(super::agent()?);
    let writer = Process::start(
        "the writer",
        command.arg("bench-page").args(args).arg(temp.path()),
    )?;
    wait::until("the page", SOON, || {
        writer.check_running()?;
        let page = std::fs::read(temp.path().join("page")).unwrap_or_default();
        Ok(page.starts_with(b"TAILBACK").then_some(()))
    })?;
    Ok(writer)
}

fn c(temp: &TempDir) -> Result<PathBuf> {
    let folder = tools::root().join("deploy/readers/c");
    let built = temp.path().join("torture");
    let mut gcc = Command::new(program::need(&["gcc"])?);
    gcc.args(["-std=c11", "-O2", "-I"])
        .arg(&folder)
        .arg(folder.join("examples/torture.c"));
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
        .folder(tools::root())
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
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if said.is_empty() {
        bail!(
            "{}: {}",
            reader.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(said)
}

fn number(said: &str, after: &str) -> Result<f64> {
    let word = said
        .split(after)
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next());
    word.and_then(|word| word.parse().ok())
        .with_context(|| format!("no {after:?} in {said:?}"))
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
