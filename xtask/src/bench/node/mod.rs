//! The cost of a node agent with the pods of a large node: CPU, memory, series, pages, spans, and whether samples are on time.

mod pods;

use std::{
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
pub use pods::Pod;
use pods::Pods;
use serde_json::json;
use tailback_tests::{
    agent::{Agent, Event},
    collector::Collector,
    http, ports,
    process::children_of,
    temp::TempDir,
    wait,
};

use super::{
    cpu,
    figure::{Figure, Goal, Report},
    footprint,
    statistics::Spread,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(120);
/// Time from the last page until the measurement: the agent has found the intervals at which its scans fit the budget.
const SETTLE: Duration = Duration::from_secs(20);
/// Goals. CPU of the agent, percent of one core: twice its budget of 1%, since the budget of scans may be exceeded by other work.
const CPU_GOAL: f64 = 2.0;
/// Resident memory of the agent with its helper and the adapter process, MB: half of the chart's memory limit, 192 MiB.
const MEMORY_GOAL: f64 = 100.0;
/// Late samples, percent.
const LATE_GOAL: f64 = 1.0;
/// Series: what one Prometheus target should export at most. The agent's own bound on queues keeps it below.
const SERIES_GOAL: f64 = 50_000.0;

#[derive(clap::Args)]
pub struct Args {
    /// Number of pods, each with one container and its own network namespace
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pods: u32,
    /// Connections in all pods together; both ends of each are on this node
    #[arg(long, default_value_t = 10_000)]
    connections: u32,
    /// Requests per second in each pod
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    requests: u32,
    /// Pods that stop accepting connections in the last phase
    #[arg(long, default_value_t = 5)]
    jammed: u32,
    /// Duration of each phase, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(10..))]
    seconds: u64,
}

pub fn measure(args: &Args, report: &mut Report) -> Result<()> {
    let length = Duration::from_secs(args.seconds);
    ensure!(args.jammed <= args.pods, "more jammed pods than pods");
    report.progress(&format!("no pods, {} s …", args.seconds));
    let node = Node::start()?;
    thread::sleep(SETTLE);
    node.phase("no pods", length, report, || Ok(()))?;

    report.progress(&format!("starting {} pods …", args.pods));
    let each = args.connections.div_ceil(args.pods);
    let before = node.metric("tailback_pages")?;
    let began = Instant::now();
    let pods = Pods::start(args.pods as usize, each as usize, args.requests)?;
    let started = began.elapsed();
    wait::until("the pages of all pods", DEADLINE, || {
        pods.check_running()?;
        let new = node.metric("tailback_pages")? - before;
        Ok((new >= f64::from(args.pods)).then_some(()))
    })?;
    let published = began.elapsed().saturating_sub(started);
    report.add(figure(
        "last page after the last pod was ready",
        "published",
        "s",
        published.as_secs_f64(),
    ));
    thread::sleep(SETTLE);
    let name = format!("{} pods, {} connections", args.pods, each * args.pods);
    report.progress(&format!("{name}, {} s …", args.seconds));
    node.phase(&name, length, report, || Ok(()))?;

    if args.jammed > 0 {
        let name = format!("{} of them jammed", args.jammed);
        report.progress(&format!("{name}, {} s …", args.seconds));
        node.phase(&name, length, report, || pods.jam(args.jammed as usize))?;
    }
    pods.check_running()
}

fn figure(what: &str, key: &str, unit: &'static str, value: f64) -> Figure {
    Figure {
        what: what.to_owned(),
        keys: json!({"bench": "node", "measured": key}),
        unit,
        value: Spread::exact(value),
        spread: "",
        goal: None,
    }
}

/// A node agent that exports spans and is scraped.
struct Node {
    agent: Agent,
    http: SocketAddr,
    collector: Collector,
    _temp: TempDir,
}

/// Counters of the agent, and its metrics.
struct State {
    at: Instant,
    samples: f64,
    late: f64,
    spans: f64,
    received: u64,
    lines: usize,
    series: usize,
    bytes: usize,
    services: f64,
    pages: f64,
    queues_omitted: f64,
    scrape: Duration,
}

impl Node {
    fn start() -> Result<Self> {
        let temp = TempDir::new("node")?;
        let http = ports::local(ports::free()?);
        let collector = Collector::start(ports::free()?)?;
        let text = format!(
            "otlp = \"{}\"\n[signal]\nmax_pages = 1024\n[signal.http]\nlisten = \"{http}\"\n",
            collector.url()
        );
        let config = temp.write("tailback.toml", &text)?;
        let mut command = Command::new(super::agent()?);
        command
            .args(["run", "--all", "--json", "--config"])
            .arg(config);
        let node = Self {
            agent: Agent::start(&mut command)?,
            http,
            collector,
            _temp: temp,
        };
        node.agent
            .wait_for("its own cost", DEADLINE, |event| event.is("agent"))?;
        Ok(node)
    }

    fn scrape(&self) -> Result<String> {
        let response = http::get(self.http, "/metrics", DEADLINE)?;
        ensure!(response.status == 200, "status {}", response.status);
        String::from_utf8(response.body).context("metrics are not UTF-8")
    }

    /// The value of a metric without labels.
    fn metric(&self, name: &str) -> Result<f64> {
        value(&self.scrape()?, name)
    }

    /// The state when the agent reports on itself, which it does every 10 s.
    fn state(&self) -> Result<State> {
        let mark = self.agent.mark();
        let is_report = |event: &Event| event.is("agent");
        let report = self
            .agent
            .wait_since(mark, "its own cost", DEADLINE, is_report)?;
        let of = |key: &str| {
            let number = report.number(key);
            number.with_context(|| format!("no {key} in {}", report.value))
        };
        let began = Instant::now();
        let text = self.scrape()?;
        Ok(State {
            at: report.at,
            samples: of("samples")?,
            late: of("late_samples")?,
            spans: of("spans")?,
            received: self.collector.spans(),
            lines: self.agent.mark(),
            series: text.lines().filter(|line| !line.starts_with('#')).count(),
            bytes: text.len(),
            services: of("targets")?,
            pages: value(&text, "tailback_pages")?,
            queues_omitted: value(&text, "tailback_queues_omitted")?,
            scrape: began.elapsed(),
        })
    }

    /// Measures for some time, and adds the figures. What `begin` causes is counted.
    fn phase(
        &self,
        name: &str,
        length: Duration,
        report: &mut Report,
        begin: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let percent = |part: f64, whole: f64| 100.0 * part / whole.max(1.0);
        let pid = self.agent.process().pid();
        let before = self.state()?;
        begin()?;
        let others: Vec<u32> = descendants(pid);
        let used = || -> Result<Duration> { others.iter().map(|pid| cpu::of_process(*pid)).sum() };
        let (began, used_before) = (Instant::now(), used()?);
        let share = footprint::cpu_share(&self.agent, length)?;
        let of_others = used()?.saturating_sub(used_before);
        let of_others = percent(of_others.as_secs_f64(), began.elapsed().as_secs_f64());
        let after = self.state()?;
        let seconds = (after.at - before.at).as_secs_f64();
        let samples = after.samples - before.samples;
        let mb =
            |pid: u32| Ok::<_, anyhow::Error>(footprint::status_kb(pid, "VmRSS")? * 1024.0 / 1e6);
        let own_mb = mb(pid)?;
        let all_mb = others.iter().map(|pid| mb(*pid)).sum::<Result<f64>>()? + own_mb;
        let mut add = |of: &str, unit, value: Spread, goal: Option<f64>| {
            report.add(Figure {
                what: format!("{name}: {of}"),
                keys: json!({"bench": "node", "phase": name, "measured": of}),
                unit,
                value,
                spread: footprint::INTERVALS,
                goal: goal.map(|goal| Goal::at_most(goal, &value)),
            });
        };
        let exact = Spread::exact;
        add(
            "CPU of the agent, share of one core",
            "%",
            share,
            Some(CPU_GOAL),
        );
        add(
            "CPU of helper and adapter process",
            "%",
            exact(of_others),
            None,
        );
        add("resident memory of the agent", "MB", exact(own_mb), None);
        add(
            "resident memory with helper and adapter process",
            "MB",
            exact(all_mb),
            Some(MEMORY_GOAL),
        );
        add("samples", "/s", exact(samples / seconds), None);
        let late = percent(after.late - before.late, samples);
        add("late samples", "%", exact(late), Some(LATE_GOAL));
        add("services", "", exact(after.services), None);
        add("pages", "", exact(after.pages), None);
        add("series", "", exact(after.series as f64), Some(SERIES_GOAL));
        add(
            "size of the metrics",
            "kB",
            exact(after.bytes as f64 / 1e3),
            None,
        );
        add(
            "time of a scrape",
            "ms",
            exact(after.scrape.as_secs_f64() * 1e3),
            None,
        );
        add(
            "queues beyond the export limit",
            "",
            exact(after.queues_omitted),
            None,
        );
        add(
            "spans exported",
            "",
            exact(after.spans - before.spans),
            None,
        );
        let received = after.received.saturating_sub(before.received);
        add(
            "spans received by the collector",
            "",
            exact(received as f64),
            None,
        );
        let lines = (after.lines - before.lines) as f64;
        add("lines of output", "/s", exact(lines / seconds), None);
        Ok(())
    }
}

/// All processes below this one.
fn descendants(pid: u32) -> Vec<u32> {
    let children = children_of(pid).unwrap_or_default();
    let below: Vec<u32> = children
        .iter()
        .flat_map(|child| descendants(*child))
        .collect();
    [children, below].concat()
}

/// The value of a metric without labels.
fn value(text: &str, name: &str) -> Result<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = line.with_context(|| format!("no metric {name}"))?;
    value
        .parse()
        .with_context(|| format!("read {name}: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "# HELP a_total A.\na_total_more 1\na_total 2.5\n";
        assert_eq!(value(text, "a_total").unwrap(), 2.5);
        assert!(value(text, "a").is_err());
    }
}
