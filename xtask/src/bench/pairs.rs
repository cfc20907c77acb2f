//! A busy service with the agent and without it, in pairs.
//!
//! The load never stops. In each pair, one window with the agent and one without it are measured, in alternating
//! order; the rate is the service's own count of requests. So whatever else changes slowly on the machine meets
//! both sides alike, and what remains is in the interval. The CPU time of a request is measured beside it: other
//! work on the machine takes time away from a service, but hardly changes what a request costs. How much other
//! work there was is measured in each window, and pairs that it disturbed are measured again, as long as the patience
//! lasts; then the least disturbed ones are taken, and the figure of other work tells that they are not to be trusted.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::{Agent, Event},
    process::{End, Process},
};

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    pins::cpus,
    statistics::{Spread, bootstrap},
};

const INTERVAL: &str = "95% interval of the median, by bootstrap";
/// With a larger share of the CPUs taken by other work, a pair counts as disturbed. Interrupts are part of it.
const DISTURBED: f64 = 0.03;
/// After the agent has begun to watch, or has ended, until the window opens: caches and clocks settle.
const SETTLE: Duration = Duration::from_millis(300);

#[derive(clap::Args)]
pub struct Windows {
    /// Length of each window, in seconds
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// How many more pairs than that to measure at most, to have so many that no other work disturbed
    #[arg(long, default_value_t = 25)]
    patience: u32,
    /// Never start the agent: shows what the measurement itself makes of two equal sides
    #[arg(long)]
    pub control: bool,
}

/// What one window showed.
#[derive(Clone)]
pub struct Window {
    pub requests_per_s: f64,
    /// CPU time of the service for each request.
    cpu_ns: f64,
    /// Share of all CPUs that went to what is no part of the benchmark.
    other_work: f64,
    /// Of the agent, where there was one.
    pub agent: Option<Watched>,
}

impl Window {
    /// Time that the service was on CPU, as a share of one core.
    fn busy(&self) -> f64 {
        self.cpu_ns * self.requests_per_s / 1e9
    }
}

/// The agent in one window.
#[derive(Clone)]
pub struct Watched {
    /// CPU time, as a share of one core.
    pub share: f64,
    /// What it told.
    pub events: Vec<Event>,
}

/// A window without the agent, and one with it.
pub struct Pair {
    pub off: Window,
    pub on: Window,
}

impl Pair {
    fn other_work(&self) -> f64 {
        self.off.other_work.max(self.on.other_work)
    }

    fn is_disturbed(&self) -> bool {
        self.other_work() > DISTURBED
    }
}

/// Pairs of windows over a service under load. `count` are the requests that it has answered, `start` starts the agent and
/// waits until the window may begin.
pub fn measure(
    windows: &Windows,
    wanted: u32,
    service: &Process,
    mut count: impl FnMut() -> Result<u64>,
    start: impl Fn() -> Result<Agent>,
    report: &Report,
) -> Result<Vec<Pair>> {
    let length = Duration::try_from_secs_f64(windows.window).context("the length of the window")?;
    let mut look = |agent: Option<&Agent>| window(length, service, &mut count, agent);
    // Not counted: the load's first connections, the first faults of every page.
    look(None)?;
    let mut pairs: Vec<Pair> = Vec::new();
    for number in 0..wanted + windows.patience {
        let good = pairs.iter().filter(|pair| !pair.is_disturbed()).count();
        if good >= wanted as usize {
            break;
        }
        let with_agent = |look: &mut dyn FnMut(Option<&Agent>) -> Result<Window>| {
            if windows.control {
                return look(None);
            }
            let agent = start()?;
            let on = look(Some(&agent))?;
            stop(agent)?;
            Ok(on)
        };
        let pair = if number % 2 == 0 {
            let off = look(None)?;
            let on = with_agent(&mut look)?;
            Pair { off, on }
        } else {
            let on = with_agent(&mut look)?;
            let off = look(None)?;
            Pair { off, on }
        };
        report.progress(&format!(
            "{} {}: {:.0} a second without the agent, {:.0} with it{}",
            service.name(),
            number + 1,
            pair.off.requests_per_s,
            pair.on.requests_per_s,
            if pair.is_disturbed() {
                " (disturbed)"
            } else {
                ""
            }
        ));
        pairs.push(pair);
    }
    Ok(least_disturbed(pairs, wanted as usize))
}

/// By what happened beside them, never by what they show.
fn least_disturbed(mut pairs: Vec<Pair>, wanted: usize) -> Vec<Pair> {
    pairs.sort_by(|a, b| a.other_work().total_cmp(&b.other_work()));
    pairs.truncate(wanted);
    pairs
}

fn window(
    length: Duration,
    service: &Process,
    count: &mut impl FnMut() -> Result<u64>,
    agent: Option<&Agent>,
) -> Result<Window> {
    thread::sleep(SETTLE);
    let mark = agent.map_or(0, Agent::mark);
    let cpu_times = || -> Result<[Duration; 4]> {
        let agent = agent.map(|agent| cpu::of_family(agent.process().pid()));
        Ok([
            cpu::of_family(service.pid())?,
            // All that the benchmark started are children of this process.
            cpu::of_family(std::process::id())?,
            cpu::of_machine()?,
            agent.transpose()?.unwrap_or_default(),
        ])
    };
    let (start, before, cpu_before) = (Instant::now(), count()?, cpu_times()?);
    thread::sleep(length);
    let (end, after, cpu_after) = (Instant::now(), count()?, cpu_times()?);
    let [service_cpu, ours, all, agent_cpu] =
        [0, 1, 2, 3].map(|n| cpu_after[n].saturating_sub(cpu_before[n]));
    let requests = after - before;
    if requests < 1000 {
        bail!(
            "{} answered only {requests} requests: is its load running?",
            service.name()
        );
    }
    let took_s = (end - start).as_secs_f64();
    let watched = |agent: &Agent| -> Result<Watched> {
        Ok(Watched {
            share: agent_cpu.as_secs_f64() / took_s,
            events: agent.events_since(mark)?,
        })
    };
    Ok(Window {
        requests_per_s: requests as f64 / took_s,
        cpu_ns: service_cpu.as_nanos() as f64 / requests as f64,
        other_work: all.saturating_sub(ours).as_secs_f64() / (took_s * cpus()),
        agent: agent.map(watched).transpose()?,
    })
}

/// Its first line about itself comes when its programs are loaded and its first tick is done.
pub fn wait_until_it_watches(agent: &Agent) -> Result<()> {
    let start = Duration::from_secs(30);
    agent.wait_for("that it watches", start, |_| true)?;
    Ok(())
}

pub fn stop(agent: Agent) -> Result<()> {
    let process = agent.into_process();
    process.signal(Signal::INT)?;
    match process.wait_end(Duration::from_secs(10))? {
        End::Code(0) => Ok(()),
        end => bail!("tailback ended with {end:?}"),
    }
}

/// The figures of some pairs: what they are told of, and the key that says so to a program.
pub struct Figures<'a> {
    pub what: &'a str,
    pub keys: &'a dyn Fn(&str) -> Value,
    pub pairs: &'a [Pair],
    pub report: &'a mut Report,
}

impl Figures<'_> {
    /// The median of what a pair shows, with its interval.
    pub fn spread(&self, of: impl Fn(&Pair) -> f64) -> Result<Spread> {
        let values: Vec<f64> = self.pairs.iter().map(of).collect();
        bootstrap(&values).context("nothing was measured")
    }

    pub fn add(
        &mut self,
        text: &str,
        measured: &str,
        unit: &'static str,
        value: Spread,
        goal: Option<Goal>,
    ) {
        self.report.add(Figure {
            what: format!("{}: {text}", self.what),
            keys: (self.keys)(measured),
            unit,
            value,
            spread: INTERVAL,
            goal,
        });
    }

    /// What stands beside each comparison: what it costs the service, its rate, and how far all of it can be trusted.
    pub fn add_circumstances(&mut self, control: bool) -> Result<()> {
        let cost = self.spread(|pair| 100.0 * (pair.on.cpu_ns / pair.off.cpu_ns - 1.0))?;
        let dearer = if control {
            "no agent, more CPU each"
        } else {
            "more CPU each"
        };
        self.add(dearer, "cpu_per_request", "%", cost, None);
        let rate = self.spread(|pair| pair.off.requests_per_s)?;
        self.add("requests", "rate_off", "/s", rate, None);
        // A service that waits for its load has time to spare, and loses nothing.
        let busy = self.spread(|pair| 100.0 * pair.off.busy())?;
        self.add("service's share of a core", "busy_off", "%", busy, None);
        let others = self.spread(|pair| 100.0 * pair.other_work())?;
        let disturbed = self.pairs.iter().filter(|pair| pair.is_disturbed()).count();
        let noisy = match disturbed {
            0 => String::new(),
            some => format!(" (noisy: {some} of {} pairs disturbed)", self.pairs.len()),
        };
        let text = format!("other work on all CPUs{noisy}");
        self.add(&text, "other_work", "%", others, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(requests_per_s: f64, other_work: [f64; 2]) -> Pair {
        let [off, on] = other_work.map(|other_work| Window {
            requests_per_s,
            cpu_ns: 1.0,
            other_work,
            agent: None,
        });
        Pair { off, on }
    }

    #[test]
    fn the_least_disturbed_pairs_are_taken_whatever_they_show() {
        let pairs = vec![
            pair(1.0, [0.01, 0.5]),
            pair(2.0, [0.02, 0.02]),
            pair(3.0, [0.0, 0.01]),
        ];
        let taken = least_disturbed(pairs, 2);
        let shown: Vec<f64> = taken.iter().map(|pair| pair.on.requests_per_s).collect();
        assert_eq!(shown, [3.0, 2.0]);
        assert!(taken.iter().all(|pair| !pair.is_disturbed()));
        assert!(pair(1.0, [0.01, 0.5]).is_disturbed());
    }

    #[test]
    fn a_service_that_needs_a_microsecond_for_each_of_half_a_million_is_half_busy() {
        let mut off = pair(500_000.0, [0.0, 0.0]).off;
        off.cpu_ns = 1000.0;
        assert_eq!(off.busy(), 0.5);
    }
}
