//! What it costs a service, and the agent, that the agent asks the service for its own queues.
//!
//! The service has no other work, so that all its CPU time is for the agent and for its own timers. Windows in which the agent asks
//! alternate with windows in which it does not (`[app] enabled = false`); the difference is the cost.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;
use tailback_tests::{
    agent::Agent, haproxy::Haproxy, pgbouncer::PgBouncer, postgres::Postgres, process::Process,
    redis::Redis, temp::TempDir,
};

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    pairs,
    statistics::{Spread, bootstrap},
};

/// Goal: at most this share of a core for the answers, in percent.
const GOAL_PERCENT: f64 = 0.5;
/// The agent asks at this interval while a service is healthy: a window holds several answers.
const PACE: Duration = Duration::from_secs(5);
const INTERVAL: &str = "95% interval of the median, by bootstrap";

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, one in which the agent asks and one in which it does not, for each service
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(4..))]
    pairs: u32,
    /// Answers in each window, one every 5 s
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    answers: u32,
    /// Queues in Redis, and backends of HAProxy
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=250))]
    queues: u32,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let queues = args.queues;
    let redis = Redis::start()?;
    fill(&redis, queues)?;
    let what = format!("Redis, {queues} queues of RQ");
    compare(args, report, "redis", &what, redis.process())?;
    drop(redis);
    let haproxy = Haproxy::start_backends(queues)?;
    let what = format!("HAProxy, {queues} backends");
    compare(args, report, "haproxy", &what, haproxy.process())?;
    drop(haproxy);
    let postgres = Postgres::start()?;
    let pooler = PgBouncer::start(&postgres, 4)?;
    compare(args, report, "pgbouncer", "PgBouncer", pooler.process())
}

/// Queues with one job each.
fn fill(redis: &Redis, queues: u32) -> Result<()> {
    let mut client = redis.client()?;
    for number in 0..queues {
        let queue = format!("rq:queue:q{number}");
        let job = format!("job{number}");
        client.call(&["SADD", "rq:queues", &queue])?;
        client.call(&["RPUSH", &queue, &job])?;
        let at = "2026-01-01T00:00:00Z";
        client.call(&["HSET", &format!("rq:job:{job}"), "enqueued_at", at])?;
    }
    Ok(())
}

/// CPU time in one window, as a share of a core, in percent.
struct Use {
    service: f64,
    agent: f64,
}

fn compare(
    args: &Args,
    report: &mut Report,
    service: &str,
    what: &str,
    process: &Process,
) -> Result<()> {
    let directory = TempDir::new("bench-app")?;
    let silent = directory.write("silent.toml", "[app]\nenabled = false\n")?;
    let asking = directory.write("asking.toml", "")?;
    let window = |config: &Path| window(PACE * args.answers, process, config);
    let mut differences: Vec<(f64, f64)> = Vec::new();
    for number in 1..=args.pairs {
        let (off, on) = if number % 2 == 0 {
            let off = window(&silent)?;
            (off, window(&asking)?)
        } else {
            let on = window(&asking)?;
            (window(&silent)?, on)
        };
        report.progress(&format!(
            "{what} {number}: service {:.3}% asked, {:.3}% not; agent {:.3}% and {:.3}%",
            on.service, off.service, on.agent, off.agent
        ));
        differences.push((on.service - off.service, on.agent - off.agent));
    }
    let spread = |of: fn(&(f64, f64)) -> f64| -> Result<Spread> {
        let values: Vec<f64> = differences.iter().map(of).collect();
        bootstrap(&values).context("nothing was measured")
    };
    let of_service = spread(|pair| pair.0)?;
    let of_agent = spread(|pair| pair.1)?;
    let per_s = 1.0 / PACE.as_secs_f64();
    let of_answer = of_service.map(|percent| percent / 100.0 / per_s * 1e3);
    // While the service is focused, it is asked every second.
    let focused = of_answer.map(|ms| ms / 1e3 * 100.0);
    for (text, measured, unit, value, goal) in [
        ("service's CPU", "service", "%", of_service, true),
        (
            "the same while it is focused",
            "focused",
            "%",
            focused,
            true,
        ),
        (
            "service's CPU for an answer",
            "answer",
            "ms",
            of_answer,
            false,
        ),
        ("agent's CPU", "agent", "%", of_agent, false),
    ] {
        report.add(Figure {
            what: format!("{what}: {text}"),
            keys: json!({"bench": "app", "measured": measured, "service": service}),
            unit,
            value,
            spread: INTERVAL,
            goal: goal.then(|| Goal::at_most(GOAL_PERCENT, &value)),
        });
    }
    Ok(())
}

fn window(length: Duration, service: &Process, config: &Path) -> Result<Use> {
    /// The first answers, and what the agent does once.
    const SETTLE: Duration = Duration::from_secs(3);
    let mut command = Command::new(super::agent()?);
    command.args([
        "run",
        "--json",
        "--pid",
        &service.pid().to_string(),
        "--config",
    ]);
    let agent = Agent::start(command.arg(config))?;
    pairs::wait_for_first_line(&agent)?;
    thread::sleep(SETTLE);
    let used = || -> Result<[Duration; 2]> {
        let agent = cpu::of_family(agent.process().pid())?;
        Ok([cpu::of_family(service.pid())?, agent])
    };
    let (began, before) = (Instant::now(), used()?);
    thread::sleep(length);
    let (after, took) = (used()?, began.elapsed());
    agent.process().check_running()?;
    agent.process().signal(rustix::process::Signal::INT)?;
    let [service, agent] = [0, 1].map(|at| {
        let used = after[at].saturating_sub(before[at]);
        100.0 * used.as_secs_f64() / took.as_secs_f64()
    });
    Ok(Use { service, agent })
}
