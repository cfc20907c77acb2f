//! Unix sockets: what was written and is not read, in both directions, and datagrams that wait.
//!
//! Sockets are grouped by path: accepted ones have their listener's, opened ones their peer's (`-> PATH`), pairs have
//! none. Each group is two queues: what waits for the target to read it, and what the target wrote and its peer has not
//! read (`… sent`). Data in a unix socket is charged to its writer: so the limit of what waits here is the peer's.
//! The kernel counts neither what was written nor what was read.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    Kind, QueueId, Reading, Sink, Source, Targets, UnixEnd,
    head::Head,
    inflow::Inflow,
    unix_listener::{UnixListeners, spelled},
};
use crate::sample::{Sample, TargetId, UnixSocket, UnixStyle};

#[derive(Default)]
pub(super) struct Unix {
    listeners: UnixListeners,
    sockets: HashMap<u64, Known>,
}

/// What is remembered of one socket.
struct Known {
    target: TargetId,
    seen_ns: u64,
    received: Half,
    sent: Half,
}

/// One socket in one direction.
#[derive(Clone, Copy, Default)]
struct Half {
    waiting: u64,
    head: Head,
    inflow: Inflow,
}

/// What sockets are grouped by.
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
    Received,
    Sent,
}

/// One queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place<'a> {
    target: TargetId,
    endpoint: Endpoint<'a>,
    datagrams: bool,
    direction: Direction,
}

/// The sockets of one queue.
#[derive(Default)]
struct Group {
    sockets: u32,
    worst: Option<Worst>,
    fill: Option<f64>,
    full: bool,
    total: u64,
    oldest_age_ns: Option<u64>,
    elapsed_ns: Option<u64>,
}

/// One socket's part of a queue at one look.
struct Worst {
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
        if !sample.walks.files {
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
        let mut groups: BTreeMap<Place<'_>, Group> = BTreeMap::new();
        let mut sockets = HashMap::with_capacity(sample.unix.len());
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
            let look = Look {
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
            let received = Place {
                target,
                endpoint,
                datagrams: socket.style == UnixStyle::Datagram,
                direction: Direction::Received,
            };
            let group = groups.entry(received).or_default();
            group.add(&look, look.received(&mut now.received));
            // Of what the service says to itself, the other end's received side shows what this one sent.
            if !inside {
                let sent = Place {
                    direction: Direction::Sent,
                    ..received
                };
                let group = groups.entry(sent).or_default();
                group.add(&look, look.sent(&mut now.sent));
            }
            sockets.insert(socket.inode, now);
        }
        self.sockets = sockets;
        for (place, group) in &groups {
            let reading = group.reading(place, targets);
            sink.put(place.target, Kind::Unix, &place.id(), reading);
        }
        sink.forget_unseen(Kind::Unix);
    }
}

/// A socket that has a path of its own was accepted, or is a server of datagrams; unless it opened a connection as well.
fn endpoint<'a>(socket: &'a UnixSocket, listening: &HashSet<&str>) -> Endpoint<'a> {
    match (socket.path.as_deref(), socket.peer_path.as_deref()) {
        (Some(path), Some(peer)) if !listening.contains(path) => Endpoint::Opened(peer),
        (Some(path), _) => Endpoint::Bound(path),
        (None, Some(peer)) => Endpoint::Opened(peer),
        (None, None) => Endpoint::Unnamed,
    }
}

impl Place<'_> {
    fn id(&self) -> QueueId {
        QueueId::UnixSockets {
            end: match self.endpoint {
                Endpoint::Bound(path) => UnixEnd::Local(spelled(path)),
                Endpoint::Opened(path) => UnixEnd::Remote(spelled(path)),
                Endpoint::Unnamed => UnixEnd::Unnamed {
                    datagrams: self.datagrams,
                },
            },
            sent: self.direction == Direction::Sent,
        }
    }

    /// Datagrams are limited by their number where they are read, and by their memory where they are written.
    fn unit(&self) -> Option<&'static str> {
        let counted = self.datagrams && self.direction == Direction::Received;
        counted.then_some("datagrams")
    }
}

/// One look at one socket.
struct Look<'a> {
    socket: &'a UnixSocket,
    /// The socket at the other end, where a target holds it.
    peer: Option<&'a UnixSocket>,
    /// Made as a pair, and the same target holds the other end.
    is_pair: bool,
    now_ns: u64,
    elapsed_ns: Option<u64>,
}

impl Look<'_> {
    fn received(&self, half: &mut Half) -> Worst {
        let socket = self.socket;
        if socket.style == UnixStyle::Datagram {
            let (queued, limit) = (u64::from(socket.queued), u64::from(socket.limit));
            let limit = Some(limit).filter(|limit| *limit > 0);
            // unix_recvq_full: as many as the limit may wait, and one more.
            let full = limit.is_some_and(|limit| queued > limit);
            return self.part(half, queued, limit, full, socket.head);
        }
        let limit = u64::from(socket.peer_sndbuf);
        self.bytes(half, u64::from(socket.unread), limit, socket.head)
    }

    /// From this end alone it is not known how long the peer has read nothing; with the peer in sight, it is. What heads
    /// a queue of datagrams may be another sender's.
    fn sent(&self, half: &mut Half) -> Worst {
        let socket = self.socket;
        let head = self
            .peer
            .filter(|_| socket.style != UnixStyle::Datagram)
            .map_or(0, |peer| peer.head);
        let (waiting, limit) = (u64::from(socket.unread_by_peer), u64::from(socket.sndbuf));
        self.bytes(half, waiting, limit, head)
    }

    fn bytes(&self, half: &mut Half, waiting: u64, limit: u64, head: u64) -> Worst {
        // A writer blocks when what it wrote has reached its limit (sock_alloc_send_pskb).
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
    ) -> Worst {
        let known = self.elapsed_ns.is_some();
        if known && waiting < half.waiting {
            half.head.moved();
        }
        let came = known && waiting > half.waiting;
        let inflow_ns = half.inflow.look(came, self.now_ns);
        half.waiting = waiting;
        let age_ns = half
            .head
            .look(head, waiting > 0, self.now_ns)
            .filter(|_| head != 0);
        let age_ns = if self.is_pair && !full {
            // What rests in a pair that a service keeps to itself is no queue while nothing comes.
            age_ns.zip(inflow_ns).map(|(age, inflow)| age.min(inflow))
        } else {
            age_ns
        };
        Worst {
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
    fn add(&mut self, look: &Look<'_>, part: Worst) {
        self.sockets += 1;
        self.total = self.total.saturating_add(part.depth);
        self.full |= part.full;
        if let Some(fill) = part.fill() {
            self.fill = Some(self.fill.map_or(fill, |most| most.max(fill)));
        }
        self.oldest_age_ns = self.oldest_age_ns.max(part.age_ns);
        self.elapsed_ns = self.elapsed_ns.max(look.elapsed_ns);
        let rank = |part: &Worst| (part.age_ns, part.depth);
        if self
            .worst
            .as_ref()
            .is_none_or(|worst| rank(&part) > rank(worst))
        {
            self.worst = Some(part);
        }
    }

    fn reading(&self, place: &Place<'_>, targets: &Targets) -> Reading {
        let worst = self.worst.as_ref();
        let depth = worst.map_or(0, |worst| worst.depth);
        let total = match place.unit() {
            Some(_) => "total_datagrams",
            None => "total_bytes",
        };
        Reading {
            depth,
            limit: worst.and_then(|worst| worst.limit),
            unit: place.unit(),
            fill: self.fill,
            full: self.full,
            elapsed_ns: self.elapsed_ns,
            servers: match place.direction {
                Direction::Received => targets.threads(place.target),
                Direction::Sent => 1,
            },
            wait_ns: (self.total == 0).then_some(0),
            oldest_age_ns: self.oldest_age_ns,
            worst: worst
                .filter(|worst| worst.depth > 0)
                .map(|worst| worst.words(place, targets)),
            extra: vec![
                ("sockets", f64::from(self.sockets)),
                (total, self.total as f64),
            ],
            ..Reading::default()
        }
    }
}

impl Worst {
    fn fill(&self) -> Option<f64> {
        let limit = self.limit?.max(1);
        Some(self.depth as f64 / limit as f64)
    }

    fn words(&self, place: &Place<'_>, targets: &Targets) -> String {
        let here = format!("process {} fd {}", self.tgid, self.fd);
        let other = self
            .peer
            .and_then(|peer| targets.held_by(place.target, peer, |_| true));
        match (other, place.direction) {
            (None, _) => here,
            (Some(names), Direction::Received) => format!("{here} from {names}"),
            (Some(names), Direction::Sent) => format!("{here} to {names}"),
        }
    }
}

#[cfg(test)]
mod tests;
