//! Connections that their peers have closed and the service has not: each keeps a descriptor.

use std::{collections::BTreeMap, net::SocketAddr};

use super::culprit;
use crate::{
    diagnose::{case::Case, topology::Link},
    event::Culprit,
    text::{count, duration},
};

/// The connections of a service that it should have closed.
pub(in crate::diagnose::rules) struct Unclosed {
    /// All of them.
    pub(in crate::diagnose::rules) connections: u64,
    /// Those that it accepted.
    pub(in crate::diagnose::rules) accepted: u64,
    /// The process that holds most of them.
    pub(in crate::diagnose::rules) tgid: u32,
    /// Where most of them lead: the port that they were accepted on, or the address that they were opened to.
    end: End,
    of_end: u64,
    /// The longest time since one of them carried data, ns.
    silent_ns: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Port(u16),
    Remote(SocketAddr),
}

impl Unclosed {
    /// `None`: there are none.
    pub(in crate::diagnose::rules) fn of(case: Case<'_>) -> Option<Self> {
        let links = case
            .view
            .topology
            .unclosed(case.target(), case.view.targets);
        let mut by_end: BTreeMap<End, u64> = BTreeMap::new();
        let mut by_process: BTreeMap<u32, u64> = BTreeMap::new();
        for link in &links {
            *by_end.entry(End::of(link)).or_default() += 1;
            *by_process.entry(link.tgid).or_default() += 1;
        }
        let (end, of_end) = by_end.into_iter().max_by_key(|(_, count)| *count)?;
        let (tgid, _) = by_process.into_iter().max_by_key(|(_, count)| *count)?;
        Some(Self {
            connections: links.len() as u64,
            accepted: links.iter().filter(|link| link.accepted).count() as u64,
            tgid,
            end,
            of_end,
            silent_ns: links.iter().map(|link| link.since_data_ns).max()?,
        })
    }

    /// `112 connections are closed by the peer and still open here (CLOSE_WAIT), 112 of them accepted on port 8080; …`.
    pub(in crate::diagnose::rules) fn words(&self) -> String {
        let end = match self.end {
            End::Port(port) => format!("accepted on port {port}"),
            End::Remote(remote) => format!("opened to {remote}"),
        };
        format!(
            "{} connections are closed by the peer and still open here (CLOSE_WAIT), {} of them {end}; the oldest has carried nothing for {}",
            count(self.connections),
            count(self.of_end),
            duration(self.silent_ns)
        )
    }

    /// What to do about them.
    pub(in crate::diagnose::rules) fn advice(&self, case: Case<'_>) -> String {
        let who = case.view.topology.process(self.tgid, case.view.targets);
        let end = match self.end {
            End::Port(_) => "after a request",
            End::Remote(_) => "after a call",
        };
        format!(
            "{who} leaks connections: it does not close them when the peer has closed them. Find the path that returns {end} without closing (an error, a timeout, a response that is not read to its end). A restart frees them."
        )
    }

    pub(in crate::diagnose::rules) fn culprit(&self, case: Case<'_>) -> Culprit {
        let process = culprit::process(case, self.tgid);
        Culprit {
            name: format!("connections that {} does not close", process.name),
            ..process
        }
    }
}

impl End {
    fn of(link: &Link) -> Self {
        if link.accepted {
            Self::Port(link.local.port())
        } else {
            Self::Remote(link.remote)
        }
    }
}
