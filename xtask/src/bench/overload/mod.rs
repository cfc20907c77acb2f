//! What a service does under more load than it can carry, alone and with those who turn away what is too much.
//!
//! The load is open-loop: requests come at their times, whether or not earlier ones were answered. Every variant gets the same
//! load, through the same HAProxy, in turn.

mod plot;
mod samples;
mod stage;

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use samples::{Of, Samples, What, When};
use stage::{Guard, Service, Stage};
use tailback_tests::{
    load::{Load, Plan, Request, Spacing},
    process::Process,
    program,
};

use super::figure::Report;

const LOADS: [f64; 6] = [0.5, 0.8, 1.0, 1.5, 2.0, 3.0];
/// An answer is good within so many times the time that a request takes by itself.
const GOOD: u32 = 5;
/// Threads of the neighbour, beside the service's two: half of the CPU, and two thirds.
const NEIGHBOURS: [u32; 2] = [2, 4];
/// Before a load steps up, so that the agent knows what is usual.
const BEFORE: Duration = Duration::from_secs(4);
const BEFORE_LOAD: f64 = 0.5;
/// After the step, what piled up in the first moment is worked off; the figures are of what comes then.
const SETTLE: Duration = Duration::from_secs(2);
/// Requests that are still under way at the end get so long to be answered.
const AFTER: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Args {
    /// How long each load lasts
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,
    /// Only this service: uwsgi-postgresql or nginx-uwsgi
    #[arg(long)]
    service: Option<String>,
    /// So many workers of uwsgi-postgresql
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Only these: nothing, static, maxconn, weight, share, page
    #[arg(long)]
    guard: Vec<Guard>,
    /// Only these loads, in times of what the service can do
    #[arg(long)]
    load: Vec<f64>,
    /// Requests come by chance, as of many independent clients, not evenly
    #[arg(long)]
    poisson: bool,
    /// How often all is measured: what is told is the median
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Write the plot here
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// What came of the requests of a stretch.
struct Outcome {
    /// Good answers over what the service can do.
    goodput: f64,
    p99: Duration,
    /// Turned away (503), and failed in any other way; of all requests.
    turned_away: f64,
    failed: f64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for round in 1..=args.rounds {
        if args.rounds > 1 {
            report.progress(&format!("round {round} of {}", args.rounds));
        }
        let spacing = if args.poisson {
            Spacing::Poisson { seed: round }
        } else {
            Spacing::Even
        };
        for service in Service::all(args.workers) {
            if args
                .service
                .as_deref()
                .is_none_or(|name| name == service.name())
            {
                of_service(service, args, spacing, &mut samples, report)?;
            }
        }
    }
    for figure in samples.figures(args.rounds) {
        report.add(figure);
    }
    if let Some(file) = &args.plot {
        fs::write(file, plot::svg(&samples))
            .with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// All variants, in turn.
fn of_service(
    service: Service,
    args: &Args,
    spacing: Spacing,
    samples: &mut Samples,
    report: &Report,
) -> Result<()> {
    let alone = alone(service, spacing)?;
    samples.add_alone(service, ms(alone.p99));
    report.progress(&format!(
        "{}, {} workers: {:.0} requests a second at most; alone a request takes {:.0} ms (99%: {:.0} ms)",
        service.name(),
        service.workers(),
        alone.capacity,
        ms(alone.median),
        ms(alone.p99)
    ));
    let loads = LOADS
        .into_iter()
        .filter(|load| args.load.is_empty() || args.load.contains(load));
    let guards = Guard::ALL
        .into_iter()
        .filter(|guard| args.guard.is_empty() || args.guard.contains(guard));
    for guard in guards {
        let mut add = |when: When, outcome: &Outcome| {
            report.progress(&format!(
                "{} {:19} {:18} goodput {:5.1}%  p99 {:6.0} ms  turned away {:4.1}%  failed {:4.1}%",
                service.name(),
                guard.name(),
                when.name(),
                100.0 * outcome.goodput,
                ms(outcome.p99),
                100.0 * outcome.turned_away,
                100.0 * outcome.failed
            ));
            for (what, value) in [
                (What::Goodput, 100.0 * outcome.goodput),
                (What::P99, ms(outcome.p99)),
                (What::TurnedAway, 100.0 * outcome.turned_away),
                (What::Failed, 100.0 * outcome.failed),
            ] {
                samples.add(
                    Of {
                        service,
                        guard,
                        when,
                        what,
                    },
                    value,
                );
            }
        };
        for load in loads.clone() {
            add(
                When::Load(load),
                &step(service, guard, load, &alone, args.seconds)?,
            );
        }
        if service == Service::Compute {
            for threads in NEIGHBOURS {
                add(
                    When::Beside(threads),
                    &neighbour(service, guard, &alone, args.seconds, threads)?,
                );
            }
        }
        let recovery = spike(service, guard, &alone)?.as_secs_f64();
        report.progress(&format!(
            "{} {:19} recovered {recovery:.2} s after a spike",
            service.name(),
            guard.name(),
        ));
        let when = When::AfterSpike;
        samples.add(
            Of {
                service,
                guard,
                when,
                what: What::Recovery,
            },
            recovery,
        );
    }
    Ok(())
}

/// The service without too much to do.
struct Alone {
    spacing: Spacing,
    /// Requests per second.
    capacity: f64,
    median: Duration,
    p99: Duration,
}

fn plan(stage: &Stage, service: Service, per_s: f64, lasts: Duration, spacing: Spacing) -> Plan {
    Plan {
        to: stage.front,
        path: service.path().to_owned(),
        per_s,
        spacing,
        duration: lasts,
        timeout: Duration::from_secs(10),
        max_in_flight: 3_000,
    }
}

fn alone(service: Service, spacing: Spacing) -> Result<Alone> {
    let stage = Stage::start(service, Guard::Nobody)?;
    // More than it can do: there is always one waiting, and what is answered is what it can do.
    let most = 2.0 * 4.0 / Duration::from_millis(40).as_secs_f64();
    let began = Instant::now();
    let load = Load::start(plan(
        &stage,
        service,
        most,
        Duration::from_secs(60),
        spacing,
    ))?;
    thread::sleep(Duration::from_secs(8));
    let from = began + Duration::from_secs(3);
    let answered = load
        .stop()?
        .into_iter()
        .filter(|request| request.ok() && request.ended >= from);
    let capacity = answered.count() as f64 / 5.0;
    // Anew: what piled up would be worked off first.
    drop(stage);
    let stage = Stage::start(service, Guard::Nobody)?;
    let quiet = plan(
        &stage,
        service,
        0.3 * capacity,
        Duration::from_secs(8),
        spacing,
    );
    let mut took = sorted(Load::start(quiet)?.finish_plan()?.iter());
    let p99 = percentile(&took, 0.99);
    let median = percentile(&took, 0.5);
    took.clear();
    Ok(Alone {
        spacing,
        capacity,
        median,
        p99,
    })
}

/// From half the load to this one, and what came of the requests of the step.
fn step(
    service: Service,
    guard: Guard,
    times: f64,
    alone: &Alone,
    seconds: u64,
) -> Result<Outcome> {
    let stage = Stage::start(service, guard)?;
    let lasts = Duration::from_secs(seconds);
    let load = Load::start(plan(
        &stage,
        service,
        BEFORE_LOAD * alone.capacity,
        BEFORE + SETTLE + lasts + AFTER,
        alone.spacing,
    ))?;
    thread::sleep(BEFORE);
    let from = Instant::now();
    load.set_rate(times * alone.capacity)?;
    thread::sleep(SETTLE + lasts);
    let to = Instant::now();
    load.set_rate(1.0)?;
    thread::sleep(AFTER);
    let requests = load.stop()?;
    Ok(outcome(service, times, &requests, from + SETTLE..to, alone))
}

fn outcome(
    service: Service,
    load: f64,
    requests: &[Request],
    span: std::ops::Range<Instant>,
    alone: &Alone,
) -> Outcome {
    let of: Vec<&Request> = requests
        .iter()
        .filter(|request| span.contains(&request.due))
        .collect();
    let seconds = (span.end - span.start).as_secs_f64();
    let is_good =
        |request: &&&Request| request.ok() && request.took() <= GOOD * service.service_time();
    let good = of.iter().filter(is_good).count();
    let away = of
        .iter()
        .filter(|request| request.response == Ok(503))
        .count();
    let ok = sorted(of.iter().copied());
    // What was given up at the end had no answer, and is not in the list: it was sent, and failed.
    let sent = load * alone.capacity * seconds;
    Outcome {
        goodput: good as f64 / seconds / alone.capacity,
        p99: percentile(&ok, 0.99),
        turned_away: away as f64 / sent,
        failed: (1.0 - (ok.len() + away) as f64 / sent).max(0.0),
    }
}

/// 1.4 times what it can do for 5 seconds: how long after it until every request is answered, and as soon as before.
fn spike(service: Service, guard: Guard, alone: &Alone) -> Result<Duration> {
    let stage = Stage::start(service, guard)?;
    let load = Load::start(plan(
        &stage,
        service,
        0.7 * alone.capacity,
        Duration::from_secs(30),
        alone.spacing,
    ))?;
    thread::sleep(BEFORE);
    load.set_rate(1.4 * alone.capacity)?;
    thread::sleep(Duration::from_secs(5));
    load.set_rate(0.7 * alone.capacity)?;
    let end = Instant::now();
    thread::sleep(Duration::from_secs(8));
    let requests = load.stop()?;
    let limit = 2 * alone.p99 + service.target_delay();
    let is_bad =
        |request: &&Request| request.due >= end && (!request.ok() || request.took() > limit);
    let last = requests
        .iter()
        .filter(is_bad)
        .map(|request| request.due - end)
        .max();
    Ok(last.unwrap_or(Duration::ZERO))
}

/// At 1.5 times the load, a neighbour with so many threads takes a part of the CPU midway.
fn neighbour(
    service: Service,
    guard: Guard,
    alone: &Alone,
    seconds: u64,
    threads: u32,
) -> Result<Outcome> {
    let stage = Stage::start(service, guard)?;
    // Long enough for what comes after the change to be more than the change.
    let half = Duration::from_secs(seconds.max(10));
    let load = Load::start(plan(
        &stage,
        service,
        BEFORE_LOAD * alone.capacity,
        BEFORE + 2 * half + AFTER,
        alone.spacing,
    ))?;
    thread::sleep(BEFORE);
    load.set_rate(1.5 * alone.capacity)?;
    thread::sleep(half);
    let stress = program::need(&["stress-ng"])?;
    let mut command = std::process::Command::new("taskset");
    let neighbour = Process::start(
        "the neighbour",
        command
            .args(["-c", "1"])
            .arg(stress)
            .args(["--cpu", &threads.to_string(), "--quiet"]),
    )?;
    let from = Instant::now();
    thread::sleep(half);
    let to = Instant::now();
    load.set_rate(1.0)?;
    thread::sleep(AFTER);
    let requests = load.stop()?;
    drop(neighbour);
    // The service has less of the CPU then; the goal for an answer is the same.
    Ok(outcome(service, 1.5, &requests, from..to, alone))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The times of those that were answered.
fn sorted<'a>(requests: impl Iterator<Item = &'a Request>) -> Vec<Duration> {
    let mut took: Vec<Duration> = requests
        .filter(|request| request.ok())
        .map(Request::took)
        .collect();
    took.sort_unstable();
    took
}

fn percentile(sorted: &[Duration], part: f64) -> Duration {
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(Duration::ZERO)
}
