//! Which processes of this machine take items from the queues inside a service: those that hold the other ends of the connections that
//! the service names.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use super::{Apps, canonical};
use crate::{
    sample::{AppAnswer, Connection, Peer},
    target::End,
};

impl Apps {
    /// `connections`: those of all watched processes; `peers`: other ends that were searched for. A service may name any address: only
    /// those of its own connections count.
    pub(in crate::collect) fn find_consumers(
        &mut self,
        connections: &[Connection],
        peers: &[Peer],
    ) {
        self.consumers.clear();
        let Some(asker) = &self.asker else {
            return;
        };
        let clients = asker.clients();
        let named = clients.iter().flat_map(|((tgid, _), queues)| {
            let addresses = queues.values().flatten();
            addresses.map(|address| (*tgid, canonical(*address)))
        });
        let named: HashSet<(u32, SocketAddr)> = named.collect();
        if named.is_empty() {
            return;
        }
        self.consumers = holders(&named, connections, peers);
    }

    /// Each service, and the processes that take items from its queues.
    pub(in crate::collect) fn consumer_ends(&self) -> impl Iterator<Item = (u32, End)> {
        let all = self.consumers.iter();
        all.flat_map(|((service, _), tgids)| {
            tgids.iter().map(|tgid| (*service, End::Process(*tgid)))
        })
    }

    /// Adds the processes that take items from the queues of an answer.
    pub(super) fn add_consumers(&self, answer: &mut AppAnswer) {
        let Some(asker) = self.asker.as_ref().filter(|_| !self.consumers.is_empty()) else {
            return;
        };
        let clients = asker.clients();
        let Some(clients) = clients.get(&(answer.tgid, answer.preset.clone())) else {
            return;
        };
        for queue in answer.queues.iter_mut().flatten() {
            let addresses = clients.get(&queue.name).into_iter().flatten();
            let tgids = addresses.filter_map(|address| {
                let client = (answer.tgid, canonical(*address));
                self.consumers.get(&client)
            });
            let tgids: BTreeSet<u32> = tgids.flatten().copied().collect();
            queue.consumer_tgids = tgids.into_iter().collect();
        }
    }
}

/// A client of a service: the process of the service, and the client's address.
type Client = (u32, SocketAddr);
/// A connection as one of its ends sees it: its network namespace if it is a loopback connection, the local and the remote address.
type Ends = (Option<u32>, SocketAddr, SocketAddr);

/// The ends of a connection. Loopback addresses mean the same only within a network namespace.
fn ends(netns: u32, local: SocketAddr, remote: SocketAddr) -> Ends {
    let (local, remote) = (canonical(local), canonical(remote));
    let is_loopback = local.ip().is_loopback() || remote.ip().is_loopback();
    (is_loopback.then_some(netns), local, remote)
}

/// The processes that hold the clients' ends of the services' connections.
fn holders(
    named: &HashSet<Client>,
    connections: &[Connection],
    peers: &[Peer],
) -> HashMap<Client, BTreeSet<u32>> {
    // As the client sees its connection.
    let of_services = connections.iter().filter_map(|one| {
        let client = (one.tgid, canonical(one.remote));
        let ends = ends(one.netns, one.remote, one.local);
        named.contains(&client).then_some((ends, client))
    });
    let of_services: HashMap<Ends, Client> = of_services.collect();
    let watched = connections
        .iter()
        .map(|one| (ends(one.netns, one.local, one.remote), one.tgid));
    let peers = peers
        .iter()
        .map(|one| (ends(one.netns, one.local, one.remote), one.tgid));
    let mut holders: HashMap<Client, BTreeSet<u32>> = HashMap::new();
    for (ends, tgid) in watched.chain(peers) {
        if let Some(client) = of_services.get(&ends) {
            holders.entry(*client).or_default().insert(tgid);
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::fixture::silent_connection;

    const REDIS: u32 = 10;
    const WORKER: u32 = 20;

    fn address(ip: [u8; 4], port: u16) -> SocketAddr {
        SocketAddr::from((ip, port))
    }

    fn worker(netns: u32, local: SocketAddr, remote: SocketAddr) -> Peer {
        Peer {
            netns,
            local,
            remote,
            tgid: WORKER,
            fd: 5,
            name: "rq".to_owned(),
        }
    }

    fn found(netns: u32, ip: [u8; 4]) -> Vec<u32> {
        let (server, client) = (address(ip, 6379), address(ip, 50_000));
        let accepted = Connection {
            tgid: REDIS,
            local: server,
            remote: client,
            ..silent_connection()
        };
        let named = HashSet::from([(REDIS, client)]);
        let holders = holders(&named, &[accepted], &[worker(netns, client, server)]);
        holders.into_values().flatten().collect()
    }

    #[test]
    fn a_loopback_connection_of_another_network_namespace_is_not_a_consumer() {
        assert_eq!(found(1, [127, 0, 0, 1]), [WORKER]);
        assert!(found(2, [127, 0, 0, 1]).is_empty());
        assert_eq!(found(2, [10, 0, 0, 7]), [WORKER]);
    }
}
