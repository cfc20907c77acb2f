//! Throughput that a busy service loses while it is focused all the time, and the resulting sampling rate.
//!
//! While a target is focused, the agent samples what each of its threads waits for, up to 100 times per second within its CPU
//! budget. Here it does so permanently: for memcached with all threads busy, and for very many threads.

use std::{
    convert::Infallible, env, net::SocketAddr, path::PathBuf, process::Command, time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::json;
use tailback_tests::{
    agent::{Agent, Event},
    memcached::{self, Memcached},
    process::Process,
    temp::TempDir,
};

use super::{
    figure::{Figure, Goal, Report},
    footprint, hold,
    pairs::{self, Companion as _, Figures, Pair, Windows},
    pins::Pins,
    statistics::{Spread, bootstrap, quartiles},
};

const THREADS: usize = 64;
/// Two connections per thread.
const CONNECTIONS: usize = 2 * THREADS;
/// Goal: throughput with the agent, relative to the throughput without.
const MIN_THROUGHPUT_RATIO: f64 = 0.99;
/// Too many threads to sample 100 times per second within the budget.
const MANY_THREADS: usize = 2_000;
/// CPU budgets as a share of one core: the default, and the default of `tailback diagnose`.
const BUDGETS: [f64; 2] = [0.01, 0.05];
/// Time until the agent knows the cost of a sample and its rate has settled.
const WARM_UP_NS: u64 = 2_000_000_000;
/// Interval for the rates of one run.
const INTERVAL_NS: u64 = 2_000_000_000;

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, one with the agent and one without, for each CPU budget of the agent (1% and 5% of a core)
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(3..))]
    pairs: u32,
    /// Duration of the run with very many threads, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(10..))]
    seconds: u32,
    #[command(flatten)]
    windows: Windows,
}

/// Hidden subcommand: this program as the load generator.
#[derive(clap::Args)]
pub struct Load {
    address: SocketAddr,
    connections: usize,
}

impl Load {
    /// Runs until this process or its parent is killed.
    pub fn forever(&self) -> Result<Infallible> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .context("set the parent death signal")?;
        memcached::load(self.address, self.connections)
    }

    fn start(pins: &Pins, memcached: &Memcached) -> Result<Process> {
        let program = env::current_exe().context("find this program")?;
        pins.start_load(&[
            &program.display().to_string(),
            "bench",
            "load-memcached",
            &memcached.address().to_string(),
            &CONNECTIONS.to_string(),
        ])
    }
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let agents = FocusedAgents::new()?;
    let pins = Pins::choose();
    report.progress(&pins.text());
    let memcached = Memcached::start_with(THREADS, |words| pins.pin(words, Pins::SERVER))?;
    let load = Load::start(&pins, &memcached)?;
    let mut client = memcached.client()?;
    let mut rate_at_64 = None;
    for budget in BUDGETS {
        let targets = ["--pid".to_owned(), memcached.process().pid().to_string()];
        let pairs = pairs::measure(
            &args.windows,
            args.pairs,
            memcached.process(),
            &mut || client.gets(),
            || agents.start(budget, &targets),
            report,
        )?;
        load.check_running()?;
        let rate = add_pairs(report, args, budget, &pairs)?;
        rate_at_64 = rate_at_64.or(rate);
        if args.windows.control {
            return Ok(());
        }
    }
    drop((load, memcached));
    let rate_at_64 = rate_at_64.context("no rate was measured to compare with")?;
    many_threads(args, &agents, rate_at_64, report)
}

/// Adds the figures of the pairs. Returns the sampling rate, if the agent ran.
fn add_pairs(report: &mut Report, args: &Args, budget: f64, pairs: &[Pair]) -> Result<Option<f64>> {
    let control = args.windows.control;
    let keys = |measured: &str| {
        json!({
            "bench": "profile", "measured": measured, "service": "memcached", "threads": THREADS,
            "budget": budget, "pairs": pairs.len(), "control": control,
        })
    };
    let agents = pairs.iter().filter_map(|pair| pair.on.agent.as_ref());
    let (mut shares, mut rates, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    for agent in agents {
        let samples = samples(&agent.events)?;
        shares.push(100.0 * agent.share);
        rates
            .push(rate(&samples).context("the agent reported fewer than two samples in a window")?);
        seen.extend(samples.iter().map(|line| line.threads));
    }
    let what = format!("memcached, {THREADS} threads, {}", text(budget));
    let mut figures = Figures {
        what: &what,
        keys: &keys,
        pairs,
        report,
    };
    let kept = figures.spread(|pair| pair.on.requests_per_s / pair.off.requests_per_s)?;
    if control {
        figures.add("no agent, throughput kept", "kept", "", kept, None);
        figures.add_circumstances(control)?;
        return Ok(None);
    }
    if let Some(least) = seen.iter().copied().reduce(f64::min)
        && least < THREADS as f64
    {
        bail!("the agent saw {least} of memcached's {THREADS} threads and more");
    }
    let goal = Goal::at_least(MIN_THROUGHPUT_RATIO, &kept);
    figures.add("throughput kept", "kept", "", kept, Some(goal));
    let shares = bootstrap(&shares).context("the agent was not measured")?;
    let goal = Goal::at_most(100.0 * budget, &shares);
    figures.add("agent's share of a core", "cpu", "%", shares, Some(goal));
    let rates = bootstrap(&rates).context("no samples were reported")?;
    figures.add("samples", "samples", "/s", rates, None);
    let seen = bootstrap(&seen).context("no samples were reported")?;
    figures.add("threads per sample", "threads_seen", "", seen, None);
    figures.add_circumstances(control)?;
    Ok(Some(rates.median))
}

fn many_threads(
    args: &Args,
    agents: &FocusedAgents,
    rate_at_64: f64,
    report: &mut Report,
) -> Result<()> {
    let [budget, _] = BUDGETS;
    report.progress(&format!("{MANY_THREADS} threads, {} s …", args.seconds));
    let holders = hold::threads(MANY_THREADS)?;
    let agent = agents.start(budget, &hold::targets(&holders))?;
    let mark = agent.mark();
    let share = footprint::cpu_share(&agent, Duration::from_secs(u64::from(args.seconds)))?;
    let samples = samples(&agent.events_since(mark)?)?;
    agent.stop()?;
    if let Some(line) = samples
        .iter()
        .find(|line| line.threads < MANY_THREADS as f64)
    {
        bail!("the agent saw {} of {MANY_THREADS} threads", line.threads);
    }
    let rates = rates(&samples);
    let whole = rate(&samples).context("the agent reported fewer than two samples")?;
    let spread = quartiles(&rates).context("the run was shorter than one interval")?;
    let value = Spread {
        median: whole,
        low: spread.low.min(whole),
        high: spread.high.max(whole),
    };
    let what = format!("2,000 threads, {}", text(budget));
    let keys = |measured: &str| {
        json!({
            "bench": "profile", "measured": measured, "service": "parked", "threads": MANY_THREADS,
            "budget": budget,
        })
    };
    report.add(Figure {
        what: format!("{what}: agent's share of a core"),
        keys: keys("cpu"),
        unit: "%",
        value: share,
        spread: footprint::INTERVALS,
        goal: Some(Goal::at_most(100.0 * budget, &share)),
    });
    report.add(Figure {
        what: format!("{what}: samples"),
        keys: keys("samples"),
        unit: "/s",
        value,
        spread: footprint::INTERVALS,
        goal: Some(Goal {
            text: format!("< {rate_at_64:.0}, falls by itself"),
            met: value.median < rate_at_64,
        }),
    });
    Ok(())
}

fn text(budget: f64) -> String {
    format!("budget {}%", 100.0 * budget)
}

/// Starts agents that focus all targets permanently.
struct FocusedAgents {
    program: PathBuf,
    temp: TempDir,
}

impl FocusedAgents {
    fn new() -> Result<Self> {
        Ok(Self {
            program: super::agent()?,
            temp: TempDir::new("profile")?,
        })
    }

    /// Starts an agent and waits for [`WARM_UP_NS`].
    fn start(&self, budget: f64, targets: &[String]) -> Result<Agent> {
        let config = format!("cpu_budget = {budget}\n");
        let config = self.temp.write("profile.toml", &config)?;
        let mut command = Command::new(&self.program);
        command.args(["run", "--json", "--focus-all", "--config"]);
        command.arg(config).args(targets);
        let agent = Agent::start(&mut command)?;
        let mut first_ns = None;
        let is_warm = |event: &Event| match SampleCount::of(event) {
            Ok(Some(line)) => line.mono_ns >= *first_ns.get_or_insert(line.mono_ns) + WARM_UP_NS,
            _ => false,
        };
        agent.wait_for("its sampling rate", Duration::from_secs(60), is_warm)?;
        Ok(agent)
    }
}

/// A line of the agent about its focus samples.
#[derive(Clone, Copy, Debug, PartialEq)]
struct SampleCount {
    mono_ns: u64,
    /// Total samples so far.
    samples: u64,
    threads: f64,
}

impl SampleCount {
    /// `None` for a line of another type.
    fn of(event: &Event) -> Result<Option<Self>> {
        if !event.is("focus_samples") {
            return Ok(None);
        }
        let whole = |key: &str| event.value.get(key).and_then(serde_json::Value::as_u64);
        let line = || {
            Some(Self {
                mono_ns: whole("mono_ns")?,
                samples: whole("samples")?,
                threads: event.number("threads")?,
            })
        };
        let line =
            line().with_context(|| format!("incomplete line about samples: {}", event.value))?;
        Ok(Some(line))
    }
}

fn samples(events: &[Event]) -> Result<Vec<SampleCount>> {
    let samples = events
        .iter()
        .map(|event| SampleCount::of(event).transpose());
    samples.flatten().collect()
}

/// Samples per second from the first line to the last; `None` for fewer than two lines.
fn rate(samples: &[SampleCount]) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    let elapsed_ns = last.mono_ns.checked_sub(first.mono_ns)?;
    (elapsed_ns > 0).then(|| (last.samples - first.samples) as f64 * 1e9 / elapsed_ns as f64)
}

/// Samples per second in each [`INTERVAL_NS`].
fn rates(samples: &[SampleCount]) -> Vec<f64> {
    let (mut rates, mut begun) = (Vec::new(), 0);
    for (at, line) in samples.iter().enumerate() {
        if line.mono_ns >= samples[begun].mono_ns + INTERVAL_NS {
            rates.extend(rate(&samples[begun..=at]));
            begun = at;
        }
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn line(at_ms: u64, samples: u64) -> SampleCount {
        SampleCount {
            mono_ns: at_ms * MS,
            samples,
            threads: 64.0,
        }
    }

    #[test]
    fn the_rate_counts_samples_between_the_first_line_and_the_last() {
        assert_eq!(
            rate(&[line(100, 7), line(600, 30), line(1100, 57)]),
            Some(50.0)
        );
        assert_eq!(rate(&[line(100, 7)]), None);
        assert_eq!(rate(&[line(100, 7), line(100, 7)]), None);
        assert_eq!(rate(&[]), None);
    }

    #[test]
    fn a_change_of_rate_shows_in_the_intervals() {
        // Ten seconds at 100/s, then ten at 10/s, one line every 200 ms.
        let samples: Vec<SampleCount> = (0..=50)
            .map(|number| line(200 * number, 20 * number))
            .chain((1..=50).map(|number| line(10_000 + 200 * number, 1000 + 2 * number)))
            .collect();
        let rates: Vec<u64> = rates(&samples)
            .iter()
            .map(|rate| rate.round() as u64)
            .collect();
        assert_eq!(rates, [100, 100, 100, 100, 100, 10, 10, 10, 10, 10]);
    }

    #[test]
    fn other_lines_are_ignored_and_incomplete_ones_are_errors() {
        let event = |value| Event {
            at: std::time::Instant::now(),
            unix_ns: 0,
            value,
        };
        let right =
            event(json!({"type": "focus_samples", "mono_ns": 5, "samples": 3, "threads": 64}));
        let other = event(json!({"type": "agent", "samples": 3}));
        let expected = SampleCount {
            mono_ns: 5,
            samples: 3,
            threads: 64.0,
        };
        assert_eq!(samples(&[other, right]).unwrap(), [expected]);
        let broken = event(json!({"type": "focus_samples", "mono_ns": 5}));
        assert!(samples(&[broken]).is_err());
    }
}
