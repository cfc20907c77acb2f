//! Requests in flight and calls outstanding: what every connection is about, summed up by endpoint.
//!
//! [`requests`](super::requests) judges one connection; here they are remembered, and counted for the queues of
//! [`inflight`](super::inflight) (connections that a service accepted) and [`downstream`](super::downstream) (those that it
//! opened). A walk over all connections counts anew; a look at a few of them corrects the count by what changed.

use std::{collections::hash_map::Entry, net::SocketAddr};

use rustc_hash::FxHashMap;

use super::{
    Kind, Sink, Source, Targets,
    downstream::{self, Nearby},
    endpoint::{Endpoint, Groups, Placed, state},
    inflight,
    requests::{Conversation, Role, Seen, Standing},
};
use crate::sample::{Connection, Sample, TargetId};

#[derive(Default)]
pub(super) struct Conversations {
    connections: FxHashMap<u64, Known>,
    groups: Groups<Group>,
    nearby: Nearby,
    /// Walks over files so far.
    walks: u64,
    /// Samples so far: tells the groups that a sample touched from the rest.
    samples: u64,
    /// The walk at which a target was first there: what is new at a later one came in between.
    since: FxHashMap<TargetId, u64>,
}

/// What is remembered of one connection.
struct Known {
    group: usize,
    walk: u64,
    conversation: Conversation,
    standing: Standing,
    began_ns: u64,
    tgid: u32,
    fd: u32,
    remote: SocketAddr,
}

/// The connections of one endpoint.
#[derive(Default)]
pub(super) struct Group {
    sample: u64,
    /// Where the first of them is.
    netns: u32,
    pub(super) tally: Tally,
    /// When each request that waits began to, and its connection; in this order.
    waiting: Vec<(u64, u64)>,
    /// Since the last walk over all connections.
    pub(super) since: Since,
    /// When that was.
    walked_ns: Option<u64>,
    /// The most that ever waited at once.
    pub(super) most: u64,
    /// Opened: who listens at the other end, where it is on this node.
    pub(super) behind: Option<downstream::Behind>,
}

/// Connections by what they are about.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) idle: u64,
    pub(super) unread: u64,
    pub(super) working: u64,
    pub(super) outstanding: u64,
    pub(super) sending: u64,
    pub(super) unknown: u64,
    pub(super) push: u64,
    pub(super) closed: u64,
}

/// What happened in a stretch of time, at least.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Since {
    pub(super) begun: u64,
    pub(super) answered: u64,
    pub(super) at_least: bool,
    /// Sum and number of those of which it is known how long they took.
    took_ns: u128,
    timed: u64,
    pub(super) lost: u64,
}

/// What a group tells at one sample.
pub(super) struct Told<'a> {
    pub(super) group: &'a Group,
    pub(super) now_ns: u64,
    /// Since the previous walk; `None` where this sample did not see all connections, or is the first that did.
    pub(super) elapsed_ns: Option<u64>,
    pub(super) threads: u32,
    /// Process and descriptor of the connection whose request waits longest, and its other end.
    pub(super) oldest: Option<(u32, u32, SocketAddr)>,
}

impl Source for Conversations {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if let Some(listening) = &sample.listening {
            self.nearby.replace(listening);
        }
        let all = sample.walks.files;
        if !all && !sample.walks.marked {
            return;
        }
        self.samples += 1;
        if all {
            self.walks += 1;
            self.since.retain(|id, _| targets.get(*id).is_some());
            for target in targets.all() {
                self.since.entry(target.id).or_insert(self.walks);
            }
            self.groups.for_each(|group| {
                group.tally = Tally::default();
                group.waiting.clear();
            });
        }
        for connection in &sample.connections {
            if !matches!(connection.state, state::SYN_SENT | state::SYN_RECV) {
                self.look(connection, sample.mono_ns, all, targets);
            }
        }
        if all {
            self.forget_gone(targets);
        }
        self.tell(sample.mono_ns, all, targets, sink);
        if all {
            sink.forget_unseen(Kind::Inflight);
            sink.forget_unseen(Kind::Downstream);
        }
    }
}

impl Conversations {
    fn look(&mut self, connection: &Connection, now_ns: u64, all: bool, targets: &Targets) {
        let cookie = connection.cookie;
        let (known, seen, before) = match self.connections.entry(cookie) {
            Entry::Occupied(known) => {
                let known = known.into_mut();
                let seen = known.conversation.look(connection, now_ns);
                let before = (known.standing, known.began_ns);
                (known, seen, (!all).then_some(before))
            }
            Entry::Vacant(vacant) => {
                let Some(target) = targets.of(connection.tgid) else {
                    return;
                };
                let endpoint = Endpoint::of(connection, targets);
                let role = match endpoint {
                    Endpoint::Served(_) => Role::Accepted,
                    Endpoint::Opened(_) => Role::Opened,
                };
                let walked = self.since.get(&target);
                let fresh = walked.is_some_and(|first| *first < self.walks || !all);
                let (conversation, seen) = Conversation::first(connection, role, fresh, now_ns);
                let group = self.groups.place(target, endpoint);
                if let Endpoint::Opened(remote) = endpoint {
                    let behind = || downstream::Behind::new(connection, remote);
                    self.groups.at(group).behind.get_or_insert_with(behind);
                }
                self.groups.at(group).netns = connection.netns;
                let known = vacant.insert(Known {
                    group,
                    walk: 0,
                    conversation,
                    standing: seen.standing,
                    began_ns: seen.began_ns,
                    tgid: connection.tgid,
                    fd: connection.fd,
                    remote: connection.remote,
                });
                (known, seen, None)
            }
        };
        known.walk = self.walks;
        known.standing = seen.standing;
        known.began_ns = seen.began_ns;
        known.tgid = connection.tgid;
        known.fd = connection.fd;
        let group = self.groups.at(known.group);
        group.sample = self.samples;
        group.since.add(&seen);
        group.count(cookie, before, &seen, all);
    }

    /// After a walk over all: connections that it did not see are gone, and what waited on them has left.
    fn forget_gone(&mut self, targets: &Targets) {
        let (walk, groups) = (self.walks, &mut self.groups);
        self.connections.retain(|_, known| {
            let stays = known.walk == walk;
            if !stays && known.standing.waits() {
                let since = &mut groups.at(known.group).since;
                since.answered += 1;
                since.at_least = true;
            }
            stays
        });
        let samples = self.samples;
        self.groups.retain(|target, endpoint, group| {
            // A service that nobody is connected to right now is still there.
            let serves =
                matches!(endpoint, Endpoint::Served(port) if targets.listens(group.netns, port));
            group.sample == samples || (serves && targets.get(target).is_some())
        });
    }

    fn tell(&mut self, now_ns: u64, all: bool, targets: &Targets, sink: &mut Sink<'_>) {
        let (samples, nearby) = (self.samples, &self.nearby);
        self.groups.for_each(|group| {
            if all {
                group.waiting.sort_unstable();
            }
            if all || group.sample == samples {
                group.most = group.most.max(group.waiting.len() as u64);
                if let Some(behind) = &mut group.behind {
                    behind.refresh(nearby);
                }
            }
        });
        for (target, endpoint, Placed { name, group }) in self.groups.iter() {
            if targets.get(target).is_none() || !(all || group.sample == samples) {
                continue;
            }
            let oldest = group.waiting.first();
            let oldest = oldest.and_then(|(_, cookie)| self.connections.get(cookie));
            let walked_ns = group.walked_ns.filter(|_| all);
            let told = Told {
                group,
                now_ns,
                elapsed_ns: walked_ns.map(|walked_ns| now_ns.saturating_sub(walked_ns)),
                threads: targets.threads(target),
                oldest: oldest.map(|known| (known.tgid, known.fd, known.remote)),
            };
            match endpoint {
                Endpoint::Served(_) => {
                    sink.put(target, Kind::Inflight, name, inflight::reading(&told));
                }
                Endpoint::Opened(_) => {
                    sink.put(target, Kind::Downstream, name, downstream::reading(&told));
                }
            }
        }
        if all {
            self.groups.for_each(|group| {
                group.since = Since::default();
                group.walked_ns = Some(now_ns);
            });
        }
    }
}

impl Group {
    /// Takes in one connection: at a walk over all it is added, else it takes the place of what it was before.
    fn count(&mut self, cookie: u64, before: Option<(Standing, u64)>, seen: &Seen, all: bool) {
        let now = (seen.standing, seen.began_ns);
        if before == Some(now) {
            return;
        }
        if let Some((standing, began_ns)) = before {
            let count = self.tally.of(standing);
            *count = count.saturating_sub(1);
            if standing.waits()
                && let Ok(place) = self.waiting.binary_search(&(began_ns, cookie))
            {
                self.waiting.remove(place);
            }
        }
        *self.tally.of(seen.standing) += 1;
        if seen.standing.waits() {
            let entry = (seen.began_ns, cookie);
            if all {
                self.waiting.push(entry);
            } else if let Err(place) = self.waiting.binary_search(&entry) {
                self.waiting.insert(place, entry);
            }
        }
    }

    /// Ages of what waits, ns, oldest first.
    pub(super) fn ages_ns(&self, now_ns: u64) -> impl Iterator<Item = u64> {
        self.waiting
            .iter()
            .map(move |(began_ns, _)| now_ns.saturating_sub(*began_ns))
    }

    pub(super) fn depth(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// The age that half of what waits has reached, ns.
    pub(super) fn median_age_ns(&self, now_ns: u64) -> Option<u64> {
        self.ages_ns(now_ns).nth(self.waiting.len() / 2)
    }
}

impl Tally {
    fn of(&mut self, standing: Standing) -> &mut u64 {
        match standing {
            Standing::Idle => &mut self.idle,
            Standing::Unread => &mut self.unread,
            Standing::Working => &mut self.working,
            Standing::Outstanding => &mut self.outstanding,
            Standing::Sending => &mut self.sending,
            Standing::Unknown => &mut self.unknown,
            Standing::Push => &mut self.push,
            Standing::Closed => &mut self.closed,
        }
    }

    /// Connections on which one asks and the other answers, or may.
    pub(super) fn conversations(&self) -> u64 {
        self.idle + self.unread + self.working + self.outstanding + self.sending + self.unknown
    }
}

impl Since {
    fn add(&mut self, seen: &Seen) {
        self.begun += u64::from(seen.begun);
        self.answered += u64::from(seen.answered);
        self.at_least |= seen.at_least;
        self.lost += u64::from(seen.lost);
        if let Some(took_ns) = seen.took_ns {
            self.took_ns += u128::from(took_ns);
            self.timed += 1;
        }
    }

    /// How long those took that were answered, on average, ns.
    pub(super) fn answer_ns(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.took_ns as f64 / self.timed as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        queue::{Model, Reading},
        sample::{Listener, Listening, Target, Walks},
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
        told: bool,
    }

    fn established(cookie: u64, local: &str, remote: &str) -> Connection {
        Connection {
            cookie,
            tgid: 7,
            fd: 10 + cookie as u32,
            netns: 1,
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            state: state::ESTABLISHED,
            rcv_nxt: 1_000,
            copied_seq: 1_000,
            write_seq: 5_000,
            snd_una: 5_000,
            snd_nxt: 5_000,
            snd_wnd: 65_535,
            rmem_alloc: 0,
            rcvbuf: 0,
            wmem_queued: 0,
            sndbuf: 0,
            drops: 0,
            snd_wl1: 1_000,
            since_received_ns: 3_600_000 * MS,
            since_sent_ns: 3_600_000 * MS,
            since_heard_ns: 3_600_000 * MS,
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
            world.walk();
            world
        }

        fn at(&mut self, cookie: u64) -> &mut Connection {
            self.connections
                .iter_mut()
                .find(|it| it.cookie == cookie)
                .unwrap()
        }

        /// A request comes in and is read.
        fn ask(&mut self, cookie: u64) {
            let connection = self.at(cookie);
            connection.snd_wl1 = connection.rcv_nxt;
            connection.rcv_nxt += 100;
            connection.copied_seq = connection.rcv_nxt;
            connection.since_received_ns = 0;
        }

        /// It is answered, and the answer acknowledged.
        fn answer(&mut self, cookie: u64) {
            let connection = self.at(cookie);
            connection.write_seq += 100;
            connection.snd_una = connection.write_seq;
            connection.snd_wl1 = connection.rcv_nxt;
            connection.since_sent_ns = 0;
        }

        fn walk(&mut self) {
            self.sample(|_| true, true);
        }

        /// 100 ms later: a look at all, or at these alone.
        fn sample(&mut self, seen: impl Fn(u64) -> bool, files: bool) {
            for one in &mut self.connections {
                one.since_received_ns += 100 * MS;
                one.since_sent_ns += 100 * MS;
                one.since_heard_ns += 100 * MS;
            }
            self.now_ns += 100 * MS;
            let mut connections = self.connections.clone();
            connections.retain(|it| seen(it.cookie));
            let first = !std::mem::replace(&mut self.told, true);
            let sample = Sample {
                mono_ns: self.now_ns,
                targets: first.then(|| {
                    vec![Target {
                        id: 1,
                        tgids: vec![7],
                        ..Target::default()
                    }]
                }),
                walks: Walks {
                    files,
                    marked: !files,
                    ..Walks::default()
                },
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
            let tell = |(key, reading): (std::sync::Arc<crate::queue::QueueKey>, Reading)| {
                (key.kind, key.name.clone(), reading)
            };
            self.readings = readings.queues.into_iter().map(tell).collect();
            self.gone = readings
                .gone
                .iter()
                .filter(|key| matches!(key.kind, Kind::Inflight | Kind::Downstream))
                .map(|key| key.name.clone())
                .collect();
        }

        fn reading(&self, kind: Kind) -> &Reading {
            let found = self.readings.iter().find(|(of, ..)| *of == kind);
            &found.unwrap().2
        }

        fn extra(&self, kind: Kind, key: &str) -> Option<f64> {
            let extra = &self.reading(kind).extra;
            extra.iter().find(|(name, _)| *name == key).map(|it| it.1)
        }
    }

    #[test]
    fn requests_in_flight_are_counted_aged_and_named() {
        let mut world = World::new((1..=20).map(served));
        assert_eq!(world.reading(Kind::Inflight).depth, 0);
        assert_eq!(world.reading(Kind::Inflight).limit, None);
        world.ask(3);
        world.walk();
        world.ask(4);
        world.ask(5);
        world.walk();
        let reading = world.reading(Kind::Inflight);
        assert_eq!((reading.depth, reading.limit), (3, Some(3)));
        assert_eq!((reading.arrivals, reading.departures), (Some(2), Some(0)));
        assert_eq!(reading.oldest_ns, Some(200 * MS));
        assert_eq!(reading.ages_ns, [200 * MS, 100 * MS, 100 * MS]);
        assert_eq!(reading.wait_ns, Some(100 * MS));
        let worst = reading.worst.as_deref();
        assert_eq!(worst, Some("process 7 fd 13 with 10.0.0.9:40003"));
        assert_eq!(world.extra(Kind::Inflight, "working"), Some(3.0));
        assert_eq!(world.extra(Kind::Inflight, "connections"), Some(20.0));
        world.answer(3);
        world.walk();
        let reading = world.reading(Kind::Inflight);
        assert_eq!((reading.depth, reading.limit), (2, Some(3)));
        assert_eq!((reading.arrivals, reading.departures), (Some(0), Some(1)));
        assert_eq!(world.extra(Kind::Inflight, "answer_ns"), Some(200e6));
        assert_eq!(world.extra(Kind::Inflight, "at_least"), None);
    }

    #[test]
    fn idle_connections_are_no_requests_in_flight() {
        let mut world = World::new((1..=20).map(served).chain((21..=30).map(opened)));
        for _ in 0..50 {
            world.walk();
            for kind in [Kind::Inflight, Kind::Downstream] {
                let reading = world.reading(kind);
                assert_eq!((reading.depth, reading.wait_ns), (0, Some(0)));
                assert_eq!((reading.oldest_ns, reading.losses), (None, 0));
            }
        }
    }

    #[test]
    fn a_look_at_some_corrects_the_count_of_all() {
        let mut world = World::new((1..=20).map(served));
        for cookie in 1..=10 {
            world.ask(cookie);
        }
        world.walk();
        world.answer(1);
        world.ask(11);
        world.ask(12);
        world.sample(|cookie| [1, 2, 11, 12].contains(&cookie), false);
        let reading = world.reading(Kind::Inflight);
        assert_eq!((reading.depth, reading.limit), (11, Some(11)));
        assert_eq!((reading.arrivals, reading.elapsed_ns), (None, None));
        assert_eq!(reading.oldest_ns, Some(200 * MS));
        assert!(world.gone.is_empty());
        // What it saw is counted once, with the rest, at the next walk.
        world.walk();
        let reading = world.reading(Kind::Inflight);
        assert_eq!((reading.arrivals, reading.departures), (Some(2), Some(1)));
        assert_eq!((reading.depth, reading.elapsed_ns), (11, Some(200 * MS)));
    }

    #[test]
    fn a_service_without_a_connection_keeps_its_queue_and_what_waited_has_left() {
        let mut world = World::new([served(1)]);
        world.ask(1);
        world.walk();
        world.connections.clear();
        world.walk();
        let reading = world.reading(Kind::Inflight);
        assert_eq!((reading.depth, reading.limit), (0, Some(1)));
        assert_eq!(reading.departures, Some(1));
        assert_eq!(world.extra(Kind::Inflight, "at_least"), Some(1.0));
        assert!(world.gone.is_empty());
    }

    #[test]
    fn calls_outstanding_name_the_process_that_does_not_answer() {
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
        world.walk();
        let reading = world.reading(Kind::Downstream);
        assert_eq!((reading.depth, reading.limit), (2, Some(4)));
        assert_eq!(reading.oldest_ns, Some(100 * MS));
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
        world.walk();
        assert_eq!(world.reading(Kind::Downstream).departures, Some(2));
        assert_eq!(world.extra(Kind::Downstream, "busiest"), Some(2.0));
        world.connections.clear();
        world.walk();
        assert_eq!(world.gone, ["-> 127.0.0.1:6379"]);
    }
}
