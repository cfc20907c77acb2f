//! A service with accepted and opened connections, sample by sample.

use super::*;
use crate::{
    queue::{Model, Reading, watched},
    sample::{Listener, Listening, Network, Scans, Target, Thread, fixture::silent_connection},
};

const MS: u64 = 1_000_000;

/// A service (process 7) that listens on 8080 and calls 127.0.0.1:6379; its connections by cookie.
#[derive(Default)]
struct World {
    model: Model,
    now_ns: u64,
    connections: Vec<Connection>,
    readings: Vec<(Kind, String, Reading)>,
    gone: Vec<String>,
    /// The model knows the targets and listeners.
    started: bool,
    /// Connections accepted so far, as the kernel counts them.
    passive_opens: u64,
    /// Listeners of others in the namespace.
    others: u32,
    /// CPU time of the service so far, ns.
    cpu_ns: u64,
}

fn established(cookie: u64, local: &str, remote: &str) -> Connection {
    Connection {
        cookie,
        tgid: 7,
        fd: 10 + cookie as u32,
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        rcv_nxt: 1_000,
        copied_seq: 1_000,
        write_seq: 5_000,
        snd_una: 5_000,
        snd_nxt: 5_000,
        snd_wnd: 65_535,
        snd_wl1: 1_000,
        since_received_ns: 3_600_000 * MS,
        since_sent_ns: 3_600_000 * MS,
        since_any_segment_ns: 3_600_000 * MS,
        ..silent_connection()
    }
}

fn served(cookie: u64) -> Connection {
    established(
        cookie,
        "127.0.0.1:8080",
        &format!("10.0.0.9:{}", 40_000 + cookie),
    )
}

fn opened(cookie: u64) -> Connection {
    let own = format!("127.0.0.1:{}", 40_000 + cookie);
    Connection {
        snd_wl1: 999,
        ..established(cookie, &own, "127.0.0.1:6379")
    }
}

impl World {
    fn new(connections: impl IntoIterator<Item = Connection>) -> Self {
        let mut world = Self {
            now_ns: 1_000_000 * MS,
            connections: connections.into_iter().collect(),
            ..Self::default()
        };
        world.scan();
        world
    }

    fn at(&mut self, cookie: u64) -> &mut Connection {
        self.connections
            .iter_mut()
            .find(|it| it.cookie == cookie)
            .unwrap()
    }

    /// A request arrives and is read.
    fn ask(&mut self, cookie: u64) {
        let connection = self.at(cookie);
        connection.snd_wl1 = connection.rcv_nxt;
        connection.rcv_nxt += 100;
        connection.copied_seq = connection.rcv_nxt;
        connection.since_received_ns = 0;
    }

    /// The request is answered, and the answer acknowledged.
    fn answer(&mut self, cookie: u64) {
        let connection = self.at(cookie);
        connection.write_seq += 100;
        connection.snd_una = connection.write_seq;
        connection.snd_wl1 = connection.rcv_nxt;
        connection.since_sent_ns = 0;
    }

    fn scan(&mut self) {
        self.sample(|_| true, true);
    }

    /// A sample 100 ms later, of all connections or of the `seen` ones only.
    fn sample(&mut self, seen: impl Fn(u64) -> bool, files: bool) {
        for one in &mut self.connections {
            one.since_received_ns += 100 * MS;
            one.since_sent_ns += 100 * MS;
            one.since_any_segment_ns += 100 * MS;
        }
        self.now_ns += 100 * MS;
        let mut connections = self.connections.clone();
        connections.retain(|it| seen(it.cookie));
        let first = !std::mem::replace(&mut self.started, true);
        let sample = Sample {
            mono_ns: self.now_ns,
            targets: first.then(|| {
                vec![Target {
                    id: 1,
                    tgids: vec![7],
                    ..Target::default()
                }]
            }),
            scans: Scans {
                files,
                focused_sockets: !files,
                threads: true,
                ..Scans::default()
            },
            threads: vec![Thread {
                tgid: 7,
                tid: 7,
                runnable: false,
                on_cpu: false,
                run_delay_ns: 0,
                dispatches: 0,
                cpu_ns: self.cpu_ns,
            }],
            listeners: vec![Listener {
                cookie: 99,
                tgid: 7,
                netns: 1,
                address: "0.0.0.0:8080".parse().unwrap(),
                depth: 0,
                limit: 10,
                drops: 0,
                half_open: None,
                seen_ns: self.now_ns,
                ages_ns: Vec::new(),
            }],
            networks: vec![Network {
                netns: 1,
                passive_opens: self.passive_opens,
                others: self.others,
                ..Network::default()
            }],
            listening: first.then(|| {
                vec![Listening {
                    netns: 1,
                    address: "127.0.0.1:6379".parse().unwrap(),
                    tgid: 77,
                    name: "redis-server".to_owned(),
                }]
            }),
            connections,
            ..Sample::default()
        };
        let readings = self.model.read(&sample);
        let of_key = |(key, reading): (std::sync::Arc<crate::queue::QueueKey>, Reading)| {
            (key.kind, key.name().to_owned(), reading)
        };
        self.readings = readings.queues.into_iter().map(of_key).collect();
        self.gone = readings
            .gone
            .iter()
            .filter(|key| matches!(key.kind, Kind::Inflight | Kind::Downstream))
            .map(|key| key.name().to_owned())
            .collect();
    }

    fn reading(&self, kind: Kind) -> &Reading {
        let found = self.readings.iter().find(|(of, ..)| *of == kind);
        &found.unwrap().2
    }

    fn extra(&self, kind: Kind, key: &str) -> Option<f64> {
        watched::extra(self.reading(kind), key)
    }
}

#[test]
fn requests_in_flight_are_counted_aged_and_named() {
    let mut world = World::new((1..=20).map(served));
    assert_eq!(world.reading(Kind::Inflight).depth, 0);
    assert_eq!(world.reading(Kind::Inflight).limit, None);
    world.ask(3);
    world.scan();
    world.ask(4);
    world.ask(5);
    world.scan();
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.depth, reading.limit), (3, Some(3)));
    assert_eq!((reading.arrivals, reading.departures), (Some(2), Some(0)));
    assert_eq!(reading.oldest_age_ns, Some(200 * MS));
    assert_eq!(reading.ages_ns, [200 * MS, 100 * MS, 100 * MS]);
    assert_eq!(reading.wait_ns, Some(100 * MS));
    let worst = reading.worst.as_deref();
    assert_eq!(worst, Some("process 7 fd 13 with 10.0.0.9:40003"));
    assert_eq!(world.extra(Kind::Inflight, "working"), Some(3.0));
    assert_eq!(world.extra(Kind::Inflight, "connections"), Some(20.0));
    world.answer(3);
    world.scan();
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.depth, reading.limit), (2, Some(3)));
    assert_eq!((reading.arrivals, reading.departures), (Some(0), Some(1)));
    assert_eq!(world.extra(Kind::Inflight, "response_time_ns"), Some(200e6));
    assert_eq!(world.extra(Kind::Inflight, "at_least"), None);
}

#[test]
fn idle_connections_are_not_requests_in_flight() {
    let mut world = World::new((1..=20).map(served).chain((21..=30).map(opened)));
    for _ in 0..50 {
        world.scan();
        for kind in [Kind::Inflight, Kind::Downstream] {
            let reading = world.reading(kind);
            assert_eq!((reading.depth, reading.wait_ns), (0, Some(0)));
            assert_eq!((reading.oldest_age_ns, reading.losses), (None, 0));
        }
    }
}

#[test]
fn a_sample_of_some_connections_adjusts_the_count_of_all() {
    let mut world = World::new((1..=20).map(served));
    for cookie in 1..=10 {
        world.ask(cookie);
    }
    world.scan();
    world.answer(1);
    world.ask(11);
    world.ask(12);
    world.sample(|cookie| [1, 2, 11, 12].contains(&cookie), false);
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.depth, reading.limit), (11, Some(11)));
    assert_eq!((reading.arrivals, reading.elapsed_ns), (None, None));
    assert_eq!(reading.oldest_age_ns, Some(200 * MS));
    assert!(world.gone.is_empty());
    // What it saw is counted once, together with the rest, at the next scan.
    world.scan();
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.arrivals, reading.departures), (Some(2), Some(1)));
    assert_eq!((reading.depth, reading.elapsed_ns), (11, Some(200 * MS)));
}

#[test]
fn a_service_without_connections_keeps_its_queue_and_its_requests_have_left() {
    let mut world = World::new([served(1)]);
    world.ask(1);
    world.scan();
    world.connections.clear();
    world.scan();
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.depth, reading.limit), (0, Some(1)));
    assert_eq!(reading.departures, Some(1));
    assert_eq!(world.extra(Kind::Inflight, "at_least"), Some(1.0));
    assert!(world.gone.is_empty());
}

#[test]
fn outstanding_calls_name_the_process_that_does_not_answer() {
    let mut world = World::new((1..=4).map(opened));
    let worst = |world: &World| world.reading(Kind::Downstream).worst.clone();
    assert_eq!(
        worst(&world).as_deref(),
        Some("redis-server (77) on this node")
    );
    for cookie in [2, 3] {
        let call = world.at(cookie);
        call.write_seq += 50;
        call.since_sent_ns = 0;
    }
    world.scan();
    let reading = world.reading(Kind::Downstream);
    assert_eq!((reading.depth, reading.limit), (2, Some(4)));
    assert_eq!(reading.oldest_age_ns, Some(100 * MS));
    assert_eq!(
        worst(&world).as_deref(),
        Some("process 7 fd 12 to redis-server (77) on this node")
    );
    for cookie in [2, 3] {
        let answered = world.at(cookie);
        answered.snd_una = answered.write_seq;
        answered.rcv_nxt += 10;
        answered.since_received_ns = 0;
    }
    world.scan();
    assert_eq!(world.reading(Kind::Downstream).departures, Some(2));
    assert_eq!(world.extra(Kind::Downstream, "busiest"), Some(2.0));
    world.connections.clear();
    world.scan();
    assert_eq!(world.gone, ["-> 127.0.0.1:6379"]);
}

#[test]
fn a_connection_opened_and_closed_between_two_scans_counts_as_a_request() {
    let mut world = World::new([]);
    let counted = |world: &World| {
        let reading = world.reading(Kind::Inflight);
        (reading.arrivals, reading.departures)
    };
    for _ in 0..4 {
        world.passive_opens += 2;
        world.scan();
    }
    assert_eq!(counted(&world), (Some(2), Some(2)));
    assert_eq!(world.extra(Kind::Inflight, "at_least"), Some(1.0));
    assert_eq!(world.reading(Kind::Inflight).depth, 0);
    // A connection that stays has sent no request yet. It is seen at the sample that counts it, or at the next.
    world.scan();
    world.passive_opens += 1;
    world.connections.push(served(1));
    for _ in 0..3 {
        world.scan();
        assert_eq!(counted(&world), (Some(0), Some(0)));
    }
    world.connections.push(served(2));
    world.scan();
    world.passive_opens += 1;
    for _ in 0..3 {
        world.scan();
        assert_eq!(counted(&world), (Some(0), Some(0)));
    }
}

#[test]
fn the_size_of_responses_is_known_if_they_are_alike_and_counted() {
    // So many samples of 5 responses each, with this many bytes in turn; then a queue, and pings among the responses.
    let usual_bytes = |samples: u64, exchanges: u64, bytes: [u64; 2]| {
        let activity = |answer_bytes: u64| Activity {
            responses: 5,
            exchanges,
            answer_bytes,
            ..Activity::default()
        };
        let mut size = ResponseSize::default();
        for at in 0..samples {
            size.add(&activity(bytes[at as usize % 2]), 1, 100 * MS);
        }
        for _ in 0..20 {
            size.add(&activity(200), 20, 100 * MS);
        }
        size.usual_bytes()
    };
    assert_eq!(usual_bytes(10, 5, [505; 2]), Some(101));
    assert_eq!(usual_bytes(5, 5, [505; 2]), None, "too few samples");
    assert_eq!(usual_bytes(10, 5, [100, 900]), None, "not alike");
    assert_eq!(
        usual_bytes(10, 0, [505; 2]),
        None,
        "segments are not counted"
    );
}

/// A world with listeners of others, after a second in which per sample so many connections came and went, and the service
/// computed.
fn beside_others(opens: u64, cpu_ns: u64) -> World {
    let mut world = World::new([served(1)]);
    world.others = 1;
    for _ in 0..10 {
        world.passive_opens += opens;
        world.cpu_ns += cpu_ns;
        world.scan();
    }
    world
}

#[test]
fn beside_others_unseen_connections_may_be_of_a_service_that_computes() {
    let unseen = |world: &World| world.reading(Kind::Inflight).unseen_at_most;
    assert_eq!(unseen(&beside_others(6, MS)), 6);
    assert_eq!(unseen(&beside_others(6, 0)), 0, "an idle service");
    assert_eq!(unseen(&beside_others(0, MS)), 0, "nothing was accepted");
    let mut world = beside_others(6, MS);
    let reading = world.reading(Kind::Inflight);
    assert_eq!((reading.arrivals, reading.departures), (Some(0), Some(0)));
    // From now on they stay, and are seen.
    for cookie in 2..20 {
        world.passive_opens += 1;
        world.cpu_ns += MS;
        world.connections.push(served(cookie));
        world.scan();
    }
    assert_eq!(unseen(&world), 0);
}

#[test]
fn an_idle_time_beside_others_leaves_no_debt() {
    let mut world = beside_others(0, 0);
    // Connections of the service are seen, and their number is not counted.
    for cookie in 2..100 {
        world.connections.push(served(cookie));
        world.scan();
    }
    for _ in 0..20 {
        world.passive_opens += 6;
        world.cpu_ns += MS;
        world.scan();
    }
    assert_eq!(world.reading(Kind::Inflight).unseen_at_most, 6);
}

#[test]
fn a_sample_of_threads_alone_does_not_lose_the_connections_that_were_counted() {
    let mut world = World::new([]);
    for _ in 0..4 {
        world.passive_opens += 2;
        world.scan();
    }
    let threads = Sample {
        mono_ns: world.now_ns + MS,
        scans: Scans {
            profile: true,
            ..Scans::default()
        },
        ..Sample::default()
    };
    world.model.read(&threads);
    world.scan();
    assert_eq!(world.reading(Kind::Inflight).arrivals, Some(2));
}

#[test]
fn an_interim_answer_alone_does_not_spoil_the_size_of_responses() {
    let mut size = ResponseSize::default();
    for responses in [5, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5] {
        let activity = Activity {
            responses,
            exchanges: 5,
            answer_bytes: 505,
            ..Activity::default()
        };
        size.add(&activity, 1, 100 * MS);
    }
    assert_eq!(size.usual_bytes(), Some(101));
}
