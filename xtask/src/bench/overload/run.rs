//! State that the parts of one run share: what was built, and what the services do at rest.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    postgres::Postgres,
};

use super::{
    group,
    outcome::{latencies, percentile},
    scenario::Phases,
    service::{Programs, Service},
    shedding::{Proxy, Shedding},
    stage::Stage,
};

/// The longest load of a scenario; each one ends its load before.
const LOAD_LIMIT: Duration = Duration::from_secs(3_600);
/// Load at rest, and while the capacity is measured, relative to workers ÷ service time.
const REST_LOAD: f64 = 0.3;
const PROBE_LOAD: f64 = 2.0;
/// Load before that, so that every worker has been used: each connects to its database at its first request.
const WARM_UP_LOAD: f64 = 1.0;

pub struct Run {
    pub phases: Phases,
    pub spacing: Spacing,
    /// Workers of uwsgi-postgresql.
    sql_workers: u32,
    agent: PathBuf,
    programs: Programs,
    /// Started for the first service that needs it.
    postgres: Option<Postgres>,
    at_rest: Vec<(Service, Result<AtRest, String>)>,
    /// Capacities of the servers that load is moved between.
    pub groups: group::Cache,
}

/// A service without overload.
#[derive(Clone, Copy, Debug)]
pub struct AtRest {
    /// Requests per second.
    pub capacity_per_s: f64,
    pub median: Duration,
    pub p99: Duration,
}

impl Run {
    pub fn new(phases: Phases, sql_workers: u32, agent: PathBuf, programs: Programs) -> Self {
        Self {
            phases,
            spacing: Spacing::Even,
            sql_workers,
            agent,
            programs,
            postgres: None,
            at_rest: Vec::new(),
            groups: group::Cache::default(),
        }
    }

    /// Starts a round: the services are measured at rest again.
    pub fn begin_round(&mut self, spacing: Spacing) {
        self.spacing = spacing;
        self.at_rest.clear();
        self.groups = group::Cache::default();
    }

    /// The agent's program.
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    pub fn workers(&self, service: Service) -> u32 {
        match service {
            Service::UwsgiPostgresql => self.sql_workers,
            _ => service.default_workers(),
        }
    }

    pub fn postgres_port(&mut self, service: Service) -> Result<Option<u16>> {
        if service != Service::UwsgiPostgresql {
            return Ok(None);
        }
        let postgres = match self.postgres.take() {
            Some(postgres) => postgres,
            None => Postgres::start()?,
        };
        Ok(Some(self.postgres.insert(postgres).port()))
    }

    /// An open-loop load through HAProxy, until it is stopped.
    pub fn plan(&self, stage: &Stage, per_s: f64) -> Plan {
        Plan {
            to: stage.front,
            path: stage.service.path().to_owned(),
            per_s,
            spacing: self.spacing,
            duration: LOAD_LIMIT,
            timeout: Duration::from_secs(10),
            max_in_flight: 3_000,
        }
    }

    /// The service without overload, measured once per round.
    pub fn at_rest(&mut self, service: Service) -> Result<AtRest> {
        if !self.at_rest.iter().any(|(known, _)| *known == service) {
            let measured = self.measure_at_rest(service);
            self.at_rest
                .push((service, measured.map_err(|error| format!("{error:#}"))));
        }
        let known = self.at_rest.iter().find(|(known, _)| *known == service);
        match known {
            Some((_, Ok(at_rest))) => Ok(*at_rest),
            Some((_, Err(error))) => Err(anyhow!("{} at rest: {error}", service.name())),
            None => Err(anyhow!("{} was not measured at rest", service.name())),
        }
    }

    fn measure_at_rest(&mut self, service: Service) -> Result<AtRest> {
        let nothing = Shedding {
            reads_page: false,
            proxy: Proxy::Forward,
        };
        let stage = Stage::start(self, service, nothing)?;
        // Without waiting, each worker completes a request per service time.
        let nominal_per_s = f64::from(self.workers(service)) / service.service_time().as_secs_f64();
        let load = Load::start(self.plan(&stage, WARM_UP_LOAD * nominal_per_s))?;
        thread::sleep(self.phases.warm_up);
        load.set_rate(REST_LOAD * nominal_per_s)?;
        // The backlog of the warm-up, if any, drains.
        thread::sleep(self.phases.warm_up);
        let start = Instant::now();
        thread::sleep(self.phases.rest);
        let overload = Instant::now();
        load.set_rate(PROBE_LOAD * nominal_per_s)?;
        thread::sleep(self.phases.probe_settle + self.phases.probe);
        let requests = load.stop()?;
        let counted = overload + self.phases.probe_settle;
        let span = counted..counted + self.phases.probe;
        let completed = requests
            .iter()
            .filter(|request| request.ok() && span.contains(&request.ended));
        let capacity_per_s = completed.count() as f64 / self.phases.probe.as_secs_f64();
        ensure!(capacity_per_s > 0.0, "no request succeeded under overload");
        // A request that was due just before the step may have waited behind those after it.
        let rest = start
            ..overload
                .checked_sub(service.service_time())
                .unwrap_or(overload);
        let took = latencies(
            requests
                .iter()
                .filter(|request| rest.contains(&request.due)),
        );
        Ok(AtRest {
            capacity_per_s,
            median: percentile(&took, 0.5),
            p99: percentile(&took, 0.99),
        })
    }
}
