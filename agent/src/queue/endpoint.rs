//! Groups connections by endpoint. The number of connections is unbounded; the number of endpoints nearly always is not.

use std::{collections::BTreeMap, net::SocketAddr};

use super::{QueueId, Targets};
use crate::sample::{Connection, TargetId};

/// TCP states, as in include/net/tcp_states.h.
pub(super) mod state {
    pub(in super::super) const ESTABLISHED: u8 = 1;
    pub(in super::super) const SYN_SENT: u8 = 2;
    pub(in super::super) const SYN_RECV: u8 = 3;
    pub(in super::super) const FIN_WAIT1: u8 = 4;
    pub(in super::super) const FIN_WAIT2: u8 = 5;
    pub(in super::super) const TIME_WAIT: u8 = 6;
    pub(in super::super) const CLOSE: u8 = 7;
    pub(in super::super) const CLOSE_WAIT: u8 = 8;
    pub(in super::super) const LAST_ACK: u8 = 9;
    pub(in super::super) const CLOSING: u8 = 11;
}

/// The end that connections of one group share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Endpoint {
    /// Accepted connections, by local port. The listening address may be a wildcard.
    Served(u16),
    /// Opened connections, by remote address.
    Opened(SocketAddr),
}

impl Endpoint {
    pub(super) fn of(connection: &Connection, targets: &Targets) -> Self {
        if targets.listens(connection.netns, connection.local.port()) {
            Self::Served(connection.local.port())
        } else {
            Self::Opened(connection.remote)
        }
    }

    /// The identity of a queue of these connections.
    pub(super) fn id(self) -> QueueId {
        match self {
            Self::Served(port) => QueueId::Port(port),
            Self::Opened(remote) => QueueId::Remote(remote),
        }
    }
}

/// All groups, each in a slot that a connection remembers, so that it finds its group without a search.
pub(super) struct Groups<G> {
    by_key: BTreeMap<(TargetId, Endpoint), usize>,
    slots: Vec<G>,
    free: Vec<usize>,
}

impl<G> Default for Groups<G> {
    fn default() -> Self {
        Self {
            by_key: BTreeMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<G: Default> Groups<G> {
    /// The slot of this endpoint's group, which is created empty if there is none.
    pub(super) fn slot(&mut self, target: TargetId, endpoint: Endpoint) -> usize {
        if let Some(slot) = self.by_key.get(&(target, endpoint)) {
            return *slot;
        }
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = G::default();
                slot
            }
            None => {
                self.slots.push(G::default());
                self.slots.len() - 1
            }
        };
        self.by_key.insert((target, endpoint), slot);
        slot
    }

    pub(super) fn has(&self, target: TargetId, endpoint: Endpoint) -> bool {
        self.by_key.contains_key(&(target, endpoint))
    }

    /// The group in a slot that [`Groups::slot`] returned and [`Groups::retain`] has not freed since.
    pub(super) fn at(&mut self, slot: usize) -> &mut G {
        &mut self.slots[slot]
    }

    /// Calls `act` with each group.
    pub(super) fn for_each(&mut self, mut act: impl FnMut(&mut G)) {
        for slot in self.by_key.values() {
            act(&mut self.slots[*slot]);
        }
    }

    /// All groups, by target and endpoint.
    pub(super) fn iter(&self) -> impl Iterator<Item = (TargetId, Endpoint, &G)> {
        self.by_key
            .iter()
            .map(|((target, endpoint), slot)| (*target, *endpoint, &self.slots[*slot]))
    }

    /// Frees the slots of the groups that `stays` rejects.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(TargetId, Endpoint, &mut G) -> bool) {
        let (slots, free) = (&mut self.slots, &mut self.free);
        self.by_key.retain(|(target, endpoint), slot| {
            let stays = stays(*target, *endpoint, &mut slots[*slot]);
            if !stays {
                free.push(*slot);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_keeps_its_slot_and_a_freed_slot_is_reused_empty() {
        let mut groups: Groups<Vec<u32>> = Groups::default();
        let (web, admin) = (Endpoint::Served(80), Endpoint::Served(81));
        let slot = groups.slot(1, web);
        groups.at(slot).push(7);
        assert_eq!(groups.slot(1, web), slot);
        assert_ne!(groups.slot(2, web), slot);
        groups.retain(|target, _, _| target == 2);
        assert_eq!(groups.slot(1, admin), slot);
        assert!(groups.at(slot).is_empty());
        let endpoints: Vec<Endpoint> = groups.iter().map(|(_, endpoint, _)| endpoint).collect();
        assert_eq!(endpoints, [admin, web]);
    }
}
