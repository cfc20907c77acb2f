//! `cargo xtask plans`: how the agent reads each fact on each kernel, and which facts are unavailable there, according to
//! `tailback doctor` on that kernel.
//!
//! docs/reference/kernels.md is generated from it, and the tests compare each kernel with that document. If a fact is read
//! differently or no longer read, they fail until the document is updated.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    cargo,
    command::Cmd,
    kernels::{self, Kernel, version},
    setup::{self, Purpose},
    test::{Outcome, Tally},
    tools,
};

/// Checks of doctor that depend on the machine rather than the kernel.
const NOT_PER_KERNEL: &[&str] = &[
    "kernel",
    "BTF",
    "capabilities",
    "files of other users",
    "user of the adapter process",
    "killing a hung adapter process",
    "ports of adapters",
    "Envoy's runtime layer",
    "user namespace",
    "processes",
    "files of /proc",
    "processes in /proc",
    "limits of services",
    "I/O limits around services",
    "queues inside services",
];

/// The text above the table.
const INTRODUCTION: &str = "\
How the agent reads each fact on each kernel, and what is absent there. A `·` marks a fact that is not available.

`cargo xtask plans --write` writes this page from `tailback doctor`. `cargo xtask test` compares the output of `tailback
doctor` on each kernel with the kernel's column. The columns are for x86-64.

On aarch64, `cargo xtask kernel 6.12-arm64` boots Debian's cloud kernel in QEMU. `tailback doctor` there gives the column 6.12,
and the other checks of the matrix and all rows of the [accuracy table](../appendix/accuracy.md) pass, except those of a disk,
which the guest does not have.
";

#[derive(clap::Args)]
pub struct Args {
    /// Kernels of the matrix to use besides this one: all, none, or a comma-separated list
    #[arg(long, value_name = "LIST", default_value = "all")]
    kernels: String,
    /// Write docs/reference/kernels.md instead of comparing with it
    #[arg(long)]
    write: bool,
}

/// The plan of one kernel: each fact, and how it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    release: String,
    ways: Vec<(String, String)>,
}

impl Plan {
    /// Parses the output of `tailback doctor --json`.
    pub fn parse<'a>(release: &str, lines: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut ways = Vec::new();
        for line in lines {
            let check: Value = serde_json::from_str(line)
                .with_context(|| format!("parse the line of doctor {line:?}"))?;
            let text = |key: &str| check[key].as_str().map(str::to_owned);
            let name = text("name").with_context(|| format!("a check without a name: {line}"))?;
            if NOT_PER_KERNEL.contains(&name.as_str()) {
                continue;
            }
            let way = match check["state"].as_str() {
                Some("ok") => text("how"),
                _ => text("why").map(|why| format!("off: {why}")),
            };
            ways.push((
                name,
                way.with_context(|| format!("a check without explanation: {line}"))?,
            ));
        }
        ensure!(!ways.is_empty(), "doctor reports no plan");
        Ok(Self {
            release: release.to_owned(),
            ways,
        })
    }

    /// Compares the plan with its column of the document.
    fn check(&self, document: &str) -> Result<(), Mismatch> {
        let version = version(&self.release);
        let Some(column) = columns(document).remove(&version) else {
            return Err(Mismatch::NoColumn(version));
        };
        let written: BTreeMap<_, _> = column.into_iter().collect();
        let found: BTreeMap<_, _> = self.ways.iter().cloned().collect();
        let names = written.keys().chain(found.keys());
        let differs = names
            .filter(|name| written.get(*name) != found.get(*name))
            .map(|name| {
                let words = |ways: &BTreeMap<String, String>| {
                    ways.get(name)
                        .cloned()
                        .unwrap_or_else(|| "nothing".to_owned())
                };
                format!(
                    "{name}: {} (docs/reference/kernels.md: {})",
                    words(&found),
                    words(&written)
                )
            });
        match differs.collect::<std::collections::BTreeSet<_>>() {
            same if same.is_empty() => Ok(()),
            differs => Err(Mismatch::Differs(
                differs.into_iter().collect::<Vec<_>>().join("; "),
            )),
        }
    }
}

/// Why a plan does not match the document.
enum Mismatch {
    NoColumn(String),
    Differs(String),
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let kernels = kernels::choose(&args.kernels)?;
    setup::ensure_with_kernels(Purpose::Boot, &kernels)?;
    let mut plans = vec![plan_here(&cargo::build(cargo::AGENT)?)?];
    for kernel in kernels {
        plans.push(plan_on(kernel)?);
    }
    plans.sort_by_key(|plan| {
        let number = |part: &str| part.parse::<u32>().unwrap_or(0);
        version(&plan.release)
            .split('.')
            .map(number)
            .collect::<Vec<_>>()
    });
    if args.write {
        let text = document(&plans);
        fs::write(file(), &text).with_context(|| format!("write {}", file().display()))?;
        println!("{}: review the changes", file().display());
        return Ok(ExitCode::SUCCESS);
    }
    let mut tally = Tally::default();
    for plan in &plans {
        record(&format!("{}: plan", plan.release), plan, &mut tally);
    }
    Ok(if tally.is_green() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Records one test: whether the plan of a kernel matches the document.
pub fn record(name: &str, plan: &Plan, tally: &mut Tally) {
    let document = fs::read_to_string(file()).unwrap_or_default();
    match plan.check(&document) {
        Ok(()) => tally.record(name, Outcome::Passed),
        Err(Mismatch::NoColumn(version)) => {
            let why = format!(
                "docs/reference/kernels.md has no column for {version}: `cargo xtask plans --write`"
            );
            tally.record(name, Outcome::Skipped(why));
        }
        Err(Mismatch::Differs(how)) => tally.record(name, Outcome::Failed(how)),
    }
}

/// The test on this kernel, unless tests are asked for by name.
pub fn run_here(agent: &Path, filter: Option<&str>, tally: &mut Tally) {
    if filter.is_some_and(|filter| filter != "plan") {
        return;
    }
    match plan_here(agent) {
        Ok(plan) => record("this kernel: plan", &plan, tally),
        Err(error) => tally.record("this kernel: plan", Outcome::Failed(format!("{error:#}"))),
    }
}

fn file() -> PathBuf {
    tools::root().join("docs/reference/kernels.md")
}

fn plan_here(agent: &Path) -> Result<Plan> {
    let cmd = Cmd::new(agent).args(["doctor", "--json"]);
    let output = cmd.command().output();
    let output = output.with_context(|| format!("start `{cmd}`"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    Plan::parse(&release, text.lines())
}

fn plan_on(kernel: &Kernel) -> Result<Plan> {
    let command = ["/tailback", "doctor", "--json"].map(str::to_owned);
    let printed = kernels::fetch(kernel, &command)?;
    Plan::parse(&kernel.release(), String::from_utf8_lossy(&printed).lines())
}

fn document(plans: &[Plan]) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut legend: Vec<&str> = Vec::new();
    for (name, way) in plans.iter().flat_map(|plan| &plan.ways) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
        if !legend.contains(&way.as_str()) {
            legend.push(way);
        }
    }
    let mut text = format!("# Kernels\n\n{INTRODUCTION}\n| fact |");
    for plan in plans {
        let _ = write!(text, " {} |", version(&plan.release));
    }
    text += "\n| --- |";
    text += &" --- |".repeat(plans.len());
    for name in names {
        let _ = write!(text, "\n| {name} |");
        for plan in plans {
            let way = plan.ways.iter().find(|(known, _)| known == name);
            let number = way.and_then(|(_, way)| legend.iter().position(|known| known == way));
            match number {
                Some(number) => {
                    let off = if legend[number].starts_with("off: ") {
                        "·"
                    } else {
                        ""
                    };
                    let _ = write!(text, " {off}{} |", number + 1);
                }
                None => text += " |",
            }
        }
    }
    text += "\n\nHow:\n\n";
    for (number, way) in legend.iter().enumerate() {
        let _ = writeln!(text, "{}. {way}", number + 1);
    }
    text += "\nKernels measured:\n\n";
    for plan in plans {
        let _ = writeln!(text, "- {}", plan.release);
    }
    text
}

/// Columns of the document by kernel version: (fact, how it is read).
fn columns(document: &str) -> BTreeMap<String, Vec<(String, String)>> {
    let legend: BTreeMap<&str, &str> = document
        .lines()
        .filter_map(|line| line.split_once(". "))
        .filter(|(number, _)| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
        .collect();
    let mut rows = document
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|line| line.split(" | ").map(str::trim).collect::<Vec<_>>());
    let Some(head) = rows.next() else {
        return BTreeMap::new();
    };
    let versions: Vec<String> = head
        .iter()
        .skip(1)
        .map(|version| (*version).to_owned())
        .collect();
    let mut columns: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for row in rows.filter(|row| row.first().is_some_and(|name| *name != "---")) {
        for (version, cell) in versions.iter().zip(row.iter().skip(1)) {
            if let Some(way) = legend.get(cell.trim_start_matches('·')) {
                let column = columns.entry(version.clone()).or_default();
                column.push((row[0].to_owned(), (*way).to_owned()));
            }
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(release: &str, rings: &str) -> Result<Plan> {
        let lines = [
            r#"{"type":"check","name":"kernel","state":"ok","how":"6.1.0"}"#.to_owned(),
            r#"{"type":"check","name":"pipes and FIFOs","state":"ok","how":"iterator, typed loads"}"#.to_owned(),
            format!(r#"{{"type":"check","name":"io_uring",{rings}}}"#),
        ];
        Plan::parse(release, lines.iter().map(String::as_str))
    }

    #[test]
    fn a_plan_is_compared_with_its_column() -> Result<()> {
        let on = r#""state":"ok","how":"iterator, probe reads""#;
        let off = r#""state":"off","why":"no such type""#;
        let plans = [plan("5.10.0-32", off)?, plan("6.1.0-50", on)?];
        let text = document(&plans);
        assert!(plans.iter().all(|plan| plan.check(&text).is_ok()), "{text}");
        let Err(Mismatch::Differs(how)) = plan("6.1.0-51", off)?.check(&text) else {
            panic!("a silent fall-back is not detected");
        };
        assert_eq!(
            how,
            "io_uring: off: no such type (docs/reference/kernels.md: iterator, probe reads)"
        );
        assert!(matches!(
            plan("6.6.1", on)?.check(&text),
            Err(Mismatch::NoColumn(version)) if version == "6.6"
        ));
        Ok(())
    }
}
