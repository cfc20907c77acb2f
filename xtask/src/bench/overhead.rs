//! Throughput that a busy service loses while the agent, with default settings, monitors it.
//!
//! One agent runs all the time, and is paused in the windows without it: it attaches nothing, so it costs nothing then. With an agent
//! that starts and ends for each window, the windows would differ by what its start and its end leave behind.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::json;
use tailback_tests::{
    agent::{Agent, Event},
    nginx::Nginx,
    process::Process,
    program,
    redis::{Client, Redis, Reply},
};

use super::{
    figure::{Goal, Report},
    pairs::{self, Companion, Count, Figures, Pair, Windows},
    pins::Pins,
};

const REDIS_CLIENTS: u32 = 50;
/// Requests that each client sends at once. With one, the benchmark's client is the slower side: Redis idles for 30% of the
/// time. Any delay of the client then makes Redis answer more requests per wake-up, and throughput rises.
const REDIS_PIPELINE: u32 = 64;
const NGINX_CONNECTIONS: u32 = 64;
/// Goal: at most this much throughput lost.
const GOAL_PERCENT: f64 = 0.5;

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, one with the agent and one without, for each service
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(15..))]
    pairs: u32,
    #[command(flatten)]
    windows: Windows,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let program = super::agent()?;
    let pins = Pins::choose();
    report.progress(&pins.text());
    let start = |service: &Process| -> Result<Agent> {
        let mut command = Command::new(&program);
        command.args(["run", "--json", "--pid", &service.pid().to_string()]);
        let agent = Agent::start(&mut command)?;
        pairs::wait_for_first_line(&agent)?;
        agent.process().signal(Signal::STOP)?;
        Ok(agent)
    };

    with_redis(&pins, |service, what, count| {
        let agent = start(service)?;
        let start = || Continued::start(&agent);
        let pairs = pairs::measure(&args.windows, args.pairs, service, count, start, report)?;
        add(report, args, what, "redis", &pairs)
    })?;
    with_nginx(&pins, |service, what, count| {
        let agent = start(service)?;
        let start = || Continued::start(&agent);
        let pairs = pairs::measure(&args.windows, args.pairs, service, count, start, report)?;
        add(report, args, what, "nginx", &pairs)
    })
}

/// A paused agent that continues for one window.
struct Continued<'a>(&'a Agent);

impl<'a> Continued<'a> {
    fn start(agent: &'a Agent) -> Result<Self> {
        agent.process().signal(Signal::CONT)?;
        Ok(Self(agent))
    }
}

impl Companion for Continued<'_> {
    fn process(&self) -> &Process {
        self.0.process()
    }

    fn mark(&self) -> usize {
        self.0.mark()
    }

    fn events_since(&self, mark: usize) -> Result<Vec<Event>> {
        self.0.events_since(mark)
    }

    fn stop(self) -> Result<()> {
        self.0.process().check_running()?;
        self.0.process().signal(Signal::STOP)
    }
}

/// Runs `work` while a Redis is busy, with its process, a description, and its count of requests.
pub fn with_redis(
    pins: &Pins,
    mut work: impl FnMut(&Process, &str, &mut Count<'_>) -> Result<()>,
) -> Result<()> {
    let redis = Redis::start_with(|words| pins.pin(words, Pins::SERVER))?;
    let benchmark = program::need(&["redis-benchmark"])?.display().to_string();
    let _load = pins.start_load(&[
        &benchmark,
        "-p",
        &redis.port().to_string(),
        "-c",
        &REDIS_CLIENTS.to_string(),
        "-P",
        &REDIS_PIPELINE.to_string(),
        "-t",
        "get",
        "-n",
        "2000000000",
    ])?;
    let mut client = redis.client()?;
    let what = format!("Redis GET, {REDIS_CLIENTS} clients, {REDIS_PIPELINE} requests at once");
    work(redis.process(), &what, &mut || redis_commands(&mut client))
}

/// Runs `work` while an nginx is busy.
pub fn with_nginx(
    pins: &Pins,
    mut work: impl FnMut(&Process, &str, &mut Count<'_>) -> Result<()>,
) -> Result<()> {
    let nginx = Nginx::start_with(1, |words| pins.pin(words, Pins::SERVER))?;
    let wrk = program::need(&["wrk"])?.display().to_string();
    let _load = pins.start_load(&[
        &wrk,
        "-t1",
        &format!("-c{NGINX_CONNECTIONS}"),
        "-d86400s",
        &format!("http://{}/", nginx.address()),
    ])?;
    let what = format!("nginx, {NGINX_CONNECTIONS} connections");
    work(nginx.process(), &what, &mut || nginx.requests())
}

fn add(report: &mut Report, args: &Args, what: &str, service: &str, pairs: &[Pair]) -> Result<()> {
    let control = args.windows.control;
    let keys = |measured: &str| {
        json!({
            "bench": "overhead", "measured": measured, "service": service, "pairs": pairs.len(),
            "control": control,
        })
    };
    let mut figures = Figures {
        what,
        keys: &keys,
        pairs,
        report,
    };
    let loss =
        figures.spread(|pair| 100.0 * (1.0 - pair.on.requests_per_s / pair.off.requests_per_s))?;
    let goal = (!control).then(|| Goal {
        text: format!("≤ {GOAL_PERCENT}, interval includes 0"),
        met: loss.median <= GOAL_PERCENT && loss.low <= 0.0 && loss.high >= 0.0,
    });
    let lost = if control {
        "no agent, throughput lost"
    } else {
        "throughput lost"
    };
    figures.add(lost, "loss", "%", loss, goal);
    figures.add_circumstances(control)
}

/// Commands processed, from Redis's own counter.
fn redis_commands(client: &mut Client) -> Result<u64> {
    let Reply::Text(info) = client.call(&["INFO", "stats"])? else {
        bail!("Redis's INFO is not text");
    };
    let count = info
        .lines()
        .find_map(|line| line.strip_prefix("total_commands_processed:"));
    count
        .context("Redis's INFO has no total_commands_processed")?
        .trim()
        .parse()
        .context("read Redis's count")
}
