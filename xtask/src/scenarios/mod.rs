//! `cargo xtask scenarios`: plays incidents on real servers and checks the agent's verdicts.
//!
//! `tests/scenarios` holds them; `play` runs each in its own process; this module selects, repeats and prints them, and
//! writes a section of docs/appendix/accuracy.md.
//!
//! The verdict on a live run varies with the load, the scheduler and the timing, so it is right only with some probability.
//! Two checks make up for that. The recorded incidents (`agent/tests/incidents`) are deterministic: every one of their
//! verdicts must be right. And the share of right live runs must not be significantly below [`REQUIRED_RATE`]:
//! `cargo xtask test` plays each scenario once; `cargo xtask scenarios --repeat 5` plays it five times, which notices a drop
//! to 85% (see [`min_right`]). Two failures count whatever the share: a scenario that cannot be played, and a live run that
//! its own recording does not reproduce.

mod play;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::scenario::{Listed, Outcome, Row};

use crate::{
    cargo,
    setup::{self, Purpose},
    test,
    test::Tally,
    tools,
};

/// Where our section of the document begins; it goes on to the end.
const HEADING: &str = "\n## Verdicts\n";
const HEAD: &str = "
Incidents are planted on real, stock servers under open-loop load. A run is right if all of the following hold:

- the episode of the affected queue names the cause and the root cause, both while the cause is present and at the end;
- no other episode names a different cause, except causes that the scenario lists;
- the warning comes before the application's own message and before the first error;
- everything recovers after the cause is gone.

Healthy services must have no episode at all.

Written by `cargo xtask scenarios --repeat 5 --write`. Values are medians of all runs. The verdict is the
most frequent one, with the cause at the end of the path in parentheses if that differs. \"Lead\" is the time from the warning to the application's own
message, or to the first failed request, if there was any.

";

#[derive(clap::Args)]
pub struct Args {
    /// List the scenarios and exit
    #[arg(long)]
    list: bool,
    /// Play each scenario N times; 0: only count and write the runs of `--rows`
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: u32,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    /// Count the runs in FILE too, which an earlier `--json` of the same agent printed, or `cargo xtask test` left in
    /// target/scenarios.json: many rounds need not be played at once
    #[arg(long, value_name = "FILE")]
    rows: Vec<PathBuf>,
    /// Keep the recording of each run in this directory, for `tailback replay`
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Write the table into a section of FILE; `--write` alone: of docs/appendix/accuracy.md
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/appendix/accuracy.md")]
    write: Option<PathBuf>,
    /// Scenarios [default: all]
    scenarios: Vec<String>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let program = cargo::build(cargo::SCENARIOS)?;
    let known = play::list(&program)?;
    if args.list {
        known
            .iter()
            .for_each(|scenario| println!("{}", scenario.name));
        return Ok(ExitCode::SUCCESS);
    }
    let place = |name: &str| known.iter().position(|scenario| scenario.name == name);
    let mut chosen: Vec<Listed> = Vec::new();
    for name in &args.scenarios {
        let Some(place) = place(name) else {
            bail!("no such scenario: {name:?}; `--list` prints all of them");
        };
        chosen.push(known[place].clone());
    }
    if chosen.is_empty() {
        chosen.clone_from(&known);
    }
    setup::ensure(Purpose::Test)?;
    let agent = cargo::build(cargo::AGENT)?;
    let mut rows = earlier(&args.rows)?;
    for run in 1..=args.repeat {
        let keep = args.keep.as_ref().map(|directory| match args.repeat {
            1 => directory.clone(),
            _ => directory.join(run.to_string()),
        });
        let mut unplayed = None;
        play::play_each(
            &program,
            &agent,
            &chosen,
            keep.as_deref(),
            |_, row| match row {
                Ok(row) => {
                    if args.json {
                        println!("{}", row.to_json());
                    } else {
                        println!("{}", line(&row));
                    }
                    rows.push(row);
                }
                Err(error) => unplayed = Some(error),
            },
        );
        if let Some(error) = unplayed {
            return Err(error);
        }
        // After every round, so that an interrupted command keeps the rows played so far.
        write(args.write.as_deref(), &mut rows, place)?;
    }
    if args.repeat == 0 {
        ensure!(!rows.is_empty(), "--repeat 0 needs --rows FILE");
        write(args.write.as_deref(), &mut rows, place)?;
    }
    if !args.json {
        println!("\n{}", total(&sums(&rows)));
    }
    let good = judge_rate(&rows);
    if !args.json {
        println!("{}", good.as_ref().unwrap_or_else(|why| why));
    }
    let broken = rows.iter().filter_map(broken);
    let broken = broken.inspect(|why| eprintln!("{why}")).count();
    Ok(if good.is_ok() && broken == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Writes the table into its section of the file, in the order of the list.
fn write(
    file: Option<&Path>,
    rows: &mut [Row],
    place: impl Fn(&str) -> Option<usize>,
) -> Result<()> {
    rows.sort_by_key(|row| place(&row.scenario));
    let Some(file) = file else {
        return Ok(());
    };
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let text = format!("{}{}", before_section(&text), section(&sums(rows)));
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

/// The runs in these files.
fn earlier(files: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        for line in text.lines() {
            let row = Row::from_json(line);
            rows.push(row.with_context(|| format!("{}: not a run: {line:?}", file.display()))?);
        }
    }
    Ok(rows)
}

/// Share of right runs that the agent must reach.
const REQUIRED_RATE: f64 = 0.95;
/// Largest probability of failing an agent that is right in exactly [`REQUIRED_RATE`] of all runs.
const FALSE_ALARM_PROBABILITY: f64 = 0.01;
/// A share of right runs so low that five runs of each scenario must notice it.
const NOTICEABLE_RATE: f64 = 0.85;

/// Plays each scenario once, as part of `cargo xtask test`. A filter plays none, unless it is `scenario` (all) or the name of one.
pub fn run_here(program: &Path, agent: &Path, filter: Option<&str>, tally: &mut Tally) {
    let record = |tally: &mut Tally, name: &str, result: Result<(), String>| {
        tally.record(
            name,
            match result {
                Ok(()) => test::Outcome::Passed,
                Err(why) => test::Outcome::Failed(why),
            },
        );
    };
    let listed = match play::list(program) {
        Ok(listed) => listed,
        Err(error) => return record(tally, "scenarios", Err(format!("{error:#}"))),
    };
    let chosen: Vec<Listed> = listed
        .into_iter()
        .filter(|scenario| {
            filter.is_none_or(|filter| filter == "scenario" || scenario.name == filter)
        })
        .collect();
    if chosen.is_empty() {
        return;
    }
    println!("\n     Playing {} scenarios", chosen.len());
    let mut rows = Vec::new();
    let report = |name: &str, row: Result<Row>| {
        let name = format!("scenario {name}");
        let row = match row {
            Ok(row) => row,
            Err(error) => return record(tally, &name, Err(format!("{error:#}"))),
        };
        let took = Some(Duration::from_secs_f64(row.took_s.max(0.0)));
        println!("{}", line(&row));
        let outcome = match (row.outcome, broken(&row)) {
            (Outcome::Skipped, _) => test::Outcome::Skipped(row.why.join("; ")),
            (_, Some(why)) => test::Outcome::Failed(why),
            (_, None) => test::Outcome::Passed,
        };
        if row.outcome == Outcome::Wrong && outcome == test::Outcome::Passed {
            tally.note(format!("wrong verdict in {name}: {}", row.why.join("; ")));
        }
        tally.record_timed(&name, outcome, took);
        rows.push(row);
    };
    play::play_each(program, agent, &chosen, None, report);
    if filter.is_none()
        && let Err(error) = keep(&rows)
    {
        record(tally, "rows of the scenarios", Err(format!("{error:#}")));
    }
    let rate = judge_rate(&rows);
    if let Ok(text) = &rate {
        tally.note(text);
    }
    record(
        tally,
        "rate of right verdicts on live incidents",
        rate.map(drop),
    );
}

/// Leaves the rows of a round for `--rows` and `cargo xtask calibration`.
fn keep(rows: &[Row]) -> Result<()> {
    let file = tools::root().join("target/scenarios.json");
    let lines: String = rows
        .iter()
        .map(|row| format!("{}\n", row.to_json()))
        .collect();
    fs::write(&file, lines).with_context(|| format!("write {}", file.display()))
}

/// What is wrong with a run besides its verdict.
fn broken(row: &Row) -> Option<String> {
    match (row.outcome, row.replayed) {
        (Outcome::Skipped, _) | (_, Some(true)) => None,
        (_, Some(false)) => Some(format!(
            "{}: the recording of the run does not reproduce what the agent reported live",
            row.scenario
        )),
        (_, None) => Some(format!(
            "{} was not played: {}",
            row.scenario,
            row.why.join("; ")
        )),
    }
}

/// Whether the number of right runs is compatible with [`REQUIRED_RATE`].
fn judge_rate(rows: &[Row]) -> Result<String, String> {
    let count = |outcome: Outcome| rows.iter().filter(|row| row.outcome == outcome).count();
    let right = count(Outcome::Right);
    let played = right + count(Outcome::Wrong);
    let least = min_right(played);
    let noticed = probability_of_at_most(least.saturating_sub(1), played, NOTICEABLE_RATE);
    let text = format!(
        "{right} of {played} verdicts on live incidents are right; fewer than {least} would be significantly below {} (an \
         agent at {} would fail this check with a probability of {})",
        percent(REQUIRED_RATE),
        percent(NOTICEABLE_RATE),
        percent(noticed),
    );
    if right >= least { Ok(text) } else { Err(text) }
}

/// The smallest number of right runs, of `played`, that is compatible with [`REQUIRED_RATE`]: an agent with that rate falls
/// below it with a probability of at most [`FALSE_ALARM_PROBABILITY`]. Of 175 runs (five of each scenario) it is 159, and an
/// agent that is right in 85% of runs falls below it with a probability of 98%.
fn min_right(played: usize) -> usize {
    let mut least = 0;
    while least < played
        && probability_of_at_most(least, played, REQUIRED_RATE) <= FALSE_ALARM_PROBABILITY
    {
        least += 1;
    }
    least
}

/// The probability of at most `right` right runs of `played`, each right with probability `rate`: the binomial
/// distribution, summed from `played` down so that all factors stay within range.
fn probability_of_at_most(right: usize, played: usize, rate: f64) -> f64 {
    let mut term = rate.powi(i32::try_from(played).unwrap_or(i32::MAX));
    let mut above = 0.0;
    for k in (right + 1..=played).rev() {
        above += term;
        term *= k as f64 / (played - k + 1) as f64 * (1.0 - rate) / rate;
    }
    1.0 - above
}

/// One run as a line for the terminal.
fn line(row: &Row) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1} s"));
    let verdict = match row.verdict.as_str() {
        "" => "-",
        verdict => verdict,
    };
    let mut text = format!(
        "{:<19} {:<19} {verdict:<27} {:>5}  warned {:>6}  lead {:>6}  {}",
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

    /// The most frequent verdict.
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

/// The present section of the file, for a command that rewrites the rest.
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
            confidence: "high".to_owned(),
            share: Some(0.9),
            warned_after_s: Some(warned_after_s),
            lead_s: None,
            outcome,
            why: Vec::new(),
            replayed: Some(true),
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
    fn a_drop_from_95_to_85_percent_is_noticed() {
        let runs = |right: usize, wrong: usize| {
            let right = vec![row("a", Outcome::Right, 1.0); right];
            let wrong = vec![row("b", Outcome::Wrong, 1.0); wrong];
            judge_rate(&[right, wrong].concat())
        };
        assert!(runs(166, 9).is_ok(), "95% of 175");
        assert!(runs(149, 26).is_err(), "85% of 175");
        assert!(
            runs(34, 1).is_ok() && runs(29, 6).is_err(),
            "one run of each scenario"
        );
        let least = min_right(175);
        assert!(probability_of_at_most(least - 1, 175, REQUIRED_RATE) <= FALSE_ALARM_PROBABILITY);
        assert!(probability_of_at_most(least - 1, 175, NOTICEABLE_RATE) > 0.95);
        assert!((probability_of_at_most(1, 2, 0.5) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_run_that_its_recording_does_not_reproduce_is_broken() {
        let mut run = row("a", Outcome::Wrong, 1.0);
        assert_eq!(broken(&run), None, "a wrong verdict counts for the rate");
        run.replayed = Some(false);
        assert!(broken(&run).is_some());
        (run.replayed, run.why) = (None, vec!["uWSGI ended".to_owned()]);
        assert_eq!(
            broken(&run).as_deref(),
            Some("a was not played: uWSGI ended")
        );
    }

    #[test]
    fn the_section_takes_the_place_of_the_old_one() {
        let old = format!("# Accuracy\n{HEADING}old\n");
        assert_eq!(before_section(&old), "# Accuracy\n");
        assert_eq!(before_section("# Accuracy\n"), "# Accuracy\n");
    }
}
