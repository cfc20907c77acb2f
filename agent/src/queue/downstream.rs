//! Calls on other services: requests sent on the connections that a service opened, and not yet answered; and which
//! process answers them, where it is on this node.

use std::net::{IpAddr, SocketAddr};

use rustc_hash::FxHashMap;

use super::{
    Reading,
    conversations::Told,
    inflight::{counted, waiting},
};
use crate::sample::{Connection, Listening};

pub(super) fn reading(told: &Told<'_>) -> Reading {
    let Told { group, now_ns, .. } = *told;
    let tally = &group.tally;
    let pool = tally.conversations();
    let mut extra = vec![
        ("connections", (pool + tally.push) as f64),
        ("idle", tally.idle as f64),
        ("unknown", tally.unknown as f64),
        ("push", tally.push as f64),
        ("busiest", group.most as f64),
    ];
    extra.extend(counted(told, "broken"));
    let behind = group.behind.as_ref().and_then(Behind::name);
    let oldest = told
        .oldest
        .map(|(tgid, fd, _)| format!("process {tgid} fd {fd}"));
    Reading {
        limit: Some(pool).filter(|pool| *pool > 0),
        servers: u32::try_from(pool).unwrap_or(u32::MAX).max(1),
        worst: match (oldest, behind) {
            (Some(oldest), Some(behind)) => Some(format!("{oldest} to {behind}")),
            (Some(oldest), None) => Some(oldest),
            (None, behind) => behind.map(str::to_owned),
        },
        extra,
        ..waiting(told, now_ns)
    }
}

/// Who listens where on this node, as last told.
#[derive(Default)]
pub(super) struct Nearby {
    told: u64,
    by_address: FxHashMap<(u32, SocketAddr), Process>,
    /// Addresses that can be meant in any network namespace of the node.
    anywhere: FxHashMap<SocketAddr, Process>,
}

/// Number and name.
type Process = (u32, String);

impl Nearby {
    pub(super) fn replace(&mut self, listening: &[Listening]) {
        self.told += 1;
        self.by_address.clear();
        self.anywhere.clear();
        for one in listening {
            let address = canonical(one.address);
            let process = || (one.tgid, one.name.clone());
            // Several processes may share a listener: the first of them is the one that made it, nearly always.
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

    /// `own`: the address that we call from. A wildcard stands for the node's own addresses alone, and of those we
    /// know only loopback and our own.
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

/// IPv4 within IPv6 is IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The other end of a group of connections, and who that is.
pub(super) struct Behind {
    netns: u32,
    own: IpAddr,
    remote: SocketAddr,
    told: u64,
    name: Option<String>,
}

impl Behind {
    pub(super) fn new(connection: &Connection, remote: SocketAddr) -> Self {
        Self {
            netns: connection.netns,
            own: connection.local.ip().to_canonical(),
            remote: canonical(remote),
            told: 0,
            name: None,
        }
    }

    /// Looks it up again if who listens where has changed.
    pub(super) fn refresh(&mut self, nearby: &Nearby) {
        if self.told != nearby.told {
            self.told = nearby.told;
            self.name = nearby
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

    fn found(nearby: &Nearby, netns: u32, own: &str, remote: &str) -> Option<u32> {
        let remote = canonical(remote.parse().unwrap());
        let found = nearby.find(netns, own.parse().unwrap(), remote);
        found.map(|(tgid, _)| *tgid)
    }

    #[test]
    fn a_peer_on_this_node_is_found_by_its_address_then_by_a_wildcard() {
        let mut nearby = Nearby::default();
        nearby.replace(&[
            listening(1, "127.0.0.1:6379", 77, "redis-server"),
            listening(1, "127.0.0.1:6379", 70, "redis-server"),
            listening(1, "0.0.0.0:5432", 80, "postgres"),
            listening(1, "[::]:8080", 81, "java"),
            listening(2, "10.1.0.2:9000", 90, "php-fpm"),
            listening(2, "127.0.0.1:7000", 91, "sidecar"),
        ]);
        assert_eq!(found(&nearby, 1, "127.0.0.1", "127.0.0.1:6379"), Some(70));
        let mapped = "[::ffff:127.0.0.1]:6379";
        assert_eq!(found(&nearby, 1, "127.0.0.1", mapped), Some(70));
        assert_eq!(found(&nearby, 1, "127.0.0.1", "127.0.0.1:5432"), Some(80));
        assert_eq!(found(&nearby, 1, "10.0.0.1", "10.0.0.1:8080"), Some(81));
        assert_eq!(found(&nearby, 1, "::1", "[::1]:8080"), Some(81));
        assert_eq!(found(&nearby, 1, "10.1.0.1", "10.1.0.2:9000"), Some(90));
    }

    #[test]
    fn a_wildcard_here_is_not_a_peer_elsewhere() {
        let mut nearby = Nearby::default();
        nearby.replace(&[
            listening(1, "0.0.0.0:5432", 80, "postgres"),
            listening(2, "127.0.0.1:7000", 91, "sidecar"),
        ]);
        assert_eq!(found(&nearby, 1, "10.0.0.1", "10.0.0.2:5432"), None);
        assert_eq!(found(&nearby, 1, "127.0.0.1", "127.0.0.1:7000"), None);
        assert_eq!(found(&nearby, 2, "127.0.0.1", "127.0.0.1:5432"), None);
    }
}
