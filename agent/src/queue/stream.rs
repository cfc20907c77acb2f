//! Receive and send queues of TCP connections.
//!
//! Connections are grouped, for their number has no bound: those that a target accepted by the address it listens on,
//! those that it opened by the remote endpoint. Depth and limit are those of the worst connection of the group,
//! which is named; one stuck connection among a thousand idle ones would not be seen in a sum.

use std::net::SocketAddr;

use super::{
    Kind, NewConnections, Reading, Sink, Source, Targets, advance,
    endpoint::{Endpoint, Groups, state},
    head::Head,
    little,
};
use crate::{
    in_order::InOrder,
    sample::{Connection, Sample},
};

/// Unsent data below one segment may wait for company (Nagle's algorithm, TCP_CORK).
const SEGMENT_BYTES: u64 = 1460;
/// A send queue that stands still for so long is stuck, whatever the round trip: TCP's initial retransmission timeout.
const STALL_NS: u64 = 1_000_000_000;

#[derive(Default)]
pub(super) struct Streams {
    connections: InOrder<Known>,
    groups: Groups<Group>,
    /// Walks over files so far.
    walks: u64,
    /// Samples so far: tells the groups that a sample touched from the rest.
    samples: u64,
}

/// What is remembered of one connection.
struct Known {
    group: usize,
    walk: u64,
    seen_ns: u64,
    rcv_nxt: u32,
    copied_seq: u32,
    write_seq: u32,
    snd_una: u32,
    drops: Option<u32>,
    recv_head: Head,
    send_head: Head,
}

/// The connections of one endpoint, over one sample.
#[derive(Default)]
struct Group {
    sample: u64,
    connections: u64,
    elapsed_ns: Option<u64>,
    recv: Half,
    send: Half,
}

/// One group in one direction, over one sample.
#[derive(Default)]
struct Half {
    total: u64,
    arrivals: u64,
    departures: u64,
    served: u64,
    losses: u64,
    worst: Option<Worst>,
    oldest_age_ns: Option<u64>,
}

struct Worst {
    rank: (u64, u64),
    depth: u64,
    limit: u64,
    fill: f64,
    wait_ns: Option<u64>,
    age_ns: u64,
    tgid: u32,
    fd: u32,
    remote: SocketAddr,
    limited_by: Option<&'static str>,
}

impl Source for Streams {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.walks.files && !sample.walks.marked {
            return;
        }
        self.samples += 1;
        self.walks += u64::from(sample.walks.files);
        for connection in &sample.connections {
            if !matches!(connection.state, state::SYN_SENT | state::SYN_RECV) {
                self.look(connection, sample.mono_ns, targets, &mut sink.new);
            }
        }
        if sample.walks.files {
            let walk = self.walks;
            self.connections.retain(|known| known.walk == walk);
            // A group that it did not touch has no connection left.
            let samples = self.samples;
            self.groups.retain(|_, _, group| group.sample == samples);
        }
        for (target, endpoint, group) in self.groups.iter() {
            if group.sample != self.samples {
                continue;
            }
            let id = endpoint.id();
            sink.put_with(target, Kind::Recv, &id, || {
                group.recv.reading(group, targets.threads(target))
            });
            sink.put_with(target, Kind::Send, &id, || group.send.reading(group, 1));
        }
        if sample.walks.files {
            sink.forget_unseen(Kind::Recv);
            sink.forget_unseen(Kind::Send);
        }
    }
}

impl Streams {
    fn look(
        &mut self,
        connection: &Connection,
        now_ns: u64,
        targets: &Targets,
        new: &mut NewConnections,
    ) {
        if let Some(known) = self.connections.next(connection.cookie) {
            let elapsed_ns = now_ns.saturating_sub(known.seen_ns);
            let group = touch(&mut self.groups, known.group, self.samples);
            group.add(connection, known, Some(elapsed_ns), now_ns);
            known.walk = self.walks;
            return;
        }
        let Some(target) = targets.of(connection.tgid) else {
            return;
        };
        let endpoint = Endpoint::of(connection, targets);
        let came_since = self.walks > 1;
        if came_since && let Endpoint::Served(port) = endpoint {
            *new.entry((connection.netns, port)).or_default() += 1;
        }
        let group = self.groups.place(target, endpoint);
        let mut known = Known::first(connection, group, came_since);
        let group = touch(&mut self.groups, group, self.samples);
        group.add(connection, &mut known, None, now_ns);
        known.walk = self.walks;
        self.connections.insert(connection.cookie, known);
    }
}

/// The group in this place, empty at the first touch of a sample.
fn touch(groups: &mut Groups<Group>, place: usize, sample: u64) -> &mut Group {
    let group = groups.at(place);
    if group.sample != sample {
        *group = Group {
            sample,
            ..Group::default()
        };
    }
    group
}

impl Known {
    /// A connection at first sight. One that came since the last walk began without drops; its first sequence number
    /// is not known.
    fn first(connection: &Connection, group: usize, came_since: bool) -> Self {
        Self {
            group,
            walk: 0,
            seen_ns: 0,
            rcv_nxt: connection.rcv_nxt,
            copied_seq: connection.copied_seq,
            write_seq: connection.write_seq,
            snd_una: connection.snd_una,
            drops: came_since.then_some(0),
            recv_head: Head::default(),
            send_head: Head::default(),
        }
    }
}

impl Group {
    fn add(
        &mut self,
        connection: &Connection,
        known: &mut Known,
        elapsed_ns: Option<u64>,
        now_ns: u64,
    ) {
        self.connections += 1;
        self.elapsed_ns = self.elapsed_ns.max(elapsed_ns);
        self.receive(connection, known, elapsed_ns, now_ns);
        self.send(connection, known, elapsed_ns, now_ns);
        known.seen_ns = now_ns;
    }

    fn receive(
        &mut self,
        connection: &Connection,
        known: &mut Known,
        elapsed_ns: Option<u64>,
        now_ns: u64,
    ) {
        let unread = unread(connection);
        let read = advance(known.copied_seq, connection.copied_seq);
        let age_ns = known
            .recv_head
            .look(connection.copied_seq, unread > 0, now_ns);
        let half = &mut self.recv;
        half.arrivals += advance(known.rcv_nxt, connection.rcv_nxt);
        half.departures += read;
        half.served += u64::from(read > 0);
        half.total += unread;
        known.rcv_nxt = connection.rcv_nxt;
        known.copied_seq = connection.copied_seq;
        // Drops are read only while something is unread.
        if connection.rcvbuf > 0 {
            let before = known.drops.replace(connection.drops);
            half.losses += before.map_or(0, |before| advance(before, connection.drops));
        }
        if let Some(age_ns) = age_ns {
            half.consider(Worst {
                rank: (age_ns, unread),
                depth: unread,
                limit: u64::from(connection.rcvbuf),
                fill: f64::from(connection.rmem_alloc) / f64::from(connection.rcvbuf.max(1)),
                wait_ns: little(unread, read, elapsed_ns),
                age_ns,
                tgid: connection.tgid,
                fd: connection.fd,
                remote: connection.remote,
                limited_by: None,
            });
        }
    }

    fn send(
        &mut self,
        connection: &Connection,
        known: &mut Known,
        elapsed_ns: Option<u64>,
        now_ns: u64,
    ) {
        let waits = unacknowledged(connection);
        let acknowledged = advance(known.snd_una, connection.snd_una);
        let age_ns = known.send_head.look(connection.snd_una, waits > 0, now_ns);
        let half = &mut self.send;
        half.arrivals += advance(known.write_seq, connection.write_seq);
        half.departures += acknowledged;
        half.served += u64::from(acknowledged > 0);
        half.total += waits;
        known.write_seq = connection.write_seq;
        known.snd_una = connection.snd_una;
        if let Some(age_ns) = age_ns {
            let limited_by = limited_by(connection);
            // Data in flight always waits, a round trip; that is no queue. What counts is data that the peer
            // gives no room for, and a connection on which nothing moves at all.
            let stands = limited_by == Some(PEER) || age_ns >= STALL_NS;
            half.consider(Worst {
                rank: (if stands { age_ns } else { 0 }, waits),
                depth: waits,
                limit: u64::from(connection.sndbuf),
                fill: f64::from(connection.wmem_queued) / f64::from(connection.sndbuf.max(1)),
                wait_ns: little(waits, acknowledged, elapsed_ns).filter(|_| stands),
                age_ns: if stands { age_ns } else { 0 },
                tgid: connection.tgid,
                fd: connection.fd,
                remote: connection.remote,
                limited_by,
            });
        }
    }
}

/// Bytes received and not read: what SIOCINQ answers. A FIN takes a sequence number and is not data.
fn unread(connection: &Connection) -> u64 {
    let span = advance(connection.copied_seq, connection.rcv_nxt);
    let fin_received = !matches!(
        connection.state,
        state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2
    );
    span.saturating_sub(u64::from(fin_received))
}

/// Bytes written and not acknowledged: what SIOCOUTQ answers, less our own FIN.
fn unacknowledged(connection: &Connection) -> u64 {
    let span = advance(connection.snd_una, connection.write_seq);
    let fin_sent = matches!(
        connection.state,
        state::FIN_WAIT1 | state::LAST_ACK | state::CLOSING
    );
    span.saturating_sub(u64::from(fin_sent))
}

const PEER: &str = "peer window";

/// Who keeps a connection from sending what is written, at this moment.
fn limited_by(connection: &Connection) -> Option<&'static str> {
    let unsent = advance(connection.snd_nxt, connection.write_seq);
    let in_flight = advance(connection.snd_una, connection.snd_nxt);
    // Sequence numbers of two moments can cross; a "negative" distance is no data.
    if unsent >= 1 << 31 || unsent == 0 {
        return None;
    }
    if in_flight == 0 && unsent >= SEGMENT_BYTES {
        // All that was sent is acknowledged, there is more, and yet nothing is on its way: the peer offers no room.
        Some(PEER)
    } else if connection.wmem_queued >= connection.sndbuf && connection.sndbuf > 0 {
        Some("own buffer")
    } else {
        Some("network")
    }
}

impl Half {
    fn consider(&mut self, candidate: Worst) {
        self.oldest_age_ns = self.oldest_age_ns.max(Some(candidate.age_ns));
        if self
            .worst
            .as_ref()
            .is_none_or(|worst| candidate.rank > worst.rank)
        {
            self.worst = Some(candidate);
        }
    }

    fn reading(&self, group: &Group, servers: u32) -> Reading {
        let known = group.elapsed_ns.is_some();
        let worst = self.worst.as_ref();
        Reading {
            depth: worst.map_or(0, |worst| worst.depth),
            limit: worst.map(|worst| worst.limit).filter(|limit| *limit > 0),
            unit: None,
            fill: Some(worst.map_or(0.0, |worst| worst.fill)),
            full: worst.is_some_and(|worst| worst.fill >= 1.0),
            arrivals: known.then_some(self.arrivals),
            departures: known.then_some(self.departures),
            elapsed_ns: group.elapsed_ns,
            served: known.then_some(self.served),
            servers,
            wait_ns: match worst {
                None => Some(0),
                Some(worst) => worst.wait_ns,
            },
            oldest_age_ns: self.oldest_age_ns,
            ages_ns: Vec::new(),
            losses: self.losses,
            worst: worst.map(|worst| {
                let by = worst
                    .limited_by
                    .map_or_else(String::new, |by| format!(", limited by {by}"));
                format!(
                    "process {} fd {} with {}{by}",
                    worst.tgid, worst.fd, worst.remote
                )
            }),
            extra: vec![
                ("connections", group.connections as f64),
                ("total_bytes", self.total as f64),
            ],
        }
    }
}
