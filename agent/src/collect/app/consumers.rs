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
        // As the client sees its connection.
        let ends = connections.iter().filter_map(|connection| {
            let (local, remote) = (canonical(connection.local), canonical(connection.remote));
            let client = (connection.tgid, remote);
            named.contains(&client).then_some(((remote, local), client))
        });
        let ends: HashMap<(SocketAddr, SocketAddr), (u32, SocketAddr)> = ends.collect();
        let watched = connections
            .iter()
            .map(|one| (one.local, one.remote, one.tgid));
        let peers = peers.iter().map(|one| (one.local, one.remote, one.tgid));
        for (local, remote, tgid) in watched.chain(peers) {
            if let Some(client) = ends.get(&(canonical(local), canonical(remote))) {
                self.consumers.entry(*client).or_default().insert(tgid);
            }
        }
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
