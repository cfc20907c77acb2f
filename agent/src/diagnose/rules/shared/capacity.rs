//! How many workers would keep up with the arrivals: utilization law, workers = arrival rate × service time ÷ target
//! utilization.

use crate::{
    diagnose::{case::Case, classify::Resource},
    event::Activity,
    queue::Kind,
    text::{duration, rate},
};

const SECOND_NS: f64 = 1e9;
/// Utilization at which a pool of workers or connections still has room for random arrivals. A rule of thumb: at 85% the
/// mean wait in an M/M/1 queue is 5.7 service times.
pub(in crate::diagnose::rules) const TARGET_UTILIZATION: f64 = 0.85;

/// Workers, what they serve, and how many would be enough.
pub(in crate::diagnose::rules) struct Capacity {
    workers: usize,
    /// Time for which one request occupies one worker.
    service_time_ns: u64,
    served_per_s: f64,
    arrivals_per_s: f64,
    needed: u64,
}

impl Capacity {
    /// `None` where the rates say nothing about requests, or where a request does not occupy a worker.
    pub(in crate::diagnose::rules) fn of(case: Case<'_>) -> Option<Self> {
        let first = case.first()?;
        let episode = case.episode;
        // Rates of bytes say nothing about requests.
        if matches!(
            episode.key.kind,
            Kind::Recv | Kind::Send | Kind::Udp | Kind::Pipe
        ) {
            return None;
        }
        // An event loop serves many requests at once: those that wait in it occupy none of its threads.
        if first.activity == Activity::Inside && matches!(first.resource, Resource::Connection(_)) {
            return None;
        }
        let served = episode.service_rate.filter(|rate| *rate > 0.0)?;
        let arrivals = episode
            .arrival_rate
            .map_or(served, |arrivals| arrivals.max(served));
        let workers = first.threads.len();
        let busy = 1.0 - case.share(Activity::Idle);
        let service_time_s = workers as f64 * busy / served;
        Some(Self {
            workers,
            service_time_ns: (service_time_s * SECOND_NS) as u64,
            served_per_s: served,
            arrivals_per_s: arrivals,
            needed: needed(arrivals, service_time_s).max(workers as u64 + 1),
        })
    }

    /// `3 workers × 150 ms per request serve 20/s, 30/s arrive: 6 workers would keep up`.
    pub(in crate::diagnose::rules) fn words(&self) -> String {
        format!(
            "{} workers × {} per request serve {}/s, {}/s arrive: {} workers would keep up",
            self.workers,
            duration(self.service_time_ns),
            rate(self.served_per_s),
            rate(self.arrivals_per_s),
            self.needed
        )
    }
}

/// How many workers or connections keep up, if each is occupied for `service_time_s` seconds.
pub(in crate::diagnose::rules) fn needed(arrivals_per_s: f64, service_time_s: f64) -> u64 {
    (arrivals_per_s * service_time_s / TARGET_UTILIZATION).ceil() as u64
}
