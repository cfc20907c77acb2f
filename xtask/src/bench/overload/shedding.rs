//! Consumers that shed: one service whose excess load is rejected, by itself, by HAProxy, or by both.

use std::{
    ops::Range,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tailback_tests::{
    load::{Load, Request},
    process::Process,
    program,
};

use super::{
    outcome::{Bound, Measure, Outcome, Responses, admits_all_after, ms},
    run::{AtRest, Run},
    scenario::Scenario,
    service::Service,
    stage::Stage,
};

/// A response is good if it takes at most this multiple of the service time.
const GOOD_WITHIN: u32 = 5;
/// Load during the baseline, relative to the capacity.
const BASELINE_LOAD: f64 = 0.5;
/// Load before and after a spike, and during it.
const SPIKE_LOADS: (f64, f64) = (0.7, 1.4);
/// Load before a CPU neighbour starts.
const NEIGHBOUR_LOAD: f64 = 1.5;
/// Load while the agent dies and returns.
const AGENT_LOAD: f64 = 2.0;
/// A page's time to live, as the agent sets it.
pub const TTL: Duration = Duration::from_secs(1);
/// Interval of HAProxy's agent-check, and of the agent's renewals.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What rejects the excess.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shedding {
    /// The service reads its page.
    pub reads_page: bool,
    pub proxy: Proxy,
}

/// What the proxy does besides forwarding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    Forward,
    /// A limit tuned by hand.
    Static,
    /// The `maxconn` of Tailback's agent-check.
    Maxconn,
    /// Envoy instead of HAProxy: its circuit breakers, by Tailback's runtime layer.
    Envoy,
}

impl Shedding {
    /// Whether Tailback controls the shedding.
    pub fn needs_agent(self) -> bool {
        self.reads_page || matches!(self.proxy, Proxy::Maxconn | Proxy::Envoy)
    }

    /// Whether it decides only by a ratio, which is right for one load: after a change it has to be estimated again.
    fn is_ratio(self, service: Service) -> bool {
        let knows_waits = self.reads_page && !service.takes_all();
        !knows_waits && !matches!(self.proxy, Proxy::Maxconn | Proxy::Envoy)
    }

    /// How long after the death of the agent its signal may still be in force.
    fn fail_open_within(self) -> Duration {
        match self.proxy {
            // Readers check the page for each request. One interval is allowed for the response itself.
            Proxy::Forward | Proxy::Static => TTL + POLL_INTERVAL,
            // One more until the adapter is asked, or writes what Envoy reads.
            Proxy::Maxconn | Proxy::Envoy => TTL + 2 * POLL_INTERVAL,
        }
    }
}

/// One service and what sheds its load.
#[derive(Clone, Copy)]
struct Subject {
    service: Service,
    shedding: Shedding,
    at_rest: AtRest,
}

/// Starts the servers and plays a scenario.
pub fn play(
    run: &mut Run,
    service: Service,
    shedding: Shedding,
    scenario: Scenario,
) -> Result<Outcome> {
    let subject = Subject {
        service,
        shedding,
        at_rest: run.at_rest(service)?,
    };
    let mut stage = Stage::start(run, service, shedding)?;
    let measures = match scenario {
        Scenario::Load(times) => subject.load(run, &stage, times)?,
        Scenario::Spike => subject.spike(run, &stage)?,
        Scenario::LostCpu(threads) => subject.lost_cpu(run, &stage, threads)?,
        Scenario::AgentDies => subject.agent_dies(run, &mut stage)?,
        Scenario::AgentReturns => subject.agent_returns(run, &mut stage)?,
        Scenario::SlowServer(_) | Scenario::StalledServer | Scenario::Day => {
            bail!("one service does not play this scenario")
        }
    };
    Ok(Outcome(measures))
}

impl Subject {
    /// Starts with a low load, so that the agent learns the baseline, and steps to `times` the capacity.
    fn step(&self, run: &Run, stage: &Stage, times: f64) -> Result<(Load, Instant)> {
        let load = Load::start(run.plan(stage, BASELINE_LOAD * self.at_rest.capacity_per_s))?;
        thread::sleep(run.phases.baseline);
        load.set_rate(times * self.at_rest.capacity_per_s)?;
        Ok((load, Instant::now()))
    }

    fn responses(&self, requests: &[Request], span: Range<Instant>, times: f64) -> Responses {
        let good_within = GOOD_WITHIN * self.service.service_time();
        Responses::of(
            requests,
            span,
            times,
            self.at_rest.capacity_per_s,
            good_within,
        )
    }

    /// The goal; none without Tailback.
    fn goal(&self, bound: Bound) -> Option<Bound> {
        self.shedding.needs_agent().then_some(bound)
    }

    /// Maximum 99th percentile of the latency under overload.
    fn max_p99(&self) -> Duration {
        2 * self.at_rest.p99 + self.service.target_delay()
    }

    fn load(&self, run: &Run, stage: &Stage, times: f64) -> Result<Vec<Measure>> {
        let (load, step) = self.step(run, stage, times)?;
        let settle = run.phases.settle;
        thread::sleep(settle + run.phases.load);
        let end = Instant::now();
        load.set_rate(1.0)?;
        thread::sleep(run.phases.drain);
        let responses = self.responses(&load.stop()?, step + settle..end, times);
        let min_goodput = match times {
            _ if times >= 3.0 => Some(Bound::AtLeast(90.0)),
            _ if times >= 1.5 => Some(Bound::AtLeast(95.0)),
            _ => None,
        };
        let max_p99 = (times > 1.0).then(|| Bound::AtMost(ms(self.max_p99()).round()));
        Ok(measures(
            responses,
            min_goodput.and_then(|bound| self.goal(bound)),
            max_p99.and_then(|bound| self.goal(bound)),
        ))
    }

    /// Time after a spike until every request succeeds with normal latency.
    fn spike(&self, run: &Run, stage: &Stage) -> Result<Vec<Measure>> {
        let (normal, spike) = SPIKE_LOADS;
        let capacity = self.at_rest.capacity_per_s;
        let load = Load::start(run.plan(stage, normal * capacity))?;
        thread::sleep(run.phases.baseline);
        load.set_rate(spike * capacity)?;
        thread::sleep(run.phases.spike);
        load.set_rate(normal * capacity)?;
        let end = Instant::now();
        thread::sleep(run.phases.recovery);
        let requests = load.stop()?;
        let limit = self.max_p99();
        let is_bad =
            |request: &&Request| request.due >= end && (!request.ok() || request.took() > limit);
        let last = requests
            .iter()
            .filter(is_bad)
            .map(|request| request.due - end)
            .max();
        let goal = (!self.shedding.is_ratio(self.service)).then_some(Bound::AtMost(0.2));
        let goal = goal.and_then(|bound| self.goal(bound));
        Ok(vec![
            Measure::seconds("recovery", last.unwrap_or_default()).goal(goal),
        ])
    }

    /// Outcome beside a CPU neighbour, relative to the capacity without it.
    fn lost_cpu(&self, run: &Run, stage: &Stage, threads: u32) -> Result<Vec<Measure>> {
        let half = run.phases.beside_neighbour();
        let (load, _) = self.step(run, stage, NEIGHBOUR_LOAD)?;
        thread::sleep(half);
        let mut command = Command::new("taskset");
        let neighbour = Process::start(
            "the neighbour",
            command
                .args(["-c", "1"])
                .arg(program::need(&["stress-ng"])?)
                .args(["--cpu", &threads.to_string(), "--quiet"]),
        )?;
        let from = Instant::now();
        thread::sleep(half);
        let to = Instant::now();
        load.set_rate(1.0)?;
        thread::sleep(run.phases.drain);
        let requests = load.stop()?;
        drop(neighbour);
        // The service has less CPU now; the limit for a good response stays the same.
        Ok(measures(
            self.responses(&requests, from..to, NEIGHBOUR_LOAD),
            None,
            None,
        ))
    }

    /// Kills the agent under overload and measures how long its last signal stays in force.
    fn agent_dies(&self, run: &Run, stage: &mut Stage) -> Result<Vec<Measure>> {
        let (load, step) = self.step(run, stage, AGENT_LOAD)?;
        thread::sleep(run.phases.settle + run.phases.before_death);
        let death = Instant::now();
        stage.kill_agent()?;
        thread::sleep(run.phases.dead);
        let end = Instant::now();
        load.set_rate(1.0)?;
        thread::sleep(run.phases.drain);
        let requests = load.stop()?;
        let before = self.responses(&requests, step + run.phases.settle..death, AGENT_LOAD);
        let open_after = admits_all_after(&requests, death, end);
        let within = self.shedding.fail_open_within().as_secs_f64();
        Ok(vec![
            // If nothing were shed before, the next figure would mean nothing. Half of the load is excess.
            Measure::percent("shed before", before.shed).goal(Bound::AtLeast(25.0)),
            Measure::seconds("fail-open time", open_after.unwrap_or(end - death))
                .goal(Bound::AtMost(within)),
        ])
    }

    /// Kills the agent under overload, starts it again, and measures once its first page is alive.
    fn agent_returns(&self, run: &Run, stage: &mut Stage) -> Result<Vec<Measure>> {
        let (load, _) = self.step(run, stage, AGENT_LOAD)?;
        thread::sleep(run.phases.settle + run.phases.before_death);
        stage.kill_agent()?;
        thread::sleep(run.phases.dead);
        let started = Instant::now();
        stage.start_agent()?;
        let alive = Instant::now();
        thread::sleep(run.phases.returned);
        let end = Instant::now();
        load.set_rate(1.0)?;
        thread::sleep(run.phases.drain);
        let requests = load.stop()?;
        let responses = self.responses(&requests, alive..end, AGENT_LOAD);
        // Nobody can withdraw the requests that the service took during the absence; their clients have long given up.
        let backlog = worked_off(&requests, alive, end);
        let seconds = (end - alive).as_secs_f64();
        let left = 1.0 - backlog as f64 / seconds / self.at_rest.capacity_per_s;
        let mut all = vec![
            Measure::percent(
                "goodput of the capacity that the backlog left",
                responses.goodput / left.max(f64::MIN_POSITIVE),
            )
            .goal(Bound::AtLeast(90.0)),
        ];
        all.extend(measures(responses, None, None));
        all.push(Measure::percent(
            "capacity that the backlog took",
            1.0 - left,
        ));
        all.push(Measure::seconds("page alive after", alive - started));
        Ok(all)
    }
}

/// The number of requests sent before `from` that were served after it.
fn worked_off(requests: &[Request], from: Instant, to: Instant) -> usize {
    requests
        .iter()
        .filter(|request| request.ok() && request.due < from && (from..to).contains(&request.ended))
        .count()
}

fn measures(responses: Responses, goodput: Option<Bound>, p99: Option<Bound>) -> Vec<Measure> {
    vec![
        Measure::percent("goodput", responses.goodput).goal(goodput),
        Measure::ms("p99", responses.p99).goal(p99),
        Measure::percent("shed", responses.shed),
        Measure::percent("failed", responses.failed),
    ]
}
