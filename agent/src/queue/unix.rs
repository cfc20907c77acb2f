//! Unix sockets: data and datagrams written and not read, in both directions.
//!
//! Sockets are grouped by path: accepted ones by that of their listener, opened ones by that of their peer (`-> PATH`).
//! Socket pairs have none. Each group has two queues: data that the target has not read, and data that the target wrote and
//! its peer has not read (`… sent`). Data in a unix socket is charged to its writer, so the limit of received data is the
//! peer's. The kernel counts neither writes nor reads.

use std::collections::BTreeMap;

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets, UnixEnd,
    head::Head,
    inflow::Inflow,
    unix_listener::{UnixListeners, spelled},
};
use crate::{
    hash::{HashMap, HashSet},
    sample::{Sample, TargetId, UnixSocket, UnixStyle},
};

#[derive(Default)]
pub(super) struct Unix {
    listeners: UnixListeners,
    sockets: HashMap<u64, Known>,
}

/// State kept per socket.
struct Known {
    target: TargetId,
    seen_ns: u64,
    received: Half,
    sent: Half,
}

/// State kept per socket and direction.
#[derive(Clone, Copy, Default)]
struct Half {
    waiting: u64,
    head: Head,
    inflow: Inflow,
}

/// The path that sockets of one group share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Endpoint<'a> {
    /// Accepted at this path, or bound to it.
    Bound(&'a str),
    /// Connected to this path.
    Opened(&'a str),
    Unnamed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    /// Written by the peer, not read by the target.
    Received,
    /// Written by the target, not read by the peer.
    Sent,
}

/// Identifies a queue within a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct GroupKey<'a> {
    target: TargetId,
    endpoint: Endpoint<'a>,
    datagrams: bool,
    direction: Direction,
}

/// The sockets of one queue.
#[derive(Default)]
struct Group {
    sockets: u32,
    worst: Option<Part>,
    fill: Option<f64>,
    full: bool,
    total: u64,
    oldest_age_ns: Option<u64>,
    elapsed_ns: Option<u64>,
}

/// The part of a queue that one socket holds, at one sample.
struct Part {
    depth: u64,
    limit: Option<u64>,
    full: bool,
    age_ns: Option<u64>,
    tgid: u32,
    fd: u32,
    peer: Option<u64>,
}

impl Source for Unix {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files {
            return;
        }
        self.listeners.read(sample, targets, sink);
        let paths: HashSet<&str> = sample
            .unix
            .iter()
            .filter(|socket| socket.listening)
            .filter_map(|socket| socket.path.as_deref())
            .collect();
        let by_inode: HashMap<u64, &UnixSocket> = sample
            .unix
            .iter()
            .map(|socket| (socket.inode, socket))
            .collect();
        let mut groups: BTreeMap<GroupKey<'_>, Group> = BTreeMap::new();
        let mut sockets = HashMap::with_capacity_and_hasher(sample.unix.len(), Default::default());
        for socket in sample.unix.iter().filter(|socket| !socket.listening) {
            let before = self.sockets.get(&socket.inode);
            let target = targets
                .of(socket.tgid)
                .or(before.map(|before| before.target))
                .filter(|target| targets.get(*target).is_some());
            let Some(target) = target else {
                continue;
            };
            let peer = socket.peer.and_then(|peer| by_inode.get(&peer)).copied();
            let endpoint = endpoint(socket, &paths);
            let inside = peer.is_some_and(|peer| targets.of(peer.tgid) == Some(target));
            let sampled = SocketSample {
                socket,
                peer,
                is_pair: inside && endpoint == Endpoint::Unnamed,
                now_ns: sample.mono_ns,
                elapsed_ns: before.map(|before| sample.mono_ns.saturating_sub(before.seen_ns)),
            };
            let mut now = Known {
                target,
                seen_ns: sample.mono_ns,
                received: before.map_or_else(Half::default, |before| before.received),
                sent: before.map_or_else(Half::default, |before| before.sent),
            };
            let received = GroupKey {
                target,
                endpoint,
                datagrams: socket.style == UnixStyle::Datagram,
                direction: Direction::Received,
            };
            let group = groups.entry(received).or_default();
            group.add(&sampled, sampled.received(&mut now.received));
            // Within one service, the received side of the other end already shows this data.
            if !inside {
                let sent = GroupKey {
                    direction: Direction::Sent,
                    ..received
                };
                let group = groups.entry(sent).or_default();
                group.add(&sampled, sampled.sent(&mut now.sent));
            }
            sockets.insert(socket.inode, now);
        }
        self.sockets = sockets;
        let mut taken = HashMap::with_capacity_and_hasher(groups.len(), Default::default());
        for (key, group) in &groups {
            let id = key.unique_id(&mut taken);
            sink.put(key.target, Kind::Unix, &id, group.reading(key, targets));
        }
        sink.forget_unseen(Kind::Unix);
    }
}

/// The endpoint of a socket. One with a path of its own was accepted or serves datagrams, unless it is also connected to
/// another path.
fn endpoint<'a>(socket: &'a UnixSocket, listening: &HashSet<&str>) -> Endpoint<'a> {
    match (socket.path.as_deref(), socket.peer_path.as_deref()) {
        (Some(path), Some(peer)) if !listening.contains(path) => Endpoint::Opened(peer),
        (Some(path), _) => Endpoint::Bound(path),
        (None, Some(peer)) => Endpoint::Opened(peer),
        (None, None) => Endpoint::Unnamed,
    }
}

impl GroupKey<'_> {
    /// Returns an id that is not in `taken`, and adds it there. Two groups of a target have the same name if streams and datagrams use
    /// one path (a server that unlinks and rebinds it), or if two paths differ only beyond the maximum length of a name. Then the
    /// second is called `/run/log [2]`. `taken` has the last number used for a name.
    fn unique_id(&self, taken: &mut HashMap<(TargetId, QueueId), usize>) -> QueueId {
        let plain = (self.target, self.id(1));
        let mut number = taken.get(&plain).copied().unwrap_or(0);
        let unique = loop {
            number += 1;
            let id = (self.target, self.id(number));
            if number == 1 || !taken.contains_key(&id) {
                break id;
            }
        };
        taken.insert(plain, number);
        taken.entry(unique.clone()).or_insert(1);
        unique.1
    }

    fn id(&self, number: usize) -> QueueId {
        let name = |path: &str| match number {
            1 => spelled(path),
            _ => format!("{} [{number}]", spelled(path)).into(),
        };
        QueueId::UnixSockets {
            end: match self.endpoint {
                Endpoint::Bound(path) => UnixEnd::Local(name(path)),
                Endpoint::Opened(path) => UnixEnd::Remote(name(path)),
                Endpoint::Unnamed => UnixEnd::Unnamed {
                    datagrams: self.datagrams,
                },
            },
            sent: self.direction == Direction::Sent,
        }
    }

    /// The unit of the queue: the kernel limits received datagrams by number, and sent ones by memory.
    fn unit(&self) -> Option<&'static str> {
        let counted = self.datagrams && self.direction == Direction::Received;
        counted.then_some("datagrams")
    }
}

/// One socket at one sample.
struct SocketSample<'a> {
    socket: &'a UnixSocket,
    /// The socket at the other end, if a target holds it.
    peer: Option<&'a UnixSocket>,
    /// Created by socketpair(2), with both ends in this target.
    is_pair: bool,
    now_ns: u64,
    elapsed_ns: Option<u64>,
}

impl SocketSample<'_> {
    fn received(&self, half: &mut Half) -> Part {
        let socket = self.socket;
        if socket.style == UnixStyle::Datagram {
            let (queued, limit) = (u64::from(socket.queued), u64::from(socket.limit));
            let limit = Some(limit).filter(|limit| *limit > 0);
            // unix_recvq_full: one more than the limit may wait.
            let full = limit.is_some_and(|limit| queued > limit);
            return self.part(half, queued, limit, full, socket.head);
        }
        let limit = u64::from(socket.peer_sndbuf);
        self.bytes(half, u64::from(socket.unread), limit, socket.head)
    }

    /// The part that this socket sent. Its age is known only if the peer is also a target's socket. The head of a datagram
    /// queue may be another sender's, so datagrams have no age.
    fn sent(&self, half: &mut Half) -> Part {
        let socket = self.socket;
        let head = self
            .peer
            .filter(|_| socket.style != UnixStyle::Datagram)
            .map_or(0, |peer| peer.head);
        let (waiting, limit) = (u64::from(socket.unread_by_peer), u64::from(socket.sndbuf));
        self.bytes(half, waiting, limit, head)
    }

    fn bytes(&self, half: &mut Half, waiting: u64, limit: u64, head: u64) -> Part {
        // A writer blocks when its unread data reaches its limit (sock_alloc_send_pskb).
        let limit = Some(limit).filter(|limit| *limit > 0);
        let full = limit.is_some_and(|limit| waiting >= limit);
        self.part(half, waiting, limit, full, head)
    }

    fn part(
        &self,
        half: &mut Half,
        waiting: u64,
        limit: Option<u64>,
        full: bool,
        head: u64,
    ) -> Part {
        let known = self.elapsed_ns.is_some();
        if known && waiting < half.waiting {
            half.head.moved();
        }
        let arrived = known && waiting > half.waiting;
        let inflow_ns = half.inflow.observe(arrived, self.now_ns);
        half.waiting = waiting;
        let age_ns = half
            .head
            .observe(head, waiting > 0, self.now_ns)
            .filter(|_| head != 0);
        let age_ns = if self.is_pair && !full {
            // Data at rest in an internal socket pair is not a queue while nothing arrives.
            age_ns.zip(inflow_ns).map(|(age, inflow)| age.min(inflow))
        } else {
            age_ns
        };
        Part {
            depth: waiting,
            limit,
            full,
            age_ns,
            tgid: self.socket.tgid,
            fd: self.socket.fd,
            peer: self.socket.peer,
        }
    }
}

impl Group {
    fn add(&mut self, sampled: &SocketSample<'_>, part: Part) {
        self.sockets += 1;
        self.total = self.total.saturating_add(part.depth);
        self.full |= part.full;
        if let Some(fill) = part.fill() {
            self.fill = Some(self.fill.map_or(fill, |most| most.max(fill)));
        }
        self.oldest_age_ns = self.oldest_age_ns.max(part.age_ns);
        self.elapsed_ns = self.elapsed_ns.max(sampled.elapsed_ns);
        let rank = |part: &Part| (part.age_ns, part.depth);
        if self
            .worst
            .as_ref()
            .is_none_or(|worst| rank(&part) > rank(worst))
        {
            self.worst = Some(part);
        }
    }

    fn reading(&self, key: &GroupKey<'_>, targets: &Targets) -> Reading {
        let worst = self.worst.as_ref();
        let depth = worst.map_or(0, |worst| worst.depth);
        let total = match key.unit() {
            Some(_) => "total_datagrams",
            None => "total_bytes",
        };
        Reading {
            depth,
            limit: worst.and_then(|worst| worst.limit),
            unit: key.unit(),
            fill: self.fill,
            full: self.full,
            elapsed_ns: self.elapsed_ns,
            servers: match key.direction {
                Direction::Received => targets.threads(key.target),
                Direction::Sent => 1,
            },
            wait_ns: (self.total == 0).then_some(0),
            oldest_age_ns: self.oldest_age_ns,
            worst: worst
                .filter(|worst| worst.depth > 0)
                .map(|worst| worst.describe(key, targets)),
            extra: vec![
                ("sockets", f64::from(self.sockets)),
                (total, self.total as f64),
            ],
            ..Reading::default()
        }
    }
}

impl Part {
    fn fill(&self) -> Option<f64> {
        let limit = self.limit?.max(1);
        Some(self.depth as f64 / limit as f64)
    }

    fn describe(&self, key: &GroupKey<'_>, targets: &Targets) -> String {
        let here = format!("process {} fd {}", self.tgid, self.fd);
        let other = self
            .peer
            .and_then(|peer| targets.held_by(key.target, peer, |_| true));
        match (other, key.direction) {
            (None, _) => here,
            (Some(names), Direction::Received) => format!("{here} from {names}"),
            (Some(names), Direction::Sent) => format!("{here} to {names}"),
        }
    }
}

#[cfg(test)]
mod tests;
