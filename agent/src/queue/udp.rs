//! UDP sockets: datagrams received and not read.
//!
//! The kernel limits them by memory and counts neither arrivals nor reads. So there are no rates, and no wait by Little's
//! law. The age comes from how long the datagram at the head of the queue has not changed.

use crate::hash::{HashMap, HashSet};
use std::{collections::BTreeMap, net::SocketAddr};

use super::{Kind, QueueId, Reading, Sink, Source, Targets, advance, head::Head, inflow::Inflow};
use crate::sample::{DatagramSocket, Sample, TargetId};

#[derive(Default)]
pub(super) struct Udp {
    sockets: HashMap<u64, Known>,
    /// Processes watched at the previous scan. A new socket of theirs began without drops.
    watched: HashSet<u32>,
}

/// State kept per socket.
struct Known {
    memory: u32,
    queued: Option<u32>,
    drops: u32,
    head: Head,
    inflow: Inflow,
    seen_ns: u64,
}

/// The end that sockets of one group share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Endpoint {
    /// Bound to this address.
    Bound(SocketAddr),
    /// Connected to this address.
    Opened(SocketAddr),
}

impl Endpoint {
    fn id(self) -> QueueId {
        match self {
            Self::Bound(local) => QueueId::Local(local),
            Self::Opened(remote) => QueueId::Remote(remote),
        }
    }
}

/// Addresses of unconnected bound sockets, by target, network namespace and port.
type Ports = HashMap<(TargetId, u32, u16), SocketAddr>;

/// The sockets of one endpoint.
#[derive(Default)]
struct Group {
    sockets: u32,
    fullest: Option<Fullest>,
    full: bool,
    /// Age of the oldest datagram.
    oldest_age_ns: Option<u64>,
    datagrams: Option<u64>,
    losses: u64,
    elapsed_ns: Option<u64>,
}

/// The socket with the highest fill.
struct Fullest {
    fill: f64,
    memory: u32,
    rcvbuf: u32,
    tgid: u32,
    fd: u32,
}

impl Source for Udp {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.files {
            return;
        }
        let is_bound = |socket: &&DatagramSocket| socket.local.port() != 0;
        let ports: Ports = sample
            .datagrams
            .iter()
            .filter(is_bound)
            .filter(|socket| socket.remote.port() == 0)
            .filter_map(|socket| Some((place(socket, targets)?, socket.local)))
            .collect();
        let mut groups: BTreeMap<(TargetId, Endpoint), Group> = BTreeMap::new();
        let mut sockets =
            HashMap::with_capacity_and_hasher(sample.datagrams.len(), Default::default());
        // A socket without a port receives nothing.
        for socket in sample.datagrams.iter().filter(is_bound) {
            let Some(target) = targets.of(socket.tgid) else {
                continue;
            };
            let endpoint = endpoint(socket, targets, &ports);
            let before = self.sockets.get(&socket.cookie);
            let is_process_known = self.watched.contains(&socket.tgid);
            let group = groups.entry((target, endpoint)).or_default();
            let now = group.add(socket, endpoint, before, is_process_known, sample.mono_ns);
            sockets.insert(socket.cookie, now);
        }
        self.sockets = sockets;
        self.watched = targets
            .all()
            .flat_map(|target| target.tgids.iter().copied())
            .collect();
        for ((target, endpoint), group) in &groups {
            let reading = group.reading(targets.threads(*target));
            sink.put(*target, Kind::Udp, &endpoint.id(), reading);
        }
        sink.forget_unseen(Kind::Udp);
    }
}

fn place(socket: &DatagramSocket, targets: &Targets) -> Option<(TargetId, u32, u16)> {
    let target = targets.of(socket.tgid)?;
    Some((target, socket.netns, socket.local.port()))
}

/// The endpoint of a socket. A server may connect one socket to each client (QUIC, DTLS); all of them serve its port.
fn endpoint(socket: &DatagramSocket, targets: &Targets, ports: &Ports) -> Endpoint {
    if socket.remote.port() == 0 {
        return Endpoint::Bound(socket.local);
    }
    place(socket, targets)
        .and_then(|place| ports.get(&place))
        .map_or(Endpoint::Opened(socket.remote), |local| {
            Endpoint::Bound(*local)
        })
}

impl Group {
    fn add(
        &mut self,
        socket: &DatagramSocket,
        endpoint: Endpoint,
        before: Option<&Known>,
        is_process_known: bool,
        now_ns: u64,
    ) -> Known {
        self.sockets += 1;
        self.full |= is_full(socket);
        if let Some(queued) = socket.queued {
            let sum = self.datagrams.unwrap_or(0);
            self.datagrams = Some(sum + u64::from(queued));
        }
        let fill = f64::from(socket.memory) / f64::from(socket.rcvbuf.max(1));
        if self.fullest.as_ref().is_none_or(|best| fill > best.fill) {
            self.fullest = Some(Fullest {
                fill,
                memory: socket.memory,
                rcvbuf: socket.rcvbuf,
                tgid: socket.tgid,
                fd: socket.fd,
            });
        }
        self.losses += match before {
            Some(before) => advance(before.drops, socket.drops),
            None if is_process_known => u64::from(socket.drops),
            None => 0,
        };
        let elapsed_ns = before.map(|before| now_ns.saturating_sub(before.seen_ns));
        self.elapsed_ns = self.elapsed_ns.max(elapsed_ns);
        let (mut head, mut inflow) =
            before.map_or_else(Default::default, |before| (before.head, before.inflow));
        let grown = before.is_some_and(|before| socket.memory > before.memory);
        let fell = before.is_some_and(|before| socket.queued < before.queued);
        if fell {
            head.moved();
        }
        let age_ns = head
            .observe(socket.head, socket.memory > 0, now_ns)
            .filter(|_| socket.head != 0);
        // A client may leave late responses unread in its socket. They are not a queue, since nobody waits for them.
        let inflow_ns = inflow.observe(grown, now_ns);
        let age_ns = match endpoint {
            Endpoint::Bound(_) => age_ns,
            Endpoint::Opened(_) => age_ns.zip(inflow_ns).map(|(age, inflow)| age.min(inflow)),
        };
        self.oldest_age_ns = self.oldest_age_ns.max(age_ns);
        Known {
            memory: socket.memory,
            queued: socket.queued,
            drops: socket.drops,
            head,
            inflow,
            seen_ns: now_ns,
        }
    }

    fn reading(&self, servers: u32) -> Reading {
        let fullest = self.fullest.as_ref();
        let depth = fullest.map_or(0, |fullest| u64::from(fullest.memory));
        let fill = fullest.map(|fullest| fullest.fill);
        let mut extra = vec![("sockets", f64::from(self.sockets))];
        if let Some(datagrams) = self.datagrams {
            extra.push(("datagrams", datagrams as f64));
        }
        Reading {
            depth,
            limit: fullest.map(|fullest| u64::from(fullest.rcvbuf)),
            // The remaining space is useless if no datagram fits.
            fill: fill.map(|fill| if self.full { fill.max(1.0) } else { fill }),
            full: self.full,
            elapsed_ns: self.elapsed_ns,
            servers,
            wait_ns: (depth == 0).then_some(0),
            oldest_age_ns: self.oldest_age_ns,
            losses: self.losses,
            worst: fullest
                .filter(|_| depth > 0)
                .map(|fullest| format!("process {} fd {}", fullest.tgid, fullest.fd)),
            extra,
            ..Reading::default()
        }
    }
}

/// Whether the socket is full: another datagram of the average size would not fit. The kernel drops a datagram that would
/// make the memory exceed the limit (__udp_enqueue_schedule_skb; older kernels let one exceed it).
fn is_full(socket: &DatagramSocket) -> bool {
    let one = socket
        .queued
        .and_then(|queued| socket.memory.checked_div(queued))
        .unwrap_or(0);
    socket.memory > 0 && socket.memory.saturating_add(one) >= socket.rcvbuf
}

#[cfg(test)]
mod tests {
    use super::super::{
        Kind, Reading,
        watched::{PID, TICK, Watched, extra},
    };
    use crate::sample::{DatagramSocket, Sample};

    fn socket(cookie: u64, memory: u32) -> DatagramSocket {
        DatagramSocket {
            cookie,
            tgid: PID,
            fd: cookie as u32,
            netns: 1,
            local: ([0, 0, 0, 0], 53).into(),
            remote: ([0, 0, 0, 0], 0).into(),
            memory,
            rcvbuf: 10_000,
            queued: Some(memory / 500),
            drops: 0,
            head: u64::from(memory > 0),
        }
    }

    fn opened(cookie: u64, memory: u32, local: u16) -> DatagramSocket {
        DatagramSocket {
            local: ([10, 0, 0, 1], local).into(),
            remote: ([10, 0, 0, 9], 5_353).into(),
            ..socket(cookie, memory)
        }
    }

    fn scan(watched: &mut Watched, datagrams: Vec<DatagramSocket>) -> Vec<(String, Reading)> {
        let sample = Sample {
            datagrams,
            ..Sample::default()
        };
        watched.scan(Kind::Udp, sample)
    }

    #[test]
    fn sockets_on_one_port_are_one_queue_and_the_fullest_is_reported() {
        let mut watched = Watched::default();
        let queues = scan(&mut watched, vec![socket(4, 1_000), socket(5, 3_000)]);
        let (name, reading) = &queues[0];
        assert_eq!((queues.len(), name.as_str()), (1, "0.0.0.0:53"));
        assert_eq!((reading.depth, reading.limit), (3_000, Some(10_000)));
        assert_eq!(extra(reading, "datagrams"), Some(8.0));
        assert_eq!(reading.worst.as_deref(), Some("process 12 fd 5"));
        assert_eq!((reading.arrivals, reading.departures), (None, None));
    }

    #[test]
    fn an_empty_socket_has_no_wait() {
        let queues = scan(&mut Watched::default(), vec![socket(4, 0)]);
        let reading = &queues[0].1;
        assert_eq!((reading.wait_ns, reading.oldest_age_ns), (Some(0), None));
        assert!(!reading.full);
    }

    #[test]
    fn a_socket_is_full_if_another_average_datagram_does_not_fit() {
        let full = |memory| {
            scan(&mut Watched::default(), vec![socket(4, memory)])[0]
                .1
                .full
        };
        assert!(!full(9_000));
        assert!(full(9_500));
        assert!(full(10_000));
    }

    #[test]
    fn drops_count_from_the_first_sample_unless_the_socket_is_newer() {
        let mut watched = Watched::default();
        let dropped = |cookie, drops| DatagramSocket {
            drops,
            ..socket(cookie, 0)
        };
        let queues = scan(&mut watched, vec![dropped(4, 70)]);
        assert_eq!(queues[0].1.losses, 0);
        let queues = scan(&mut watched, vec![dropped(4, 72), dropped(5, 3)]);
        assert_eq!(queues[0].1.losses, 5);
        let queues = scan(&mut watched, vec![dropped(4, 72), dropped(5, 3)]);
        assert_eq!(queues[0].1.losses, 0);
    }

    #[test]
    fn an_unchanged_head_ages_and_a_read_resets_the_age() {
        let mut watched = Watched::default();
        let mut age = |memory, head| {
            let socket = DatagramSocket {
                head,
                ..socket(4, memory)
            };
            scan(&mut watched, vec![socket])[0].1.oldest_age_ns
        };
        assert_eq!(age(1_000, 7), Some(0));
        assert_eq!(age(2_000, 7), Some(TICK));
        assert_eq!(age(2_000, 8), Some(0));
        assert_eq!(age(2_000, 8), Some(TICK));
        assert_eq!(
            age(1_500, 8),
            Some(0),
            "fewer datagrams wait: the address was reused"
        );
        assert_eq!(age(0, 0), None);
    }

    #[test]
    fn an_answer_that_a_client_left_unread_does_not_age() {
        let mut watched = Watched::default();
        scan(&mut watched, vec![opened(4, 0, 40_000)]);
        let oldest: Vec<_> = (0..30)
            .map(|_| {
                let queues = scan(&mut watched, vec![opened(4, 500, 40_000)]);
                assert_eq!(queues[0].0, "-> 10.0.0.9:5353");
                queues[0].1.oldest_age_ns
            })
            .collect();
        assert!(oldest.iter().flatten().all(|age| *age <= 10 * TICK));
        assert_eq!(oldest.last(), Some(&None));
    }

    #[test]
    fn sockets_that_a_server_connects_to_its_clients_serve_its_port() {
        let queues = scan(
            &mut Watched::default(),
            vec![socket(4, 0), opened(5, 500, 53), opened(6, 500, 4_000)],
        );
        let names: Vec<_> = queues.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["0.0.0.0:53", "-> 10.0.0.9:5353"]);
    }
}
