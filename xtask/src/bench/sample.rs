//! The cost of one sample of many sockets and threads.
//!
//! `tailback bench-scan` repeats the kernel's scan with the decoding of its records, and the whole sample including everything
//! computed from a sample, and reports the times. `ss -tanmp`, the manual alternative, is timed on the same sockets. Both run
//! with real-time priority if allowed, to measure the cost of a sample rather than its wait for a CPU.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tailback_tests::{agent::Agent, process::Process, program};

use super::{
    figure::{Figure, Goal, Report},
    hold,
    statistics::{Spread, quartiles},
};

/// (sockets, goal for the scan in ns per socket).
const SOCKETS: [(usize, f64); 3] = [(1_000, 250.0), (9_000, 250.0), (27_000, 700.0)];
const THREADS: usize = 5_000;
const THREAD_GOAL_NS: f64 = 150.0;
/// Rounds of `ss`, which takes longer; the help of `--rounds` names this number.
const SS_ROUNDS: usize = 7;
const QUARTILES: &str = "quartiles of the rounds";

#[derive(clap::Args)]
pub struct Args {
    /// Number of measurements of each scan and of the whole sample (of `ss`: always 7)
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(5..))]
    rounds: u32,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let agent = super::agent()?;
    let priority = Priority::choose();
    report.progress(priority.text());
    let ss = program::need(&["ss"])?;
    for (sockets, goal) in SOCKETS {
        report.progress(&format!("{sockets} sockets …"));
        let holders = hold::sockets(sockets)?;
        let scan = Scan::run(priority.of(&agent), &holders, args.rounds)?;
        if scan.sockets < sockets as f64 {
            bail!("the agent saw {} of {sockets} sockets", scan.sockets);
        }
        let per_socket = |times: &[f64]| spread(times, scan.sockets);
        let (files, sample) = (per_socket(&scan.files_ns)?, per_socket(&scan.sample_ns)?);
        let keys = |measured: &str| json!({"bench": "sample", "measured": measured, "sockets": scan.sockets});
        let thousands = format!("{},000 sockets", sockets / 1000);
        report.add(Figure {
            what: format!("{thousands}: scan, each"),
            keys: keys("scan_per_socket"),
            unit: "ns",
            value: files,
            spread: QUARTILES,
            goal: Some(Goal::at_most(goal, &files)),
        });
        report.add(Figure {
            what: format!("{thousands}: the kernel's own scan, each"),
            keys: keys("bare_scan_per_socket"),
            unit: "ns",
            value: per_socket(&scan.bare_files_ns)?,
            spread: QUARTILES,
            goal: None,
        });
        report.add(Figure {
            what: format!("{thousands}: whole sample, each"),
            keys: keys("sample_per_socket"),
            unit: "ns",
            value: sample,
            spread: QUARTILES,
            goal: None,
        });
        report.add(Figure {
            what: format!("{thousands}: whole sample"),
            keys: keys("sample"),
            unit: "ms",
            value: spread(&scan.sample_ns, 1e6)?,
            spread: QUARTILES,
            goal: None,
        });
        let times = time_ss(&priority, &ss)?;
        report.add(Figure {
            what: format!("{thousands}: ss -tanmp"),
            keys: keys("ss"),
            unit: "ms",
            value: spread(&times, 1e6)?,
            spread: QUARTILES,
            goal: None,
        });
    }
    report.progress(&format!("{THREADS} threads …"));
    let holders = hold::threads(THREADS)?;
    let scan = Scan::run(priority.of(&agent), &holders, args.rounds)?;
    if scan.threads < THREADS as f64 {
        bail!("the agent saw {} of {THREADS} threads", scan.threads);
    }
    let value = spread(&scan.threads_ns, scan.threads)?;
    report.add(Figure {
        what: format!("{},000 threads: scan, each", THREADS / 1000),
        keys: json!({"bench": "sample", "measured": "scan_per_thread", "threads": scan.threads}),
        unit: "ns",
        value,
        spread: QUARTILES,
        goal: Some(Goal::at_most(THREAD_GOAL_NS, &value)),
    });
    report.add(Figure {
        what: format!(
            "{},000 threads: the kernel's own scan, each",
            THREADS / 1000
        ),
        keys: json!({"bench": "sample", "measured": "bare_scan_per_thread", "threads": scan.threads}),
        unit: "ns",
        value: spread(&scan.bare_threads_ns, scan.threads)?,
        spread: QUARTILES,
        goal: None,
    });
    Ok(())
}

/// What `tailback bench-scan` measured.
struct Scan {
    sockets: f64,
    threads: f64,
    files_ns: Vec<f64>,
    threads_ns: Vec<f64>,
    /// The same scans with programs that only read the owner of each object.
    bare_files_ns: Vec<f64>,
    bare_threads_ns: Vec<f64>,
    sample_ns: Vec<f64>,
}

impl Scan {
    fn run(mut agent: Command, holders: &[Process], rounds: u32) -> Result<Self> {
        const TIME: Duration = Duration::from_secs(120);
        agent
            .arg("bench-scan")
            .args(hold::targets(holders))
            .args(["--rounds", &rounds.to_string()]);
        let agent = Agent::start(&mut agent)?;
        let line = agent.wait_for("the times of its scans", TIME, |event| event.is("scan"))?;
        Self::read(&line.value).context("read what `tailback bench-scan` printed")
    }

    fn read(line: &Value) -> Result<Self> {
        let number = |key: &str| {
            line.get(key)
                .and_then(Value::as_f64)
                .with_context(|| format!("no number {key:?}"))
        };
        let times = |key: &str| -> Result<Vec<f64>> {
            let times = line.get(key).and_then(Value::as_array);
            let times = times.with_context(|| format!("no list {key:?}"))?;
            Ok(times.iter().filter_map(Value::as_f64).collect())
        };
        Ok(Self {
            sockets: number("sockets")?,
            threads: number("threads")?,
            files_ns: times("files_ns")?,
            threads_ns: times("threads_ns")?,
            bare_files_ns: times("bare_files_ns")?,
            bare_threads_ns: times("bare_threads_ns")?,
            sample_ns: times("sample_ns")?,
        })
    }
}

fn spread(times: &[f64], divisor: f64) -> Result<Spread> {
    let spread = quartiles(times).context("nothing was measured")?;
    Ok(spread.map(|time| time / divisor))
}

/// Time of each run, ns. `ss` lists all sockets of the machine, nearly all of them ours.
fn time_ss(priority: &Priority, ss: &Path) -> Result<Vec<f64>> {
    (0..SS_ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let status = priority
                .of(ss)
                .arg("-tanmp")
                .stdout(Stdio::null())
                .status()
                .context("start ss")?;
            if !status.success() {
                bail!("ss -tanmp: {status}");
            }
            Ok(start.elapsed().as_nanos() as f64)
        })
        .collect()
}

/// Real-time priority with `chrt`, if allowed.
struct Priority {
    chrt: Option<PathBuf>,
}

impl Priority {
    fn choose() -> Self {
        let chrt = program::find(&["chrt"]).filter(|chrt| {
            let tried = Command::new(chrt).args(["-f", "1", "true"]).output();
            tried.is_ok_and(|output| output.status.success())
        });
        Self { chrt }
    }

    fn text(&self) -> &'static str {
        match self.chrt {
            Some(_) => "with real-time priority (chrt -f 1)",
            None => {
                "without real-time priority (chrt -f 1 does not work here): other programs affect the times"
            }
        }
    }

    fn of(&self, program: &Path) -> Command {
        match &self.chrt {
            Some(chrt) => {
                let mut command = Command::new(chrt);
                command.args(["-f", "1"]).arg(program);
                command
            }
            None => Command::new(program),
        }
    }
}
