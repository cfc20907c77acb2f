//! Closes the loop with every consumer of Tailback's signal: goodput and latency of a service under overload.
//!
//! The load is an open loop: requests are sent on schedule, whether or not earlier ones have completed. Every consumer gets
//! the same load, one after the other. `consumers` is the table of them, `parts` selects what is measured, `shedding` plays
//! the scenarios of the consumers that shed, `group` those of the consumers that move load, and `results` keeps the figures.

mod consumers;
mod group;
mod outcome;
mod parts;
mod plot;
mod results;
mod run;
mod scenario;
mod service;
mod shedding;
mod stage;

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::builder::PossibleValuesParser;
use parts::Part;
use results::Results;
use run::Run;
use scenario::{Phases, ScenarioKind};
use service::{Programs, Service};
use tailback_tests::load::Spacing;

use super::figure::Report;
use crate::setup;

#[derive(clap::Args)]
pub struct Args {
    /// A verdict on each consumer except `keda` within 5 minutes: short phases, 2× load, one service each. The exit code is 1
    /// if one misses a goal
    #[arg(long, conflicts_with_all = ["seconds", "rounds", "plot"])]
    quick: bool,
    /// Duration of each load, in seconds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,
    /// Measure only these consumers
    #[arg(long, value_parser = PossibleValuesParser::new(consumers::possible_values()))]
    consumer: Vec<String>,
    /// Measure only with these services
    #[arg(long)]
    service: Vec<Service>,
    /// Play only these scenarios
    #[arg(long)]
    scenario: Vec<ScenarioKind>,
    /// Measure only these loads, relative to the capacity
    #[arg(long, value_parser = load)]
    load: Vec<f64>,
    /// Workers of uwsgi-postgresql
    #[arg(long, default_value_t = Service::UwsgiPostgresql.default_workers(), value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Poisson arrivals, as of many independent clients, instead of even ones
    #[arg(long)]
    poisson: bool,
    /// Number of repetitions; the median is reported
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Write the plot to this file; measures loads below the capacity too
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn load(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(load) if (0.1..=10.0).contains(&load) => Ok(load),
        _ => Err("must be a number from 0.1 to 10".to_owned()),
    }
}

pub fn measure(args: &Args, report: &mut Report) -> Result<ExitCode> {
    let parts = parts::select(args)?;
    setup::ensure_parts(&parts::needs(&parts))?;
    let phases = if args.quick {
        Phases::quick()
    } else {
        Phases::full(Duration::from_secs(args.seconds))
    };
    let agent = super::agent()?;
    let programs = Programs::build(parts::services(&parts))?;
    let mut run = Run::new(phases, args.workers, agent, programs);
    let mut results = Results::create()?;
    let round = parts::duration(&parts, &phases);
    report.progress(&format!(
        "{} parts, about {}; results are kept in {}",
        parts.len() * args.rounds as usize,
        minutes(args.rounds * round),
        results.path().display()
    ));
    for number in 1..=args.rounds {
        let spacing = if args.poisson {
            Spacing::Poisson {
                seed: u64::from(number),
            }
        } else {
            Spacing::Even
        };
        run.begin_round(spacing);
        let left = (args.rounds - number) * round;
        measure_round(number, &parts, left, &mut run, &mut results, report)?;
    }
    let mut has_missed = false;
    for figure in results.figures(&run, args.rounds)? {
        has_missed |= figure.goal.as_ref().is_some_and(|goal| !goal.met);
        report.add(figure);
    }
    if let Some(file) = &args.plot {
        fs::write(file, plot::svg(&results))
            .with_context(|| format!("write {}", file.display()))?;
    }
    for (part, error) in results.failures() {
        eprintln!("failed: {part}: {error}");
    }
    let has_failed = !results.failures().is_empty() || (args.quick && has_missed);
    Ok(if has_failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Plays all parts once. A part that fails does not end the round.
fn measure_round(
    round: u32,
    parts: &[Part],
    later: Duration,
    run: &mut Run,
    results: &mut Results,
    report: &mut Report,
) -> Result<()> {
    let mut at_rest: Option<Service> = None;
    for (index, part) in parts.iter().enumerate() {
        let rest = &parts[index..];
        let left = later + parts::duration(rest, &run.phases);
        let progress = |text: &str| {
            format!(
                "[{}/{}, {} left] {text}",
                index + 1,
                parts.len(),
                minutes(left)
            )
        };
        if let Some(service) = part.service.filter(|service| at_rest != Some(*service)) {
            at_rest = Some(service);
            // An error is reported by each part.
            if let Ok(measured) = run.at_rest(service) {
                let workers = run.workers(service);
                report.progress(&progress(&format!(
                    "{}: capacity {:.0} requests/s with {workers} workers; latency at rest {:.0} ms (p99 {:.0} ms)",
                    service.name(),
                    measured.capacity_per_s,
                    outcome::ms(measured.median),
                    outcome::ms(measured.p99)
                )));
                results.add_at_rest(report, service, workers, &measured)?;
            }
        }
        match part.play(run) {
            Ok(outcome) => {
                report.progress(&progress(&format!("{}: {}", part.title(), outcome.text())));
                results.add(report, round, part, &outcome)?;
            }
            Err(error) => {
                report.progress(&progress(&format!("{}: FAILED: {error:#}", part.title())));
                results.add_failure(report, round, part, &error)?;
            }
        }
    }
    Ok(())
}

/// A duration for people.
fn minutes(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds < 100 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}
