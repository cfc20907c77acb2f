//! What a busy service loses while the agent looks closely at it all the time, and how often it can.
//!
//! While a queue is suspicious, the agent looks at what each thread waits for, up to a hundred times a second, as far as its
//! CPU budget allows. Here it does so without a break: at memcached, all of whose threads work, and at very many threads.

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
    pairs::{self, Figures, Pair, Windows},
    pins::Pins,
    statistics::{Spread, bootstrap, quartiles},
};

const THREADS: usize = 64;
/// The same number for each thread.
const CONNECTIONS: usize = 2 * THREADS;
/// Of the throughput without the agent, so much stays.
const KEPT: f64 = 0.99;
/// So many threads cannot be looked at a hundred times a second within the budget.
const MANY_THREADS: usize = 2_000;
/// Of one core: the default, and that of a person who waits for `tailback diagnose`.
const BUDGETS: [f64; 2] = [0.01, 0.05];
/// What a look costs is known after so long, and the pace settled.
const LEARN_NS: u64 = 2_000_000_000;
/// Between two rates, where they are taken from one run.
const STRETCH_NS: u64 = 2_000_000_000;

#[derive(clap::Args)]
pub struct Args {
    /// Pairs of windows, for each budget
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(3..))]
    pairs: u32,
    /// How long the agent looks at very many threads
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(10..))]
    seconds: u32,
    #[command(flatten)]
    windows: Windows,
}

/// The other side: this very program, as a child.
#[derive(clap::Args)]
pub struct Load {
    address: SocketAddr,
    connections: usize,
}

impl Load {
    /// Until it is killed, or its parent is.
    pub fn forever(&self) -> Result<Infallible> {
        set_parent_process_death_signal(Some(Signal::KILL)).context("end with the parent")?;
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
    let watcher = Watcher::new()?;
    let pins = Pins::choose();
    report.progress(&pins.text());
    let memcached = Memcached::start_with(THREADS, |words| pins.pin(words, Pins::SERVER))?;
    let load = Load::start(&pins, &memcached)?;
    let mut client = memcached.client()?;
    let mut usual_rate = None;
    for budget in BUDGETS {
        let targets = ["--pid".to_owned(), memcached.process().pid().to_string()];
        let pairs = pairs::measure(
            &args.windows,
            args.pairs,
            memcached.process(),
            || client.gets(),
            || watcher.start(budget, &targets),
            report,
        )?;
        load.check_running()?;
        let rate = add_pairs(report, args, budget, &pairs)?;
        usual_rate = usual_rate.or(rate);
        if args.windows.control {
            return Ok(());
        }
    }
    drop((load, memcached));
    let usual_rate = usual_rate.context("no rate was measured to compare with")?;
    many_threads(args, &watcher, usual_rate, report)
}

/// Answers the looks per second, where there was an agent.
fn add_pairs(report: &mut Report, args: &Args, budget: f64, pairs: &[Pair]) -> Result<Option<f64>> {
    let control = args.windows.control;
    let keys = |measured: &str| {
        json!({
            "bench": "profile", "measured": measured, "service": "memcached", "threads": THREADS,
            "budget": budget, "pairs": pairs.len(), "control": control,
        })
    };
    let watched = pairs.iter().filter_map(|pair| pair.on.agent.as_ref());
    let (mut shares, mut rates, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    for agent in watched {
        let looks = looks(&agent.events)?;
        shares.push(100.0 * agent.share);
        rates.push(rate(&looks).context("the agent told of less than two looks in a window")?);
        seen.extend(looks.iter().map(|look| look.threads));
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
    let goal = Goal::at_least(KEPT, &kept);
    figures.add("throughput kept", "kept", "", kept, Some(goal));
    let shares = bootstrap(&shares).context("the agent was not measured")?;
    let goal = Goal::at_most(100.0 * budget, &shares);
    figures.add("agent's share of a core", "cpu", "%", shares, Some(goal));
    let rates = bootstrap(&rates).context("no looks were told")?;
    figures.add("looks", "looks", "/s", rates, None);
    let seen = bootstrap(&seen).context("no looks were told")?;
    figures.add("threads in a look", "threads_seen", "", seen, None);
    figures.add_circumstances(control)?;
    Ok(Some(rates.median))
}

fn many_threads(
    args: &Args,
    watcher: &Watcher,
    usual_rate: f64,
    report: &mut Report,
) -> Result<()> {
    let [budget, _] = BUDGETS;
    report.progress(&format!("{MANY_THREADS} threads, {} s …", args.seconds));
    let holders = hold::threads(MANY_THREADS)?;
    let agent = watcher.start(budget, &hold::targets(&holders))?;
    let mark = agent.mark();
    let share = footprint::cpu_share(&agent, Duration::from_secs(u64::from(args.seconds)))?;
    let looks = looks(&agent.events_since(mark)?)?;
    pairs::stop(agent)?;
    if let Some(look) = looks.iter().find(|look| look.threads < MANY_THREADS as f64) {
        bail!("the agent saw {} of {MANY_THREADS} threads", look.threads);
    }
    let rates = rates(&looks);
    let whole = rate(&looks).context("the agent told of less than two looks")?;
    let spread = quartiles(&rates).context("the agent looked for less than a stretch")?;
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
        spread: footprint::STRETCHES,
        goal: Some(Goal::at_most(100.0 * budget, &share)),
    });
    report.add(Figure {
        what: format!("{what}: looks"),
        keys: keys("looks"),
        unit: "/s",
        value,
        spread: footprint::STRETCHES,
        goal: Some(Goal {
            text: format!("< {usual_rate:.0}, falls by itself"),
            met: value.median < usual_rate,
        }),
    });
    Ok(())
}

fn text(budget: f64) -> String {
    format!("budget {}%", 100.0 * budget)
}

/// Starts the agent so that it looks closely all the time.
struct Watcher {
    program: PathBuf,
    temp: TempDir,
}

impl Watcher {
    fn new() -> Result<Self> {
        Ok(Self {
            program: super::agent()?,
            temp: TempDir::new("profile")?,
        })
    }

    /// Until it has learned what a look costs.
    fn start(&self, budget: f64, targets: &[String]) -> Result<Agent> {
        let config = format!("cpu_budget = {budget}\n");
        let config = self.temp.write("profile.toml", &config)?;
        let mut command = Command::new(&self.program);
        command.args(["run", "--json", "--focus-all", "--config"]);
        command.arg(config).args(targets);
        let agent = Agent::start(&mut command)?;
        let mut first_ns = None;
        let learned = |event: &Event| match Look::of(event) {
            Ok(Some(look)) => look.mono_ns >= *first_ns.get_or_insert(look.mono_ns) + LEARN_NS,
            _ => false,
        };
        agent.wait_for("how often it looks", Duration::from_secs(60), learned)?;
        Ok(agent)
    }
}

/// A line of the agent's about its looks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Look {
    mono_ns: u64,
    /// All of them up to this one.
    looks: u64,
    threads: f64,
}

impl Look {
    /// `None`: the line is about something else.
    fn of(event: &Event) -> Result<Option<Self>> {
        if !event.is("focus_samples") {
            return Ok(None);
        }
        let whole = |key: &str| event.value.get(key).and_then(serde_json::Value::as_u64);
        let look = || {
            Some(Self {
                mono_ns: whole("mono_ns")?,
                looks: whole("samples")?,
                threads: event.number("threads")?,
            })
        };
        let look = look().with_context(|| format!("not a line about looks: {}", event.value))?;
        Ok(Some(look))
    }
}

fn looks(events: &[Event]) -> Result<Vec<Look>> {
    let looks = events.iter().map(|event| Look::of(event).transpose());
    looks.flatten().collect()
}

/// Looks per second from the first line to the last; `None`: there are not two.
fn rate(looks: &[Look]) -> Option<f64> {
    let (first, last) = (looks.first()?, looks.last()?);
    let elapsed_ns = last.mono_ns.checked_sub(first.mono_ns)?;
    (elapsed_ns > 0).then(|| (last.looks - first.looks) as f64 * 1e9 / elapsed_ns as f64)
}

/// The same for each stretch.
fn rates(looks: &[Look]) -> Vec<f64> {
    let (mut rates, mut begun) = (Vec::new(), 0);
    for (at, look) in looks.iter().enumerate() {
        if look.mono_ns >= looks[begun].mono_ns + STRETCH_NS {
            rates.extend(rate(&looks[begun..=at]));
            begun = at;
        }
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn look(at_ms: u64, looks: u64) -> Look {
        Look {
            mono_ns: at_ms * MS,
            looks,
            threads: 64.0,
        }
    }

    #[test]
    fn the_rate_counts_looks_between_the_first_line_and_the_last() {
        assert_eq!(
            rate(&[look(100, 7), look(600, 30), look(1100, 57)]),
            Some(50.0)
        );
        assert_eq!(rate(&[look(100, 7)]), None);
        assert_eq!(rate(&[look(100, 7), look(100, 7)]), None);
        assert_eq!(rate(&[]), None);
    }

    #[test]
    fn a_change_of_pace_shows_in_the_stretches() {
        // Ten seconds at 100 a second, then ten at 10, a line every 200 ms.
        let looks: Vec<Look> = (0..=50)
            .map(|line| look(200 * line, 20 * line))
            .chain((1..=50).map(|line| look(10_000 + 200 * line, 1000 + 2 * line)))
            .collect();
        let rates: Vec<u64> = rates(&looks)
            .iter()
            .map(|rate| rate.round() as u64)
            .collect();
        assert_eq!(rates, [100, 100, 100, 100, 100, 10, 10, 10, 10, 10]);
    }

    #[test]
    fn only_lines_about_looks_are_taken_and_broken_ones_are_errors() {
        let event = |value| Event {
            at: std::time::Instant::now(),
            unix_ns: 0,
            value,
        };
        let right =
            event(json!({"type": "focus_samples", "mono_ns": 5, "samples": 3, "threads": 64}));
        let other = event(json!({"type": "agent", "ticks": 3}));
        let expected = Look {
            mono_ns: 5,
            looks: 3,
            threads: 64.0,
        };
        assert_eq!(looks(&[other, right]).unwrap(), [expected]);
        let broken = event(json!({"type": "focus_samples", "mono_ns": 5}));
        assert!(looks(&[broken]).is_err());
    }
}
