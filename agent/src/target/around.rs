//! Whom a suspicious service waits for, or who keeps it waiting: from what its processes hold to whoever holds the other
//! ends. Pure.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
};

use super::{ListenerSeen, ProcessSeen};
use crate::sample::{Connection, Holder, Peer, Pipe, UnixSocket, UnixStyle};

/// So many connections, pipes or sockets away.
const MAX_HOPS: u32 = 4;
/// Processes that are followed beyond those that the user asked for.
pub(crate) const MAX_FOLLOWED: usize = 64;
/// Processes of one service that are looked through for its kin.
const MAX_KIN: usize = 1_024;

/// What a process holds and may be waiting on, by what tells who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A connection, as this process sees it.
    Tcp {
        netns: u32,
        local: SocketAddr,
        remote: SocketAddr,
    },
    /// A pipe that holds what nobody has read.
    ReadersOf(u64),
    /// An empty pipe to read from.
    WritersOf(u64),
    /// The unix socket at the other end.
    Socket(u64),
}

/// The ends behind which somebody may keep their process waiting. Whoever merely calls a service does not: the other end
/// of a connection that it accepted counts while something that it sent has not arrived.
/// `is_served`: somebody listens on this port of this network namespace.
pub(crate) fn ends(
    connections: &[Connection],
    pipes: &[Pipe],
    unix: &[UnixSocket],
    is_served: impl Fn(u32, u16) -> bool,
) -> Vec<(u32, End)> {
    let tcp = connections.iter().filter_map(|connection| {
        let is_opened = !is_served(connection.netns, connection.local.port());
        let is_stuck = connection.write_seq != connection.snd_una;
        let end = End::Tcp {
            netns: connection.netns,
            local: connection.local,
            remote: connection.remote,
        };
        (is_opened || is_stuck).then_some((connection.tgid, end))
    });
    let pipes = pipes.iter().filter_map(|pipe| {
        let is_empty = pipe.head == pipe.tail;
        let end = match (pipe.reads, pipe.writes) {
            (_, true) if !is_empty => End::ReadersOf(pipe.inode),
            (true, _) if is_empty => End::WritersOf(pipe.inode),
            _ => return None,
        };
        Some((pipe.tgid, end))
    });
    let unix = unix.iter().filter_map(|socket| {
        // An accepted socket has its listener's path.
        let is_accepted = socket.path.is_some() && socket.peer_path.is_none();
        let waits_for_answers = socket.style != UnixStyle::Datagram && !is_accepted;
        let is_stuck = socket.unread_by_peer > 0;
        (waits_for_answers || is_stuck).then_some((socket.tgid, End::Socket(socket.peer?)))
    });
    tcp.chain(pipes).chain(unix).collect()
}

/// What is known of the machine.
pub(crate) struct Nearby<'a> {
    /// All, in the order of their tgids.
    pub(crate) processes: &'a [ProcessSeen],
    pub(crate) ends: &'a [(u32, End)],
    pub(crate) peers: &'a [Peer],
    pub(crate) holders: &'a [Holder],
    pub(crate) listeners: &'a [ListenerSeen],
    /// The agent's.
    pub(crate) own_pid: u32,
}

/// Who stands around.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Around {
    /// Without those it began with.
    pub(crate) reached: BTreeSet<u32>,
    /// Would have been reached, had there been room.
    pub(crate) left_out: usize,
}

/// Goes from the processes of suspicious targets to whoever may keep them waiting, and on from there. A process that is
/// reached brings along the others of its service. `asked` are the processes that are watched anyway.
pub(crate) fn around(
    seeds: &BTreeSet<u32>,
    asked: &BTreeSet<u32>,
    nearby: &Nearby<'_>,
    same_program: &mut dyn FnMut(&ProcessSeen, &ProcessSeen) -> bool,
) -> Around {
    let map = Map::new(nearby);
    let mut reach = Reach {
        asked,
        seen: seeds.clone(),
        beyond: 0,
        left_out: BTreeSet::new(),
    };
    let mut front: Vec<u32> = seeds.iter().copied().collect();
    for _ in 0..MAX_HOPS {
        let mut next = Vec::new();
        for tgid in &front {
            for other in map.others(*tgid) {
                if map.may_be_followed(other) && reach.take(other) {
                    next.push(other);
                }
            }
        }
        // Those who are met come before their kin: where room is short, they are the ones that count.
        for index in 0..next.len() {
            for other in map.kin(next[index], same_program) {
                if map.may_be_followed(other) && reach.take(other) {
                    next.push(other);
                }
            }
        }
        if next.is_empty() {
            break;
        }
        front = next;
    }
    let reached = reach.seen.difference(seeds).copied().collect();
    Around {
        reached,
        left_out: reach.left_out.len(),
    }
}

/// Who was reached so far.
struct Reach<'a> {
    asked: &'a BTreeSet<u32>,
    seen: BTreeSet<u32>,
    beyond: usize,
    left_out: BTreeSet<u32>,
}

impl Reach<'_> {
    /// Whether it is new, and there is room for it.
    fn take(&mut self, tgid: u32) -> bool {
        if self.seen.contains(&tgid) {
            return false;
        }
        if !self.asked.contains(&tgid) {
            if self.beyond == MAX_FOLLOWED {
                self.left_out.insert(tgid);
                return false;
            }
            self.beyond += 1;
        }
        self.seen.insert(tgid)
    }
}

/// [`Nearby`], to be asked quickly.
struct Map<'a> {
    nearby: &'a Nearby<'a>,
    ends: HashMap<u32, Vec<End>>,
    /// By their own view of the connection.
    peers: HashMap<(SocketAddr, SocketAddr), Vec<&'a Peer>>,
    holders: HashMap<u64, Vec<&'a Holder>>,
    children: BTreeMap<u32, Vec<u32>>,
}

impl<'a> Map<'a> {
    fn new(nearby: &'a Nearby<'a>) -> Self {
        let mut map = Self {
            nearby,
            ends: HashMap::new(),
            peers: HashMap::new(),
            holders: HashMap::new(),
            children: BTreeMap::new(),
        };
        for (tgid, end) in nearby.ends {
            map.ends.entry(*tgid).or_default().push(*end);
        }
        for peer in nearby.peers {
            let tuple = (peer.local, peer.remote);
            map.peers.entry(tuple).or_default().push(peer);
        }
        for holder in nearby.holders {
            map.holders.entry(holder.inode).or_default().push(holder);
        }
        for process in nearby.processes {
            let children = map.children.entry(process.parent).or_default();
            children.push(process.tgid);
        }
        map
    }

    fn process(&self, tgid: u32) -> Option<&'a ProcessSeen> {
        let processes = self.nearby.processes;
        let found = processes.binary_search_by_key(&tgid, |process| process.tgid);
        found.ok().map(|index| &processes[index])
    }

    /// Neither the agent itself, nor the kernel, nor init, which holds a little of everything.
    fn may_be_followed(&self, tgid: u32) -> bool {
        const INIT: u32 = 1;
        let process = self.process(tgid);
        process.is_some_and(|process| {
            process.tgid != INIT && process.pid != self.nearby.own_pid && !process.kernel
        })
    }

    /// Who holds the other ends of what a process holds.
    fn others(&self, tgid: u32) -> Vec<u32> {
        let ends = self.ends.get(&tgid).map_or(&[][..], Vec::as_slice);
        let mut others = Vec::new();
        for end in ends {
            match *end {
                End::Tcp {
                    netns,
                    local,
                    remote,
                } => self.across(netns, local, remote, &mut others),
                End::ReadersOf(inode) => others.extend(self.holding(inode, |holder| holder.reads)),
                End::WritersOf(inode) => others.extend(self.holding(inode, |holder| holder.writes)),
                End::Socket(inode) => others.extend(self.holding(inode, |_| true)),
            }
        }
        others.retain(|other| *other != tgid);
        others.sort_unstable();
        others.dedup();
        others
    }

    fn holding(&self, inode: u64, is_it: fn(&Holder) -> bool) -> impl Iterator<Item = u32> {
        let holders = self.holders.get(&inode).into_iter().flatten();
        holders
            .filter(move |holder| is_it(holder))
            .map(|holder| holder.tgid)
    }

    /// Whoever holds the other end of a connection; where nobody has accepted it yet, whoever should.
    fn across(&self, netns: u32, local: SocketAddr, remote: SocketAddr, others: &mut Vec<u32>) {
        let peers = self.peers.get(&(remote, local));
        let peers = peers.map_or(&[][..], Vec::as_slice);
        let is_here = |peer: &&&Peer| peer.netns == netns;
        let any_here = peers.iter().any(|peer| is_here(&peer));
        let held = peers.iter().filter(|peer| !any_here || is_here(peer));
        let before = others.len();
        others.extend(held.map(|peer| peer.tgid));
        if others.len() > before {
            return;
        }
        // An address of this machine: the loopback's, or the one that the connection itself comes from.
        let is_own = remote.ip().is_loopback() || remote.ip() == local.ip();
        let listeners = self.nearby.listeners.iter().filter(|listener| {
            let here = listener.netns == netns;
            let any_address =
                listener.address.ip().is_unspecified() && listener.address.port() == remote.port();
            listener.address == remote && (here || !remote.ip().is_loopback())
                || any_address && here && is_own
        });
        others.extend(listeners.map(|listener| listener.tgid));
    }

    /// The other processes of the same service: forked from each other, and still the same program.
    fn kin(
        &self,
        tgid: u32,
        same_program: &mut dyn FnMut(&ProcessSeen, &ProcessSeen) -> bool,
    ) -> Vec<u32> {
        let mut is_kin = |a: &ProcessSeen, b: &ProcessSeen| {
            // Whoever was started anew is a service of its own, even where it is the same interpreter.
            a.exec_id == b.exec_id && same_program(a, b)
        };
        let Some(mut eldest) = self.process(tgid) else {
            return Vec::new();
        };
        for _ in 0..MAX_KIN {
            match self.process(eldest.parent) {
                Some(parent) if parent.tgid != eldest.tgid && is_kin(parent, eldest) => {
                    eldest = parent;
                }
                _ => break,
            }
        }
        let mut kin = vec![eldest];
        let mut at = 0;
        while at < kin.len() && kin.len() < MAX_KIN {
            let parent = kin[at];
            let children = self.children.get(&parent.tgid).into_iter().flatten();
            for child in children.filter_map(|child| self.process(*child)) {
                if child.tgid != parent.tgid && is_kin(parent, child) {
                    kin.push(child);
                }
            }
            at += 1;
        }
        kin.into_iter().map(|process| process.tgid).collect()
    }
}

#[cfg(test)]
mod tests;
