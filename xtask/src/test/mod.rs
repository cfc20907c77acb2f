//! `cargo xtask test`: all tests, on this kernel and on those of the matrix, and one sum of them.
//!
//! A test that cannot run here (a server is not installed, a privilege is missing) says so in the file that
//! `TAILBACK_SKIP_LOG` names and returns; the test harness counts it as passed, this command as skipped.
//!
//! Many tests measure time, and a machine that others use too may hold one of them up. So a test that fails is run once
//! more, alone. One that passes then has passed, and the sum names it as flaky; one that fails twice failed. Scenarios have
//! their repeats, and a rule of how many may be wrong, at their first try: they get no second one.

mod libtest;
mod tally;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result};
use tailback_tests::scenario::SECOND_TRY;

use crate::{
    accuracy::{self, Programs},
    cargo,
    command::Cmd,
    kernels, plans,
    setup::{self, Purpose, seconds},
    tools,
};
pub use tally::{Tally, Told};

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix: all, none, or names separated by commas. With a filter, none unless asked for
    #[arg(long, value_name = "LIST")]
    kernels: Option<String>,
    /// Run only the tests whose name contains this
    filter: Option<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let default = if args.filter.is_some() { "none" } else { "all" };
    let kernels = kernels::choose(args.kernels.as_deref().unwrap_or(default))?;
    setup::ensure_with_kernels(Purpose::Test, &kernels)?;

    let programs = Programs::at(cargo::build_tests(Programs::NEEDED)?);
    let filter = args.filter.as_deref();
    let mut tally = Tally::default();
    cargo_test(&programs.agent, filter, &mut tally)?;
    plans::run_here(&programs.agent, filter, &mut tally);
    accuracy::run_here(&programs, filter, &mut tally);
    kernels::run_checks(&kernels, &mut tally);

    println!("\nall tests took {}", seconds(start.elapsed()));
    print!("{}", tally.summary());
    Ok(if tally.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The tests of the workspace.
fn cargo_test(agent: &Path, filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    let skips = tools::cache().join(format!("skipped.{}", std::process::id()));
    let mut cargo = cargo::test()
        .arg("--no-fail-fast")
        .env("TAILBACK_BIN", agent)
        .env("TAILBACK_SKIP_LOG", &skips);
    if let Some(jaeger) = tools::jaeger() {
        cargo = cargo.env("TAILBACK_JAEGER", jaeger);
    }
    let before = tally.failures.len();
    count(&cargo.clone().args(filter), &skips, tally)?;
    tally.try_again(before, |name| {
        let mut second = Tally::default();
        let alone = cargo.clone().args([name, "--", "--exact"]);
        let alone = alone.env(SECOND_TRY, "1");
        count(&alone, &skips, &mut second).map_err(|error| format!("{error:#}"))?;
        match second.failures.pop() {
            Some(failure) => Err(failure.why),
            // One that skips itself then has not shown that it passes.
            None if second.passed == 0 => Err("it was not run".to_owned()),
            None => Ok(()),
        }
    });
    Ok(())
}

/// Runs a `cargo test` whose tests write those that they skip to a file, and counts it.
fn count(cargo: &Cmd, skips: &Path, tally: &mut Tally) -> Result<()> {
    fs::write(skips, "")
        .with_context(|| format!("make {}, the list of skipped tests", skips.display()))?;
    read_tests(cargo, tally)?;
    let list = fs::read_to_string(skips).with_context(|| format!("read {}", skips.display()))?;
    fs::remove_file(skips).with_context(|| format!("remove {}", skips.display()))?;
    tally.skip_listed(&list);
    Ok(())
}

/// Shows what a `cargo test` prints, and counts what it says.
fn read_tests(cargo: &Cmd, tally: &mut Tally) -> Result<()> {
    let mut child = cargo
        .command()
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{cargo}`"))?;
    let stdout = child
        .stdout
        .take()
        .context("take the output of cargo test")?;
    let before = tally.failures.len();
    let mut reader = libtest::Reader::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("read the output of cargo test")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        reader.read(&line, tally);
    }
    reader.end(tally);
    let status = child
        .wait()
        .with_context(|| format!("wait for `{cargo}`"))?;
    if !status.success() && tally.failures.len() == before {
        // It did not compile.
        tally.tell(
            "cargo test",
            Told::Failed(&format!("`{cargo}` ended with {status}")),
        );
    }
    Ok(())
}
