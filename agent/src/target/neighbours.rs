//! Finds the neighbours of focused targets: processes that may keep them waiting. They are reached through connections,
//! pipes, unix sockets, locks, and queues inside services. Pure.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
};

use super::{ListenerInfo, ProcessInfo};
use crate::sample::{Connection, Holder, Peer, Pipe, UnixSocket, UnixStyle};

/// Maximum number of connections, pipes or sockets between a focused process and a neighbour.
const MAX_HOPS: u32 = 4;
/// Maximum number of neighbours that are watched although no selector names them.
pub(crate) const MAX_NEIGHBOURS: usize = 64;
/// Maximum number of processes of one service that are visited to find siblings.
const MAX_SIBLINGS: usize = 1_024;

/// Something that a process holds and may be waiting on, by what identifies the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// A connection, as the process sees it.
    Tcp {
        netns: u32,
        local: SocketAddr,
        remote: SocketAddr,
    },
    /// A pipe that holds unread bytes, by inode.
    ReadersOf(u64),
    /// An empty pipe that the process reads from, by inode.
    WritersOf(u64),
    /// A unix socket, by the inode of its peer.
    Socket(u64),
    /// A lock, by the process that holds it; or a queue inside the service, by a process that takes items from it.
    Process(u32),
}

/// The ends that may keep their process waiting, each with its tgid.
///
/// An accepted connection counts only while bytes that the process sent are unacknowledged: a client that merely waits for a
/// response keeps nobody waiting. `is_served(netns, port)`: whether a process listens there.
pub(crate) fn ends(
    connections: &[Connection],
    pipes: &[Pipe],
    unix: &[UnixSocket],
    is_served: impl Fn(u32, u16) -> bool,
) -> Vec<(u32, End)> {
    let tcp = connections.iter().filter_map(|connection| {
        let is_opened = !is_served(connection.netns, connection.local.port());
        let is_unacknowledged = connection.write_seq != connection.snd_una;
        let end = End::Tcp {
            netns: connection.netns,
            local: connection.local,
            remote: connection.remote,
        };
        (is_opened || is_unacknowledged).then_some((connection.tgid, end))
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
        let waits_for_response = socket.style != UnixStyle::Datagram && !is_accepted;
        let is_unread = socket.unread_by_peer > 0;
        (waits_for_response || is_unread).then_some((socket.tgid, End::Socket(socket.peer?)))
    });
    tcp.chain(pipes).chain(unix).collect()
}

/// What the scans know about the machine.
pub(crate) struct HostView<'a> {
    /// All processes, in the order of their tgids.
    pub(crate) processes: &'a [ProcessInfo],
    pub(crate) ends: &'a [(u32, End)],
    pub(crate) peers: &'a [Peer],
    pub(crate) holders: &'a [Holder],
    pub(crate) listeners: &'a [ListenerInfo],
    /// Pid of the agent, which is nobody's neighbour.
    pub(crate) own_pid: u32,
}

/// The result of [`find_neighbours`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FoundNeighbours {
    /// tgids, without the focused processes.
    pub(crate) tgids: BTreeSet<u32>,
    /// Processes beyond [`MAX_NEIGHBOURS`].
    pub(crate) left_out: usize,
}

/// Goes from the `focused` processes to those that may keep them waiting, from there to the next, and so on. Each
/// process reached adds its siblings of the same service. `selected`: processes that are watched anyway, to which no
/// limit applies.
pub(crate) fn find_neighbours(
    focused: &BTreeSet<u32>,
    selected: &BTreeSet<u32>,
    host: &HostView<'_>,
    is_same_program: &mut dyn FnMut(&ProcessInfo, &ProcessInfo) -> bool,
) -> FoundNeighbours {
    let graph = Graph::new(host);
    let mut visited = Visited {
        selected,
        tgids: focused.clone(),
        added: 0,
        left_out: BTreeSet::new(),
    };
    let mut frontier: Vec<u32> = focused.iter().copied().collect();
    for _ in 0..MAX_HOPS {
        let mut next = Vec::new();
        for tgid in &frontier {
            for other in graph.other_ends(*tgid) {
                if graph.may_be_watched(other) && visited.add(other) {
                    next.push(other);
                }
            }
        }
        // Siblings only after all processes that hold an end: at the limit, the latter matter more.
        for index in 0..next.len() {
            for other in graph.siblings(next[index], is_same_program) {
                if graph.may_be_watched(other) && visited.add(other) {
                    next.push(other);
                }
            }
        }
        if next.is_empty() {
            break;
        }
        frontier = next;
    }
    FoundNeighbours {
        tgids: visited.tgids.difference(focused).copied().collect(),
        left_out: visited.left_out.len(),
    }
}

/// The processes reached so far.
struct Visited<'a> {
    selected: &'a BTreeSet<u32>,
    tgids: BTreeSet<u32>,
    /// How many of them are not selected.
    added: usize,
    left_out: BTreeSet<u32>,
}

impl Visited<'_> {
    /// Adds a process; returns whether it is new and within the limit.
    fn add(&mut self, tgid: u32) -> bool {
        if self.tgids.contains(&tgid) {
            return false;
        }
        if !self.selected.contains(&tgid) {
            if self.added == MAX_NEIGHBOURS {
                self.left_out.insert(tgid);
                return false;
            }
            self.added += 1;
        }
        self.tgids.insert(tgid)
    }
}

/// [`HostView`], indexed.
struct Graph<'a> {
    host: &'a HostView<'a>,
    ends: HashMap<u32, Vec<End>>,
    /// By the connection as the peer sees it.
    peers: HashMap<(SocketAddr, SocketAddr), Vec<&'a Peer>>,
    holders: HashMap<u64, Vec<&'a Holder>>,
    children: BTreeMap<u32, Vec<u32>>,
}

impl<'a> Graph<'a> {
    fn new(host: &'a HostView<'a>) -> Self {
        let mut map = Self {
            host,
            ends: HashMap::new(),
            peers: HashMap::new(),
            holders: HashMap::new(),
            children: BTreeMap::new(),
        };
        for (tgid, end) in host.ends {
            map.ends.entry(*tgid).or_default().push(*end);
        }
        for peer in host.peers {
            let tuple = (peer.local, peer.remote);
            map.peers.entry(tuple).or_default().push(peer);
        }
        for holder in host.holders {
            map.holders.entry(holder.inode).or_default().push(holder);
        }
        for process in host.processes {
            let children = map.children.entry(process.parent).or_default();
            children.push(process.tgid);
        }
        map
    }

    fn process(&self, tgid: u32) -> Option<&'a ProcessInfo> {
        let processes = self.host.processes;
        let found = processes.binary_search_by_key(&tgid, |process| process.tgid);
        found.ok().map(|index| &processes[index])
    }

    /// Not the agent itself, a kernel thread, or init, which holds many unrelated files.
    fn may_be_watched(&self, tgid: u32) -> bool {
        const INIT: u32 = 1;
        let process = self.process(tgid);
        process.is_some_and(|process| {
            process.tgid != INIT && process.pid != self.host.own_pid && !process.kernel
        })
    }

    /// The processes that hold the other ends of what a process holds.
    fn other_ends(&self, tgid: u32) -> Vec<u32> {
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
                End::Process(tgid) => others.push(tgid),
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

    /// The holders of a connection's other end; if nobody has accepted it yet, the processes that listen for it.
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
        // The remote address is this machine's if it is a loopback address, or equal to the local one.
        let is_own = remote.ip().is_loopback() || remote.ip() == local.ip();
        let listeners = self.host.listeners.iter().filter(|listener| {
            let here = listener.netns == netns;
            let any_address =
                listener.address.ip().is_unspecified() && listener.address.port() == remote.port();
            listener.address == remote && (here || !remote.ip().is_loopback())
                || any_address && here && is_own
        });
        others.extend(listeners.map(|listener| listener.tgid));
    }

    /// All processes of the same service: forked from each other, and still the same program.
    fn siblings(
        &self,
        tgid: u32,
        is_same_program: &mut dyn FnMut(&ProcessInfo, &ProcessInfo) -> bool,
    ) -> Vec<u32> {
        let mut is_sibling = |a: &ProcessInfo, b: &ProcessInfo| {
            // A process that called exec is a service of its own, even if it runs the same interpreter.
            a.exec_id == b.exec_id && is_same_program(a, b)
        };
        let Some(mut eldest) = self.process(tgid) else {
            return Vec::new();
        };
        for _ in 0..MAX_SIBLINGS {
            match self.process(eldest.parent) {
                Some(parent) if parent.tgid != eldest.tgid && is_sibling(parent, eldest) => {
                    eldest = parent;
                }
                _ => break,
            }
        }
        let mut siblings = vec![eldest];
        let mut at = 0;
        while at < siblings.len() && siblings.len() < MAX_SIBLINGS {
            let parent = siblings[at];
            let children = self.children.get(&parent.tgid).into_iter().flatten();
            for child in children.filter_map(|child| self.process(*child)) {
                if child.tgid != parent.tgid && is_sibling(parent, child) {
                    siblings.push(child);
                }
            }
            at += 1;
        }
        siblings.into_iter().map(|process| process.tgid).collect()
    }
}

#[cfg(test)]
mod tests;
