//! The command line: commands, options and exit codes.

mod adapters;
mod anonymize;
mod bench_page;
mod bench_scan;
mod buffered_stdout;
mod capabilities;
mod config;
mod diagnose;
mod doctor;
mod exit_code;
mod focus_samples;
mod helper;
mod logging;
mod output;
mod record;
mod reload;
mod replay;
mod run;
mod sample;
mod service_manager;
mod session;
mod signals;
mod status;
mod top;
mod traces;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use tracing::{debug, trace};
use wildmatch::WildMatch;

pub use exit_code::Failure;
use exit_code::{Outcome, print_failure};

use crate::{
    collect::Tier,
    config::{Config, check_interval, file, parse_duration, parse_tier},
    kernel::scanner::LoadOptions,
    target::{Selector, Spec},
};

const AFTER_HELP: &str = "\
Exit codes:
  0   success
  1   --check found a critical queue
  2   invalid usage, configuration or recording
  3   not permitted or not supported by the kernel
  4   no such target
  70  internal error (please report it)
  74  a file could not be written

Examples:
  tailback run --port 8080              watch the service that listens on port 8080
  tailback diagnose                     which queue on this host is filling, why, and what to do
  tailback top                          the same, live
  tailback sample --name 'uwsgi*'       print all queues of uWSGI once
  tailback run --all --json | jq .      watch every service of this host, with JSON output
  OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 tailback run --pid 4711
                                        send incidents to Jaeger as traces";

const SAMPLE_AFTER_HELP: &str = "\
With --duration, it keeps sampling for that time: --json prints every queue after each interval, the table shows the last \
state.";

/// Finds the queue that is filling in an unmodified service, and warns before it is full.
#[derive(Debug, Parser)]
#[command(name = "tailback", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Write a debug log to standard error; FILTER is a level (debug), or levels by module (tailback::emit=trace) [env:
    /// TAILBACK_LOG]
    #[arg(long, global = true, value_name = "FILTER", display_order = 1_000)]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch services until stopped: report changes of a queue's level (ok, warn, critical, full) and episodes (from
    /// leaving ok to recovery), export spans, publish signals
    Run(run::Options),
    /// Find the queue that is filling, why, and what to do (default target: the whole host)
    Diagnose(diagnose::Options),
    /// Show services, queues and verdicts live on a terminal: from the running agent, from samples that `top` takes itself,
    /// or from a recording
    Top(top::Options),
    /// Print every queue once, from two samples one interval apart (to measure rates)
    #[command(after_help = SAMPLE_AFTER_HELP)]
    Sample(sample::Options),
    /// Record samples to a file for later replay
    Record(record::Options),
    /// Replay a recording through the same pipeline, with the same output
    Replay(replay::Options),
    /// Strip names, paths and addresses from a recording so it can be shared
    Anonymize(anonymize::Options),
    /// Check what this kernel supports, what is missing, and how to get it
    Doctor(doctor::Options),
    /// Show published signals and connected consumers of the running agent
    Status(status::Options),
    /// Check a configuration file, or show what is in force with it
    Config(config::Options),
    /// Serve the adapters configured in [signal] (`run` starts this process itself); they fail open if the agent dies
    Adapters(adapters::Options),
    /// Create files and run the adapter process for an agent that has dropped its privileges; `run` starts it
    #[command(hide = true)]
    Helper,
    /// Measure scans of the targets, for `cargo xtask bench`
    #[command(hide = true)]
    BenchScan(bench_scan::Options),
    /// Write a page as fast as possible, for `cargo xtask bench`
    #[command(hide = true)]
    BenchPage(bench_page::Options),
}

/// Targets to watch. Options can be repeated and combined; every match is watched.
#[derive(Clone, Debug, Default, Args)]
struct Targets {
    /// Watch this PID and its forked workers
    #[arg(long, value_name = "N")]
    pid: Vec<u32>,
    /// Watch processes whose name or executable matches this glob
    #[arg(long, value_name = "GLOB")]
    name: Vec<String>,
    /// Watch processes that listen on this TCP port
    #[arg(long, value_name = "N")]
    port: Vec<u16>,
    /// Watch all processes in this cgroup and its descendants
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Watch every service of this host: containers, systemd units, and other processes
    #[arg(long)]
    all: bool,
    /// With --all, also watch short-lived processes, and those of the system and of Kubernetes (`diagnose` and `sample` always do)
    #[arg(long)]
    every_process: bool,
    /// Write debug lines of the eBPF programs to standard error, at most 100 per second
    #[arg(long)]
    log_bpf: bool,
    /// Configuration file (TOML): targets, thresholds, signals
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Targets {
    fn config(&self) -> Outcome<Config> {
        Ok(self.config_and_text()?.0)
    }

    /// The configuration, and the text of its file.
    fn config_and_text(&self) -> Outcome<(Config, String)> {
        let Some(path) = &self.config else {
            return Ok((Config::default(), String::new()));
        };
        let text = file::read(path).map_err(Failure::usage)?;
        let config = Config::parse_file(path, &text).map_err(Failure::usage)?;
        debug!(file = %path.display(), "configuration loaded");
        trace!(?config);
        Ok((config, text))
    }

    /// These targets, or all processes if neither the command line nor the configuration names any.
    fn or_all(&self, config: &Config) -> Self {
        let mut targets = self.clone();
        targets.all |= config.specs().is_empty() && !self.are_given();
        targets
    }

    /// Whether the command line names any.
    fn are_given(&self) -> bool {
        let is_empty = self.pid.is_empty()
            && self.name.is_empty()
            && self.port.is_empty()
            && self.cgroup.is_empty();
        self.all || !is_empty
    }

    /// The same targets; `--all` includes every process. For commands that examine the host once, instead of watching it.
    fn with_every_process(&self) -> Self {
        Self {
            every_process: true,
            ..self.clone()
        }
    }

    /// What to load for a tier.
    fn load_options(&self, tier: Tier) -> LoadOptions {
        LoadOptions {
            log_bpf: self.log_bpf,
            hooks: tier.has_hooks(),
        }
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
            let every_process = self.every_process;
            specs.push(Selector::All { every_process }.into());
        }
        if specs.is_empty() {
            return Err(Failure::usage(anyhow::anyhow!(
                "no target: give --pid, --name, --port, --cgroup or --all, or a [[target]] in --config FILE"
            )));
        }
        Ok(specs)
    }
}

/// Whether hooks are attached.
#[derive(Clone, Copy, Debug, Default, Args)]
struct TierOption {
    /// Attach hooks that measure waits exactly: glance (never), auto (from the first sign that a queue fills) or watch
    /// (always) [default: glance]
    #[arg(long, value_name = "TIER", value_parser = parse_tier)]
    tier: Option<Tier>,
}

impl TierOption {
    fn is_given(self) -> bool {
        self.tier.is_some()
    }

    /// The tier: the command line's, else the configuration's.
    fn or(self, config: &Config) -> Tier {
        self.tier.unwrap_or(config.tier())
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

/// The command line, for manual pages and shell completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version go to stdout with code 0, usage errors to stderr with code 2.
        Err(error) => error.exit(),
    };
    let log = match logging::start(cli.log.as_deref()) {
        Ok(log) => log,
        Err(failure) => return exit(&failure),
    };
    let command = AssertUnwindSafe(|| match &cli.command {
        Command::Run(options) => run::run(options),
        Command::Diagnose(options) => diagnose::run(options),
        Command::Top(options) => top::run(options),
        Command::Sample(options) => sample::run(options),
        Command::Record(options) => record::run(options),
        Command::Replay(options) => replay::run(options),
        Command::Anonymize(options) => anonymize::run(options),
        Command::Doctor(options) => doctor::run(options),
        Command::Status(options) => status::run(options),
        Command::Config(options) => config::run(options),
        Command::Adapters(options) => adapters::run(options),
        Command::Helper => helper::run(),
        Command::BenchScan(options) => bench_scan::run(options),
        Command::BenchPage(options) => bench_page::run(options),
    });
    // No state is used after a panic; the panic message is on standard error already.
    let outcome = catch_unwind(command).unwrap_or_else(|_| {
        let text = "internal error in Tailback: please report it with the lines above";
        Err(Failure::bug(anyhow::anyhow!(text)))
    });
    // Written out before the failure, which is the last line.
    drop(log);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has closed the pipe: `tailback … | head`.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => exit(&failure),
    }
}

fn exit(failure: &Failure) -> ExitCode {
    print_failure(failure);
    ExitCode::from(failure.code())
}
