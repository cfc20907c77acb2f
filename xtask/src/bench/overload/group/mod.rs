//! Consumers that move load between two servers instead of rejecting it.
//!
//! One server loses half of its speed, or all of it, while the load stays below the joint capacity. If the load is balanced evenly,
//! that server is overloaded. The loop is closed if nearly all requests are still answered in time.

mod autoscaler;
mod grpc;
mod haproxy;
mod http;
mod keda;
mod play;
mod servers;

use std::{ops::Range, time::Instant};

use anyhow::{Context as _, Result};

use super::{outcome::Outcome, run::Run, scenario::Scenario};
use servers::Tailback;

pub use keda::{DAY, play as scale};

/// What balances the load between two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// HAProxy's round robin, without Tailback.
    RoundRobin,
    /// HAProxy, by the weight of the agent-check.
    Weight,
    /// HAProxy, by the `maxconn` of the agent-check.
    Maxconn,
    /// HAProxy, by its own health check of `/ready`.
    Ready,
    /// Envoy, by its own health check of `/ready`.
    EnvoyReady,
    /// gRPC's round robin, without Tailback.
    GrpcRoundRobin,
    /// gRPC's weighted round robin, by load reports.
    Orca,
}

/// Requests per second that a server can handle.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    pub healthy: f64,
    /// With half of its speed.
    pub slow: f64,
}

/// What is measured once per round: capacities, of HTTP and of gRPC servers.
#[derive(Default)]
pub struct Cache {
    http: Option<Capacity>,
    grpc: Option<Capacity>,
}

/// Two servers and what balances between them, with or without agents.
trait Group {
    /// Starts an open-loop load.
    fn start_load(&mut self, run: &Run, per_s: f64) -> Result<()>;

    /// Halves the speed of the second server.
    fn slow_down(&self) -> Result<()>;

    /// Stops all work of the second server, which still accepts connections.
    fn stall(&self) -> Result<()>;

    fn agents(&mut self) -> &mut [Tailback];

    /// Whether both servers are treated alike.
    fn is_even(&self) -> Result<bool>;

    /// Requests that each server has completed so far.
    fn completed(&self) -> Result<[f64; 2]>;

    /// Responses in a time span.
    fn responses(&self, span: Range<Instant>) -> Result<Responses>;
}

/// Responses in a time span.
struct Responses {
    /// In time, per second.
    good_per_s: f64,
    /// 99th percentile of the successful ones, ms, if known.
    p99_ms: Option<f64>,
}

impl Mover {
    fn is_grpc(self) -> bool {
        matches!(self, Self::GrpcRoundRobin | Self::Orca)
    }

    fn has_agent(self) -> bool {
        !matches!(self, Self::RoundRobin | Self::GrpcRoundRobin)
    }

    /// Capacity of the servers that it balances, measured once per round.
    fn capacity(self, run: &mut Run) -> Result<Capacity> {
        let known = if self.is_grpc() {
            run.groups.grpc
        } else {
            run.groups.http
        };
        if let Some(known) = known {
            return Ok(known);
        }
        let capacity = if self.is_grpc() {
            grpc::capacity(run)
        } else {
            http::capacity(run)
        };
        let capacity = capacity.context("measure the capacity of the servers")?;
        if self.is_grpc() {
            run.groups.grpc = Some(capacity);
        } else {
            run.groups.http = Some(capacity);
        }
        Ok(capacity)
    }
}

/// Starts the servers and plays a scenario.
pub fn play(run: &mut Run, mover: Mover, scenario: Scenario) -> Result<Outcome> {
    let capacity = mover.capacity(run)?;
    let group: Box<dyn Group> = if mover.is_grpc() {
        Box::new(grpc::Servers::start(run, mover)?)
    } else {
        Box::new(http::Servers::start(run, mover, scenario)?)
    };
    play::Subject {
        mover,
        capacity,
        group,
    }
    .play(run, scenario)
}
