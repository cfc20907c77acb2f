//! A hand-made scene: services, their connections and files, and what their threads do in each sample.

use std::{net::SocketAddr, sync::Arc};

use super::super::{
    Diagnosis,
    classify::{Observation, Threads, classify},
    profile::Window,
    wait_graph::{Step, View, chain_from, chain_of, workers},
};
use crate::{
    event::{DrivenBy, Episode, Instant, Level, Verdict},
    queue::{Kind, Model, PendingRequest, QueueId, QueueKey, Reading, Readings},
    sample::{
        AppAnswer, AppQueue, Architecture, Connection, DatagramSocket, Detail, Holder, Listener,
        Listening, Peer, Pipe, Sample, Scans, State, Syscall, Target, TargetId, Title, UnixSocket,
        UnixStyle, Wait, fixture::silent_connection,
    },
};

/// Time between two samples, ns.
const TICK_NS: u64 = 25_000_000;
/// Time of the first sample, ns.
const START_NS: u64 = 100_000_000_000;

/// Some services, and the diagnosis that samples them.
pub(super) struct Scene {
    diagnosis: Diagnosis,
    model: Model,
    pub(super) targets: Vec<Target>,
    /// The part of every sample that is not about threads.
    sample: Sample,
    readings: Vec<(Arc<QueueKey>, Reading)>,
    awaited: Vec<PendingRequest>,
    now_ns: u64,
    /// Whether services are focused.
    focused: bool,
}

/// The thread of a process with this index. Thread 0 has the number of the process.
pub(super) fn thread(tgid: u32, index: u32) -> Wait {
    Wait {
        tgid,
        tid: tgid + index,
        own_tid: tgid + index,
        comm: format!("worker-{index}"),
        state: State::Sleeping,
        io: false,
        syscall: None,
        voluntary: 1,
        involuntary: 0,
        cpu_ns: 0,
        run_delay_ns: 0,
    }
}

/// A thread of process 10 that waits for a disk.
pub(super) fn waits_for_a_disk() -> Wait {
    Wait {
        io: true,
        ..thread(10, 0).state(State::Uninterruptible)
    }
}

impl Wait {
    pub(super) fn state(mut self, state: State) -> Self {
        self.state = state;
        self
    }

    pub(super) fn on_cpu(self) -> Self {
        self.state(State::Running)
    }

    /// Asleep in a system call with these arguments; the first is a descriptor or an address.
    pub(super) fn call(mut self, number: libc::c_long, args: [u64; 4]) -> Self {
        self.syscall = Some(Syscall {
            architecture: Architecture::OWN,
            number: number as i32,
            args,
            detail: Detail::None,
        });
        self
    }

    pub(super) fn with(mut self, detail: Detail) -> Self {
        if let Some(syscall) = &mut self.syscall {
            syscall.detail = detail;
        }
        self
    }

    pub(super) fn reads(self, fd: u64) -> Self {
        self.call(libc::SYS_read, [fd, 0, 0, 0])
    }

    pub(super) fn writes(self, fd: u64) -> Self {
        self.call(libc::SYS_write, [fd, 0, 0, 0])
    }

    pub(super) fn serves_all(self) -> Self {
        self.call(libc::SYS_epoll_pwait, [4, 0, 0, 0])
    }

    /// Waits for the lock at this address, which this thread holds.
    pub(super) fn locked(self, address: u64, owner: u32) -> Self {
        self.call(libc::SYS_futex, [address, 128, 2, 0])
            .with(Detail::Futex { word: 2, owner })
    }

    /// Waits on a condition variable.
    pub(super) fn parked(self) -> Self {
        self.call(libc::SYS_futex, [0x7000, 128 | 9, 0, 0])
    }
}

pub(super) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn connection(cookie: u64, tgid: u32, fd: u32, ends: (SocketAddr, SocketAddr)) -> Connection {
    Connection {
        cookie,
        tgid,
        fd,
        local: ends.0,
        remote: ends.1,
        snd_wnd: 65_536,
        rcvbuf: 131_072,
        sndbuf: 131_072,
        since_received_ns: 5_000_000_000,
        since_sent_ns: 5_000_000_000,
        since_any_segment_ns: 5_000_000_000,
        ..silent_connection()
    }
}

impl Scene {
    /// Focused services, each given by its processes. Their ids are 1, 2, …
    pub(super) fn of(services: &[&[u32]]) -> Self {
        let target = |(index, tgids): (usize, &&[u32])| Target {
            id: index as u32 + 1,
            name: format!("service-{}", index + 1),
            pid: tgids[0],
            tgids: tgids.to_vec(),
            cgroup: Some(format!("/service-{}", index + 1)),
            ..Target::default()
        };
        Self {
            diagnosis: Diagnosis::default(),
            model: Model::default(),
            targets: services.iter().enumerate().map(target).collect(),
            sample: Sample {
                scans: Scans {
                    files: true,
                    profile: true,
                    ..Scans::default()
                },
                holders: Some(Vec::new()),
                peers: Some(Vec::new()),
                ..Sample::default()
            },
            readings: Vec::new(),
            awaited: Vec::new(),
            now_ns: START_NS,
            focused: true,
        }
    }

    /// No service is focused until [`Scene::focus`].
    pub(super) fn unfocused(mut self) -> Self {
        self.focused = false;
        self
    }

    pub(super) fn focus(&mut self) {
        self.focused = true;
    }

    fn id_of(&self, tgid: u32) -> TargetId {
        let of = |target: &&Target| target.tgids.contains(&tgid);
        self.targets.iter().find(of).unwrap().id
    }

    /// A connection that the service accepted from a remote client.
    pub(super) fn accepts(
        &mut self,
        cookie: u64,
        (tgid, fd): (u32, u32),
        port: u16,
    ) -> &mut Connection {
        let listener = Listener {
            cookie: 1_000_000 + u64::from(port),
            tgid,
            netns: 1,
            address: local(port),
            depth: 0,
            limit: 100,
            drops: 0,
            half_open: None,
            seen_ns: 0,
            ages_ns: Vec::new(),
        };
        if !self
            .sample
            .listeners
            .iter()
            .any(|known| known.cookie == listener.cookie)
        {
            self.sample.listeners.push(listener);
        }
        let client = SocketAddr::from(([192, 0, 2, 7], 20_000 + cookie as u16));
        self.hold(connection(cookie, tgid, fd, (local(port), client)))
    }

    /// The only listening address that the agent knows, and the process that listens there.
    pub(super) fn listens(&mut self, tgid: u32, address: SocketAddr, name: &str) {
        self.sample.listening = Some(vec![Listening {
            netns: 1,
            address,
            tgid,
            name: name.to_owned(),
        }]);
    }

    /// A connection that the service opened.
    pub(super) fn calls(
        &mut self,
        cookie: u64,
        (tgid, fd): (u32, u32),
        remote: SocketAddr,
    ) -> &mut Connection {
        let port = 30_000 + cookie as u16;
        self.hold(connection(cookie, tgid, fd, (local(port), remote)))
    }

    /// A connected UDP socket.
    pub(super) fn asks(&mut self, (tgid, fd): (u32, u32), remote: SocketAddr) {
        self.sample.datagrams.push(DatagramSocket {
            cookie: 2_000_000 + u64::from(fd),
            tgid,
            fd,
            netns: 1,
            local: local(40_000),
            remote,
            memory: 0,
            rcvbuf: 212_992,
            queued: Some(0),
            drops: 0,
            head: 0,
        });
    }

    /// A connection between two processes of the scene. The accepting end has the next cookie.
    pub(super) fn joins(&mut self, cookie: u64, from: (u32, u32), to: (u32, u32), port: u16) {
        self.calls(cookie, from, local(port));
        self.accepts(cookie + 1, to, port).remote = local(30_000 + cookie as u16);
    }

    fn hold(&mut self, connection: Connection) -> &mut Connection {
        self.sample.connections.push(connection);
        self.sample.connections.last_mut().unwrap()
    }

    /// Puts an unwatched process of this machine at the other end of a connection.
    pub(super) fn unwatched_peer(&mut self, tgid: u32, cookie: u64) {
        let ours = self
            .sample
            .connections
            .iter()
            .find(|one| one.cookie == cookie);
        let (here, there) = ours.map(|one| (one.local, one.remote)).unwrap();
        self.sample.peers.as_mut().unwrap().push(Peer {
            netns: 1,
            local: there,
            remote: here,
            tgid,
            fd: 3,
            name: "stranger".to_owned(),
        });
    }

    /// Puts a request without a response on a connection; a call, if the service opened it.
    pub(super) fn awaits(&mut self, cookie: u64) -> &mut PendingRequest {
        let connection = self
            .sample
            .connections
            .iter()
            .find(|one| one.cookie == cookie);
        let connection = connection.unwrap();
        let listens = |listener: &Listener| listener.address.port() == connection.local.port();
        let awaited = PendingRequest {
            target: self.id_of(connection.tgid),
            tgid: connection.tgid,
            cookie,
            accepted: self.sample.listeners.iter().any(listens),
            read: true,
            began_ns: START_NS - 1_000_000_000,
        };
        self.awaited.push(awaited);
        self.awaited.last_mut().unwrap()
    }

    pub(super) fn pipe(&mut self, inode: u64, writer: (u32, u32), reader: u32) {
        self.sample.pipes.push(Pipe {
            inode,
            tgid: writer.0,
            fd: writer.1,
            reads: false,
            writes: true,
            head: 16,
            tail: 0,
            limit: 16,
            bytes: None,
            readers: 1,
            writers: 1,
            path: None,
        });
        self.holder(inode, reader);
    }

    pub(super) fn unix(&mut self, (inode, peer): (u64, u64), (tgid, fd): (u32, u32), other: u32) {
        self.sample.unix.push(UnixSocket {
            inode,
            peer: Some(peer),
            tgid,
            fd,
            netns: 1,
            style: UnixStyle::Stream,
            listening: false,
            path: None,
            peer_path: None,
            queued: 0,
            limit: 0,
            head: 0,
            unread_by_peer: 0,
            sndbuf: 212_992,
            unread: 0,
            peer_sndbuf: 212_992,
        });
        self.holder(peer, other);
    }

    fn holder(&mut self, inode: u64, tgid: u32) {
        self.sample.holders.as_mut().unwrap().push(Holder {
            inode,
            tgid,
            name: "reader".to_owned(),
            fd: 0,
            reads: true,
            writes: false,
        });
    }

    /// Sets the title of a process from the next sample on.
    pub(super) fn set_title(&mut self, tgid: u32, title: &str) {
        self.sample.titles.push(Title {
            tgid,
            title: title.to_owned(),
        });
    }

    /// Sets the reading of a queue from the next sample on.
    pub(super) fn queue(&mut self, target: TargetId, kind: Kind, name: &str, reading: Reading) {
        let key = QueueKey::new(target, kind, name.into());
        self.readings.retain(|(known, _)| **known != key);
        self.readings.push((Arc::new(key), reading));
    }

    /// A queue of jobs inside the first service, whose process is `tgid`, and the processes that take them.
    pub(super) fn jobs(&mut self, tgid: u32, consumer_tgids: &[u32], reading: Reading) {
        let queue = AppQueue {
            name: "orders".to_owned(),
            depth: reading.depth,
            consumer_tgids: consumer_tgids.to_vec(),
            ..AppQueue::default()
        };
        self.sample.app = vec![AppAnswer {
            tgid,
            preset: "redis".to_owned(),
            queues: Some(vec![queue]),
            ..AppAnswer::default()
        }];
        self.readings.retain(|(known, _)| known.kind != Kind::App);
        self.readings.push((Arc::clone(&jobs().key), reading));
    }

    /// The queue of a proxy or a pool: `tgid`, the first service, passes its items on over connections with these ends.
    pub(super) fn passes_on(&mut self, tgid: u32, ends: &[SocketAddr], reading: Reading) {
        self.jobs(tgid, &[], reading);
        for answer in &mut self.sample.app {
            for queue in answer.queues.iter_mut().flatten() {
                queue.served_on = Some(ends.to_vec());
            }
        }
    }

    pub(super) fn sample(&mut self) -> &mut Sample {
        &mut self.sample
    }

    /// Takes `count` samples of these threads.
    pub(super) fn take_samples(&mut self, count: usize, threads: &[Wait]) {
        for _ in 0..count {
            self.now_ns += TICK_NS;
            let sample = Sample {
                mono_ns: self.now_ns,
                targets: Some(self.targets.clone()),
                profile: threads.to_vec(),
                ..self.sample.clone()
            };
            self.sample.titles.clear();
            self.model.read(&sample);
            let readings = Readings {
                queues: self.readings.clone(),
                pending_requests: Some(self.awaited.clone()),
                ..Readings::default()
            };
            let ids = self.targets.iter().map(|target| target.id);
            let focus_scope = ids.filter(|_| self.focused).collect();
            let targets = self.model.targets();
            self.diagnosis
                .read(&sample, &readings, targets, &focus_scope);
        }
    }

    /// Takes one sample of these threads, and returns what the first does.
    pub(super) fn observation(&mut self, threads: &[Wait]) -> Option<Observation> {
        self.take_samples(1, threads);
        classify(&threads[0], &Threads::of(threads), &self.diagnosis.topology)
    }

    pub(super) fn window(&self) -> Window {
        self.over(0, self.now_ns)
    }

    pub(super) fn over(&self, from_ns: u64, to_ns: u64) -> Window {
        self.diagnosis.profile.over(from_ns, to_ns)
    }

    /// The wait chain of a service.
    pub(super) fn chain(&self, target: TargetId) -> Vec<Step> {
        chain_from(self.view(&self.window()), target)
    }

    /// The wait chain of some of its processes.
    pub(super) fn chain_of_processes(&self, tgids: &[u32]) -> Vec<Step> {
        let window = self.window();
        let view = self.view(&window);
        chain_of(view, workers(view, tgids))
    }

    fn view<'a>(&'a self, window: &'a Window) -> View<'a> {
        View {
            topology: &self.diagnosis.topology,
            profile: &self.diagnosis.profile,
            consumers: &self.diagnosis.consumers,
            targets: self.model.targets(),
            window,
        }
    }

    pub(super) fn now(&self) -> Instant {
        Instant {
            mono_ns: self.now_ns,
            unix_ns: self.now_ns,
        }
    }

    /// From now on verdicts carry every rule with its numbers.
    pub(super) fn explain(&mut self) {
        self.diagnosis.explain();
    }

    /// Why this queue fills.
    pub(super) fn verdict(&self, episode: &Episode) -> Verdict {
        self.diagnosis
            .judge(self.now(), episode, self.model.targets())
    }
}

/// An open episode of the queue of [`Scene::jobs`], of which no departures are known.
pub(super) fn jobs() -> Episode {
    let id = QueueId::App {
        preset: "redis".into(),
        name: "orders".into(),
    };
    Episode {
        key: Arc::new(QueueKey::new(1, Kind::App, id)),
        arrivals: None,
        departures: None,
        ..episode(Kind::App, "")
    }
}

/// An open episode of the first service's accept queue.
pub(super) fn filling() -> Episode {
    episode(Kind::Accept, "127.0.0.1:80")
}

/// The same, with bursts that exceed its backlog of 8 and are taken at the usual rate.
pub(super) fn bursts() -> Episode {
    Episode {
        level_max: Level::Full,
        losses: 12,
        limit: Some(8),
        empty_share: 0.5,
        driven_by: DrivenBy::Producer,
        ..filling()
    }
}

pub(super) fn episode(kind: Kind, name: &str) -> Episode {
    let at = Instant {
        mono_ns: START_NS,
        unix_ns: START_NS,
    };
    Episode {
        id: "e".to_owned(),
        incident: "i".to_owned(),
        key: Arc::new(QueueKey::new(1, kind, name.into())),
        onset: at,
        start: at,
        end: at,
        ongoing: true,
        level_max: Level::Critical,
        score_max: 1.0,
        depth: 50,
        depth_max: 50,
        empty_share: 0.0,
        limit: Some(100),
        unit: kind.unit(),
        wait_p50_ns: None,
        wait_p99_ns: None,
        wait_max_ns: Some(2_000_000_000),
        arrivals: Some(200),
        departures: Some(100),
        losses: 0,
        arrival_rate: Some(40.0),
        service_rate: Some(20.0),
        baseline_arrival_rate: Some(40.0),
        baseline_service_rate: Some(40.0),
        driven_by: DrivenBy::Consumer,
        time_to_full_ns: None,
        lead_ns: None,
        worst: None,
        depths: vec![0, 25, 50],
        evidence: String::new(),
        advice: String::new(),
        verdict: None,
        moments: Vec::new(),
        moments_dropped: 0,
        measured_waits: Vec::new(),
    }
}
