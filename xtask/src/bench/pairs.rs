//! Compares a busy service with and without the agent, in pairs of windows.
//!
//! The load never stops. Each pair has one window with the agent and one without, in alternating order; the rate comes from
//! the service's own request counter. Slow changes of the machine affect both sides alike, and the rest is in the confidence
//! interval. The CPU time per request is measured too: other work on the machine takes time from the service, but hardly
//! changes the cost of a request. Other work is measured in each window. Disturbed pairs are repeated, up to a limit; then the
//! least disturbed pairs are used, and the figure for other work shows that they are unreliable.

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
/// A pair is disturbed if other work, including interrupts, took a larger share of all CPUs.
const MAX_OTHER_WORK: f64 = 0.03;
/// Pause after the agent started or ended, so that caches and clocks settle before the window.
const SETTLE: Duration = Duration::from_millis(300);

#[derive(clap::Args)]
pub struct Windows {
    /// Length of each window, in seconds
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// Maximum number of additional pairs to replace disturbed ones
    #[arg(long, default_value_t = 25)]
    extra_pairs: u32,
    /// Never start the agent: measures the error of the comparison itself
    #[arg(long)]
    pub control: bool,
}

/// Result of one window.
#[derive(Clone)]
pub struct Window {
    pub requests_per_s: f64,
    /// CPU time of the service per request.
    cpu_ns: f64,
    /// Share of all CPUs used by processes outside the benchmark.
    other_work: f64,
    /// The agent, if one ran.
    pub agent: Option<AgentUse>,
}

impl Window {
    /// CPU use of the service, as a share of one core.
    fn busy(&self) -> f64 {
        self.cpu_ns * self.requests_per_s / 1e9
    }
}

/// The agent in one window.
#[derive(Clone)]
pub struct AgentUse {
    /// CPU time, as a share of one core.
    pub share: f64,
    /// Its events in the window.
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
        self.other_work() > MAX_OTHER_WORK
    }
}

/// What runs beside the service in one window of each pair.
pub trait Companion {
    fn process(&self) -> &Process;

    /// See [`Agent::mark`].
    fn mark(&self) -> usize {
        0
    }

    /// See [`Agent::events_since`].
    fn events_since(&self, _mark: usize) -> Result<Vec<Event>> {
        Ok(Vec::new())
    }

    fn stop(self) -> Result<()>;
}

impl Companion for Agent {
    fn process(&self) -> &Process {
        Self::process(self)
    }

    fn mark(&self) -> usize {
        Self::mark(self)
    }

    fn events_since(&self, mark: usize) -> Result<Vec<Event>> {
        Self::events_since(self, mark)
    }

    fn stop(self) -> Result<()> {
        let process = self.into_process();
        process.signal(Signal::INT)?;
        match process.wait_end(Duration::from_secs(10))? {
            End::Code(0) => Ok(()),
            end => bail!("tailback ended with {end:?}"),
        }
    }
}

/// Returns the requests that a service has served so far.
pub type Count<'a> = dyn FnMut() -> Result<u64> + 'a;

/// Measures pairs of windows over a service under load. `start` starts what it is compared with, and waits until the window may
/// begin.
pub fn measure<C: Companion>(
    windows: &Windows,
    wanted: u32,
    service: &Process,
    count: &mut Count<'_>,
    start: impl Fn() -> Result<C>,
    report: &Report,
) -> Result<Vec<Pair>> {
    let length = Duration::try_from_secs_f64(windows.window).context("the length of the window")?;
    let mut measure_window = |beside: Option<&C>| window(length, service, count, beside);
    // Warm-up, not counted: first connections and page faults.
    measure_window(None)?;
    let mut pairs: Vec<Pair> = Vec::new();
    for number in 0..wanted + windows.extra_pairs {
        let good = pairs.iter().filter(|pair| !pair.is_disturbed()).count();
        if good >= wanted as usize {
            break;
        }
        let with_it = |measure: &mut dyn FnMut(Option<&C>) -> Result<Window>| {
            if windows.control {
                return measure(None);
            }
            let beside = start()?;
            let on = measure(Some(&beside))?;
            beside.stop()?;
            Ok(on)
        };
        let pair = if number % 2 == 0 {
            let off = measure_window(None)?;
            let on = with_it(&mut measure_window)?;
            Pair { off, on }
        } else {
            let on = with_it(&mut measure_window)?;
            let off = measure_window(None)?;
            Pair { off, on }
        };
        report.progress(&format!(
            "{} {}: {:.0}/s without, {:.0}/s with it{}",
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

/// Selects pairs by other work, never by their result.
fn least_disturbed(mut pairs: Vec<Pair>, wanted: usize) -> Vec<Pair> {
    pairs.sort_by(|a, b| a.other_work().total_cmp(&b.other_work()));
    pairs.truncate(wanted);
    pairs
}

fn window<C: Companion>(
    length: Duration,
    service: &Process,
    count: &mut Count<'_>,
    agent: Option<&C>,
) -> Result<Window> {
    thread::sleep(SETTLE);
    let mark = agent.map_or(0, C::mark);
    let cpu_times = || -> Result<[Duration; 4]> {
        let agent = agent.map(|agent| cpu::of_family(agent.process().pid()));
        Ok([
            cpu::of_family(service.pid())?,
            // All processes of the benchmark are children of this process.
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
            "{} served only {requests} requests: is its load running?",
            service.name()
        );
    }
    let took_s = (end - start).as_secs_f64();
    let agent_use = |agent: &C| -> Result<AgentUse> {
        Ok(AgentUse {
            share: agent_cpu.as_secs_f64() / took_s,
            events: agent.events_since(mark)?,
        })
    };
    Ok(Window {
        requests_per_s: requests as f64 / took_s,
        cpu_ns: service_cpu.as_nanos() as f64 / requests as f64,
        other_work: all.saturating_sub(ours).as_secs_f64() / (took_s * cpus()),
        agent: agent.map(agent_use).transpose()?,
    })
}

/// Waits for the first line of the agent: its programs are loaded and its first sample is taken.
pub fn wait_for_first_line(agent: &Agent) -> Result<()> {
    let start = Duration::from_secs(30);
    agent.wait_for("its first line", start, |_| true)?;
    Ok(())
}

/// Adds the figures of pairs to the report.
pub struct Figures<'a> {
    pub what: &'a str,
    pub keys: &'a dyn Fn(&str) -> Value,
    pub pairs: &'a [Pair],
    pub report: &'a mut Report,
}

impl Figures<'_> {
    /// The median of a value over all pairs, with its confidence interval.
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

    /// Adds the figures that accompany each comparison: CPU cost, rate, utilization, and other work.
    pub fn add_circumstances(&mut self, control: bool) -> Result<()> {
        let cost = self.spread(|pair| 100.0 * (pair.on.cpu_ns / pair.off.cpu_ns - 1.0))?;
        let cost_text = if control {
            "no agent, more CPU each"
        } else {
            "more CPU each"
        };
        self.add(cost_text, "cpu_per_request", "%", cost, None);
        let rate = self.spread(|pair| pair.off.requests_per_s)?;
        self.add("requests", "rate_off", "/s", rate, None);
        // A service below saturation has spare time and so loses nothing.
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
    fn the_least_disturbed_pairs_are_used_whatever_their_result() {
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
    fn utilization_is_the_rate_times_the_cpu_time_per_request() {
        let mut off = pair(500_000.0, [0.0, 0.0]).off;
        off.cpu_ns = 1000.0;
        assert_eq!(off.busy(), 0.5);
    }
}
