//! Two uWSGI servers behind HAProxy or Envoy.

use std::{
    cell::Cell,
    net::SocketAddr,
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use tailback_tests::{
    envoy::{self, CLUSTER, Endpoint, Envoy},
    load::{self, Load, Plan},
    ports,
};

use super::{
    super::{
        outcome::{latencies, ms, percentile},
        run::Run,
        scenario::Scenario,
    },
    Capacity, Group, Mover, Responses,
    haproxy::{Check, Haproxy, NAMES},
    servers::{BACKLOG, SERVICE_MS, Server, Tailback},
};

/// A response is good if it takes at most this long: five service times of a healthy server.
pub const GOOD_WITHIN: Duration = Duration::from_millis(5 * SERVICE_MS as u64);
/// Backlog where a server stalls: it is full soon.
const SHORT_BACKLOG: u32 = 32;
/// Load while the capacity is measured, requests per second: twice that of a healthy server.
const PROBE_PER_S: f64 = 200.0;

/// An open-loop load, until it is stopped.
pub fn plan(run: &Run, to: SocketAddr, per_s: f64) -> Plan {
    Plan {
        to,
        path: "/".to_owned(),
        per_s,
        spacing: run.spacing,
        duration: Duration::from_secs(3_600),
        timeout: Duration::from_secs(10),
        max_in_flight: 3_000,
    }
}

/// Measures a healthy and a slow server, both at once.
pub fn capacity(run: &Run) -> Result<Capacity> {
    let servers = [Server::start(BACKLOG)?, Server::start(BACKLOG)?];
    servers[1].set_service_time(2 * SERVICE_MS)?;
    let loads: Vec<Load> = servers
        .iter()
        .map(|server| Load::start(plan(run, server.uwsgi.address(), PROBE_PER_S)))
        .collect::<Result<_>>()?;
    thread::sleep(run.phases.probe_settle);
    let count = || -> Result<[u64; 2]> { Ok([servers[0].requests()?, servers[1].requests()?]) };
    let (began, before) = (Instant::now(), count()?);
    thread::sleep(run.phases.probe);
    let (seconds, after) = (began.elapsed().as_secs_f64(), count()?);
    drop(loads);
    let [healthy, slow] = [0, 1].map(|server| (after[server] - before[server]) as f64 / seconds);
    Ok(Capacity { healthy, slow })
}

/// The servers behind their proxy. Fields are dropped in this order.
pub struct Servers {
    load: Option<Load>,
    proxy: Proxy,
    agents: Vec<Tailback>,
    servers: [Server; 2],
    is_stalled: Cell<bool>,
}

enum Proxy {
    Haproxy(Haproxy),
    Envoy(Envoy),
}

impl Servers {
    pub fn start(run: &Run, mover: Mover, scenario: Scenario) -> Result<Self> {
        let backlog = match (mover, scenario) {
            (Mover::Ready | Mover::EnvoyReady, _) | (_, Scenario::StalledServer) => SHORT_BACKLOG,
            _ => BACKLOG,
        };
        let servers = [Server::start(backlog)?, Server::start(backlog)?];
        let addresses = [0, 1].map(|server| servers[server].uwsgi.address());
        let services = [0, 1].map(|server| (NAMES[server], servers[server].uwsgi.port()));
        let checks = [ports::free()?, ports::free()?];
        let mut agents = Vec::new();
        let mut start_agent = |services: &[(&str, u16)], adapters: &str| -> Result<()> {
            agents.push(Tailback::start(run.agent(), services, adapters)?);
            Ok(())
        };
        let proxy = match mover {
            Mover::Weight | Mover::Maxconn => {
                let check = if mover == Mover::Weight {
                    Check::Weight(checks)
                } else {
                    Check::Maxconn(checks)
                };
                start_agent(&services, &check.adapters())?;
                Proxy::Haproxy(Haproxy::start(addresses, check)?)
            }
            Mover::Ready => {
                let check = Check::Ready(checks[0]);
                start_agent(&services, &check.adapters())?;
                Proxy::Haproxy(Haproxy::start(addresses, check)?)
            }
            Mover::EnvoyReady => {
                // Envoy requests the same path of all endpoints: each server has an agent of its own, as on two nodes.
                let mut endpoints = Vec::new();
                for server in [0, 1] {
                    let adapters = format!(
                        "http.listen = \"127.0.0.1:{}\"\n[[signal.group]]\ntargets = [\"{}\"]\nmin_ready = 0\n",
                        checks[server], NAMES[server]
                    );
                    start_agent(&[services[server]], &adapters)?;
                    endpoints.push(Endpoint {
                        server: addresses[server],
                        health_port: Some(checks[server]),
                    });
                }
                Proxy::Envoy(Envoy::start(|front| {
                    envoy::forward(front, &endpoints, None)
                })?)
            }
            Mover::RoundRobin | Mover::GrpcRoundRobin | Mover::Orca => {
                Proxy::Haproxy(Haproxy::start(addresses, Check::None)?)
            }
        };
        Ok(Self {
            load: None,
            proxy,
            agents,
            servers,
            is_stalled: Cell::new(false),
        })
    }

    fn requests(&self) -> Vec<load::Request> {
        self.load.as_ref().map(Load::done).unwrap_or_default()
    }
}

impl Group for Servers {
    fn start_load(&mut self, run: &Run, per_s: f64) -> Result<()> {
        let front = match &self.proxy {
            Proxy::Haproxy(haproxy) => haproxy.address(),
            Proxy::Envoy(envoy) => envoy.address(),
        };
        self.load = Some(Load::start(plan(run, front, per_s))?);
        Ok(())
    }

    fn slow_down(&self) -> Result<()> {
        self.servers[1].set_service_time(2 * SERVICE_MS)
    }

    fn stall(&self) -> Result<()> {
        self.is_stalled.set(true);
        self.servers[1].uwsgi.process().freeze_group()
    }

    fn agents(&mut self) -> &mut [Tailback] {
        &mut self.agents
    }

    fn is_even(&self) -> Result<bool> {
        match &self.proxy {
            Proxy::Haproxy(haproxy) => haproxy.is_even(),
            Proxy::Envoy(envoy) => Ok(envoy.unhealthy(CLUSTER)?.is_empty()),
        }
    }

    /// By uWSGI's own count. A stalled server completes nothing, and does not answer.
    fn completed(&self) -> Result<[f64; 2]> {
        let mut completed = [self.servers[0].requests()? as f64, 0.0];
        if !self.is_stalled.get() {
            completed[1] = self.servers[1].requests()? as f64;
        }
        Ok(completed)
    }

    fn responses(&self, span: Range<Instant>) -> Result<Responses> {
        let requests = self.requests();
        let in_span = || {
            let is_in = |request: &&load::Request| span.contains(&request.due);
            requests.iter().filter(is_in)
        };
        let good = in_span().filter(|request| request.ok() && request.took() <= GOOD_WITHIN);
        let seconds = (span.end - span.start).as_secs_f64();
        Ok(Responses {
            good_per_s: good.count() as f64 / seconds,
            p99_ms: Some(ms(percentile(&latencies(in_span()), 0.99))),
        })
    }
}
