//! gRPC's own load balancers in front of two servers: round robin, and weighted round robin by Tailback's ORCA load reports.

use std::{
    ops::Range,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tailback_tests::{
    cgroup::Cgroup,
    grpc::{Backend, build},
    process::Process,
    temp::TempDir,
};

use super::{
    super::run::Run, Capacity, Group, Mover, Responses, haproxy::NAMES, servers::Tailback,
};

/// CPU time of a call, ms.
const SERVICE_MS: u32 = 4;
/// CPUs that a server may use. So it takes 10 ms for a call.
const CPUS: f64 = 0.4;
/// A response is good if it takes at most this long: five times what a healthy server takes.
const GOOD_WITHIN: Duration = Duration::from_millis(50);
/// Load while the capacity is measured, requests per second: more than a healthy server can handle.
const PROBE_PER_S: f64 = 130.0;
/// Interval of the client's reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Share of completed calls from which the slow server counts as treated like the other one. At the load of these scenarios
/// it is 47% to 49% with even shares, and a third by capacity.
const EVEN_SHARE: f64 = 0.44;

/// A server with a limited share of a CPU. Dropped in this order: the cgroup must be empty.
struct Server {
    backend: Backend,
    _cgroup: Cgroup,
}

/// The programs, built for each scenario: from the second time on, Go finds all in its cache.
struct Programs {
    server: PathBuf,
    client: PathBuf,
    _temp: TempDir,
}

impl Programs {
    fn build() -> Result<Self> {
        let temp = TempDir::new("grpc-programs")?;
        Ok(Self {
            server: build(&temp, "server")?,
            client: build(&temp, "balanced")?,
            _temp: temp,
        })
    }

    fn server(&self) -> Result<Server> {
        let cgroup = Cgroup::with_cpus(CPUS)?;
        let backend = Backend::start(&self.server, &cgroup.prefix(), SERVICE_MS)?;
        Ok(Server {
            backend,
            _cgroup: cgroup,
        })
    }

    fn client(&self, policy: &str, per_s: f64, servers: &[Server]) -> Result<Client> {
        let servers: Vec<String> = servers
            .iter()
            .map(|server| server.backend.front().to_string())
            .collect();
        let mut command = Command::new(&self.client);
        command
            .args(["-policy", policy, "-good"])
            .arg(format!("{}ms", GOOD_WITHIN.as_millis()))
            .arg(format!("{per_s:.0}"))
            .args(&servers);
        let process = Process::start("the gRPC client", &mut command)?;
        Ok(Client { process, servers })
    }
}

/// The load: calls at a constant rate.
struct Client {
    process: Process,
    servers: Vec<String>,
}

/// Calls that were completed in a time span.
#[derive(Debug, Default)]
struct Calls {
    reports: u32,
    good: f64,
    of: Vec<f64>,
}

impl Client {
    /// Sums the reports of a time span; each one covers a second.
    fn calls(&self, span: &Range<Instant>) -> Result<Calls> {
        self.process.check_running()?;
        let mut calls = Calls {
            of: vec![0.0; self.servers.len()],
            ..Calls::default()
        };
        for line in self.process.lines().all() {
            if !span.contains(&line.at) || !line.text.starts_with('{') {
                continue;
            }
            let counts: Value =
                serde_json::from_str(&line.text).context("read the client's report")?;
            let count = |key: &str| counts[key].as_f64().unwrap_or(0.0);
            calls.reports += 1;
            calls.good += count("good");
            for (of, server) in calls.of.iter_mut().zip(&self.servers) {
                *of += count(server);
            }
        }
        Ok(calls)
    }
}

/// Measures a healthy and a slow server.
pub fn capacity(run: &Run) -> Result<Capacity> {
    let programs = Programs::build()?;
    let measure = |service_ms: u32| -> Result<f64> {
        let server = [programs.server()?];
        server[0].backend.set_service_time(service_ms)?;
        let client = programs.client("round_robin", PROBE_PER_S, &server)?;
        thread::sleep(run.phases.probe_settle);
        let began = Instant::now();
        thread::sleep(run.phases.probe);
        let calls = client.calls(&(began..Instant::now()))?;
        Ok(calls.of[0] / f64::from(calls.reports.max(1)))
    };
    Ok(Capacity {
        healthy: measure(SERVICE_MS)?,
        slow: measure(2 * SERVICE_MS)?,
    })
}

/// The servers, and the client that balances. Fields are dropped in this order.
pub struct Servers {
    client: Option<(Client, Instant)>,
    agents: Vec<Tailback>,
    servers: [Server; 2],
    policy: &'static str,
    programs: Programs,
}

impl Servers {
    pub fn start(run: &Run, mover: Mover) -> Result<Self> {
        let programs = Programs::build()?;
        let servers = [programs.server()?, programs.server()?];
        let mut agents = Vec::new();
        let policy = if mover == Mover::Orca {
            let mut adapters = String::new();
            for (name, server) in NAMES.iter().zip(&servers) {
                adapters += &format!(
                    "[[signal.orca]]\ntarget = \"{name}\"\nlisten = \"127.0.0.1:{}\"\n",
                    server.backend.orca_port()
                );
            }
            let services = [0, 1].map(|server| (NAMES[server], servers[server].backend.port()));
            agents.push(Tailback::start(run.agent(), &services, &adapters)?);
            "weighted_round_robin"
        } else {
            "round_robin"
        };
        Ok(Self {
            client: None,
            agents,
            servers,
            policy,
            programs,
        })
    }

    /// The client, and when it was started.
    fn client(&self) -> Result<&(Client, Instant)> {
        self.client.as_ref().context("the load was not started")
    }
}

impl Group for Servers {
    fn start_load(&mut self, _run: &Run, per_s: f64) -> Result<()> {
        let client = self.programs.client(self.policy, per_s, &self.servers)?;
        self.client = Some((client, Instant::now()));
        Ok(())
    }

    fn slow_down(&self) -> Result<()> {
        self.servers[1].backend.set_service_time(2 * SERVICE_MS)
    }

    fn stall(&self) -> Result<()> {
        bail!("gRPC servers do not play this scenario")
    }

    fn agents(&mut self) -> &mut [Tailback] {
        &mut self.agents
    }

    fn is_even(&self) -> Result<bool> {
        let (client, _) = self.client()?;
        let now = Instant::now();
        let of = client.calls(&(now - REPORT_INTERVAL..now))?.of;
        let all: f64 = of.iter().sum();
        Ok(all > 0.0 && of[1] / all > EVEN_SHARE)
    }

    fn completed(&self) -> Result<[f64; 2]> {
        let (client, start) = self.client()?;
        let of = client.calls(&(*start..Instant::now()))?.of;
        Ok([of[0], of[1]])
    }

    fn responses(&self, span: Range<Instant>) -> Result<Responses> {
        let (client, _) = self.client()?;
        let calls = client.calls(&span)?;
        Ok(Responses {
            good_per_s: calls.good / f64::from(calls.reports.max(1)),
            p99_ms: None,
        })
    }
}
