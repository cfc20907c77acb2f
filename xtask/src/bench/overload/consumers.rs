//! The table of all consumers of Tailback's signal.
//!
//! To add one: a row here, with a function that plays the scenarios, and a row in docs/appendix/benchmarks.md.

use anyhow::Result;
use clap::builder::PossibleValue;

use super::{
    group::{self, Mover},
    outcome::Outcome,
    run::Run,
    scenario::{
        Scenario,
        ScenarioKind::{
            self, AgentDies, AgentReturns, Day, Load, LostCpu, SlowServer, Spike, StalledServer,
        },
    },
    service::Service::{
        self, CThreads, GoNetHttp, NginxUwsgi, NodeHttp, RustTower, UwsgiPostgresql,
    },
    shedding::{Proxy, Shedding},
};

/// One consumer.
pub struct Consumer {
    /// For `--consumer`, as in the documentation.
    pub name: &'static str,
    pub kind: Kind,
    /// What decides, and by which value.
    pub title: &'static str,
    /// Parts of `cargo xtask setup` that it needs besides those of its services and scenarios.
    pub needs: &'static [&'static str],
    pub scenarios: &'static [ScenarioKind],
    pub play: Play,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No consumer: what happens without Tailback.
    Baseline,
    /// Rejects the excess.
    Sheds,
    /// Sends work to other instances, or adds some.
    MovesLoad,
}

/// How its scenarios are played.
pub enum Play {
    /// In front of or in each of these services.
    Shed(Shedding, &'static [Service]),
    /// With instances of its own.
    Own(fn(&mut Run, Scenario) -> Result<Outcome>),
}

/// Their workers take a request when they are free.
const WORKERS: &[Service] = &[UwsgiPostgresql, NginxUwsgi];
/// Envoy lets at least one request wait for a connection, without a deadline. Where there are only two workers, that is too long.
const FOUR_WORKERS: &[Service] = &[UwsgiPostgresql];
const WITHOUT_AGENT: &[ScenarioKind] = &[Load, Spike, LostCpu];
const ALL: &[ScenarioKind] = &[Load, Spike, LostCpu, AgentDies, AgentReturns];
const TWO: &[ScenarioKind] = &[Load, AgentDies];
const MOVES: &[ScenarioKind] = &[SlowServer, StalledServer, AgentDies, AgentReturns];
const DRAINS: &[ScenarioKind] = &[StalledServer, AgentDies, AgentReturns];
const HAPROXY: &[&str] = &["haproxy", "uWSGI"];
const GRPC: &[&str] = &["Go", "nginx"];

const NO_PAGE: Shedding = Shedding {
    reads_page: false,
    proxy: Proxy::Forward,
};
const PAGE: Shedding = Shedding {
    reads_page: true,
    ..NO_PAGE
};

#[rustfmt::skip]
pub const CONSUMERS: &[Consumer] = &[
    baseline("nothing", "no protection", NO_PAGE, WORKERS),
    baseline("static", "HAProxy: a limit tuned by hand for the service", behind(Proxy::Static), WORKERS),
    sheds("page-python", "uWSGI: the max queue wait", ALL, PAGE, WORKERS),
    sheds("page-go", "net/http: the admit ratio", ALL, PAGE, &[GoNetHttp]),
    sheds("page-node", "Node: the max queue wait, since X-Request-Start", ALL, PAGE, &[NodeHttp]),
    sheds("page-rust", "tower: the admit ratio", ALL, PAGE, &[RustTower]),
    sheds("page-c", "threads: the max queue wait", ALL, PAGE, &[CThreads]),
    sheds("maxconn", "HAProxy: the concurrency limit", ALL, behind(Proxy::Maxconn), WORKERS),
    Consumer { needs: &["Envoy"], ..sheds("envoy", "Envoy: the concurrency limit", ALL, behind(Proxy::Envoy), FOUR_WORKERS) },
    sheds("page+maxconn", "both at once", TWO, Shedding { proxy: Proxy::Maxconn, ..PAGE }, &[UwsgiPostgresql]),
    Consumer {
        kind: Kind::Baseline,
        ..moves("round-robin", "HAProxy: round robin over two servers", &[SlowServer, StalledServer], HAPROXY,
            |run, scenario| group::play(run, Mover::RoundRobin, scenario))
    },
    Consumer {
        kind: Kind::Baseline,
        ..moves("grpc-round-robin", "gRPC: round robin over two servers", &[SlowServer], GRPC,
            |run, scenario| group::play(run, Mover::GrpcRoundRobin, scenario))
    },
    moves("balance-weight", "HAProxy: the weight and drain of two servers", MOVES, HAPROXY,
        |run, scenario| group::play(run, Mover::Weight, scenario)),
    moves("balance-maxconn", "HAProxy: the concurrency limits of two servers", MOVES, HAPROXY,
        |run, scenario| group::play(run, Mover::Maxconn, scenario)),
    moves("ready", "HAProxy: its health check of `/ready`", DRAINS, HAPROXY,
        |run, scenario| group::play(run, Mover::Ready, scenario)),
    moves("envoy-ready", "Envoy: its health check of `/ready`", DRAINS, &["Envoy", "uWSGI"],
        |run, scenario| group::play(run, Mover::EnvoyReady, scenario)),
    moves("orca", "gRPC: weighted round robin by load reports", &[SlowServer, AgentDies, AgentReturns], GRPC,
        |run, scenario| group::play(run, Mover::Orca, scenario)),
    moves("keda", "an autoscaler that reads the load from Tailback's external scaler for KEDA", &[Day], &["Go", "haproxy", "uWSGI"], group::scale),
];

const fn baseline(
    name: &'static str,
    title: &'static str,
    shedding: Shedding,
    services: &'static [Service],
) -> Consumer {
    Consumer {
        kind: Kind::Baseline,
        ..sheds(name, title, WITHOUT_AGENT, shedding, services)
    }
}

const fn sheds(
    name: &'static str,
    title: &'static str,
    scenarios: &'static [ScenarioKind],
    shedding: Shedding,
    services: &'static [Service],
) -> Consumer {
    Consumer {
        name,
        kind: Kind::Sheds,
        title,
        needs: &["haproxy"],
        scenarios,
        play: Play::Shed(shedding, services),
    }
}

const fn moves(
    name: &'static str,
    title: &'static str,
    scenarios: &'static [ScenarioKind],
    needs: &'static [&'static str],
    play: fn(&mut Run, Scenario) -> Result<Outcome>,
) -> Consumer {
    Consumer {
        name,
        kind: Kind::MovesLoad,
        title,
        needs,
        scenarios,
        play: Play::Own(play),
    }
}

const fn behind(proxy: Proxy) -> Shedding {
    Shedding { proxy, ..NO_PAGE }
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Sheds => "sheds",
            Self::MovesLoad => "moves load",
        }
    }
}

impl Consumer {
    /// The services that it is measured with; none if it has instances of its own.
    pub fn services(&self) -> &'static [Service] {
        match self.play {
            Play::Shed(_, services) => services,
            Play::Own(_) => &[],
        }
    }
}

/// For the command line, with their titles.
pub fn possible_values() -> impl Iterator<Item = PossibleValue> {
    CONSUMERS
        .iter()
        .map(|consumer| PossibleValue::new(consumer.name).help(consumer.title))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tools;

    #[test]
    fn the_documentation_has_a_row_for_every_consumer() -> Result<()> {
        let page = fs::read_to_string(tools::root().join("docs/appendix/benchmarks.md"))?;
        for consumer in CONSUMERS {
            let row = format!("| `{}` | {} |", consumer.name, consumer.title);
            assert!(page.contains(&row), "no row {row}");
        }
        Ok(())
    }

    #[test]
    fn every_consumer_has_its_own_name() {
        let names: std::collections::BTreeSet<&str> =
            CONSUMERS.iter().map(|consumer| consumer.name).collect();
        assert_eq!(names.len(), CONSUMERS.len());
    }
}
