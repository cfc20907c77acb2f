//! Autoscaling by KEDA's external scaler: instances come and go as Kubernetes' autoscaler would decide by Tailback's load.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    cgroup::Cgroup,
    grpc::build,
    load::{Load, Plan, Request, Spacing},
    ports,
    temp::TempDir,
};

use super::{
    super::{
        outcome::{Bound, Measure, Outcome},
        run::Run,
        scenario::Scenario,
        shedding::{POLL_INTERVAL as PAGE_INTERVAL, TTL},
    },
    Mover,
    autoscaler::{Autoscaler, Settings, direction_changes},
    haproxy::Haproxy,
    http::{GOOD_WITHIN, plan},
    servers::{Server, Tailback},
};

/// Kubernetes polls every 15 s and scales down after 300 s. A day of [`DAY`] is ten times as fast, with as many decisions.
const POLL_INTERVAL: Duration = Duration::from_millis(1_500);
const DOWN_WINDOW: Duration = Duration::from_secs(30);
/// Kubernetes' default.
const TOLERANCE: f64 = 0.1;
const MAX_REPLICAS: u32 = 4;
/// Load that one instance should carry: the scaler's default.
const TARGET_LOAD: f64 = 0.8;
/// The load at these seconds, in capacities of one instance; linear in between. Night, morning, midday, evening, night.
const CURVE: [(f64, f64); 6] = [
    (0.0, 0.5),
    (10.0, 0.5),
    (45.0, 2.2),
    (70.0, 2.2),
    (100.0, 0.5),
    (140.0, 0.5),
];
/// Length of the curve.
pub const DAY: Duration = Duration::from_secs(140);
/// Seconds at which the agent is killed and started again: while the load is high.
const AGENT_GONE: (f64, f64) = (52.0, 56.0);
/// How often the load follows the curve.
const STEP: Duration = Duration::from_millis(100);
/// Time for the requests in flight to an instance that is removed.
const DRAIN: Duration = Duration::from_millis(500);

/// The load at this second.
fn curve(second: f64) -> f64 {
    let parts = CURVE.windows(2).map(|part| (part[0], part[1]));
    let mut part = parts.filter(|((from, _), (to, _))| (*from..=*to).contains(&second));
    part.next().map_or(0.0, |((from, low), (to, high))| {
        low + (high - low) * (second - from) / (to - from)
    })
}

/// The instances. Dropped before their cgroup, by which the agent finds them.
struct Instances {
    servers: Vec<Server>,
    cgroup: Cgroup,
}

impl Instances {
    /// Starts or removes instances. HAProxy has a slot for each.
    fn scale(&mut self, haproxy: &Haproxy, replicas: u32) -> Result<()> {
        let set = |slot: usize, what: &str| -> Result<()> {
            let reply = haproxy.command(&format!("set server back/s{slot} {what}"))?;
            let is_done = reply.trim().is_empty() || reply.contains("changed from");
            ensure!(is_done, "HAProxy did not set {what}: {reply}");
            Ok(())
        };
        while self.servers.len() < replicas as usize {
            let server = Server::start_in(&self.cgroup)?;
            let slot = self.servers.len();
            set(
                slot,
                &format!("addr 127.0.0.1 port {}", server.uwsgi.port()),
            )?;
            set(slot, "state ready")?;
            self.servers.push(server);
        }
        while self.servers.len() > replicas as usize {
            set(self.servers.len() - 1, "state maint")?;
            thread::sleep(DRAIN);
            self.servers.pop();
        }
        Ok(())
    }
}

/// The load as the scaler reports it to KEDA; `None` if it reports that it does not know it.
fn ask(scaler: &Path, port: u16) -> Result<Option<f64>> {
    let mut command = Command::new(scaler);
    command
        .arg("-metrics")
        .arg(format!("127.0.0.1:{port}"))
        .args(["target=shop", &format!("targetLoad={TARGET_LOAD}")]);
    let output = command.output().context("start the scaler's client")?;
    let response: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        format!("read the scaler's response: {errors}")
    })?;
    let metrics = &response["metrics"];
    if metrics[0]["metricName"].is_string() {
        // A value of 0 is left out.
        return Ok(Some(metrics[0]["metricValueFloat"].as_f64().unwrap_or(0.0)));
    }
    let error = metrics.as_str().unwrap_or_default();
    ensure!(
        error.starts_with("Unavailable"),
        "the scaler responded {response}"
    );
    Ok(None)
}

/// Plays a day: the instances follow the load, and the agent is gone for a while.
pub fn play(run: &mut Run, scenario: Scenario) -> Result<Outcome> {
    ensure!(scenario == Scenario::Day, "an autoscaler plays a day only");
    let capacity = Mover::RoundRobin.capacity(run)?.healthy;
    let temp = TempDir::new("keda")?;
    let scaler = build(&temp, "scaler")?;
    let port = ports::free()?;
    let mut instances = Instances {
        servers: Vec::new(),
        cgroup: Cgroup::new()?,
    };
    let slots = (0..MAX_REPLICAS).map(|slot| format!(" server s{slot} 127.0.0.1:1 disabled\n"));
    let haproxy = Haproxy::start_with(&slots.collect::<String>())?;
    instances.scale(&haproxy, 1)?;
    let target = format!(
        "[[target]]\ncgroup = \"{}\"\nservice_name = \"shop\"\n",
        instances.cgroup.path().display()
    );
    let keda = format!("keda.listen = \"127.0.0.1:{port}\"\n");
    let mut agent = Tailback::start_with(run.agent(), &["shop"], &target, &keda)?;
    let mut autoscaler = Autoscaler::new(Settings {
        target: TARGET_LOAD,
        tolerance: TOLERANCE,
        down_window: DOWN_WINDOW,
        min: 1,
        max: MAX_REPLICAS,
    });
    let load = Load::start(Plan {
        spacing: Spacing::Poisson { seed: 1 },
        ..plan(run, haproxy.address(), curve(0.0) * capacity)
    })?;
    let start = Instant::now();
    let mut next_poll = Duration::ZERO;
    let mut replicas = vec![1];
    let (mut death, mut unknown_after, mut has_returned) = (None, None, false);
    while start.elapsed() < DAY {
        let second = start.elapsed().as_secs_f64();
        load.set_rate(curve(second) * capacity)?;
        if death.is_none() && second >= AGENT_GONE.0 {
            death = Some(Instant::now());
            agent.kill_agent()?;
        }
        if !has_returned && second >= AGENT_GONE.1 {
            has_returned = true;
            agent.start_agent()?;
        }
        if start.elapsed() >= next_poll {
            next_poll += POLL_INTERVAL;
            let sum = ask(&scaler, port)?;
            if let (None, Some(death), None) = (sum, death, unknown_after) {
                unknown_after = Some(death.elapsed());
            }
            let now = replicas[replicas.len() - 1];
            let desired = autoscaler.decide(start.elapsed(), now, sum);
            instances.scale(&haproxy, desired)?;
            replicas.push(desired);
        }
        thread::sleep(STEP);
    }
    let requests = load.stop()?;
    let is_good = |request: &&Request| request.ok() && request.took() <= GOOD_WITHIN;
    let good = requests.iter().filter(is_good).count() as f64 / requests.len().max(1) as f64;
    let changes = direction_changes(&replicas) as f64;
    let most = replicas.iter().max().copied().unwrap_or_default();
    let within = (TTL + 2 * PAGE_INTERVAL + POLL_INTERVAL).as_secs_f64();
    Ok(Outcome(vec![
        Measure::number("changes of direction", "", changes).goal(Bound::AtMost(1.0)),
        Measure::percent("goodput", good).goal(Bound::AtLeast(95.0)),
        Measure::number("most instances", "", f64::from(most)),
        Measure::seconds("no value after", unknown_after.unwrap_or(DAY))
            .goal(Bound::AtMost(within)),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_follows_the_curve() {
        assert_eq!((curve(0.0), curve(10.0), curve(60.0)), (0.5, 0.5, 2.2));
        assert!((curve(27.5) - 1.35).abs() < 1e-9);
        assert_eq!(curve(DAY.as_secs_f64()), 0.5);
    }
}
