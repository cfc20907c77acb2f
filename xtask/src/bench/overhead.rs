//! What a busy service loses while the agent watches it.
//!
//! The load never stops. In each pair, one window with the agent and one without it are measured, in alternating
//! order; the rate is the service's own count of requests. So whatever else changes slowly on the machine meets
//! both sides alike, and what remains is in the interval. The CPU time of a request is measured beside it: other
//! work on the machine takes time away from a service, but hardly changes what a request costs. How much other
//! work there was is measured in each window, and pairs that it disturbed are measured again, as long as the patience
//! lasts; then the least disturbed ones are taken, and the figure of other work tells that they are not to be trusted.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::json;
use tailback_tests::{
    agent::Agent,
    nginx::Nginx,
    process::{End, Process},
    program,
    redis::{Client, Redis, Reply},
};

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    statistics::bootstrap,
};

const REDIS_CLIENTS: u32 = 50;
const NGINX_CONNECTIONS: u32 = 64;
const GOAL_PERCENT: f64 = 0.5;
/// With a larger share of the CPUs taken by other work, a pair counts as disturbed. Interrupts are part of it.
const DISTURBED: f64 = 0.03;
/// After the agent has begun to watch, or has ended, until the window opens: caches and clocks settle.
const SETTLE: Duration = Duration::from_millis(300);

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, for each service
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(15..))]
    pairs: u32,
    /// Length of each window, in seconds
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// How many more pairs than that to measure at most, to have so many that no other work disturbed
    #[arg(long, default_value_t = 25)]
    patience: u32,
    /// Never start the agent: shows what the measurement itself makes of two equal sides
    #[arg(long)]
    control: bool,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let agent = Watcher {
        program: super::agent()?,
        control: args.control,
    };
    let pins = Pins::choose();
    report.progress(&pins.text());

    let redis = Redis::start_with(|words| pins.pin(words, Pins::SERVER))?;
    let benchmark = program::need(&["redis-benchmark"])?.display().to_string();
    let _load = pins.start_load(&[
        &benchmark,
        "-p",
        &redis.port().to_string(),
        "-c",
        &REDIS_CLIENTS.to_string(),
        "-t",
        "get",
        "-n",
        "2000000000",
    ])?;
    let mut client = redis.client()?;
    let count = || redis_commands(&mut client);
    let pairs = measure_pairs(args, &agent, redis.process(), count, report)?;
    add(
        report,
        args,
        &format!("Redis GET, {REDIS_CLIENTS} clients"),
        "redis",
        &pairs,
    )?;
    drop((_load, redis));

    let nginx = Nginx::start_with(1, |words| pins.pin(words, Pins::SERVER))?;
    let wrk = program::need(&["wrk"])?.display().to_string();
    let _load = pins.start_load(&[
        &wrk,
        "-t1",
        &format!("-c{NGINX_CONNECTIONS}"),
        "-d86400s",
        &format!("http://{}/", nginx.address()),
    ])?;
    let pairs = measure_pairs(args, &agent, nginx.process(), || nginx.requests(), report)?;
    add(
        report,
        args,
        &format!("nginx, {NGINX_CONNECTIONS} connections"),
        "nginx",
        &pairs,
    )
}

/// What one window showed.
#[derive(Clone, Copy)]
struct Window {
    requests_per_s: f64,
    /// CPU time of the service for each request.
    cpu_ns: f64,
    /// Share of all CPUs that went to what is no part of the benchmark.
    other_work: f64,
}

/// A window without the agent, and one with it.
struct Pair {
    off: Window,
    on: Window,
}

impl Pair {
    fn other_work(&self) -> f64 {
        self.off.other_work.max(self.on.other_work)
    }
}

fn measure_pairs(
    args: &Args,
    agent: &Watcher,
    service: &Process,
    mut count: impl FnMut() -> Result<u64>,
    report: &Report,
) -> Result<Vec<Pair>> {
    let window = Duration::try_from_secs_f64(args.window).context("the length of the window")?;
    let mut look = || -> Result<Window> {
        thread::sleep(SETTLE);
        let cpu_times = || -> Result<[Duration; 3]> {
            // All that the benchmark started are children of this process.
            let ours = cpu::of_family(std::process::id())?;
            Ok([cpu::of_family(service.pid())?, ours, cpu::of_machine()?])
        };
        let (start, before, cpu_before) = (Instant::now(), count()?, cpu_times()?);
        thread::sleep(window);
        let (end, after, cpu_after) = (Instant::now(), count()?, cpu_times()?);
        let [service_cpu, ours, all] =
            [0, 1, 2].map(|n| cpu_after[n].saturating_sub(cpu_before[n]));
        let requests = after - before;
        if requests < 1000 {
            bail!(
                "{} answered only {requests} requests: is its load running?",
                service.name()
            );
        }
        let available = (end - start).as_secs_f64() * cpus();
        Ok(Window {
            requests_per_s: requests as f64 / (end - start).as_secs_f64(),
            cpu_ns: service_cpu.as_nanos() as f64 / requests as f64,
            other_work: all.saturating_sub(ours).as_secs_f64() / available,
        })
    };
    // Not counted: the load's first connections, the first faults of every page.
    look()?;
    let mut pairs: Vec<Pair> = Vec::new();
    for number in 0..args.pairs + args.patience {
        let good = pairs
            .iter()
            .filter(|pair| pair.other_work() <= DISTURBED)
            .count();
        if good >= args.pairs as usize {
            break;
        }
        let with_agent = |look: &mut dyn FnMut() -> Result<Window>| -> Result<Window> {
            let watching = agent.start(service)?;
            let on = look()?;
            watching.map_or(Ok(()), stop)?;
            Ok(on)
        };
        let pair = if number % 2 == 0 {
            let off = look()?;
            let on = with_agent(&mut look)?;
            Pair { off, on }
        } else {
            let on = with_agent(&mut look)?;
            let off = look()?;
            Pair { off, on }
        };
        report.progress(&format!(
            "{} {}: {:.0} a second without the agent, {:.0} with it{}",
            service.name(),
            number + 1,
            pair.off.requests_per_s,
            pair.on.requests_per_s,
            if pair.other_work() > DISTURBED {
                " (disturbed)"
            } else {
                ""
            }
        ));
        pairs.push(pair);
    }
    // By what happened beside them, never by what they show.
    pairs.sort_by(|a, b| a.other_work().total_cmp(&b.other_work()));
    pairs.truncate(args.pairs as usize);
    Ok(pairs)
}

fn add(report: &mut Report, args: &Args, what: &str, service: &str, pairs: &[Pair]) -> Result<()> {
    let keys = |measured: &str| {
        json!({
            "bench": "overhead", "measured": measured, "service": service, "pairs": pairs.len(),
            "control": args.control,
        })
    };
    let spread = |of: &dyn Fn(&Pair) -> f64| {
        let values: Vec<f64> = pairs.iter().map(of).collect();
        bootstrap(&values).context("nothing was measured")
    };
    let mut figure = |text: &str, measured: &str, unit, value, goal| {
        report.add(Figure {
            what: format!("{what}: {text}"),
            keys: keys(measured),
            unit,
            value,
            spread: "95% interval of the median, by bootstrap",
            goal,
        });
    };
    let loss = spread(&|pair| 100.0 * (1.0 - pair.on.requests_per_s / pair.off.requests_per_s))?;
    let goal = (!args.control).then(|| Goal {
        text: format!("≤ {GOAL_PERCENT}, interval includes 0"),
        met: loss.median <= GOAL_PERCENT && loss.low <= 0.0 && loss.high >= 0.0,
    });
    let (lost, dearer) = if args.control {
        ("no agent, requests lost", "no agent, more CPU each")
    } else {
        ("requests lost", "more CPU each")
    };
    figure(lost, "loss", "%", loss, goal);
    let cost = spread(&|pair| 100.0 * (pair.on.cpu_ns / pair.off.cpu_ns - 1.0))?;
    figure(dearer, "cpu_per_request", "%", cost, None);
    let rate = spread(&|pair| pair.off.requests_per_s)?;
    figure("requests", "rate_off", "/s", rate, None);
    let others = spread(&|pair| 100.0 * pair.other_work())?;
    figure("other work on all CPUs", "other_work", "%", others, None);
    Ok(())
}

/// Commands that it has processed, by its own count.
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

/// Starts the agent as a user would, at its default interval.
struct Watcher {
    program: std::path::PathBuf,
    control: bool,
}

impl Watcher {
    fn start(&self, service: &Process) -> Result<Option<Agent>> {
        if self.control {
            return Ok(None);
        }
        let mut command = Command::new(&self.program);
        command.args(["run", "--json", "--pid", &service.pid().to_string()]);
        let agent = Agent::start(&mut command)?;
        wait_until_it_watches(&agent)?;
        Ok(Some(agent))
    }
}

fn stop(agent: Agent) -> Result<()> {
    let process = agent.into_process();
    process.signal(Signal::INT)?;
    match process.wait_end(Duration::from_secs(10))? {
        End::Code(0) => Ok(()),
        end => bail!("tailback ended with {end:?}"),
    }
}

/// Its first line about itself comes when its programs are loaded and its first tick is done.
pub fn wait_until_it_watches(agent: &Agent) -> Result<()> {
    let start = Duration::from_secs(30);
    agent.wait_for("that it watches", start, |_| true)?;
    Ok(())
}

fn cpus() -> f64 {
    thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64
}

/// Which CPU does what. Server and load get one each, so that neither is moved about; the agent is free, as it is
/// in use: it goes where there is time, or takes it from one of them.
struct Pins {
    taskset: Option<String>,
}

impl Pins {
    const SERVER: &str = "0";
    const LOAD: &str = "1";

    fn choose() -> Self {
        let taskset = program::find(&["taskset"]).filter(|_| cpus() > 1.0);
        Self {
            taskset: taskset.map(|path| path.display().to_string()),
        }
    }

    fn text(&self) -> String {
        match self.taskset {
            Some(_) => format!(
                "server on CPU {}, load on CPU {}, the agent wherever the kernel puts it",
                Self::SERVER,
                Self::LOAD
            ),
            None => "one CPU, or no taskset: nothing is pinned".to_owned(),
        }
    }

    fn pin(&self, words: &mut Vec<String>, cpu: &str) {
        if let Some(taskset) = &self.taskset {
            words.splice(0..0, [taskset, "-c", cpu].map(str::to_owned));
        }
    }

    fn start_load(&self, words: &[&str]) -> Result<Process> {
        let mut words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        self.pin(&mut words, Self::LOAD);
        Process::start("load", Command::new(&words[0]).args(&words[1..]))
    }
}
