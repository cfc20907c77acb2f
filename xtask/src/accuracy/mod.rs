//! `cargo xtask accuracy`: compares the agent's numbers with an independent source.
//!
//! `tests/harness/accuracy.rs` lists the rows; `tests/accuracy` measures them, here and on the kernels of the matrix.
//! `table` prints them, `document` writes docs/appendix/accuracy.md. The same rows are tests of `cargo xtask test`.

mod document;
mod table;

use std::{
    fs,
    io::{self, IsTerminal as _},
    panic::resume_unwind,
    path::PathBuf,
    process::{ExitCode, Stdio},
    thread,
};

use anyhow::{Context as _, Result};
use tailback_tests::accuracy::{Finding, ROWS, Row, Verdict};

use crate::{
    cargo,
    command::Cmd,
    kernels::{self, GuestPrograms, Kernel},
    scenarios,
    setup::{self, Purpose},
    test::{Outcome, Tally},
};

/// Kinds whose workload computes, or which are the process's own. In the tests they are measured beside the other kinds, whose
/// workloads wait for most of the time.
const LOCAL_KINDS: &[&str] = &[
    "workers",
    "eventloop",
    "runqueue",
    "hooks",
    "lock",
    "disk",
    "memory",
    "fd",
    "uring",
];

/// Name of the column of the running kernel.
const HERE: &str = "this kernel";

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix besides this one: all, none, or names separated by commas
    #[arg(long, value_name = "LIST", default_value = "none")]
    kernels: String,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
    /// Write the table to FILE; `--write` alone: to docs/appendix/accuracy.md
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/appendix/accuracy.md")]
    write: Option<PathBuf>,
    /// Kinds of queues: accept, pipe, ... [default: all]
    kinds: Vec<String>,
}

/// The measurements on one kernel.
pub struct Column {
    pub name: String,
    pub release: String,
    pub findings: Vec<Finding>,
    absent: &'static [(&'static str, &'static str)],
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let kernels = kernels::choose(&args.kernels)?;
    setup::ensure_with_kernels(Purpose::Test, &kernels)?;
    let programs = Programs::build()?;
    let mut columns = vec![Column {
        name: HERE.to_owned(),
        release: release(),
        findings: programs.measure(&args.kinds)?,
        absent: &[],
    }];
    for kernel in kernels {
        columns.push(measure_on(kernel, &args.kinds)?);
    }
    if args.json {
        print_json(&columns);
    } else {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        print!("{}", table::of(&columns, colour));
    }
    if let Some(file) = &args.write {
        let mut text = document::of(&columns);
        text.push_str(&scenarios::section_in(file));
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    let good = columns.iter().all(Column::is_good);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Column {
    pub fn find(&self, row: &Row) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.is_of(row))
    }

    fn is_good(&self) -> bool {
        let mut measured = self.findings.iter();
        measured.all(|finding| judge(finding, self.absent).is_ok())
    }
}

/// Why a finding is a failure. A fact that is absent without being listed as such is one.
fn judge(finding: &Finding, absent: &[(&str, &str)]) -> Result<(), String> {
    let name = format!("{}.{}", finding.kind, finding.quantity);
    match finding.verdict {
        Verdict::Ok | Verdict::Skipped => Ok(()),
        Verdict::Absent if absent.iter().any(|(row, _)| *row == name) => Ok(()),
        Verdict::Absent => Err(format!("absent: {}", finding.note)),
        Verdict::Off => Err(match (finding.measured, finding.truth) {
            (Some(_), Some(_)) => format!("{}: {}", table::words(finding), finding.note),
            _ => finding.note.clone(),
        }),
    }
}

/// Whether the error is at most twice the allowed one. The table states the goal; a test fails only beyond this, because
/// a shared or emulated machine now and then stops the process that keeps the time. Exact rows stay exact.
fn is_near(finding: &Finding) -> bool {
    match (finding.truth, finding.measured, finding.allowed) {
        (Some(truth), Some(measured), Some(allowed)) => (measured - truth).abs() <= 2.0 * allowed,
        _ => false,
    }
}

/// Why the test of a finding fails.
fn judge_test(finding: &Finding, absent: &[(&str, &str)]) -> Result<(), String> {
    judge(finding, absent).or_else(|why| match is_near(finding) {
        true => Ok(()),
        false => Err(why),
    })
}

/// The name of a row's test.
pub fn test_name(row: &Row) -> String {
    format!("{} {}", row.kind, row.quantity)
}

/// Records all rows as tests. A row that was not found failed for the reason `missing`.
pub fn record(
    found: &[Settled],
    absent: &[(&str, &str)],
    missing: &str,
    prefix: &str,
    tally: &mut Tally,
) {
    for row in ROWS {
        let name = format!("{prefix}{}", test_name(row));
        let Some(settled) = found.iter().find(|settled| settled.finding.is_of(row)) else {
            tally.record(&name, Outcome::Failed(missing.to_owned()));
            continue;
        };
        if let Some(errors) = &settled.errors {
            tally.note(format!("{name}: the median of {errors} was judged"));
        }
        let outcome = match &settled.finding {
            skipped if skipped.verdict == Verdict::Skipped => {
                Outcome::Skipped(skipped.note.clone())
            }
            finding => match judge_test(finding, absent) {
                Ok(()) => Outcome::Passed,
                Err(why) => Outcome::Failed(why),
            },
        };
        tally.record(&name, outcome);
    }
}

/// Total number of measurements of a row whose first measurement is off.
const MEASUREMENTS: usize = 3;

/// The finding that a row is judged by.
pub struct Settled {
    finding: Finding,
    /// The errors of all measurements, if there was more than one.
    errors: Option<String>,
}

/// Measurements are noisy, above all on an emulated CPU, and the table states the error of the median. So a row whose
/// first measurement is off is measured [`MEASUREMENTS`] times, and its median is judged. A row that has to be exact,
/// or that was not measured at all, is judged by its first measurement.
pub fn settle(
    found: Vec<Finding>,
    absent: &[(&str, &str)],
    measure: impl Fn(&[String]) -> Result<Vec<Finding>>,
) -> Vec<Settled> {
    let is_off = |finding: &Finding| {
        let inexact = finding.allowed.is_some_and(|allowed| allowed > 0.0);
        inexact && finding.error().is_some() && judge_test(finding, absent).is_err()
    };
    let mut kinds: Vec<String> = found
        .iter()
        .filter(|finding| is_off(finding))
        .map(|finding| finding.kind.clone())
        .collect();
    kinds.dedup();
    let mut rounds = Vec::new();
    if !kinds.is_empty() {
        println!("     Measuring {} again, for medians", kinds.join(", "));
        rounds.extend((1..MEASUREMENTS).filter_map(|_| measure(&kinds).ok()));
    }
    let settled = found.into_iter().map(|first| {
        if !is_off(&first) || rounds.len() + 1 < MEASUREMENTS {
            return Settled {
                finding: first,
                errors: None,
            };
        }
        let again = rounds.iter().filter_map(|round| {
            let same =
                |other: &&Finding| other.kind == first.kind && other.quantity == first.quantity;
            round.iter().find(same).cloned()
        });
        median(std::iter::once(first.clone()).chain(again).collect())
    });
    settled.collect()
}

/// The measurement with the median error. One without a number counts as the largest.
fn median(mut all: Vec<Finding>) -> Settled {
    let error = |finding: &Finding| finding.error().unwrap_or(f64::INFINITY);
    all.sort_by(|a, b| error(a).total_cmp(&error(b)));
    let errors = all.iter().map(|finding| match finding.error() {
        Some(error) => format!("{error:+.3e}"),
        None => finding.verdict.name().to_owned(),
    });
    let errors = errors.collect::<Vec<_>>().join(", ");
    Settled {
        finding: all.swap_remove(all.len() / 2),
        errors: Some(errors),
    }
}

/// The rows as tests on this kernel, unless tests are asked for by name.
pub fn run_here(programs: &Programs, filter: Option<&str>, tally: &mut Tally) {
    if filter.is_some_and(|filter| !HERE.contains(filter) && filter != "accuracy") {
        return;
    }
    println!("\n     Measuring accuracy on {HERE} ({})", release());
    let (found, missing) = match programs.measure_side_by_side() {
        Ok(found) => (found, "it was not measured".to_owned()),
        Err(error) => (Vec::new(), format!("{error:#}")),
    };
    let found = settle(found, &[], |kinds| programs.measure(kinds));
    record(&found, &[], &missing, &format!("{HERE}: "), tally);
}

/// The agent, and the program that measures it.
pub struct Programs {
    pub agent: PathBuf,
    pub accuracy: PathBuf,
}

impl Programs {
    fn build() -> Result<Self> {
        let programs = [cargo::AGENT, cargo::ACCURACY];
        let [agent, accuracy] = cargo::build_all(programs)?;
        Ok(Self { agent, accuracy })
    }

    /// All kinds, two at a time. Each is measured in its own process, and those that read counters of a network have their own.
    fn measure_side_by_side(&self) -> Result<Vec<Finding>> {
        let (local, other): (Vec<&str>, Vec<&str>) = tailback_tests::accuracy::kinds()
            .into_iter()
            .partition(|kind| LOCAL_KINDS.contains(kind));
        let [local, other] = [local, other].map(|kinds| {
            let kinds = kinds.into_iter().map(str::to_owned);
            kinds.collect::<Vec<_>>()
        });
        let (local, other) = thread::scope(|scope| {
            let local = scope.spawn(|| self.measure(&local));
            let other = self.measure(&other);
            (local.join(), other)
        });
        let local = local.unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok([other?, local].concat())
    }

    fn measure(&self, kinds: &[String]) -> Result<Vec<Finding>> {
        let cmd = Cmd::new(&self.accuracy).args(kinds);
        let cmd = cmd.env("TAILBACK_BIN", &self.agent);
        let mut command = cmd.command();
        // Exit code 1 means that a row is off; the findings say which.
        let output = command.stderr(Stdio::inherit()).output();
        let output = output.with_context(|| format!("start `{cmd}`"))?;
        anyhow::ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "`{cmd}` ended with {}",
            output.status
        );
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(Finding::from_json).collect())
    }
}

fn measure_on(kernel: &'static Kernel, kinds: &[String]) -> Result<Column> {
    let findings = match kernels::obstacle(kernel) {
        None => {
            let programs = GuestPrograms::build(kernel.architecture)?;
            kernels::measure(kernel, &programs, kinds)?
        }
        Some(why) => {
            let skipped = |row| Finding::without_numbers(row, Verdict::Skipped, &why);
            ROWS.iter().map(skipped).collect()
        }
    };
    Ok(Column {
        name: kernel.name.to_owned(),
        release: kernel.release(),
        findings,
        absent: kernel.absent,
    })
}

/// As printed by `uname -r`.
fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

fn print_json(columns: &[Column]) {
    for column in columns {
        for finding in &column.findings {
            let mut object = finding.to_json();
            object["kernel"] = column.release.clone().into();
            println!("{object}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off_by(error: f64) -> Finding {
        let mut finding = Finding::without_numbers(&ROWS[0], Verdict::Off, "");
        finding.truth = Some(100.0);
        finding.measured = Some(100.0 + error);
        finding.allowed = Some(5.0);
        finding
    }

    #[test]
    fn the_median_of_three_is_judged_where_the_first_is_off() {
        let settle = |first: f64, then: f64| {
            let measure = |_: &[String]| Ok(vec![off_by(then)]);
            let settled = settle(vec![off_by(first)], &[], measure);
            let verdict = judge_test(&settled[0].finding, &[]).is_ok();
            (settled[0].errors.is_some(), verdict)
        };
        assert_eq!(settle(30.0, 3.0), (true, true), "noise");
        assert_eq!(settle(30.0, 31.0), (true, false), "a bias stays one");
        assert_eq!(settle(3.0, 30.0), (false, true), "measured once");
    }

    #[test]
    fn an_unlisted_absence_is_a_failure() {
        let row = &ROWS[0];
        let mut finding = Finding::without_numbers(row, Verdict::Absent, "no such queue");
        let name = format!("{}.{}", row.kind, row.quantity);
        let expected = [(name.as_str(), "not on this kernel")];
        assert!(judge(&finding, &[]).is_err());
        assert!(judge(&finding, &expected).is_ok());
        finding.verdict = Verdict::Off;
        assert!(judge(&finding, &expected).is_err());
        finding.verdict = Verdict::Skipped;
        assert!(judge(&finding, &[]).is_ok());
    }

    #[test]
    fn a_large_error_is_not_a_near_miss_and_exact_rows_stay_exact() {
        let mut finding = Finding::without_numbers(&ROWS[0], Verdict::Off, "");
        let mut near = |truth: f64, measured: f64, allowed: f64| {
            (finding.truth, finding.measured) = (Some(truth), Some(measured));
            finding.allowed = Some(allowed);
            is_near(&finding)
        };
        assert!(near(100.0, 108.0, 5.0) && near(100.0, 92.0, 5.0));
        assert!(!near(100.0, 111.0, 5.0) && !near(100.0, 101.0, 0.0));
        assert!(!is_near(&Finding::without_numbers(
            &ROWS[0],
            Verdict::Off,
            ""
        )));
    }

    #[test]
    fn the_local_kinds_exist() {
        let kinds = tailback_tests::accuracy::kinds();
        assert!(LOCAL_KINDS.iter().all(|kind| kinds.contains(kind)));
    }

    #[test]
    fn the_absent_facts_of_a_kernel_are_named_like_rows() {
        for kernel in kernels::known() {
            for (name, _) in kernel.absent {
                let is_it = |row: &&Row| format!("{}.{}", row.kind, row.quantity) == *name;
                assert!(ROWS.iter().any(|row| is_it(&row)), "{name}");
            }
        }
    }
}
