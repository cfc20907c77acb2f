//! Connections that were answered and carry no request, and the workers that wait on them.

use std::collections::BTreeSet;

use crate::{
    diagnose::{case::Case, classify::Resource, topology::Link},
    event::Activity,
};

/// The idle connections of a service that works on no request.
pub(in crate::diagnose::rules) struct KeptAlive {
    /// Connections that it has accepted.
    pub(in crate::diagnose::rules) connections: usize,
    /// Those of them whose last data was a response. Some kernels do not show it if request and response fall into one tick
    /// of the timer.
    pub(in crate::diagnose::rules) answered: usize,
    /// The longest time since one of them carried data, ns.
    pub(in crate::diagnose::rules) silent_ns: u64,
    /// Threads that wait for the next request of one connection, and for nothing else.
    pub(in crate::diagnose::rules) workers: usize,
}

impl KeptAlive {
    /// `None`: a request is in service, or there are no connections.
    pub(in crate::diagnose::rules) fn of(case: Case<'_>) -> Option<Self> {
        /// More than half of its samples: a thread that takes one request after another is on a connection at times.
        const MIN_ON_A_CLIENT: f64 = 0.5;
        let topology = case.view.topology;
        let ours: BTreeSet<u32> = case
            .view
            .targets
            .get(case.target())?
            .tgids
            .iter()
            .copied()
            .collect();
        if topology.serve_any(&ours) {
            return None;
        }
        let links: Vec<&Link> = topology
            .links()
            .map(|(_, link)| link)
            .filter(|link| link.accepted && !link.closed_by_peer && ours.contains(&link.tgid))
            .collect();
        let threads = ours
            .iter()
            .flat_map(|tgid| case.view.window.of_process(*tgid));
        let workers = threads.filter(|(_, profile)| {
            let on_a_client = profile.by.iter().filter(|(seen, _)| {
                seen.activity == Activity::Idle && matches!(seen.resource, Resource::Client(_))
            });
            let samples: u32 = on_a_client.map(|(_, count)| count).sum();
            f64::from(samples) > f64::from(profile.samples) * MIN_ON_A_CLIENT
        });
        Some(Self {
            connections: links.len(),
            answered: links.iter().filter(|link| link.sent_last).count(),
            silent_ns: links.iter().map(|link| link.since_data_ns).max()?,
            workers: workers.count(),
        })
    }

    /// Each connection has a worker of its own.
    pub(in crate::diagnose::rules) fn has_a_worker_each(&self) -> bool {
        self.workers > 0 && self.workers >= self.connections
    }
}
