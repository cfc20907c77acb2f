//! Holds queues in a known state, samples them with the agent, and compares.
//!
//! Each kind of queue is measured in its own process, which is the agent's target. So no kind sees the queues of another,
//! and a hang or crash costs only its own rows. The truth never comes from the agent: it is the number requested, the
//! clock of the waiting side, an ioctl, or `/proc`.

mod accept;
mod control_group;
mod course;
mod disk;
mod eventloop;
mod fd;
mod holder;
mod hooks;
mod ktls;
mod link;
mod lock;
mod lossy;
mod memory;
mod pipe;
mod report;
mod requests;
mod runqueue;
mod sampling;
mod stream;
mod syn;
mod sys;
mod udp;
mod unix;
mod uring;
mod workers;

use std::{
    env,
    io::Write as _,
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tailback_tests::{
    accuracy::{Finding, ROWS, Verdict, kinds},
    lines::Stream,
    process::{End, Process},
};

use report::Report;

/// For measuring one kind. Emulated machines are about twenty times slower.
const DEADLINE: Duration = Duration::from_secs(120);
/// Path of the agent in the initramfs of a test kernel.
const IN_INITRAMFS: &str = "/tailback";

const USAGE: &str = "\
Usage: tailback-accuracy [--list] [--expect-absent KIND.QUANTITY,...] [KIND...]

Compares what the agent (TAILBACK_BIN, else /tailback) reports for queues with their known state. Prints one JSON object
per line. Exit code 0 if all rows are as expected, 1 if not, 2 for invalid arguments.";

/// Measures the rows of one kind in the current process.
type Measure = fn(&mut Report) -> Result<()>;

fn measure_of(kind: &str) -> Option<Measure> {
    Some(match kind {
        "syn" => syn::measure,
        "accept" => accept::measure,
        "recv" => stream::measure_recv,
        "send" => stream::measure_send,
        "udp" => udp::measure,
        "unix" => unix::measure,
        "pipe" => pipe::measure,
        "inflight" => requests::measure_inflight,
        "downstream" => requests::measure_downstream,
        "workers" => workers::measure,
        "eventloop" => eventloop::measure,
        "runqueue" => runqueue::measure,
        "hooks" => hooks::measure,
        "lock" => lock::measure,
        "disk" => disk::measure,
        "memory" => memory::measure,
        "fd" => fd::measure,
        "uring" => uring::measure,
        _ => return None,
    })
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--list"] => list(),
        [holder::FLAG] => holder::hold(),
        [hooks::FLAG] => hooks::sleep(),
        ["--measure", kind] => measure(kind),
        _ => match Args::parse(&words) {
            Ok(args) => compare(&args),
            Err(error) => {
                eprintln!("error: {error:#}\n\n{USAGE}");
                return ExitCode::from(2);
            }
        },
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command line.
struct Args<'a> {
    kinds: Vec<&'a str>,
    expect_absent: Vec<&'a str>,
}

impl<'a> Args<'a> {
    fn parse(words: &[&'a str]) -> Result<Self> {
        let mut parsed = Self {
            kinds: Vec::new(),
            expect_absent: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--expect-absent" => {
                    let list = words.next().context("--expect-absent needs a list")?;
                    parsed.expect_absent.extend(list.split(','));
                }
                kind if measure_of(kind).is_some() => parsed.kinds.push(kind),
                other => bail!("no such kind: {other:?}"),
            }
        }
        for name in &parsed.expect_absent {
            let known = |row: &tailback_tests::accuracy::Row| name_of(row.kind, row.quantity);
            if !ROWS.iter().any(|row| known(row) == *name) {
                bail!("no such row: {name:?}; `--list` prints all rows");
            }
        }
        if parsed.kinds.is_empty() {
            parsed.kinds = kinds();
        }
        Ok(parsed)
    }
}

fn name_of(kind: &str, quantity: &str) -> String {
    format!("{kind}.{quantity}")
}

fn list() -> Result<bool> {
    for row in ROWS {
        let name = name_of(row.kind, row.quantity);
        println!("{name}\t{}\t{}", row.unit.name(), row.truth);
    }
    Ok(true)
}

/// Prints the findings; returns whether all are as expected.
fn compare(args: &Args<'_>) -> Result<bool> {
    let mut good = true;
    for kind in &args.kinds {
        for finding in findings(kind) {
            let name = name_of(&finding.kind, &finding.quantity);
            good &= match finding.verdict {
                Verdict::Ok | Verdict::Skipped => true,
                Verdict::Absent => args.expect_absent.contains(&name.as_str()),
                Verdict::Off => false,
            };
            println!("{}", finding.to_json());
        }
        std::io::stdout().flush().context("write the findings")?;
    }
    Ok(good)
}

/// One finding per row of a kind, even if the measurement fails.
fn findings(kind: &str) -> Vec<Finding> {
    let all = |verdict, note: &str| {
        let rows = ROWS.iter().filter(|row| row.kind == kind);
        rows.map(|row| Finding::without_numbers(row, verdict, note))
            .collect()
    };
    if !rustix::process::geteuid().is_root() {
        return all(Verdict::Skipped, "only root may load eBPF programs");
    }
    let (found, reason) = match measure_in_child(kind) {
        Ok(measured) => measured,
        Err(error) => return all(Verdict::Off, &format!("{error:#}")),
    };
    let rows = ROWS.iter().filter(|row| row.kind == kind);
    rows.map(|row| {
        let own = found.iter().find(|finding| finding.is_of(row));
        own.cloned()
            .unwrap_or_else(|| Finding::without_numbers(row, Verdict::Off, &reason))
    })
    .collect()
}

/// Runs the process for a kind. Returns its findings and, for missing rows, the reason.
fn measure_in_child(kind: &str) -> Result<(Vec<Finding>, String)> {
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["--measure", kind]);
    if env::var_os("TAILBACK_BIN").is_none() && Path::new(IN_INITRAMFS).is_file() {
        command.env("TAILBACK_BIN", IN_INITRAMFS);
    }
    let process = Process::start(kind, &mut command)?;
    let end = process.wait_end(DEADLINE);
    // The process may end before its last line is read.
    let lines = process.lines();
    let second = Duration::from_secs(1);
    let _ = lines.wait("the end of the output", usize::MAX, second, |_| None::<()>);
    let lines = lines.all();
    let (out, error): (Vec<_>, Vec<_>) =
        lines.iter().partition(|line| line.stream == Stream::Stdout);
    let found = out.iter().filter_map(|line| Finding::from_json(&line.text));
    // The error line comes before the verifier's log.
    let mut errors = error.iter().map(|line| line.text.as_str());
    let first = errors.clone().find(|line| line.starts_with("error: "));
    let last = first.or(errors.next_back()).unwrap_or_default();
    let reason = match end {
        Ok(End::Code(0)) => "the workload did not measure it".to_owned(),
        Ok(end) => format!("the workload ended with {end:?}: {last}"),
        Err(error) => format!("{error:#}: {last}"),
    };
    Ok((found.collect(), reason))
}

fn measure(kind: &str) -> Result<bool> {
    let measure = measure_of(kind).with_context(|| format!("no such kind: {kind:?}"))?;
    let mut report = Report::new(kind);
    let done = measure(&mut report);
    // Findings made before a failure still count.
    report.print();
    done.map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_the_table_is_measured() {
        for kind in kinds() {
            assert!(measure_of(kind).is_some(), "{kind}");
        }
    }

    #[test]
    fn an_unknown_row_cannot_be_expected_absent() {
        assert!(Args::parse(&["--expect-absent", "udp.datagrams,lock.holder"]).is_ok());
        assert!(Args::parse(&["--expect-absent", "udp.sausages"]).is_err());
        assert!(Args::parse(&["sausages"]).is_err());
    }
}
