//! Which connections belong together: their number has no bound, the number of endpoints nearly always has one.

use std::{collections::BTreeMap, net::SocketAddr};

use super::{QueueId, Targets};
use crate::sample::{Connection, TargetId};

/// include/net/tcp_states.h
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

/// What connections are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Endpoint {
    /// Accepted: the local port; the address that was listened on may be a wildcard.
    Served(u16),
    /// Opened: the other end.
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

/// All groups, each in a place of its own, so that a connection finds its group without a search.
pub(super) struct Groups<G> {
    by_key: BTreeMap<(TargetId, Endpoint), usize>,
    places: Vec<G>,
    free: Vec<usize>,
}

impl<G> Default for Groups<G> {
    fn default() -> Self {
        Self {
            by_key: BTreeMap::new(),
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<G: Default> Groups<G> {
    /// The place of this endpoint's group; an empty group where it had none.
    pub(super) fn place(&mut self, target: TargetId, endpoint: Endpoint) -> usize {
        if let Some(place) = self.by_key.get(&(target, endpoint)) {
            return *place;
        }
        let place = match self.free.pop() {
            Some(place) => {
                self.places[place] = G::default();
                place
            }
            None => {
                self.places.push(G::default());
                self.places.len() - 1
            }
        };
        self.by_key.insert((target, endpoint), place);
        place
    }

    pub(super) fn has(&self, target: TargetId, endpoint: Endpoint) -> bool {
        self.by_key.contains_key(&(target, endpoint))
    }

    /// The group in a place that [`Groups::place`] gave and that was not freed since.
    pub(super) fn at(&mut self, place: usize) -> &mut G {
        &mut self.places[place]
    }

    /// Does something to each group.
    pub(super) fn for_each(&mut self, mut act: impl FnMut(&mut G)) {
        for place in self.by_key.values() {
            act(&mut self.places[*place]);
        }
    }

    /// All groups, in the order of their keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (TargetId, Endpoint, &G)> {
        self.by_key
            .iter()
            .map(|((target, endpoint), place)| (*target, *endpoint, &self.places[*place]))
    }

    /// Frees the places of those that go.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(TargetId, Endpoint, &mut G) -> bool) {
        let (places, free) = (&mut self.places, &mut self.free);
        self.by_key.retain(|(target, endpoint), place| {
            let stays = stays(*target, *endpoint, &mut places[*place]);
            if !stays {
                free.push(*place);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_keeps_its_place_and_a_freed_place_is_used_again_empty() {
        let mut groups: Groups<Vec<u32>> = Groups::default();
        let (web, admin) = (Endpoint::Served(80), Endpoint::Served(81));
        let place = groups.place(1, web);
        groups.at(place).push(7);
        assert_eq!(groups.place(1, web), place);
        assert_ne!(groups.place(2, web), place);
        groups.retain(|target, _, _| target == 2);
        assert_eq!(groups.place(1, admin), place);
        assert!(groups.at(place).is_empty());
        let endpoints: Vec<Endpoint> = groups.iter().map(|(_, endpoint, _)| endpoint).collect();
        assert_eq!(endpoints, [admin, web]);
    }
}
