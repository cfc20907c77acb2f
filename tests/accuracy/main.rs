//! Holds queues in a known state, asks the agent about them, and compares.
//!
//! Each kind of queue is measured in a process of its own, which is the agent's target: no kind sees the queues of
//! another, and one that hangs or dies costs its own rows alone. The truth comes from other sources than the agent's:
//! the numbers asked for, the clock of who waits, the kernel's ioctls, `/proc`.

mod accept;
mod control_group;
mod course;
mod disk;
mod eventloop;
mod fd;
mod holder;
mod ktls;
mod link;
mod lock;
mod look;
mod lossy;
mod memory;
mod pipe;
mod report;
mod requests;
mod runqueue;
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

/// For one kind. An emulated machine is some twenty times slower.
const DEADLINE: Duration = Duration::from_secs(120);
/// Where the agent lies in a test kernel's initramfs.
const IN_INITRAMFS: &str = "/tailback";

const USAGE: &str = "\
Usage: tailback-accuracy [--list] [--expect-absent KIND.QUANTITY,...] [KIND...]

Compares what the agent (TAILBACK_BIN, else /tailback) says of queues with what is known of them: one JSON object a
line. Exit code 0 if all is as it should be, 1 if not, 2 for a mistake in the arguments.";

/// Measures the rows of one kind, in a process of its own.
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
        ["--measure", kind] => measure(kind),
        _ => match Asked::read(&words) {
            Ok(asked) => compare(&asked),
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
struct Asked<'a> {
    kinds: Vec<&'a str>,
    expect_absent: Vec<&'a str>,
}

impl<'a> Asked<'a> {
    fn read(words: &[&'a str]) -> Result<Self> {
        let mut asked = Self {
            kinds: Vec::new(),
            expect_absent: Vec::new(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--expect-absent" => {
                    let list = words.next().context("--expect-absent wants a list")?;
                    asked.expect_absent.extend(list.split(','));
                }
                kind if measure_of(kind).is_some() => asked.kinds.push(kind),
                other => bail!("there is no kind {other:?}"),
            }
        }
        for name in &asked.expect_absent {
            let known = |row: &tailback_tests::accuracy::Row| name_of(row.kind, row.quantity);
            if !ROWS.iter().any(|row| known(row) == *name) {
                bail!("there is no row {name:?}; `--list` prints them all");
            }
        }
        if asked.kinds.is_empty() {
            asked.kinds = kinds();
        }
        Ok(asked)
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

/// Whether all is as it should be.
fn compare(asked: &Asked<'_>) -> Result<bool> {
    let mut good = true;
    for kind in &asked.kinds {
        for finding in findings(kind) {
            let name = name_of(&finding.kind, &finding.quantity);
            good &= match finding.verdict {
                Verdict::Ok | Verdict::Skipped => true,
                Verdict::Absent => asked.expect_absent.contains(&name.as_str()),
                Verdict::Off => false,
            };
            println!("{}", finding.to_json());
        }
        std::io::stdout().flush().context("write the findings")?;
    }
    Ok(good)
}

/// One finding for each row of a kind, come what may.
fn findings(kind: &str) -> Vec<Finding> {
    let all = |verdict, note: &str| {
        let rows = ROWS.iter().filter(|row| row.kind == kind);
        rows.map(|row| Finding::without_numbers(row, verdict, note))
            .collect()
    };
    if !rustix::process::geteuid().is_root() {
        return all(Verdict::Skipped, "only root may load eBPF programs");
    }
    let (found, said) = match measured(kind) {
        Ok(ended) => ended,
        Err(error) => return all(Verdict::Off, &format!("{error:#}")),
    };
    let rows = ROWS.iter().filter(|row| row.kind == kind);
    rows.map(|row| {
        let own = found.iter().find(|finding| finding.is_of(row));
        own.cloned()
            .unwrap_or_else(|| Finding::without_numbers(row, Verdict::Off, &said))
    })
    .collect()
}

/// What the process of a kind found, and its last words.
fn measured(kind: &str) -> Result<(Vec<Finding>, String)> {
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["--measure", kind]);
    if env::var_os("TAILBACK_BIN").is_none() && Path::new(IN_INITRAMFS).is_file() {
        command.env("TAILBACK_BIN", IN_INITRAMFS);
    }
    let process = Process::start(kind, &mut command)?;
    let end = process.wait_end(DEADLINE);
    // The end of the process may be seen before its last line.
    let lines = process.lines();
    let second = Duration::from_secs(1);
    let _ = lines.wait("the end of the output", usize::MAX, second, |_| None::<()>);
    let lines = lines.all();
    let (out, error): (Vec<_>, Vec<_>) =
        lines.iter().partition(|line| line.stream == Stream::Stdout);
    let found = out.iter().filter_map(|line| Finding::from_json(&line.text));
    // A verifier's log follows what was attempted.
    let mut said_last = error.iter().map(|line| line.text.as_str());
    let attempt = said_last.clone().find(|line| line.starts_with("error: "));
    let last = attempt.or(said_last.next_back()).unwrap_or_default();
    let said = match end {
        Ok(End::Code(0)) => "it was not measured".to_owned(),
        Ok(end) => format!("the workload ended with {end:?}: {last}"),
        Err(error) => format!("{error:#}: {last}"),
    };
    Ok((found.collect(), said))
}

fn measure(kind: &str) -> Result<bool> {
    let measure = measure_of(kind).with_context(|| format!("there is no kind {kind:?}"))?;
    let mut report = Report::new(kind);
    let done = measure(&mut report);
    // What was found before something failed stands.
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
    fn a_row_that_does_not_exist_cannot_be_expected_absent() {
        assert!(Asked::read(&["--expect-absent", "udp.datagrams,lock.holder"]).is_ok());
        assert!(Asked::read(&["--expect-absent", "udp.sausages"]).is_err());
        assert!(Asked::read(&["sausages"]).is_err());
    }
}
