//! Which process holds which connection, pipe, socket and lock, of the services in focus.
//!
//! These facts lead from a blocked thread to the process that can end its wait.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use rustc_hash::FxHashMap;

use super::{
    inputs::PoolUse,
    listening_sockets::{ListeningSockets, Uneven},
    titles::{self, TitleState},
};
use crate::{
    hash::HashMap,
    queue::{Kind, LocalListeners, PendingRequest, QueueId, Readings, Targets},
    sample::{
        Accelerator, Connection, Conntrack, DatagramSocket, Holder, LocalPorts, LockWait, Peer,
        Sample, SharedLock, TargetId, UnixSocket, Wait,
    },
    text::bounded,
};

/// A lock is forgotten if nobody has waited for it during this time, ns.
const LOCK_KEPT_NS: u64 = 5_000_000_000;
/// A connection whose last data is younger than this, ns, is in use: a response is still streaming over it.
pub(super) const STREAMING_NS: u64 = 100_000_000;
/// A connection without a call whose last data is older than this, ns, counts as unused, even if all others are in use.
const UNUSED_NS: u64 = 3_000_000_000;
/// A connection that the peer has closed, and whose last data is older than this, ns, is not about to be closed: programs that
/// close do so as soon as they read the end of the stream.
const UNCLOSED_NS: u64 = 1_000_000_000;
/// The state of a connection that the remote end has not answered, as in include/net/tcp_states.h.
const SYN_SENT: u8 = 2;
/// The port of the Domain Name System (RFC 1035).
pub(super) const DNS_PORT: u16 = 53;
/// Linux gives up a connection request after about this time, ns (tcp_syn_retries).
const MAX_REQUEST_NS: u64 = 130_000_000_000;
/// A socket to a resolver that is open for this time, ns, waits for a response. A resolver that works responds within
/// milliseconds, and libraries then close the socket.
const MIN_QUERY_NS: u64 = 500_000_000;
/// A connection request waits for an answer after this time, ns: half of the time after which Linux sends it again.
const MIN_REQUEST_NS: u64 = 500_000_000;
/// A socket to a resolver that has been open for longer than this, ns, may be kept open on purpose.
const MAX_QUERY_NS: u64 = 60_000_000_000;
/// Maximum number of sockets to resolvers; further ones are ignored.
const MAX_QUERIES: usize = 4_096;
/// The lowest port that the kernel gives to a socket by itself (net.ipv4.ip_local_port_range). Services bind to lower ones.
const FIRST_EPHEMERAL_PORT: u16 = 32_768;
/// Longest name of a process, bytes.
const MAX_NAME: usize = 64;
/// Maximum number of process names kept. Beyond that, all are dropped and learned again from the following samples.
const MAX_NAMES: usize = 8_192;

/// A TCP connection, as seen from one of its ends.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) tgid: u32,
    netns: u32,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// The service accepted it; else it opened it.
    pub(super) accepted: bool,
    /// Bytes sent and not acknowledged.
    pub(super) unacknowledged: u32,
    /// Bytes written and not sent.
    pub(super) unsent: u32,
    /// The peer's receive window, bytes.
    pub(super) window: u32,
    /// Time since data was last received or sent, ns.
    pub(super) since_data_ns: u64,
    /// The peer sent data that the process has not read.
    pub(super) is_unread: bool,
    /// The peer has closed it, and the process has not (CLOSE_WAIT).
    pub(super) closed_by_peer: bool,
    /// The last data was sent by the process, not received. False for a connection that never carried any.
    pub(super) sent_last: bool,
    /// The service asks for the connection, and the remote end has not answered.
    pub(super) connecting: bool,
}

impl Link {
    /// Data waits for the peer to read, not for the network: less than a full segment fits into its window.
    pub(super) fn peer_has_no_room(&self) -> bool {
        /// Payload of a full segment on Ethernet: 1,500 bytes less the IPv4 and TCP headers.
        const SEGMENT: u32 = 1_460;
        self.unsent > 0 && self.unacknowledged.saturating_add(SEGMENT) > self.window
            || self.window == 0 && self.unacknowledged + self.unsent > 0
    }
}

/// What a file descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenFile {
    /// A TCP connection, by its socket cookie.
    Connection(u64),
    /// By inode.
    Pipe(u64),
    /// A unix socket, by inode.
    Unix(u64),
    /// A UDP socket that is connected to this address. Port 0: not connected, but its own port is one that the kernel chose, as
    /// those of clients are.
    Datagrams(SocketAddr),
}

/// A process that holds one end of a connection, and its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SocketEnd {
    pub(super) tgid: u32,
    pub(super) fd: u32,
}

/// What one process has in progress.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ProcessWork {
    /// Connections that it has accepted.
    pub(super) clients: u32,
    /// Requests that it has read and not answered.
    pub(super) in_service: u32,
    /// Its oldest outstanding call: when it began (CLOCK_MONOTONIC, ns), and its connection.
    pub(super) oldest_call: Option<(u64, u64)>,
    /// Its oldest request in service: the same.
    pub(super) oldest_request: Option<(u64, u64)>,
    /// The client with the most bytes waiting for it to read: the bytes, and the connection.
    pub(super) stuck_client: Option<(u32, u64)>,
    /// Its oldest unanswered query to a resolver: since when the socket is open, CLOCK_MONOTONIC, ns, and the resolver.
    oldest_query: Option<(u64, SocketAddr)>,
}

/// A socket that is connected to a resolver.
#[derive(Clone, Copy, Debug)]
struct Query {
    tgid: u32,
    resolver: SocketAddr,
    /// When it was first seen, CLOCK_MONOTONIC, ns. `None`: it was open when sampling began.
    since_ns: Option<u64>,
}

impl ProcessWork {
    /// The resolver that requests in service wait for: a socket to it is open for a while, and it was opened for one of them
    /// or not long ago.
    pub(super) fn awaited_resolver(&self, now_ns: u64) -> Option<SocketAddr> {
        let (began_ns, _) = self.oldest_request?;
        let (since_ns, resolver) = self.oldest_query?;
        let is_recent = now_ns.saturating_sub(since_ns) <= MAX_QUERY_NS;
        (since_ns >= began_ns || is_recent).then_some(resolver)
    }
}

/// What the title of a process (`/proc/PID/cmdline`) reports.
#[derive(Clone, Copy, Debug)]
struct ProcessTitle {
    state: Option<TitleState>,
    /// When this title was first seen, CLOCK_MONOTONIC, ns.
    since_ns: u64,
}

#[derive(Default)]
pub(super) struct Topology {
    focus_scope: BTreeSet<TargetId>,
    links: FxHashMap<u64, Link>,
    files: FxHashMap<(u32, u32), OpenFile>,
    /// The holders of a connection, by its local and remote address: watched processes, and all others.
    ends: HashMap<(SocketAddr, SocketAddr), Vec<SocketEnd>>,
    peers: HashMap<(SocketAddr, SocketAddr), Vec<SocketEnd>>,
    holders: HashMap<u64, Vec<Holder>>,
    listeners: LocalListeners,
    listening: ListeningSockets,
    unix: HashMap<u64, UnixSocket>,
    titles: HashMap<u32, ProcessTitle>,
    names: HashMap<u32, String>,
    work: HashMap<u32, ProcessWork>,
    /// Requests and calls without a response yet, by connection.
    awaited: FxHashMap<u64, PendingRequest>,
    /// Connections that are not established yet: when each was first seen, CLOCK_MONOTONIC, ns.
    connecting: FxHashMap<u64, u64>,
    /// Sockets that are connected to resolvers, by cookie. `None` before the first scan.
    queries: Option<FxHashMap<u64, Query>>,
    /// Time of the last sample, CLOCK_MONOTONIC, ns.
    now_ns: u64,
    /// Waits for locks that processes share: on files by thread, in memory by process and address.
    file_locks: HashMap<(u32, u32), LockWait>,
    shared_mutexes: HashMap<(u32, u64), LockWait>,
    /// The network namespace of each service, as its connections show.
    networks: HashMap<TargetId, u32>,
    local_ports: Vec<LocalPorts>,
    /// Connection tracking tables that are or were full, by network namespace, and when each was last seen to be, ns.
    conntrack: BTreeMap<u32, (Conntrack, u64)>,
    /// When they were last searched for, ns.
    conntrack_ns: u64,
    /// Threads that are on an accelerator, by tgid and tid.
    on_accelerator: HashMap<(u32, u32), Accelerator>,
    /// Addresses known to be locks: whether it is an interpreter's lock, and when a thread last waited for it, ns.
    locks: HashMap<(u32, u64), (bool, u64)>,
}

impl Topology {
    /// Adds one sample, with the readings of its queues.
    pub(super) fn read(
        &mut self,
        now_ns: u64,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        focus_scope: &BTreeSet<TargetId>,
    ) {
        self.now_ns = now_ns;
        self.focus_scope.clone_from(focus_scope);
        self.learn_names(sample, targets);
        if let Some(holders) = &sample.holders {
            self.holders.clear();
            for holder in holders {
                let ends = self.holders.entry(holder.inode).or_default();
                ends.push(holder.clone());
            }
        }
        if let Some(peers) = &sample.peers {
            self.learn_peers(peers);
        }
        if let Some(listening) = &sample.listening {
            self.listeners.replace(listening);
        }
        for title in &sample.titles {
            self.titles.insert(
                title.tgid,
                ProcessTitle {
                    state: titles::state(&title.title),
                    since_ns: now_ns,
                },
            );
        }
        if sample.scans.profile || sample.scans.waits {
            let threads = sample.on_accelerator.iter();
            let threads = threads.map(|one| ((one.tgid, one.tid), one.through));
            self.on_accelerator = threads.collect();
        }
        if let Some(ports) = &sample.local_ports {
            self.local_ports.clone_from(ports);
        }
        if let Some(tables) = &sample.conntrack {
            self.conntrack_ns = now_ns;
            let full = tables.iter().map(|table| (table.netns, (*table, now_ns)));
            self.conntrack.extend(full);
            self.conntrack
                .retain(|_, (_, full_ns)| now_ns.saturating_sub(*full_ns) < MAX_REQUEST_NS);
        }
        if let Some(waits) = &sample.lock_waits {
            self.learn_lock_waits(waits);
        }
        if sample.scans.files || sample.scans.focused_sockets {
            self.learn_files(sample, targets);
            self.learn_connecting(now_ns);
            self.listening.read(sample, targets, focus_scope);
        }
        if sample.scans.files {
            self.learn_queries(now_ns, sample);
        }
        if let Some(awaited) = &readings.pending_requests {
            self.awaited = awaited.iter().map(|one| (one.cookie, *one)).collect();
        }
        if readings.pending_requests.is_some() || sample.scans.files {
            self.count_work();
        }
        self.learn_locks(now_ns, readings);
    }

    fn learn_names(&mut self, sample: &Sample, targets: &Targets) {
        if sample.targets.is_some() {
            self.titles.retain(|tgid, _| targets.of(*tgid).is_some());
            self.networks
                .retain(|target, _| targets.get(*target).is_some());
            self.names.retain(|tgid, _| targets.of(*tgid).is_some());
        }
        if self.names.len() > MAX_NAMES {
            self.names.clear();
        }
        for listening in sample.listening.iter().flatten() {
            self.names.insert(listening.tgid, listening.name.clone());
        }
        for holder in sample.holders.iter().flatten() {
            self.names.insert(holder.tgid, holder.name.clone());
        }
    }

    fn learn_peers(&mut self, peers: &[Peer]) {
        self.peers.clear();
        for peer in peers {
            let ends = self
                .peers
                .entry(tuple(peer.local, peer.remote))
                .or_default();
            ends.push(SocketEnd {
                tgid: peer.tgid,
                fd: peer.fd,
            });
            self.names.insert(peer.tgid, peer.name.clone());
        }
    }

    fn learn_files(&mut self, sample: &Sample, targets: &Targets) {
        let in_focus = |tgid: u32| {
            let target = targets.of(tgid);
            target.is_some_and(|target| self.focus_scope.contains(&target))
        };
        if sample.scans.files {
            self.links.clear();
            self.files.clear();
            self.ends.clear();
            for pipe in sample.pipes.iter().filter(|pipe| in_focus(pipe.tgid)) {
                self.files
                    .insert((pipe.tgid, pipe.fd), OpenFile::Pipe(pipe.inode));
            }
            for socket in sample.datagrams.iter().filter(|one| in_focus(one.tgid)) {
                let is_a_client = socket.local.port() >= FIRST_EPHEMERAL_PORT;
                if socket.remote.port() != 0 || is_a_client {
                    self.files
                        .insert((socket.tgid, socket.fd), OpenFile::Datagrams(socket.remote));
                }
            }
            self.unix.clear();
            for socket in sample.unix.iter().filter(|socket| in_focus(socket.tgid)) {
                self.files
                    .insert((socket.tgid, socket.fd), OpenFile::Unix(socket.inode));
                self.unix.insert(socket.inode, socket.clone());
            }
        }
        for connection in sample.connections.iter().filter(|one| in_focus(one.tgid)) {
            let end = SocketEnd {
                tgid: connection.tgid,
                fd: connection.fd,
            };
            if let Some(target) = targets.of(connection.tgid) {
                self.networks.insert(target, connection.netns);
            }
            let cookie = connection.cookie;
            let accepted = targets.listens(connection.netns, connection.local.port());
            if self
                .links
                .insert(cookie, link(connection, accepted))
                .is_none()
            {
                self.files
                    .insert((end.tgid, end.fd), OpenFile::Connection(cookie));
                let tuple = tuple(connection.local, connection.remote);
                self.ends.entry(tuple).or_default().push(end);
            }
        }
    }

    fn learn_lock_waits(&mut self, waits: &[LockWait]) {
        self.file_locks.clear();
        self.shared_mutexes.clear();
        for wait in waits {
            if let Some(tgid) = wait.holder.tgid() {
                self.names.insert(tgid, wait.holder_name.clone());
            }
            match wait.lock {
                SharedLock::File { .. } => {
                    self.file_locks.insert((wait.tgid, wait.tid), wait.clone());
                }
                SharedLock::Memory { address } => {
                    self.shared_mutexes
                        .insert((wait.tgid, address), wait.clone());
                }
            }
        }
    }

    fn learn_queries(&mut self, now_ns: u64, sample: &Sample) {
        let is_query =
            |socket: &&DatagramSocket| socket.remote.port() == DNS_PORT && socket.memory == 0;
        let query = |socket: &DatagramSocket| {
            let known = self.queries.as_ref();
            let since_ns = match known.map(|known| known.get(&socket.cookie)) {
                Some(Some(query)) => query.since_ns,
                Some(None) => Some(now_ns),
                None => None,
            };
            let query = Query {
                tgid: socket.tgid,
                resolver: socket.remote,
                since_ns,
            };
            (socket.cookie, query)
        };
        let sockets = sample.datagrams.iter().filter(is_query);
        self.queries = Some(sockets.take(MAX_QUERIES).map(query).collect());
    }

    fn learn_connecting(&mut self, now_ns: u64) {
        let links = self.links.iter().filter(|(_, link)| link.connecting);
        let since_ns = |cookie: &u64| self.connecting.get(cookie).copied().unwrap_or(now_ns);
        self.connecting = links
            .map(|(cookie, _)| (*cookie, since_ns(cookie)))
            .collect();
    }

    /// Recounts what each process has in progress.
    fn count_work(&mut self) {
        self.work.clear();
        for (cookie, link) in &self.links {
            let work = self.work.entry(link.tgid).or_default();
            let waits = link.unacknowledged.saturating_add(link.unsent);
            if link.accepted {
                work.clients += 1;
            }
            if link.accepted && link.peer_has_no_room() {
                work.stuck_client = work.stuck_client.max(Some((waits, *cookie)));
            }
        }
        // A connection that the remote end does not accept is a call without an answer.
        for (cookie, since_ns) in &self.connecting {
            if let Some(link) = self.links.get(cookie) {
                let work = self.work.entry(link.tgid).or_default();
                let call = (*since_ns, *cookie);
                work.oldest_call = Some(work.oldest_call.map_or(call, |known| known.min(call)));
            }
        }
        for query in self.queries.iter().flat_map(|queries| queries.values()) {
            let since_ns = query
                .since_ns
                .filter(|since_ns| self.now_ns.saturating_sub(*since_ns) >= MIN_QUERY_NS);
            if let Some(since_ns) = since_ns {
                let work = self.work.entry(query.tgid).or_default();
                let query = (since_ns, query.resolver);
                work.oldest_query = Some(work.oldest_query.map_or(query, |known| known.min(query)));
            }
        }
        for (cookie, awaited) in &self.awaited {
            let work = self.work.entry(awaited.tgid).or_default();
            let entry = Some((awaited.began_ns, *cookie));
            let older = |known: Option<(u64, u64)>| match known {
                Some(known) => entry.min(Some(known)),
                None => entry,
            };
            match (awaited.accepted, awaited.read) {
                (true, true) => {
                    work.in_service += 1;
                    work.oldest_request = older(work.oldest_request);
                }
                (true, false) => {}
                (false, _) => work.oldest_call = older(work.oldest_call),
            }
        }
    }

    fn learn_locks(&mut self, now_ns: u64, readings: &Readings) {
        for (key, reading) in &readings.queues {
            if key.kind != Kind::Lock || reading.depth == 0 {
                continue;
            }
            let has = |name: &str| reading.extra.iter().any(|(key, _)| *key == name);
            let interpreter = has("interpreter_lock");
            if has("uncertain") && !interpreter {
                continue;
            }
            if let QueueId::Lock { address, tgid } = key.id {
                self.locks.insert((tgid, address), (interpreter, now_ns));
            }
        }
        self.locks
            .retain(|_, (_, seen_ns)| now_ns.saturating_sub(*seen_ns) < LOCK_KEPT_NS);
    }

    pub(super) fn open_file(&self, tgid: u32, fd: u32) -> Option<OpenFile> {
        self.files.get(&(tgid, fd)).copied()
    }

    pub(super) fn link(&self, cookie: u64) -> Option<&Link> {
        self.links.get(&cookie)
    }

    /// For each endpoint that a service calls, how its connections are used. One is in use while a call is outstanding or a
    /// response streams in.
    pub(super) fn pools(&self, targets: &Targets) -> BTreeMap<(TargetId, SocketAddr), PoolUse> {
        let mut pools = BTreeMap::new();
        let opened = |link: &Link| !link.accepted && !link.connecting;
        for (cookie, link) in self.links.iter().filter(|(_, link)| opened(link)) {
            let Some(target) = targets.of(link.tgid) else {
                continue;
            };
            let in_use = self.awaited.contains_key(cookie) || link.since_data_ns < STREAMING_NS;
            let pool: &mut PoolUse = pools.entry((target, link.remote)).or_default();
            pool.used += u64::from(in_use);
            pool.unused += u64::from(!in_use && link.since_data_ns >= UNUSED_NS);
            pool.all += 1;
        }
        pools
    }

    pub(super) fn links(&self) -> impl Iterator<Item = (u64, &Link)> {
        self.links.iter().map(|(cookie, link)| (*cookie, link))
    }

    /// Connections of a service that the peer has closed and the service has not (CLOSE_WAIT), although nothing is left to do on
    /// them: it has read everything, and an accepted one was answered.
    pub(super) fn unclosed(&self, target: TargetId, targets: &Targets) -> Vec<&Link> {
        let is_left = |link: &Link| {
            link.closed_by_peer
                && !link.is_unread
                && link.since_data_ns >= UNCLOSED_NS
                && (!link.accepted || link.sent_last)
        };
        let links = self.links.values();
        links
            .filter(|link| is_left(link) && targets.of(link.tgid) == Some(target))
            .collect()
    }

    pub(super) fn unix(&self, inode: u64) -> Option<&UnixSocket> {
        self.unix.get(&inode)
    }

    /// The request or call on this connection that has no response yet.
    pub(super) fn awaited(&self, cookie: u64) -> Option<&PendingRequest> {
        self.awaited.get(&cookie)
    }

    /// All requests and calls without a response yet, by connection.
    pub(super) fn all_awaited(&self) -> impl Iterator<Item = (u64, &PendingRequest)> {
        self.awaited.iter().map(|(cookie, one)| (*cookie, one))
    }

    /// Since when this connection is not established yet, as far as was seen, CLOCK_MONOTONIC, ns.
    pub(super) fn connecting_since_ns(&self, cookie: u64) -> Option<u64> {
        self.connecting.get(&cookie).copied()
    }

    /// Whether this connection is not established yet.
    pub(super) fn is_connecting(&self, cookie: u64) -> bool {
        self.connecting.contains_key(&cookie)
    }

    pub(super) fn work_of(&self, tgid: u32) -> ProcessWork {
        self.work.get(&tgid).copied().unwrap_or_default()
    }

    /// The resolver that a process's requests in service wait for.
    pub(super) fn awaited_resolver(&self, tgid: u32) -> Option<SocketAddr> {
        self.work_of(tgid).awaited_resolver(self.now_ns)
    }

    /// Whether any of these processes has a request in service, as far as connections show.
    pub(super) fn serve_any(&self, tgids: &BTreeSet<u32>) -> bool {
        tgids.iter().any(|tgid| self.work_of(*tgid).in_service > 0)
    }

    /// The lock on a file that a thread waits for, blocked (`polled`: sleeping to try again).
    pub(super) fn file_lock(&self, thread: &Wait, polled: bool) -> Option<&LockWait> {
        let known = self.file_locks.get(&(thread.tgid, thread.tid))?;
        // A thread that has been woken may wait for another holder now.
        let is_current = polled || known.voluntary == thread.voluntary;
        let is_it = matches!(known.lock, SharedLock::File { polled: it, .. } if it == polled);
        (is_it && is_current).then_some(known)
    }

    /// The addresses towards which a service's network namespace has no local ports left.
    pub(super) fn ports_used_up(&self, target: TargetId) -> impl Iterator<Item = &LocalPorts> {
        let netns = self.networks.get(&target);
        let ports = self.local_ports.iter();
        ports.filter(move |ports| netns == Some(&ports.netns))
    }

    /// The oldest connection request of a process that has not been answered for long, with its age, ns.
    pub(super) fn unanswered_request(&self, tgid: u32) -> Option<(&Link, u64)> {
        let requests = self.connecting.iter().filter_map(|(cookie, since_ns)| {
            let link = self.links.get(cookie).filter(|link| link.tgid == tgid)?;
            Some((link, self.now_ns.saturating_sub(*since_ns)))
        });
        requests
            .filter(|(_, age_ns)| *age_ns >= MIN_REQUEST_NS)
            .max_by_key(|(_, age_ns)| *age_ns)
    }

    /// A connection tracking table that the packets of this connection request pass, and that was full since the request was
    /// first sent, `age_ns` ago: it is sent again only after seconds, when there may be room. A table that filled and emptied
    /// between two searches is missed.
    pub(super) fn full_conntrack(&self, link: &Link, age_ns: u64) -> Option<&Conntrack> {
        // Connections within a container's own namespace do not pass the host.
        let leaves = !link.remote.ip().to_canonical().is_loopback();
        let tables = self.conntrack.values();
        let mut since = tables.filter(|(_, full_ns)| {
            *full_ns == self.conntrack_ns || full_ns.saturating_add(age_ns) >= self.now_ns
        });
        let found =
            since.find(|(table, _)| table.netns == link.netns || table.is_of_host && leaves);
        found.map(|(table, _)| table)
    }

    /// The library or device by which a thread is on an accelerator in this sample, if it is on one.
    pub(super) fn accelerator(&self, thread: &Wait) -> Option<Accelerator> {
        let key = (thread.tgid, thread.tid);
        self.on_accelerator.get(&key).copied()
    }

    /// The mutex at this address that a process shares with others, while threads wait for it.
    pub(super) fn shared_mutex(&self, tgid: u32, address: u64) -> Option<&LockWait> {
        self.shared_mutexes.get(&(tgid, address))
    }

    /// The processes known to share the lock with this id; each once.
    pub(super) fn sharing(&self, id: u64) -> impl Iterator<Item = u32> {
        let waits = self.shared_mutexes.values().filter(|wait| wait.id == id);
        let tgids = waits.flat_map(|wait| [Some(wait.tgid), wait.holder.tgid()]);
        let tgids: BTreeSet<u32> = tgids.flatten().collect();
        tgids.into_iter()
    }

    /// Whether a lock at this address is an interpreter's. `None`: it is not known to be a lock.
    pub(super) fn lock(&self, tgid: u32, address: u64) -> Option<bool> {
        let known = self.locks.get(&(tgid, address));
        known.map(|(interpreter, _)| *interpreter)
    }

    /// Whether the title of a process reports that it waits for a lock.
    pub(super) fn waits_by_its_title(&self, tgid: u32) -> bool {
        let title = self.titles.get(&tgid);
        title.is_some_and(|title| title.state == Some(TitleState::WaitsForLock))
    }

    /// Since when the title of a process reports that it is idle in a transaction, CLOCK_MONOTONIC, ns.
    pub(super) fn idle_in_transaction_since_ns(&self, tgid: u32) -> Option<u64> {
        let title = self.titles.get(&tgid);
        let idle = title.filter(|title| title.state == Some(TitleState::IdleInTransaction));
        idle.map(|title| title.since_ns)
    }

    /// The holders of a connection, by its local and remote address.
    fn ends_of(&self, at: (SocketAddr, SocketAddr)) -> Option<&Vec<SocketEnd>> {
        self.peers.get(&at).or_else(|| self.ends.get(&at))
    }

    /// The process at the other end of a connection, if it is on this machine. If several share it, the one
    /// with the highest number: it was probably forked to serve it.
    pub(super) fn other_end(&self, link: &Link) -> Option<SocketEnd> {
        let ends = self.ends_of(tuple(link.remote, link.local))?;
        let others = ends.iter().filter(|end| end.tgid != link.tgid);
        others.max().copied()
    }

    /// The process at the other end is known, and has read all that has arrived there.
    pub(super) fn has_read_all(&self, link: &Link) -> bool {
        let end = self.other_end(link);
        let file = end.and_then(|end| self.files.get(&(end.tgid, end.fd)));
        let there = match file {
            Some(OpenFile::Connection(cookie)) => self.links.get(cookie),
            _ => None,
        };
        there.is_some_and(|there| !there.is_unread)
    }

    /// The other end, if the same process holds both: it called itself, and has accepted the connection.
    pub(super) fn own_end(&self, link: &Link) -> Option<SocketEnd> {
        let ends = self.ends_of(tuple(link.remote, link.local))?;
        let own = ends.first().copied();
        own.filter(|_| ends.iter().all(|end| end.tgid == link.tgid))
    }

    /// Whether this service opened the connection to an address that it listens on itself, and has not accepted it: nobody
    /// holds the other end.
    pub(super) fn is_in_its_own_accept_queue(
        &self,
        service: TargetId,
        link: &Link,
        targets: &Targets,
    ) -> bool {
        let listener = self.listener_of(link);
        listener.and_then(|tgid| targets.of(tgid)) == Some(service)
    }

    /// The process that listens for this connection, if it is on this machine and nobody holds the other end: the
    /// connection waits to be accepted, or to be established.
    pub(super) fn listener_of(&self, link: &Link) -> Option<u32> {
        if link.accepted || self.ends_of(tuple(link.remote, link.local)).is_some() {
            return None;
        }
        self.listeners.of(link.netns, link.local, link.remote)
    }

    /// Whether this connection request cannot wait for the process that listens: the kernel answers it whatever that process does,
    /// unless the accept queue is full, which it was not since the request was sent. So it is lost or held up on its way.
    pub(super) fn is_on_its_way(&self, link: &Link, cookie: u64, targets: &Targets) -> bool {
        let Some(since_ns) = self.connecting.get(&cookie) else {
            return false;
        };
        let listener = self.listener_of(link).and_then(|tgid| targets.of(tgid));
        let was_full = listener.and_then(|service| {
            let port = link.remote.port();
            self.listening.was_full(service, port, *since_ns)
        });
        was_full == Some(false)
    }

    /// Whether some listening sockets of an address had a standing queue in this time while others were empty.
    pub(super) fn uneven(
        &self,
        target: TargetId,
        address: SocketAddr,
        time: (u64, u64),
    ) -> Option<Uneven> {
        self.listening.uneven(target, address, time)
    }

    /// The other processes that hold the read end of a pipe, or the other end of a unix socket.
    pub(super) fn other_holders(&self, tgid: u32, file: OpenFile) -> Vec<u32> {
        let (inode, is_pipe) = match file {
            OpenFile::Pipe(inode) => (Some(inode), true),
            OpenFile::Unix(inode) => (self.unix.get(&inode).and_then(|socket| socket.peer), false),
            OpenFile::Connection(_) | OpenFile::Datagrams(_) => (None, false),
        };
        let ends = inode.and_then(|inode| self.holders.get(&inode));
        let reads = |holder: &&Holder| !is_pipe || holder.reads;
        let tgids: BTreeSet<u32> = ends
            .into_iter()
            .flatten()
            .filter(reads)
            .map(|holder| holder.tgid)
            .filter(|other| *other != tgid)
            .collect();
        tgids.into_iter().collect()
    }

    /// `postgres (812)`.
    pub(super) fn process(&self, tgid: u32, targets: &Targets) -> String {
        format!("{} ({tgid})", self.name(tgid, targets))
    }

    /// The name of a process: its service's, else its own.
    pub(super) fn name(&self, tgid: u32, targets: &Targets) -> String {
        let target = targets.of(tgid).and_then(|target| targets.get(target));
        let name = target.map(|target| target.name.clone());
        let name = name.or_else(|| self.names.get(&tgid).cloned());
        bounded(&name.unwrap_or_else(|| "process".to_owned()), MAX_NAME)
    }

    /// The process that has been idle in a transaction the longest, as the titles report. All titles of the first scan
    /// have the same time; among those, it is the process whose clients have been silent the longest.
    pub(super) fn longest_idle_in_transaction(&self, tgids: &[u32]) -> Option<u32> {
        let titles = tgids
            .iter()
            .filter_map(|tgid| Some((*tgid, self.titles.get(tgid)?)));
        titles
            .filter(|(_, title)| title.state == Some(TitleState::IdleInTransaction))
            .map(|(tgid, title)| (title.since_ns, Reverse(self.clients_silent_ns(tgid)), tgid))
            .min()
            .map(|(_, _, tgid)| tgid)
    }

    /// Time since a process last exchanged data with a client, ns; 0 if it has none.
    fn clients_silent_ns(&self, tgid: u32) -> u64 {
        let accepted = self.links.values().filter(|link| link.accepted);
        let silent_ns = accepted
            .filter(|link| link.tgid == tgid)
            .map(|link| link.since_data_ns);
        silent_ns.min().unwrap_or(0)
    }
}

pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A connection's addresses, with IPv4-mapped IPv6 addresses as IPv4.
fn tuple(local: SocketAddr, remote: SocketAddr) -> (SocketAddr, SocketAddr) {
    (canonical(local), canonical(remote))
}

fn link(connection: &Connection, accepted: bool) -> Link {
    /// include/net/tcp_states.h
    const CLOSE_WAIT: u8 = 8;
    let closed_by_peer = connection.state == CLOSE_WAIT;
    let unread = connection.rcv_nxt.wrapping_sub(connection.copied_seq);
    Link {
        tgid: connection.tgid,
        netns: connection.netns,
        local: connection.local,
        remote: connection.remote,
        accepted,
        unacknowledged: connection.snd_nxt.wrapping_sub(connection.snd_una),
        unsent: connection.write_seq.wrapping_sub(connection.snd_nxt),
        window: connection.snd_wnd,
        since_data_ns: connection.since_received_ns.min(connection.since_sent_ns),
        // The sequence numbers are not read at one instant and can cross. A FIN occupies one.
        is_unread: (1..1 << 31).contains(&unread.saturating_sub(u32::from(closed_by_peer))),
        closed_by_peer,
        sent_last: connection.since_sent_ns < connection.since_received_ns,
        connecting: !accepted && connection.state == SYN_SENT,
    }
}
