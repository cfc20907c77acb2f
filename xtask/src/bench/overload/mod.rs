//! Goodput and latency of a service under overload, without load shedding and with several kinds of it.
//!
//! The load is an open loop: requests are sent on schedule, whether or not earlier ones have completed. Every variant gets the
//! same load, through the same HAProxy, one after the other.

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

/// Offered load relative to the capacity.
const LOADS: [f64; 6] = [0.5, 0.8, 1.0, 1.5, 2.0, 3.0];
/// A response is good if it takes at most this multiple of the service time.
const GOOD_WITHIN: u32 = 5;
/// Threads of the CPU neighbour. With the service's two they take half of the CPU, and two thirds.
const NEIGHBOURS: [u32; 2] = [2, 4];
/// Duration of the low load before the step, so that the agent learns the baseline.
const BASELINE: Duration = Duration::from_secs(4);
/// That load, relative to the capacity.
const BASELINE_LOAD: f64 = 0.5;
/// Time after the step in which the initial backlog drains; the figures exclude it.
const SETTLE: Duration = Duration::from_secs(2);
/// Time for the requests in flight at the end to complete.
const DRAIN: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Args {
    /// Duration of each load, in seconds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,
    /// Measure only this service: uwsgi-postgresql or nginx-uwsgi
    #[arg(long)]
    service: Option<String>,
    /// Workers of uwsgi-postgresql
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Measure only these kinds of load shedding: nothing, static, maxconn, weight, share, page
    #[arg(long)]
    guard: Vec<Guard>,
    /// Measure only these loads, relative to the capacity
    #[arg(long)]
    load: Vec<f64>,
    /// Poisson arrivals, as of many independent clients, instead of even ones
    #[arg(long)]
    poisson: bool,
    /// Number of repetitions; the median is reported
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Write the plot to this file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Outcome of the requests in a time span.
struct Outcome {
    /// Good responses per second relative to the capacity.
    goodput: f64,
    p99: Duration,
    /// Share of all requests that were shed (503).
    shed: f64,
    /// Share of all requests that failed otherwise.
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
                measure_service(service, args, spacing, &mut samples, report)?;
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

/// Measures all variants of load shedding for one service.
fn measure_service(
    service: Service,
    args: &Args,
    spacing: Spacing,
    samples: &mut Samples,
    report: &Report,
) -> Result<()> {
    let unloaded = unloaded(service, spacing)?;
    samples.add_unloaded(service, ms(unloaded.p99));
    report.progress(&format!(
        "{}, {} workers: capacity {:.0} requests/s; latency at low load {:.0} ms (p99 {:.0} ms)",
        service.name(),
        service.workers(),
        unloaded.capacity,
        ms(unloaded.median),
        ms(unloaded.p99)
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
                "{} {:19} {:18} goodput {:5.1}%  p99 {:6.0} ms  shed {:4.1}%  failed {:4.1}%",
                service.name(),
                guard.name(),
                when.name(),
                100.0 * outcome.goodput,
                ms(outcome.p99),
                100.0 * outcome.shed,
                100.0 * outcome.failed
            ));
            for (what, value) in [
                (What::Goodput, 100.0 * outcome.goodput),
                (What::P99, ms(outcome.p99)),
                (What::Shed, 100.0 * outcome.shed),
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
                &step(service, guard, load, &unloaded, args.seconds)?,
            );
        }
        if service == Service::Compute {
            for threads in NEIGHBOURS {
                add(
                    When::Beside(threads),
                    &neighbour(service, guard, &unloaded, args.seconds, threads)?,
                );
            }
        }
        let recovery = spike(service, guard, &unloaded)?.as_secs_f64();
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

/// The service without overload.
struct Unloaded {
    spacing: Spacing,
    /// Capacity, requests per second.
    capacity: f64,
    median: Duration,
    p99: Duration,
}

fn plan(stage: &Stage, service: Service, per_s: f64, duration: Duration, spacing: Spacing) -> Plan {
    Plan {
        to: stage.front,
        path: service.path().to_owned(),
        per_s,
        spacing,
        duration,
        timeout: Duration::from_secs(10),
        max_in_flight: 3_000,
    }
}

fn unloaded(service: Service, spacing: Spacing) -> Result<Unloaded> {
    let stage = Stage::start(service, Guard::Nobody)?;
    // 200/s is twice the capacity of either service with its default workers, so that requests always wait: the throughput
    // is the capacity.
    let overload = 2.0 * 4.0 / Duration::from_millis(40).as_secs_f64();
    let began = Instant::now();
    let load = Load::start(plan(
        &stage,
        service,
        overload,
        Duration::from_secs(60),
        spacing,
    ))?;
    thread::sleep(Duration::from_secs(8));
    let from = began + Duration::from_secs(3);
    let completed = load
        .stop()?
        .into_iter()
        .filter(|request| request.ok() && request.ended >= from);
    let capacity = completed.count() as f64 / 5.0;
    // A new stage, without the backlog.
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
    Ok(Unloaded {
        spacing,
        capacity,
        median,
        p99,
    })
}

/// Steps from the baseline load to `times` the capacity. Returns the outcome of the requests after the step.
fn step(
    service: Service,
    guard: Guard,
    times: f64,
    unloaded: &Unloaded,
    seconds: u64,
) -> Result<Outcome> {
    let stage = Stage::start(service, guard)?;
    let duration = Duration::from_secs(seconds);
    let load = Load::start(plan(
        &stage,
        service,
        BASELINE_LOAD * unloaded.capacity,
        BASELINE + SETTLE + duration + DRAIN,
        unloaded.spacing,
    ))?;
    thread::sleep(BASELINE);
    let from = Instant::now();
    load.set_rate(times * unloaded.capacity)?;
    thread::sleep(SETTLE + duration);
    let to = Instant::now();
    load.set_rate(1.0)?;
    thread::sleep(DRAIN);
    let requests = load.stop()?;
    Ok(outcome(
        service,
        times,
        &requests,
        from + SETTLE..to,
        unloaded,
    ))
}

fn outcome(
    service: Service,
    load: f64,
    requests: &[Request],
    span: std::ops::Range<Instant>,
    unloaded: &Unloaded,
) -> Outcome {
    let in_span: Vec<&Request> = requests
        .iter()
        .filter(|request| span.contains(&request.due))
        .collect();
    let seconds = (span.end - span.start).as_secs_f64();
    let is_good = |request: &&&Request| {
        request.ok() && request.took() <= GOOD_WITHIN * service.service_time()
    };
    let good = in_span.iter().filter(is_good).count();
    let shed = in_span
        .iter()
        .filter(|request| request.response == Ok(503))
        .count();
    let ok = sorted(in_span.iter().copied());
    // Requests abandoned at the end are not in the list, but were sent and failed.
    let sent = load * unloaded.capacity * seconds;
    Outcome {
        goodput: good as f64 / seconds / unloaded.capacity,
        p99: percentile(&ok, 0.99),
        shed: shed as f64 / sent,
        failed: (1.0 - (ok.len() + shed) as f64 / sent).max(0.0),
    }
}

/// Overloads the service 1.4 times for 5 seconds. Returns the time after the spike until every request succeeds with normal
/// latency.
fn spike(service: Service, guard: Guard, unloaded: &Unloaded) -> Result<Duration> {
    let stage = Stage::start(service, guard)?;
    let load = Load::start(plan(
        &stage,
        service,
        0.7 * unloaded.capacity,
        Duration::from_secs(30),
        unloaded.spacing,
    ))?;
    thread::sleep(BASELINE);
    load.set_rate(1.4 * unloaded.capacity)?;
    thread::sleep(Duration::from_secs(5));
    load.set_rate(0.7 * unloaded.capacity)?;
    let end = Instant::now();
    thread::sleep(Duration::from_secs(8));
    let requests = load.stop()?;
    let limit = 2 * unloaded.p99 + service.target_delay();
    let is_bad =
        |request: &&Request| request.due >= end && (!request.ok() || request.took() > limit);
    let last = requests
        .iter()
        .filter(is_bad)
        .map(|request| request.due - end)
        .max();
    Ok(last.unwrap_or(Duration::ZERO))
}

/// At 1.5 times the capacity, starts a CPU neighbour with this many threads midway. Returns the outcome after that.
fn neighbour(
    service: Service,
    guard: Guard,
    unloaded: &Unloaded,
    seconds: u64,
    threads: u32,
) -> Result<Outcome> {
    let stage = Stage::start(service, guard)?;
    // Long enough that the time after the change outweighs the change itself.
    let half = Duration::from_secs(seconds.max(10));
    let load = Load::start(plan(
        &stage,
        service,
        BASELINE_LOAD * unloaded.capacity,
        BASELINE + 2 * half + DRAIN,
        unloaded.spacing,
    ))?;
    thread::sleep(BASELINE);
    load.set_rate(1.5 * unloaded.capacity)?;
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
    thread::sleep(DRAIN);
    let requests = load.stop()?;
    drop(neighbour);
    // The service has less CPU then; the latency goal stays the same.
    Ok(outcome(service, 1.5, &requests, from..to, unloaded))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Sorted latencies of the successful requests.
fn sorted<'a>(requests: impl Iterator<Item = &'a Request>) -> Vec<Duration> {
    let mut took: Vec<Duration> = requests
        .filter(|request| request.ok())
        .map(Request::took)
        .collect();
    took.sort_unstable();
    took
}

/// Percentile of sorted latencies; `part` is from 0 to 1.
fn percentile(sorted: &[Duration], part: f64) -> Duration {
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(Duration::ZERO)
}
