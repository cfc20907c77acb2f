//! Who on this machine holds the other ends of connections: what to ask for, and whose answer fits. Pure.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use rustc_hash::FxHashMap;
use tailback_ebpf::{MAX_WANTED, wanted_key};

use crate::sample::{Connection, Peer};

/// Holders of other ends that are told: a connection that a service inherited to its workers has many.
const MAX_PEERS: usize = 2 * MAX_WANTED;

/// A connection of a target whose other end is looked for, as the target sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) netns: u32,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

/// A connection of those ports, as the walk over holders shows it: once for each process and descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerSeen {
    pub(super) cookie: u64,
    pub(super) netns: u32,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) tgid: u32,
    pub(super) fd: u32,
}

/// Whose other ends to look for, among the connections of processes that are looked at closely, and how many there is no
/// room for. First those that hold something up; then those that were opened, behind which a service waits.
pub(super) fn wanted(
    connections: &[Connection],
    is_close: impl Fn(u32) -> bool,
    is_served: impl Fn(u32, u16) -> bool,
) -> (Vec<Wanted>, usize) {
    let rank = |connection: &Connection| {
        let is_unread = connection.rcv_nxt != connection.copied_seq;
        let is_stuck = connection.write_seq != connection.snd_una;
        match is_unread || is_stuck {
            true => 0,
            false if !is_served(connection.netns, connection.local.port()) => 1,
            false => 2,
        }
    };
    let close = connections
        .iter()
        .filter(|connection| is_close(connection.tgid));
    let mut ranked: Vec<(u8, &Connection)> = close
        .map(|connection| (rank(connection), connection))
        .collect();
    let left_out = ranked.len().saturating_sub(MAX_WANTED);
    if left_out > 0 {
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.truncate(MAX_WANTED);
    }
    let wanted = ranked.into_iter().map(|(_, connection)| Wanted {
        netns: connection.netns,
        local: connection.local,
        remote: connection.remote,
    });
    (wanted.collect(), left_out)
}

/// The ports by which the walk is asked for the other ends.
pub(super) fn keys(wanted: &[Wanted]) -> BTreeSet<u32> {
    let keys = wanted
        .iter()
        .map(|wanted| wanted_key(wanted.remote.port(), wanted.local.port()));
    keys.collect()
}

/// Who holds the other ends, and how many holders are left out. In the same network namespace the addresses decide; another one
/// is believed where no other connection has them, and they are not a loopback's.
pub(super) fn peers(
    wanted: &[Wanted],
    seen: &[PeerSeen],
    name: impl Fn(u32) -> String,
) -> (Vec<Peer>, usize) {
    let mut by_addresses: FxHashMap<(SocketAddr, SocketAddr), Vec<&PeerSeen>> =
        FxHashMap::default();
    for seen in seen {
        let held = by_addresses.entry((seen.local, seen.remote)).or_default();
        held.push(seen);
    }
    // Of several descriptors of one process the lowest is told.
    let mut found: BTreeMap<(u32, SocketAddr, SocketAddr, u32), u32> = BTreeMap::new();
    for wanted in wanted {
        let Some(held) = by_addresses.get(&(wanted.remote, wanted.local)) else {
            continue;
        };
        let is_here = |peer: &PeerSeen| peer.netns == wanted.netns;
        let any_here = held.iter().any(|peer| is_here(peer));
        let is_one = held.iter().all(|peer| peer.cookie == held[0].cookie);
        if !any_here && (!is_one || wanted.remote.ip().is_loopback()) {
            continue;
        }
        for peer in held.iter().filter(|peer| !any_here || is_here(peer)) {
            let fd = found
                .entry((peer.netns, peer.local, peer.remote, peer.tgid))
                .or_insert(peer.fd);
            *fd = peer.fd.min(*fd);
        }
    }
    let left_out = found.len().saturating_sub(MAX_PEERS);
    let told = found.into_iter().take(MAX_PEERS);
    let peers = told.map(|((netns, local, remote, tgid), fd)| Peer {
        netns,
        local,
        remote,
        tgid,
        fd,
        name: name(tgid),
    });
    (peers.collect(), left_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::convert::connection;

    fn address(ip: [u8; 4], port: u16) -> SocketAddr {
        SocketAddr::from((ip, port))
    }

    const HERE: [u8; 4] = [10, 0, 0, 1];
    const THERE: [u8; 4] = [10, 0, 0, 2];
    const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

    fn wants(ip: [u8; 4]) -> Wanted {
        Wanted {
            netns: 1,
            local: address(HERE, 5_000),
            remote: address(ip, 80),
        }
    }

    fn seen(netns: u32, cookie: u64, tgid: u32, fd: u32, ip: [u8; 4]) -> PeerSeen {
        PeerSeen {
            cookie,
            netns,
            local: address(ip, 80),
            remote: address(HERE, 5_000),
            tgid,
            fd,
        }
    }

    fn tgids(wanted: Wanted, seen: &[PeerSeen]) -> Vec<(u32, u32)> {
        let (peers, left_out) = peers(&[wanted], seen, |_| String::new());
        assert_eq!(left_out, 0);
        peers.iter().map(|peer| (peer.tgid, peer.fd)).collect()
    }

    #[test]
    fn all_holders_of_the_other_end_are_told_once_each() {
        let held = [
            seen(1, 9, 20, 5, THERE),
            seen(1, 9, 20, 4, THERE),
            seen(1, 9, 21, 5, THERE),
        ];
        assert_eq!(tgids(wants(THERE), &held), [(20, 4), (21, 5)]);
    }

    #[test]
    fn the_same_addresses_in_the_same_namespace_come_first() {
        let held = [seen(2, 8, 30, 3, THERE), seen(1, 9, 20, 3, THERE)];
        assert_eq!(tgids(wants(THERE), &held), [(20, 3)]);
    }

    #[test]
    fn another_namespace_is_believed_where_only_one_connection_fits() {
        let held = [seen(2, 8, 30, 3, THERE), seen(2, 8, 31, 3, THERE)];
        assert_eq!(tgids(wants(THERE), &held), [(30, 3), (31, 3)]);
        let held = [seen(2, 8, 30, 3, THERE), seen(3, 7, 40, 3, THERE)];
        assert!(tgids(wants(THERE), &held).is_empty());
        let held = [seen(2, 8, 30, 3, LOOPBACK)];
        assert!(tgids(wants(LOOPBACK), &held).is_empty());
    }

    #[test]
    fn connections_of_the_same_ports_and_other_addresses_are_strangers() {
        assert!(tgids(wants(THERE), &[seen(1, 9, 20, 3, HERE)]).is_empty());
    }

    #[test]
    fn where_room_is_short_what_holds_something_up_comes_first() {
        let of = |port: u16, unread: u32| {
            let record = tailback_ebpf::SocketRecord {
                local_port: port,
                remote_port: 80,
                family: 2,
                rcv_nxt: unread,
                ..bytemuck::Zeroable::zeroed()
            };
            connection(&record, crate::collect::Identities::default(), 1)
        };
        let mut connections: Vec<Connection> = (0..MAX_WANTED as u16).map(|at| of(at, 0)).collect();
        connections.push(of(60_000, 7));
        let (found, left_out) = wanted(&connections, |_| true, |_, port| port < 10);
        assert_eq!((found.len(), left_out), (MAX_WANTED, 1));
        assert_eq!(found[0].local.port(), 60_000);
        assert_eq!(found.last().unwrap().local.port(), 8);
        assert!(keys(&found).contains(&wanted_key(80, 60_000)));
        let (found, _) = wanted(&connections, |tgid| tgid != 0, |_, _| false);
        assert!(found.is_empty());
    }
}
