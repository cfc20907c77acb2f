//! `cargo xtask calibration`: how often verdicts are right, by their confidence.
//!
//! The recorded incidents are replayed by their test (`agent/tests/incidents.rs`), which knows what was planted in each. Rows of
//! live scenarios that were kept with `cargo xtask scenarios --json > FILE` can be added. Nothing is played.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

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
    /// Write the verdicts on the recorded incidents to FILE, to compare them after a change of the rules
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// List the verdicts on the recorded incidents that differ from those in FILE
    #[arg(long, value_name = "FILE")]
    since: Option<PathBuf>,
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
    let judged: Vec<Judged> = text.lines().filter_map(Judged::from_json).collect();
    ensure!(
        !judged.is_empty(),
        "the test {TEST} printed no verdict: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    if let Some(file) = &args.since {
        println!("{}\n", moved(&read(file)?, &judged));
    }
    if let Some(file) = &args.keep {
        let lines: String = judged
            .iter()
            .map(|judged| format!("{}\n", judged.to_json()))
            .collect();
        fs::write(file, lines).with_context(|| format!("write {}", file.display()))?;
    }
    judged
        .into_iter()
        .for_each(|judged| calibration.add(judged));
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

/// The verdicts in a file that `--keep` wrote.
fn read(file: &Path) -> Result<Vec<Judged>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let judged = text.lines().map(|line| {
        Judged::from_json(line)
            .with_context(|| format!("{}: not a verdict: {line:?}", file.display()))
    });
    judged.collect()
}

/// The verdicts that differ, one a line. An incident may have several episodes of one queue: their verdicts are compared in order.
fn moved(before: &[Judged], now: &[Judged]) -> String {
    let sides = [by_queue(before), by_queue(now)];
    let mut queues: Vec<&str> = sides.iter().flat_map(BTreeMap::keys).copied().collect();
    queues.sort_unstable();
    queues.dedup();
    let mut lines = Vec::new();
    for queue in queues {
        let [before, now] = sides
            .each_ref()
            .map(|side| side.get(queue).map_or(&[][..], Vec::as_slice));
        for index in 0..before.len().max(now.len()) {
            let (before, now) = (words(before.get(index)), words(now.get(index)));
            if before != now {
                lines.push(format!("{queue}: {before} -> {now}"));
            }
        }
    }
    if lines.is_empty() {
        "No verdict has moved.".to_owned()
    } else {
        format!("{} verdicts have moved:\n{}", lines.len(), lines.join("\n"))
    }
}

fn by_queue(verdicts: &[Judged]) -> BTreeMap<&str, Vec<&Judged>> {
    let mut queues: BTreeMap<&str, Vec<&Judged>> = BTreeMap::new();
    for judged in verdicts {
        queues.entry(&judged.of).or_default().push(judged);
    }
    queues
}

fn words(judged: Option<&&Judged>) -> String {
    let Some(judged) = judged else {
        return "no verdict".to_owned();
    };
    let right = if judged.right { "right" } else { "wrong" };
    format!("{} ({}, {right})", judged.cause, judged.confidence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(of: &str, cause: &str, right: bool) -> Judged {
        Judged {
            of: of.to_owned(),
            cause: cause.to_owned(),
            confidence: "high".to_owned(),
            right,
        }
    }

    #[test]
    fn verdicts_that_differ_are_listed_with_both_sides() {
        let before = [
            judged("a accept", "cpu_bound", true),
            judged("a accept", "disk_slow", true),
            judged("b recv", "cpu_bound", true),
        ];
        let now = [
            judged("a accept", "cpu_bound", true),
            judged("a accept", "unknown", false),
            judged("c recv", "cpu_bound", true),
        ];
        assert_eq!(
            moved(&before, &now),
            "3 verdicts have moved:\n\
             a accept: disk_slow (high, right) -> unknown (high, wrong)\n\
             b recv: cpu_bound (high, right) -> no verdict\n\
             c recv: no verdict -> cpu_bound (high, right)"
        );
        assert_eq!(moved(&now, &now), "No verdict has moved.");
    }
}
