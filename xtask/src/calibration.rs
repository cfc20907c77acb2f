//! `cargo xtask calibration`: how often verdicts are right, by their confidence.
//!
//! The recorded incidents are replayed by their test (`agent/tests/incidents.rs`), which knows what was planted in each. Rows of
//! live scenarios that were kept with `cargo xtask scenarios --json > FILE` can be added. Nothing is played.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{
    calibration::{Calibration, Judged},
    scenario::{Outcome, Row},
};

use crate::{command::Cmd, tools};

/// The test that prints each verdict on the recorded incidents.
const TEST: &str = "confidence_is_earned";

#[derive(clap::Args)]
pub struct Args {
    /// Also count the rows of live scenarios in these files: the output of `cargo xtask scenarios --json`, or
    /// target/scenarios.json of `cargo xtask test`
    #[arg(value_name = "FILE")]
    rows: Vec<PathBuf>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let output = Cmd::new("cargo")
        .current_dir(tools::root())
        .args(["test", "--release", "--quiet", "--package", "tailback"])
        .args(["--test", "incidents", TEST, "--", "--exact", "--nocapture"])
        .command()
        .output()
        .context("replay the recorded incidents")?;
    let mut calibration = Calibration::default();
    // If a bound is missed the test fails, and the table says which.
    let text = String::from_utf8_lossy(&output.stdout);
    let judged = text.lines().filter_map(Judged::from_json);
    judged.for_each(|judged| calibration.add(judged));
    ensure!(
        calibration.verdicts() > 0,
        "the test {TEST} printed no verdict: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    for file in &args.rows {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let rows = text.lines().filter_map(Row::from_json);
        rows.filter_map(of_live)
            .for_each(|judged| calibration.add(judged));
    }
    print!("{calibration}");
    let missed = calibration.missed();
    missed.iter().for_each(|missed| eprintln!("{missed}"));
    Ok(if missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The verdict of a live scenario. `None`: it was not played, or there was none.
fn of_live(row: Row) -> Option<Judged> {
    if row.outcome == Outcome::Skipped || row.confidence.is_empty() {
        return None;
    }
    Some(Judged {
        of: format!("{} (live)", row.scenario),
        cause: row.verdict,
        confidence: row.confidence,
        right: row.outcome == Outcome::Right,
    })
}
