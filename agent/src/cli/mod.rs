//! The command line: what it accepts, and the exit codes.

mod adapters;
mod anonymize;
mod bench_page;
mod bench_walk;
mod buffered_stdout;
mod diagnose;
mod doctor;
mod exit_code;
mod looks;
mod output;
mod record;
mod replay;
mod run;
mod sample;
mod session;
mod signals;
mod status;
mod traces;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use wildmatch::WildMatch;

pub use exit_code::Failure;
use exit_code::{Outcome, say};

use crate::{
    config::{Config, check_interval, parse_duration},
    target::{Selector, Spec},
};

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 --check found a critical queue, 2 usage or configuration, 3 the kernel or the privileges do \
not allow it, 4 the target does not exist, 70 a bug, 74 a file could not be written.

Examples:
  tailback run --port 8080              watch whoever listens on port 8080
  tailback diagnose                     which queue of this machine fills, why, and what to do
  tailback sample --name 'uwsgi*'       every queue of it, once, now
  tailback run --all --json | jq .      everything on this machine, for a program
  OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 tailback run --pid 4711
                                        and the incidents go to Jaeger";

/// Finds the queue that is filling in an unmodified service, and warns before it is full.
#[derive(Debug, Parser)]
#[command(name = "tailback", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch until stopped: level changes, episodes, spans
    Run(run::Options),
    /// One answer: which queue fills, why, and what to do (without a target: of the whole machine)
    Diagnose(diagnose::Options),
    /// Every queue once, now (looks twice, 100 ms apart, for the rates)
    Sample(sample::Options),
    /// Keep the stream of samples in a file
    Record(record::Options),
    /// Run the same pipeline over a recorded stream: the same output
    Replay(replay::Options),
    /// Write a recording without the names of your machine, to give it away: it replays to the same verdicts
    Anonymize(anonymize::Options),
    /// What this kernel allows, what is used, what is missing and how to get it
    Doctor(doctor::Options),
    /// Ask the running agent: what is signalled of whom, and who listens
    Status(status::Options),
    /// Serve the adapters of [signal] (`run` starts it by itself): they fail open when the agent is gone
    Adapters(adapters::Options),
    /// Measure walks over one process, for `cargo xtask bench`
    #[command(hide = true)]
    BenchWalk(bench_walk::Options),
    /// Write a page as fast as it goes, for `cargo xtask bench`
    #[command(hide = true)]
    BenchPage(bench_page::Options),
}

/// Whom to watch. Repeatable; all that they name is watched.
#[derive(Clone, Debug, Default, Args)]
struct Targets {
    /// A process, with the workers that it forked
    #[arg(long, value_name = "N")]
    pid: Vec<u32>,
    /// Processes whose name or executable matches a glob
    #[arg(long, value_name = "GLOB")]
    name: Vec<String>,
    /// Whoever listens on a TCP port
    #[arg(long, value_name = "N")]
    port: Vec<u16>,
    /// All processes in a cgroup and below
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Every process of the machine
    #[arg(long)]
    all: bool,
    /// A TOML file with targets and thresholds
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Targets {
    fn config(&self) -> Outcome<Config> {
        self.config
            .as_deref()
            .map_or_else(|| Ok(Config::default()), Config::read)
            .map_err(Failure::usage)
    }

    /// These, or the whole machine where none is named here or in the configuration.
    fn or_all(&self, config: &Config) -> Self {
        let mut targets = self.clone();
        targets.all |= config.specs().is_empty()
            && self.pid.is_empty()
            && self.name.is_empty()
            && self.port.is_empty()
            && self.cgroup.is_empty();
        targets
    }

    fn specs(&self, config: &Config) -> Outcome<Vec<Spec>> {
        let mut specs = config.specs();
        specs.extend(self.pid.iter().map(|pid| Selector::Pid(*pid).into()));
        specs.extend(
            self.name
                .iter()
                .map(|glob| Selector::Name(WildMatch::new(glob)).into()),
        );
        specs.extend(self.port.iter().map(|port| Selector::Port(*port).into()));
        specs.extend(
            self.cgroup
                .iter()
                .map(|path| Selector::Cgroup(path.clone()).into()),
        );
        if self.all {
            specs.push(Selector::All.into());
        }
        if specs.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "no target: name one with --pid, --name, --port, --cgroup, --all, or a [[target]] in --config FILE"
            )));
        }
        Ok(specs)
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text).map_err(|error| format!("{error:#}"))?;
    check_interval(interval).map_err(|error| format!("{error:#}"))?;
    Ok(interval)
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| format!("{error:#}"))
}

/// Runs the program; the exit code is the answer.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version go to stdout with code 0, mistakes to stderr with code 2.
        Err(error) => error.exit(),
    };
    let command = AssertUnwindSafe(|| match &cli.command {
        Command::Run(options) => run::run(options),
        Command::Diagnose(options) => diagnose::run(options),
        Command::Sample(options) => sample::run(options),
        Command::Record(options) => record::run(options),
        Command::Replay(options) => replay::run(options),
        Command::Anonymize(options) => anonymize::run(options),
        Command::Doctor(options) => doctor::run(options),
        Command::Status(options) => status::run(options),
        Command::Adapters(options) => adapters::run(options),
        Command::BenchWalk(options) => bench_walk::run(options),
        Command::BenchPage(options) => bench_page::run(options),
    });
    // Nothing is used after a panic; it has said on standard error what it was.
    let outcome = catch_unwind(command).unwrap_or_else(|_| {
        let text = "this is a bug in Tailback: please report it, with the lines above";
        Err(Failure::bug(anyhow::anyhow!(text)))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has gone away: `tailback … | head`.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure);
            ExitCode::from(failure.code())
        }
    }
}
