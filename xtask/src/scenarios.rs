//! `cargo xtask scenarios`: incidents on real servers, and whether the agent named what was planted.
//!
//! `tests/scenarios` plays them, one process each; here they are chosen, repeated, shown, and written into a section of
//! docs/appendix/accuracy.md. Each is a test of `cargo xtask test` as well.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::scenario::{Outcome, Row};

use crate::{
    cargo,
    command::Cmd,
    setup::{self, Purpose},
};

/// Where our section of the document begins; it goes on to the end.
const HEADING: &str = "\n## Verdicts\n";
const HEAD: &str = "
Incidents are planted on real, stock servers under open-loop load. A run is right if all of this holds:

- the episode of the queue that suffers names the cause and the root cause, while the cause is present and at the end;
- no other episode names anything else;
- the warning came before the application's own message and before the first error;
- everything recovers after the cause is gone.

Healthy services must have no episode at all.

Written by `cargo xtask scenarios --repeat 5 --write`. Values are medians of all runs. \"Lead\" is the time from the warning to the application's own
message, or to the first failed request, if there was any.

";

#[derive(clap::Args)]
pub struct Args {
    /// Print their names, and play none
    #[arg(long)]
    list: bool,
    /// Play each so often
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Keep the samples of each run in this folder, for `tailback replay`
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Write the table into a section of this file [default: docs/appendix/accuracy.md]
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/appendix/accuracy.md")]
    write: Option<PathBuf>,
    /// Scenarios [default: all]
    scenarios: Vec<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let program = cargo::build(cargo::SCENARIOS)?;
    let listed = Cmd::new(&program).arg("--list").output()?;
    if args.list {
        print!("{listed}");
        return Ok(ExitCode::SUCCESS);
    }
    let known: Vec<&str> = listed.lines().collect();
    if let Some(name) = args
        .scenarios
        .iter()
        .find(|name| !known.contains(&name.as_str()))
    {
        bail!("there is no scenario {name:?}; `--list` prints them all");
    }
    let chosen: Vec<&str> = match args.scenarios.as_slice() {
        [] => known,
        some => some.iter().map(String::as_str).collect(),
    };
    setup::ensure(Purpose::Test)?;
    let agent = cargo::build(cargo::AGENT)?;
    let mut rows = Vec::new();
    for run in 1..=args.repeat {
        for scenario in &chosen {
            let keep = args.keep.as_ref().map(|folder| match args.repeat {
                1 => folder.clone(),
                _ => folder.join(run.to_string()),
            });
            let row = play(&program, &agent, scenario, keep.as_deref())?;
            if args.json {
                println!("{}", row.to_json());
            } else {
                println!("{}", line(&row));
            }
            rows.push(row);
        }
        // Whoever stops it has what was played so far.
        if let Some(file) = &args.write {
            let text =
                fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
            let text = format!("{}{}", before_section(&text), section(&sums(&rows)));
            fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
        }
    }
    if !args.json {
        println!("\n{}", total(&sums(&rows)));
    }
    let good = rows.iter().all(|row| row.outcome != Outcome::Wrong);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn play(program: &Path, agent: &Path, scenario: &str, keep: Option<&Path>) -> Result<Row> {
    let mut cmd = Cmd::new(program).env("TAILBACK_BIN", agent);
    if let Some(folder) = keep {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        cmd = cmd.arg("--keep").arg(folder);
    }
    let cmd = cmd.arg(scenario);
    let output = cmd.command().stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start `{cmd}`"))?;
    // Its exit code says whether all is well; the row says it better.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "`{cmd}` ended with {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let row = text.lines().find_map(Row::from_json);
    row.with_context(|| format!("`{cmd}` said nothing of it: {text:?}"))
}

/// One run, for a person.
fn line(row: &Row) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1} s"));
    let said = match row.verdict.as_str() {
        "" => "-",
        said => said,
    };
    let mut text = format!(
        "{:<19} {:<19} {said:<27} {:>5}  warned {:>6}  lead {:>6}  {}",
        row.scenario,
        row.planted,
        row.share.map_or("-".to_owned(), percent),
        number(row.warned_after_s),
        number(row.lead_s),
        row.outcome.name(),
    );
    if row.outcome != Outcome::Right {
        let _ = write!(text, ": {}", row.why.join("; "));
    }
    text
}

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// All runs of one scenario.
struct Sum<'a> {
    runs: Vec<&'a Row>,
}

fn sums(rows: &[Row]) -> Vec<Sum<'_>> {
    let mut at: BTreeMap<&str, usize> = BTreeMap::new();
    let mut sums: Vec<Sum<'_>> = Vec::new();
    for row in rows {
        let index = *at.entry(&row.scenario).or_insert_with(|| {
            sums.push(Sum { runs: Vec::new() });
            sums.len() - 1
        });
        sums[index].runs.push(row);
    }
    sums
}

impl Sum<'_> {
    fn count(&self, outcome: Outcome) -> usize {
        let same = self.runs.iter().filter(|row| row.outcome == outcome);
        same.count()
    }

    fn played(&self) -> usize {
        self.runs.len() - self.count(Outcome::Skipped)
    }

    fn median(&self, of: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
        let mut values: Vec<f64> = self.runs.iter().filter_map(|row| of(row)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// What was said most often.
    fn verdict(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for row in &self.runs {
            *counts.entry(&row.verdict).or_default() += 1;
        }
        let most = counts.iter().max_by_key(|(_, count)| **count);
        most.map_or("", |(verdict, _)| verdict).to_owned()
    }
}

fn total(sums: &[Sum<'_>]) -> String {
    let right: usize = sums.iter().map(|sum| sum.count(Outcome::Right)).sum();
    let played: usize = sums.iter().map(Sum::played).sum();
    let skipped: usize = sums.iter().map(|sum| sum.count(Outcome::Skipped)).sum();
    let share = percent(right as f64 / (played.max(1)) as f64);
    match skipped {
        0 => format!("{right} of {played} runs right ({share})"),
        skipped => format!("{right} of {played} runs right ({share}), {skipped} skipped"),
    }
}

fn section(sums: &[Sum<'_>]) -> String {
    let mut text = format!("{HEADING}{HEAD}");
    text.push_str("| scenario | on | planted | verdict | share | warned after | lead | right |\n");
    text.push_str("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |\n");
    for sum in sums {
        let Some(first) = sum.runs.first() else {
            continue;
        };
        let seconds = |value: Option<f64>| value.map_or(String::new(), |s| format!("{s:.1} s"));
        let right = match sum.played() {
            0 => format!("skipped: {}", first.why.join("; ")),
            played => format!("{} of {played}", sum.count(Outcome::Right)),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {right} |",
            first.scenario,
            first.on,
            first.planted,
            sum.verdict(),
            sum.median(|row| row.share).map_or(String::new(), percent),
            seconds(sum.median(|row| row.warned_after_s)),
            seconds(sum.median(|row| row.lead_s)),
        );
    }
    let _ = writeln!(text, "\n{}.", total(sums));
    text
}

fn before_section(text: &str) -> &str {
    let end = text.find(HEADING).unwrap_or(text.len());
    text.get(..end).unwrap_or(text)
}

/// The section of a file as it stands: who writes the rest keeps it.
pub fn section_in(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let before = before_section(&text).len();
    text.get(before..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scenario: &str, outcome: Outcome, warned_after_s: f64) -> Row {
        Row {
            scenario: scenario.to_owned(),
            on: "a server".to_owned(),
            planted: "disk_slow".to_owned(),
            verdict: "disk_slow".to_owned(),
            culprit: "journal".to_owned(),
            share: Some(0.9),
            warned_after_s: Some(warned_after_s),
            lead_s: None,
            outcome,
            why: Vec::new(),
            episodes: Vec::new(),
            took_s: 20.0,
        }
    }

    #[test]
    fn runs_of_one_scenario_are_one_line_with_their_median() {
        let rows = [
            row("fsync", Outcome::Right, 1.0),
            row("stopped", Outcome::Right, 2.0),
            row("fsync", Outcome::Wrong, 3.0),
            row("fsync", Outcome::Right, 1.5),
        ];
        let text = section(&sums(&rows));
        assert!(text.contains("| 90% | 1.5 s |  | 2 of 3 |"), "{text}");
        assert!(text.contains("3 of 4 runs right (75%)"), "{text}");
    }

    #[test]
    fn the_section_takes_the_place_of_the_old_one() {
        let old = format!("# Accuracy\n{HEADING}old\n");
        assert_eq!(before_section(&old), "# Accuracy\n");
        assert_eq!(before_section("# Accuracy\n"), "# Accuracy\n");
    }
}
