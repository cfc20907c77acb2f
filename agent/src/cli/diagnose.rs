//! `tailback diagnose`: one answer. Which queue fills, why, and what to do.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::anyhow;
use clap::Args;

use super::{
    Failure, Targets, duration,
    exit_code::Outcome,
    output::{Output, colour},
    run::Ticks,
    session::{self, Stop},
};
use crate::{
    collect::Others,
    emit::{
        json,
        report::{self, Findings},
        terminal::Verbosity,
    },
    pipeline::Pipeline,
};

/// A person waits for the answer, and not for long: the looks may cost more than those of an agent that is always there.
const CPU_SHARE: f64 = 0.05;
/// Rates and shares come from several looks.
const SHORTEST: Duration = Duration::from_secs(1);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_millis(250);
/// Queues that `--check` names.
const MAX_NAMED: usize = 3;

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    output: Output,
    /// Look for so long
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = time)]
    time: Duration,
    /// Exit with 1 if a queue is, or was meanwhile, at critical or full
    #[arg(long)]
    check: bool,
}

fn time(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time < SHORTEST {
        return Err(format!(
            "{text:?} is too short: rates and shares need 1s or more"
        ));
    }
    Ok(time)
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let config = options.targets.config()?;
    let stop = Stop::on_signals()?;
    let specs = options.targets.or_all(&config).specs(&config)?;
    let mut collector = session::collector(specs, config.budget_or(CPU_SHARE), true)?;
    // Whatever their queues are: there is no time to lose.
    collector.profile_all(true);
    collector.read_logs(config.messages().map_err(Failure::usage)?);
    let mut ticks = Ticks::of(collector, Some(options.time));
    let mut pipeline = Pipeline::new(config.settings_for(), false);
    let mut findings = Findings::default();
    let mut progress = Progress::start(options);
    let looked = loop {
        let sample = match ticks.next(&stop, Others::default()) {
            Ok(Some(sample)) => sample,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        let outcome = pipeline.step(&sample);
        outcome.events.iter().for_each(|event| findings.take(event));
        findings.looked(&sample, pipeline.queues());
        progress.show(&findings);
        if let Err(failure) = ticks.spent(&outcome.focused) {
            break Err(failure);
        }
    };
    drop(progress);
    findings.cannot_judge(pipeline.no_baseline());
    let last = pipeline.finish();
    last.iter().for_each(|event| findings.take(event));
    // What was seen is told, also where the looking came to an early end.
    let told = tell(options, &findings);
    looked.and(told)?;
    if options.check {
        check(&findings)?;
    }
    Ok(())
}

fn tell(options: &Options, findings: &Findings) -> Outcome<()> {
    let mut out = io::stdout().lock();
    if options.output.json {
        json::diagnoses(&mut out, findings.episodes(), findings.targets())
            .and_then(|()| json::no_baseline(&mut out, findings.no_baseline(), findings.targets()))
    } else {
        report::write(&mut out, findings, colour(), options.output.verbosity())
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
            format!("{target} {kind} {} ({level})", episode.key.name)
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
        "--check: at critical or full within this time: {named}{more}"
    )))
}

/// How far it has come: one line on a terminal, written again and again, and taken away at the end.
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
            shown: io::stderr().is_terminal() && options.output.verbosity() > Verbosity::Quiet,
            all: options.time,
            began: now,
            due: now,
        }
    }

    fn show(&mut self, findings: &Findings) {
        if !self.shown || Instant::now() < self.due {
            return;
        }
        self.due = Instant::now() + PROGRESS;
        let line = report::progress(findings, self.began.elapsed(), self.all);
        // A terminal that takes no more is no reason to stop looking.
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
