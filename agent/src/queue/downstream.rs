//! Outstanding calls to other services: unanswered requests on the connections that a service opened. If the called
//! process is on this node, it is named.

use std::net::{IpAddr, SocketAddr};

use rustc_hash::FxHashMap;

use super::{
    Reading,
    conversations::GroupSample,
    inflight::{common, counted},
};
use crate::sample::{Connection, Listening};

pub(super) fn reading(sample: &GroupSample<'_>) -> Reading {
    let GroupSample { group, now_ns, .. } = *sample;
    let counts = &group.counts;
    let pool = counts.request_response();
    let mut extra = vec![
        ("connections", (pool + counts.push) as f64),
        ("idle", counts.idle as f64),
        ("unknown", counts.unknown as f64),
        ("push", counts.push as f64),
        ("busiest", group.peak as f64),
    ];
    extra.extend(counted(sample, "broken"));
    let peer = group.peer.as_ref().and_then(LocalPeer::name);
    let oldest = sample
        .oldest
        .map(|(tgid, fd, _)| format!("process {tgid} fd {fd}"));
    Reading {
        limit: Some(pool).filter(|pool| *pool > 0),
        servers: u32::try_from(pool).unwrap_or(u32::MAX).max(1),
        worst: match (oldest, peer) {
            (Some(oldest), Some(peer)) => Some(format!("{oldest} to {peer}")),
            (Some(oldest), None) => Some(oldest),
            (None, peer) => peer.map(str::to_owned),
        },
        extra,
        ..common(sample, now_ns)
    }
}

/// All listening addresses of this node and their processes.
#[derive(Default)]
pub(crate) struct LocalListeners {
    /// Incremented at each replacement.
    version: u64,
    by_address: FxHashMap<(u32, SocketAddr), Process>,
    /// Addresses that mean the same listener from every network namespace of the node.
    anywhere: FxHashMap<SocketAddr, Process>,
}

/// Process number and name.
type Process = (u32, String);

impl LocalListeners {
    pub(crate) fn replace(&mut self, listening: &[Listening]) {
        self.version += 1;
        self.by_address.clear();
        self.anywhere.clear();
        for one in listening {
            let address = canonical(one.address);
            let process = || (one.tgid, one.name.clone());
            // Several processes may share a listener. The lowest number is nearly always the one that created it.
            let keep = |known: &mut Process| {
                if one.tgid < known.0 {
                    *known = process();
                }
            };
            self.by_address
                .entry((one.netns, address))
                .and_modify(keep)
                .or_insert_with(process);
            if !address.ip().is_loopback() && !address.ip().is_unspecified() {
                self.anywhere
                    .entry(address)
                    .and_modify(keep)
                    .or_insert_with(process);
            }
        }
    }

    /// The process that listens at the remote end of a connection, if that is on this node.
    pub(crate) fn of(&self, netns: u32, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
        let process = self.find(netns, canonical(local).ip(), canonical(remote));
        process.map(|(tgid, _)| *tgid)
    }

    /// The process that listens on `remote`, called from the address `own`. A wildcard listener serves only addresses of
    /// the node itself; of those, loopback and `own` are known.
    fn find(&self, netns: u32, own: IpAddr, remote: SocketAddr) -> Option<&Process> {
        let at = |ip: IpAddr| {
            self.by_address
                .get(&(netns, SocketAddr::new(ip, remote.port())))
        };
        let wildcard = || {
            let is_ours = remote.ip().is_loopback() || remote.ip() == own;
            let v4 = IpAddr::from([0u8; 4]);
            let v6 = IpAddr::from([0u16; 8]);
            let both = || at(v4).filter(|_| remote.is_ipv4()).or_else(|| at(v6));
            is_ours.then(both).flatten()
        };
        at(remote.ip())
            .or_else(wildcard)
            .or_else(|| self.anywhere.get(&remote))
    }
}

/// IPv4-mapped IPv6 addresses become IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The remote end of a group of connections, and its process if it is on this node.
pub(super) struct LocalPeer {
    netns: u32,
    own: IpAddr,
    remote: SocketAddr,
    /// Version of the listeners that `name` comes from.
    version: u64,
    name: Option<String>,
}

impl LocalPeer {
    pub(super) fn new(connection: &Connection, remote: SocketAddr) -> Self {
        Self {
            netns: connection.netns,
            own: connection.local.ip().to_canonical(),
            remote: canonical(remote),
            version: 0,
            name: None,
        }
    }

    /// Looks the process up again if the listeners have changed.
    pub(super) fn refresh(&mut self, listeners: &LocalListeners) {
        if self.version != listeners.version {
            self.version = listeners.version;
            self.name = listeners
                .find(self.netns, self.own, self.remote)
                .map(|(tgid, name)| format!("{name} ({tgid}) on this node"));
        }
    }

    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(netns: u32, address: &str, tgid: u32, name: &str) -> Listening {
        Listening {
            netns,
            address: address.parse().unwrap(),
            tgid,
            name: name.to_owned(),
        }
    }

    fn found(listeners: &LocalListeners, netns: u32, own: &str, remote: &str) -> Option<u32> {
        let remote = canonical(remote.parse().unwrap());
        let found = listeners.find(netns, own.parse().unwrap(), remote);
        found.map(|(tgid, _)| *tgid)
    }

    #[test]
    fn a_peer_on_this_node_is_found_by_its_address_then_by_a_wildcard() {
        let mut listeners = LocalListeners::default();
        listeners.replace(&[
            listening(1, "127.0.0.1:6379", 77, "redis-server"),
            listening(1, "127.0.0.1:6379", 70, "redis-server"),
            listening(1, "0.0.0.0:5432", 80, "postgres"),
            listening(1, "[::]:8080", 81, "java"),
            listening(2, "10.1.0.2:9000", 90, "php-fpm"),
            listening(2, "127.0.0.1:7000", 91, "sidecar"),
        ]);
        assert_eq!(
            found(&listeners, 1, "127.0.0.1", "127.0.0.1:6379"),
            Some(70)
        );
        let mapped = "[::ffff:127.0.0.1]:6379";
        assert_eq!(found(&listeners, 1, "127.0.0.1", mapped), Some(70));
        assert_eq!(
            found(&listeners, 1, "127.0.0.1", "127.0.0.1:5432"),
            Some(80)
        );
        assert_eq!(found(&listeners, 1, "10.0.0.1", "10.0.0.1:8080"), Some(81));
        assert_eq!(found(&listeners, 1, "::1", "[::1]:8080"), Some(81));
        assert_eq!(found(&listeners, 1, "10.1.0.1", "10.1.0.2:9000"), Some(90));
    }

    #[test]
    fn a_wildcard_here_is_not_a_peer_elsewhere() {
        let mut listeners = LocalListeners::default();
        listeners.replace(&[
            listening(1, "0.0.0.0:5432", 80, "postgres"),
            listening(2, "127.0.0.1:7000", 91, "sidecar"),
        ]);
        assert_eq!(found(&listeners, 1, "10.0.0.1", "10.0.0.2:5432"), None);
        assert_eq!(found(&listeners, 1, "127.0.0.1", "127.0.0.1:7000"), None);
        assert_eq!(found(&listeners, 2, "127.0.0.1", "127.0.0.1:5432"), None);
    }
}
