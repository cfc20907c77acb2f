//! `cargo xtask accuracy`: what the agent says of queues, beside what is known of them by other means.
//!
//! The rows are the harness's (`tests/harness/accuracy.rs`); `tests/accuracy` measures them, here and on the kernels of
//! the matrix. `table` shows them to a person, `document` writes docs/appendix/accuracy.md. The same rows are tests of
//! `cargo xtask test`.

mod document;
mod table;

use std::{
    fs,
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result};
use tailback_tests::accuracy::{Finding, ROWS, Row, Verdict};

use crate::{
    cargo::{self, Link, Program},
    command::Cmd,
    kernels::{self, Kernel},
    scenarios,
    setup::{self, Purpose},
    test::{Tally, Told},
};

/// Where it is measured on no kernel of the matrix.
const HERE: &str = "this kernel";

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix besides this one: all, none, or names separated by commas
    #[arg(long, value_name = "LIST", default_value = "none")]
    kernels: String,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Write the table to this file [default: docs/appendix/accuracy.md]
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/appendix/accuracy.md")]
    write: Option<PathBuf>,
    /// Kinds of queues: accept, pipe, ... [default: all]
    kinds: Vec<String>,
}

/// What was found on one kernel.
pub struct Column {
    pub name: String,
    pub release: String,
    pub findings: Vec<Finding>,
    absent: &'static [(&'static str, &'static str)],
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let kernels = kernels::choose(&args.kernels)?;
    setup::ensure_with_kernels(Purpose::Test, &kernels)?;
    let programs = Programs::at(cargo::build_all(Programs::NEEDED, Link::Usual)?);
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

/// Why a finding is a failure. A fact that is silently absent is one.
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

/// Off by no more than twice what is allowed. The table shows the goal; a test fails beyond this, for a machine that is
/// shared, or emulated, now and then stops whoever holds the clock. What has to be exact has to be exact here as well.
fn is_near(finding: &Finding) -> bool {
    match (finding.truth, finding.measured, finding.allowed) {
        (Some(truth), Some(measured), Some(allowed)) => (measured - truth).abs() <= 2.0 * allowed,
        _ => false,
    }
}

/// Why a test of a finding fails.
fn judge_test(finding: &Finding, absent: &[(&str, &str)]) -> Result<(), String> {
    judge(finding, absent).or_else(|why| match is_near(finding) {
        true => Ok(()),
        false => Err(why),
    })
}

/// What a test of this row is called.
pub fn test_name(row: &Row) -> String {
    format!("{} {}", row.kind, row.quantity)
}

/// Tells all rows as tests. A row that was not found failed for the reason `missing`.
pub fn tell(
    found: &[Finding],
    absent: &[(&str, &str)],
    missing: &str,
    prefix: &str,
    tally: &mut Tally,
) {
    for row in ROWS {
        let name = format!("{prefix}{}", test_name(row));
        match found.iter().find(|finding| finding.is_of(row)) {
            None => tally.tell(&name, Told::Failed(missing)),
            Some(finding) if finding.verdict == Verdict::Skipped => {
                tally.tell(&name, Told::Skipped(&finding.note));
            }
            Some(finding) => match judge_test(finding, absent) {
                Ok(()) => tally.tell(&name, Told::Passed),
                Err(why) => tally.tell(&name, Told::Failed(&why)),
            },
        }
    }
}

/// Measures the row of a test once more, and says why it failed again.
pub fn try_again(
    test: &str,
    absent: &[(&str, &str)],
    measure: impl FnOnce(&[String]) -> Result<Vec<Finding>>,
) -> Result<(), String> {
    let row = ROWS.iter().find(|row| test_name(row) == test);
    let row = row.ok_or("there is no such row")?;
    let found = measure(&[row.kind.to_owned()]).map_err(|error| format!("{error:#}"))?;
    let finding = found.iter().find(|finding| finding.is_of(row));
    match finding.ok_or("it was not measured")? {
        skipped if skipped.verdict == Verdict::Skipped => Err(skipped.note.clone()),
        finding => judge_test(finding, absent),
    }
}

/// The rows as tests on this kernel, unless tests are asked for by name.
pub fn run_here(programs: &Programs, filter: Option<&str>, tally: &mut Tally) {
    if filter.is_some_and(|filter| !HERE.contains(filter) && filter != "accuracy") {
        return;
    }
    println!("\n     Measuring accuracy on {HERE} ({})", release());
    let (found, missing) = match programs.measure(&[]) {
        Ok(found) => (found, "it was not measured".to_owned()),
        Err(error) => (Vec::new(), format!("{error:#}")),
    };
    let prefix = format!("{HERE}: ");
    let before = tally.failures.len();
    tell(&found, &[], &missing, &prefix, tally);
    tally.try_again(before, |name| {
        let test = name.strip_prefix(&prefix).unwrap_or(name);
        try_again(test, &[], |kinds| programs.measure(kinds))
    });
}

/// What measures on this kernel, and what is measured.
pub struct Programs {
    pub agent: PathBuf,
    accuracy: PathBuf,
}

impl Programs {
    pub const NEEDED: [Program; 2] = [cargo::AGENT, cargo::ACCURACY];

    /// Where a build of those that are needed has put them.
    pub fn at([agent, accuracy]: [PathBuf; 2]) -> Self {
        Self { agent, accuracy }
    }

    fn measure(&self, kinds: &[String]) -> Result<Vec<Finding>> {
        let cmd = Cmd::new(&self.accuracy).args(kinds);
        let cmd = cmd.env("TAILBACK_BIN", &self.agent);
        let mut command = cmd.command();
        // Its exit code says whether all is well; the findings say it better.
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
        None => kernels::measure(kernel, kinds)?,
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

/// As `uname -r` says.
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

    #[test]
    fn what_is_silently_absent_is_a_failure() {
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
    fn what_is_far_off_is_no_near_miss_and_what_is_exact_stays_so() {
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
    fn what_a_kernel_lacks_is_named_as_the_rows_are() {
        for kernel in kernels::KERNELS {
            for (name, _) in kernel.absent {
                let is_it = |row: &&Row| format!("{}.{}", row.kind, row.quantity) == *name;
                assert!(ROWS.iter().any(|row| is_it(&row)), "{name}");
            }
        }
    }
}
