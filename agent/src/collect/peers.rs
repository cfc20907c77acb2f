//! Finds the processes on this machine that hold the other ends of connections in the focus scope: chooses which connections the
//! kernel is to search for, and matches its records with them. Pure.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use rustc_hash::{FxHashMap, FxHashSet};
use tailback_ebpf::{MAX_REQUESTED_PEERS, peer_key};

use super::{MS, notices::Notices, processes::Processes};
use crate::sample::{Connection, Peer, Sample};

/// When a process comes into scope, the peers of its connections are searched for within this time, ns.
pub(super) const FIRST_SEARCH_WITHIN_NS: u64 = 250 * MS;
/// Time between later searches, ns, if the background budget allows.
pub(super) const SEARCH_INTERVAL_NS: u64 = 1_000 * MS;
/// Maximum number of holders of other ends in a sample: a connection that forked workers inherited has many.
const MAX_PEERS: usize = 2 * MAX_REQUESTED_PEERS;

#[derive(Default)]
pub(super) struct Peers {
    /// Connections whose other ends the next scan over holders asks for.
    requested: Vec<RequestedPeer>,
    peers: Vec<Peer>,
    /// No sample has reported `peers` yet.
    is_unreported: bool,
    /// The focus scope that `requested` covers, and the one that the last search covered.
    requested_for: FxHashSet<u32>,
    searched_for: FxHashSet<u32>,
}

/// A connection whose other end is searched for, as its process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RequestedPeer {
    netns: u32,
    local: SocketAddr,
    remote: SocketAddr,
}

/// A connection that the scan over holders found by its ports: once for each process and descriptor that hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerInfo {
    pub(super) cookie: u64,
    pub(super) netns: u32,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) tgid: u32,
    pub(super) fd: u32,
}

impl Peers {
    /// Chooses the connections whose other ends the next scan over holders asks for. `scope`: tgids in the focus scope.
    /// Returns whether the scope holds processes that no search has covered yet.
    pub(super) fn search_for(
        &mut self,
        connections: &[Connection],
        scope: &FxHashSet<u32>,
        is_served: impl Fn(u32, u16) -> bool,
        notices: &mut Notices,
    ) -> bool {
        let in_scope = |tgid| scope.contains(&tgid);
        let (requested, left_out) = choose(connections, in_scope, is_served);
        self.requested = requested;
        self.requested_for.clone_from(scope);
        if left_out > 0 {
            notices.report_once("too_many_peers", || {
                format!(
                    "peers are searched for at most {MAX_REQUESTED_PEERS} connections: {left_out} are left out"
                )
            });
        }
        !scope.is_subset(&self.searched_for)
    }

    /// Ports of the requested connections as their holder sees them, for [`crate::kernel::scanner::Scanner::request_peers`].
    pub(super) fn keys(&self) -> BTreeSet<u32> {
        keys(&self.requested)
    }

    /// Adds the result of a scan over holders.
    pub(super) fn found(
        &mut self,
        connections: &[PeerInfo],
        processes: &Processes,
        notices: &mut Notices,
    ) {
        let name = |tgid| processes.name(tgid);
        let (peers, left_out) = match_peers(&self.requested, connections, name);
        self.peers = peers;
        self.is_unreported = true;
        self.searched_for.clone_from(&self.requested_for);
        if left_out > 0 {
            notices.report_once("too_many_peer_holders", || {
                format!("limit of {MAX_PEERS} peers reached: {left_out} are not named")
            });
        }
    }

    /// Holders of the other ends, as of the last search.
    pub(super) fn found_peers(&self) -> &[Peer] {
        &self.peers
    }

    /// Puts the result of a search into the sample if there was one since the last sample.
    pub(super) fn report(&mut self, sample: &mut Sample) {
        if std::mem::take(&mut self.is_unreported) {
            sample.peers = Some(self.peers.clone());
        }
    }

    /// Forgets all requests and peers: no target is focused any more.
    pub(super) fn clear(&mut self) {
        self.requested.clear();
        self.peers.clear();
        self.searched_for.clear();
    }
}

/// Chooses at most [`MAX_REQUESTED_PEERS`] connections of processes in scope; also returns how many are left out. Connections with
/// unread or unacknowledged bytes come first, then those that the process opened: it waits for the service behind them.
fn choose(
    connections: &[Connection],
    in_scope: impl Fn(u32) -> bool,
    is_served: impl Fn(u32, u16) -> bool,
) -> (Vec<RequestedPeer>, usize) {
    let rank = |connection: &Connection| {
        let is_unread = connection.rcv_nxt != connection.copied_seq;
        let is_unacknowledged = connection.write_seq != connection.snd_una;
        match is_unread || is_unacknowledged {
            true => 0,
            false if !is_served(connection.netns, connection.local.port()) => 1,
            false => 2,
        }
    };
    let in_scope = connections
        .iter()
        .filter(|connection| in_scope(connection.tgid));
    let mut ranked: Vec<(u8, &Connection)> = in_scope
        .map(|connection| (rank(connection), connection))
        .collect();
    let left_out = ranked.len().saturating_sub(MAX_REQUESTED_PEERS);
    if left_out > 0 {
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.truncate(MAX_REQUESTED_PEERS);
    }
    let requested = ranked.into_iter().map(|(_, connection)| RequestedPeer {
        netns: connection.netns,
        local: connection.local,
        remote: connection.remote,
    });
    (requested.collect(), left_out)
}

fn keys(requested: &[RequestedPeer]) -> BTreeSet<u32> {
    let keys = requested
        .iter()
        .map(|request| peer_key(request.remote.port(), request.local.port()));
    keys.collect()
}

/// Finds the holders of the requested other ends; also returns how many holders are left out.
///
/// In the connection's own network namespace, the addresses decide. A match in another namespace counts only if no second
/// connection has the same addresses and they are not loopback addresses.
fn match_peers(
    requested: &[RequestedPeer],
    found: &[PeerInfo],
    name: impl Fn(u32) -> String,
) -> (Vec<Peer>, usize) {
    let mut by_addresses: FxHashMap<(SocketAddr, SocketAddr), Vec<&PeerInfo>> =
        FxHashMap::default();
    for peer in found {
        let held = by_addresses.entry((peer.local, peer.remote)).or_default();
        held.push(peer);
    }
    // If a process has several descriptors of the connection, the lowest is reported.
    let mut lowest_fds: BTreeMap<(u32, SocketAddr, SocketAddr, u32), u32> = BTreeMap::new();
    for request in requested {
        let Some(held) = by_addresses.get(&(request.remote, request.local)) else {
            continue;
        };
        let is_here = |peer: &PeerInfo| peer.netns == request.netns;
        let any_here = held.iter().any(|peer| is_here(peer));
        let is_one = held.iter().all(|peer| peer.cookie == held[0].cookie);
        if !any_here && (!is_one || request.remote.ip().is_loopback()) {
            continue;
        }
        for peer in held.iter().filter(|peer| !any_here || is_here(peer)) {
            let fd = lowest_fds
                .entry((peer.netns, peer.local, peer.remote, peer.tgid))
                .or_insert(peer.fd);
            *fd = peer.fd.min(*fd);
        }
    }
    let left_out = lowest_fds.len().saturating_sub(MAX_PEERS);
    let named = lowest_fds.into_iter().take(MAX_PEERS);
    let peers = named.map(|((netns, local, remote, tgid), fd)| Peer {
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

    fn request(ip: [u8; 4]) -> RequestedPeer {
        RequestedPeer {
            netns: 1,
            local: address(HERE, 5_000),
            remote: address(ip, 80),
        }
    }

    fn seen(netns: u32, cookie: u64, tgid: u32, fd: u32, ip: [u8; 4]) -> PeerInfo {
        PeerInfo {
            cookie,
            netns,
            local: address(ip, 80),
            remote: address(HERE, 5_000),
            tgid,
            fd,
        }
    }

    fn tgids(requested: RequestedPeer, seen: &[PeerInfo]) -> Vec<(u32, u32)> {
        let (peers, left_out) = match_peers(&[requested], seen, |_| String::new());
        assert_eq!(left_out, 0);
        peers.iter().map(|peer| (peer.tgid, peer.fd)).collect()
    }

    #[test]
    fn each_holder_of_the_other_end_is_reported_once() {
        let held = [
            seen(1, 9, 20, 5, THERE),
            seen(1, 9, 20, 4, THERE),
            seen(1, 9, 21, 5, THERE),
        ];
        assert_eq!(tgids(request(THERE), &held), [(20, 4), (21, 5)]);
    }

    #[test]
    fn a_match_in_the_same_network_namespace_wins() {
        let held = [seen(2, 8, 30, 3, THERE), seen(1, 9, 20, 3, THERE)];
        assert_eq!(tgids(request(THERE), &held), [(20, 3)]);
    }

    #[test]
    fn a_match_in_another_namespace_counts_if_it_is_the_only_one_and_not_loopback() {
        let held = [seen(2, 8, 30, 3, THERE), seen(2, 8, 31, 3, THERE)];
        assert_eq!(tgids(request(THERE), &held), [(30, 3), (31, 3)]);
        let held = [seen(2, 8, 30, 3, THERE), seen(3, 7, 40, 3, THERE)];
        assert!(tgids(request(THERE), &held).is_empty());
        let held = [seen(2, 8, 30, 3, LOOPBACK)];
        assert!(tgids(request(LOOPBACK), &held).is_empty());
    }

    #[test]
    fn connections_with_the_same_ports_but_other_addresses_do_not_match() {
        assert!(tgids(request(THERE), &[seen(1, 9, 20, 3, HERE)]).is_empty());
    }

    #[test]
    fn at_the_limit_connections_with_unread_bytes_come_first() {
        let of = |port: u16, unread: u32| {
            let record = tailback_ebpf::SocketRecord {
                local_port: port,
                remote_port: 80,
                family: 2,
                rcv_nxt: unread,
                ..bytemuck::Zeroable::zeroed()
            };
            connection(&record, crate::collect::ObjectIds::default(), 1)
        };
        let mut connections: Vec<Connection> = (0..MAX_REQUESTED_PEERS as u16)
            .map(|at| of(at, 0))
            .collect();
        connections.push(of(60_000, 7));
        let (found, left_out) = choose(&connections, |_| true, |_, port| port < 10);
        assert_eq!((found.len(), left_out), (MAX_REQUESTED_PEERS, 1));
        assert_eq!(found[0].local.port(), 60_000);
        assert_eq!(found.last().unwrap().local.port(), 8);
        assert!(keys(&found).contains(&peer_key(80, 60_000)));
        let (found, _) = choose(&connections, |tgid| tgid != 0, |_, _| false);
        assert!(found.is_empty());
    }
}
