//! Receive and send queues of TCP connections.
//!
//! Connections are grouped, since their number is unbounded: accepted ones by local port, opened ones by remote address.
//! Depth and limit are those of the worst connection of the group, which is named. In a sum, one stuck connection among a
//! thousand idle ones would disappear.

use std::net::SocketAddr;

use super::{
    Hidden, Kind, NewConnections, Reading, Sink, Source, Targets, advance,
    endpoint::{Endpoint, Groups, state},
    head::Head,
    littles_law,
};
use crate::{
    in_order::InOrder,
    sample::{Connection, Sample},
};

/// Size of a full segment (Ethernet MSS), bytes. Less unsent data may be held back by Nagle's algorithm or TCP_CORK.
const FULL_SEGMENT_BYTES: u64 = 1460;
/// A send queue without progress for this long, ns, is stuck, whatever the round-trip time. It is TCP's initial
/// retransmission timeout (RFC 6298).
const STALLED_NS: u64 = 1_000_000_000;

#[derive(Default)]
pub(super) struct Streams {
    connections: InOrder<Known>,
    groups: Groups<Group>,
    /// Number of file scans so far.
    scans: u64,
    /// Number of samples so far. It identifies the groups that the current sample touched.
    samples: u64,
}

/// State kept per connection.
struct Known {
    /// Slot of its group.
    group: usize,
    /// The last scan that saw it.
    scan: u64,
    seen_ns: u64,
    rcv_nxt: u32,
    copied_seq: u32,
    write_seq: u32,
    snd_una: u32,
    drops: Option<u32>,
    recv_head: Head,
    send_head: Head,
}

/// The connections of one endpoint at one sample.
#[derive(Default)]
struct Group {
    sample: u64,
    connections: u64,
    elapsed_ns: Option<u64>,
    recv: Half,
    send: Half,
}

/// One direction of a group at one sample.
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

/// The connection that a queue is represented by.
struct Worst {
    /// Age and depth: the greatest is the worst.
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
        if !sample.scans.files && !sample.scans.focused_sockets {
            return;
        }
        self.samples += 1;
        self.scans += u64::from(sample.scans.files);
        for connection in &sample.connections {
            if !matches!(connection.state, state::SYN_SENT | state::SYN_RECV) {
                self.read_connection(connection, sample.mono_ns, targets, &mut sink.new);
            }
        }
        if sample.scans.files {
            let scan = self.scans;
            self.connections.retain(|known| known.scan == scan);
            // A group that the scan did not touch has no connections left.
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
        if sample.scans.files {
            sink.forget_unseen(Kind::Recv);
            sink.forget_unseen(Kind::Send);
        }
    }
}

impl Streams {
    fn read_connection(
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
            known.scan = self.scans;
            return;
        }
        let Some(target) = targets.of(connection.tgid) else {
            return;
        };
        let endpoint = Endpoint::of(connection, targets);
        let is_new = self.scans > 1;
        if is_new && let Endpoint::Served(port) = endpoint {
            *new.entry((connection.netns, port)).or_default() += 1;
        }
        let group = self.groups.slot(target, endpoint);
        let mut known = Known::first(connection, group, is_new);
        let group = touch(&mut self.groups, group, self.samples);
        group.add(connection, &mut known, None, now_ns);
        known.scan = self.scans;
        self.connections.insert(connection.cookie, known);
    }
}

/// The group in this slot, reset at its first use within a sample.
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
    /// A new connection. If it was opened since the previous scan, it began without drops. Its initial sequence number is
    /// unknown.
    fn first(connection: &Connection, group: usize, is_new: bool) -> Self {
        Self {
            group,
            scan: 0,
            seen_ns: 0,
            rcv_nxt: connection.rcv_nxt,
            copied_seq: connection.copied_seq,
            write_seq: connection.write_seq,
            snd_una: connection.snd_una,
            drops: is_new.then_some(0),
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
            .observe(connection.copied_seq, unread > 0, now_ns);
        let half = &mut self.recv;
        half.arrivals += advance(known.rcv_nxt, connection.rcv_nxt);
        half.departures += read;
        half.served += u64::from(read > 0);
        half.total += unread;
        known.rcv_nxt = connection.rcv_nxt;
        known.copied_seq = connection.copied_seq;
        // The kernel side reads drops only while data is unread.
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
                wait_ns: littles_law(unread, read, elapsed_ns),
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
        let age_ns = known
            .send_head
            .observe(connection.snd_una, waits > 0, now_ns);
        let half = &mut self.send;
        half.arrivals += advance(known.write_seq, connection.write_seq);
        half.departures += acknowledged;
        half.served += u64::from(acknowledged > 0);
        half.total += waits;
        known.write_seq = connection.write_seq;
        known.snd_una = connection.snd_una;
        if let Some(age_ns) = age_ns {
            let limited_by = limited_by(connection);
            // Data in flight waits for a round trip, which is not queueing. What counts is data that the peer's window
            // has no room for, and a connection without any progress.
            let is_standing = limited_by == Some(PEER) || age_ns >= STALLED_NS;
            half.consider(Worst {
                rank: (if is_standing { age_ns } else { 0 }, waits),
                depth: waits,
                limit: u64::from(connection.sndbuf),
                fill: f64::from(connection.wmem_queued) / f64::from(connection.sndbuf.max(1)),
                wait_ns: littles_law(waits, acknowledged, elapsed_ns).filter(|_| is_standing),
                age_ns: if is_standing { age_ns } else { 0 },
                tgid: connection.tgid,
                fd: connection.fd,
                remote: connection.remote,
                limited_by,
            });
        }
    }
}

/// Bytes received and not read, as SIOCINQ returns. A FIN occupies a sequence number and is not data.
fn unread(connection: &Connection) -> u64 {
    let span = advance(connection.copied_seq, connection.rcv_nxt);
    let fin_received = !matches!(
        connection.state,
        state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2
    );
    span.saturating_sub(u64::from(fin_received))
}

/// Bytes written and not acknowledged, as SIOCOUTQ returns, without our own FIN.
fn unacknowledged(connection: &Connection) -> u64 {
    let span = advance(connection.snd_una, connection.write_seq);
    let fin_sent = matches!(
        connection.state,
        state::FIN_WAIT1 | state::LAST_ACK | state::CLOSING
    );
    span.saturating_sub(u64::from(fin_sent))
}

/// The peer's receive window is closed.
const PEER: &str = "peer window";

/// What keeps a connection from sending the data that is written, at this moment.
fn limited_by(connection: &Connection) -> Option<&'static str> {
    let unsent = advance(connection.snd_nxt, connection.write_seq);
    let in_flight = advance(connection.snd_una, connection.snd_nxt);
    // The sequence numbers are not read at one instant and can cross. A negative distance means that there is no data.
    if unsent >= 1 << 31 || unsent == 0 {
        return None;
    }
    if in_flight == 0 && unsent >= FULL_SEGMENT_BYTES {
        // Everything sent is acknowledged, more is waiting, and nothing is in flight: the peer's window is closed.
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
            hidden: Hidden::Nothing,
            unseen_at_most: 0,
            elapsed_ns: group.elapsed_ns,
            served: known.then_some(self.served),
            servers,
            wait_ns: match worst {
                None => Some(0),
                Some(worst) => worst.wait_ns,
            },
            oldest_age_ns: self.oldest_age_ns,
            ages_ns: Vec::new(),
            no_consumers_ns: None,
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
