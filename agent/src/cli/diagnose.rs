//! `tailback diagnose`: watches for a few seconds, then reports which queue is filling, why, and what to do.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::anyhow;
use clap::Args;

use super::{
    Failure, Targets, TierOption, duration,
    exit_code::Outcome,
    logging,
    output::{Output, colour},
    run::SamplingClock,
    session::{self, Stop},
};
use crate::{
    collect::OutputStats,
    emit::{
        explain, json,
        report::{self, Findings},
        terminal::Verbosity,
    },
    pipeline::Pipeline,
};

/// Default CPU budget, as a share of one core. It exceeds the agent's (1%): a person waits, and the run is short.
const CPU_BUDGET: f64 = 0.05;
/// Shortest observation time: rates and shares need several samples.
const MIN_TIME: Duration = Duration::from_secs(1);
/// How often the progress line is redrawn.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum number of queues that the message of `--check` names.
const MAX_NAMED: usize = 3;

#[derive(Debug, Args)]
#[command(mut_arg("quiet", |quiet| quiet.help("Print only the headlines")))]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    tier: TierOption,
    /// Observe for TIME
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = time)]
    time: Duration,
    /// Exit with code 1 if any queue reached critical or full during the observation
    #[arg(long)]
    check: bool,
    /// Print every rule behind each verdict, and the numbers that decided
    #[arg(long)]
    explain: bool,
}

fn time(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time < MIN_TIME {
        return Err(format!(
            "{text:?} is too short: rates and shares need 1s or more"
        ));
    }
    Ok(time)
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let stop = Stop::on_signals()?;
    let targets = options.targets.or_all(&config).with_every_process();
    let specs = targets.specs(&config)?;
    let tier = options.tier.or(&config);
    let mut collector = session::collector(
        specs,
        config.budget_or(CPU_BUDGET),
        true,
        options.targets.load_options(tier),
    )?;
    collector.set_tier(tier, config.hook_budget());
    // Focus every target from the start: there is no time to wait for a level change.
    collector.focus_all(true);
    collector.read_logs(config.messages().map_err(Failure::usage)?);
    collector.ask_apps(config.apps().map_err(Failure::usage)?);
    let mut clock = SamplingClock::with(collector, Some(options.time));
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    if options.explain {
        pipeline.explain();
    }
    let mut findings = Findings::default();
    let mut progress = Progress::start(options);
    let watched = loop {
        let sample = match clock.next(&stop, OutputStats::default()) {
            Ok(Some(sample)) => sample,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        let outcome = pipeline.step(&sample);
        logging::pipeline_events(&outcome.events);
        outcome.events.iter().for_each(|event| findings.take(event));
        findings.observed(&sample, pipeline.queues());
        progress.show(&findings);
        if let Err(failure) = clock.finish_sample(&outcome.focused) {
            break Err(failure);
        }
    };
    drop(progress);
    findings.set_no_baseline(pipeline.no_baseline());
    let last = pipeline.finish();
    last.iter().for_each(|event| findings.take(event));
    // Report what was found even if watching ended early.
    let reported = report_findings(options, &findings);
    watched.and(reported)?;
    if options.check {
        check(&findings)?;
    }
    Ok(())
}

fn report_findings(options: &Options, findings: &Findings) -> Outcome<()> {
    let mut out = io::stdout().lock();
    if options.output.json {
        json::diagnoses(&mut out, findings.episodes(), findings.targets())
            .and_then(|()| json::no_baseline(&mut out, findings.no_baseline(), findings.targets()))
            .and_then(|()| json::exact_waits(&mut out, findings.exact_waits(), findings.targets()))
    } else {
        report::write(&mut out, findings, colour(), options.output.verbosity())
            .and_then(|()| explain::write(&mut out, findings.episodes(), findings.targets()))
    }
    .map_err(Failure::stdout)
}

fn check(findings: &Findings) -> Outcome<()> {
    let names: Vec<String> = findings
        .critical()
        .map(|episode| {
            let target = findings.targets().get(&episode.key.target);
            let target = target.map_or("?", |target| target.name.as_str());
            let (kind, level) = (episode.key.kind.name(), episode.level_max.name());
            format!("{target} {kind} {} ({level})", episode.key.name())
        })
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let more = match names.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = names[..names.len().min(MAX_NAMED)].join(", ");
    Err(Failure::check(anyhow!(
        "--check: reached critical or full: {named}{more}"
    )))
}

/// The progress line on a terminal: redrawn while watching and erased at the end.
struct Progress {
    shown: bool,
    all: Duration,
    began: Instant,
    due: Instant,
}

impl Progress {
    fn start(options: &Options) -> Self {
        let now = Instant::now();
        Self {
            shown: io::stderr().is_terminal()
                && options.output.verbosity() > Verbosity::Quiet
                && logging::filter().is_none(),
            all: options.time,
            began: now,
            due: now,
        }
    }

    fn show(&mut self, findings: &Findings) {
        if !self.shown || Instant::now() < self.due {
            return;
        }
        self.due = Instant::now() + PROGRESS_INTERVAL;
        let line = report::progress(findings, self.began.elapsed(), self.all);
        // A blocked or closed terminal must not stop the diagnosis.
        let _ = write!(io::stderr(), "\r\x1b[K{line}");
        let _ = io::stderr().flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
