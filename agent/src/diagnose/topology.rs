//! Who holds what, of the targets that are looked at closely: the facts that join a blocked thread to what it waits for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
};

use rustc_hash::FxHashMap;

use crate::{
    queue::{Awaited, Kind, QueueId, Readings, Targets},
    sample::{Connection, Holder, Peer, Sample, TargetId, UnixSocket},
    text::bounded,
};

/// A lock that nobody has waited for since is forgotten, ns.
const KEEP_LOCKS_NS: u64 = 5_000_000_000;
/// Pieces of an answer come at least so often.
const STREAMS_NS: u64 = 100_000_000;
/// What one connection's other end may be called at most.
const MAX_NAME: usize = 64;
/// Names of processes beyond which all are learnt anew: those that are told again are the ones that are there.
const MAX_NAMES: usize = 8_192;

/// A connection, as far as it tells who waits for whom.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) tgid: u32,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// The target listens where this connection came in.
    pub(super) accepted: bool,
    /// Bytes sent and not acknowledged; written and not sent.
    pub(super) unacknowledged: u32,
    pub(super) unsent: u32,
    /// Window that the peer offers, bytes.
    pub(super) window: u32,
    /// Since data last came or went, ns.
    pub(super) since_data_ns: u64,
}

impl Link {
    /// What is sent waits for the peer to make room, not for the network: less than a full segment fits its window.
    pub(super) fn peer_has_no_room(&self) -> bool {
        const SEGMENT: u32 = 1_460;
        self.unsent > 0 && self.unacknowledged.saturating_add(SEGMENT) > self.window
            || self.window == 0 && self.unacknowledged + self.unsent > 0
    }
}

/// What stands behind a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    Connection(u64),
    Pipe(u64),
    Unix(u64),
}

/// A process that holds one end of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct End {
    pub(super) tgid: u32,
    pub(super) fd: u32,
}

/// What one process has under way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Business {
    /// Connections that it accepted and holds.
    pub(super) clients: u32,
    /// Requests that it has read and not answered; not read.
    pub(super) working: u32,
    pub(super) unread: u32,
    /// Calls that nobody has answered yet, and the connection of the oldest.
    pub(super) outstanding: u32,
    pub(super) oldest_call: Option<(u64, u64)>,
    /// The oldest request in work, and its connection.
    pub(super) oldest_request: Option<(u64, u64)>,
    /// A client that does not read, and the bytes that wait for it.
    pub(super) stuck_client: Option<(u32, u64)>,
}

/// A process's title, and since when it stands.
#[derive(Clone, Debug)]
pub(super) struct Titled {
    pub(super) title: String,
    pub(super) since_ns: u64,
}

#[derive(Default)]
pub(super) struct Topology {
    focus_scope: BTreeSet<TargetId>,
    links: FxHashMap<u64, Link>,
    files: FxHashMap<(u32, u32), Held>,
    /// Who holds a connection, by its own end and the other.
    ends: HashMap<(SocketAddr, SocketAddr), Vec<End>>,
    peers: HashMap<(SocketAddr, SocketAddr), Vec<End>>,
    holders: HashMap<u64, Vec<Holder>>,
    unix: HashMap<u64, UnixSocket>,
    titles: HashMap<u32, Titled>,
    names: HashMap<u32, String>,
    business: HashMap<u32, Business>,
    awaited: FxHashMap<u64, Awaited>,
    /// Addresses that are known to be locks, by process; whether of an interpreter, and when last seen.
    locks: HashMap<(u32, u64), (bool, u64)>,
}

impl Topology {
    pub(super) fn read(
        &mut self,
        now_ns: u64,
        sample: &Sample,
        readings: &Readings,
        targets: &Targets,
        focus_scope: &BTreeSet<TargetId>,
    ) {
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
        for title in &sample.titles {
            self.titles.insert(
                title.tgid,
                Titled {
                    title: title.title.clone(),
                    since_ns: now_ns,
                },
            );
        }
        if sample.walks.files || sample.walks.marked {
            self.learn_files(sample, targets);
        }
        if let Some(awaited) = &readings.awaited {
            self.awaited = awaited.iter().map(|one| (one.cookie, *one)).collect();
        }
        if readings.awaited.is_some() || sample.walks.files {
            self.take_stock();
        }
        self.learn_locks(now_ns, readings);
    }

    fn learn_names(&mut self, sample: &Sample, targets: &Targets) {
        if sample.targets.is_some() {
            self.titles.retain(|tgid, _| targets.of(*tgid).is_some());
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
            ends.push(End {
                tgid: peer.tgid,
                fd: peer.fd,
            });
            self.names.insert(peer.tgid, peer.name.clone());
        }
    }

    fn learn_files(&mut self, sample: &Sample, targets: &Targets) {
        let near = |tgid: u32| {
            let target = targets.of(tgid);
            target.is_some_and(|target| self.focus_scope.contains(&target))
        };
        if sample.walks.files {
            self.links.clear();
            self.files.clear();
            self.ends.clear();
            for pipe in sample.pipes.iter().filter(|pipe| near(pipe.tgid)) {
                self.files
                    .insert((pipe.tgid, pipe.fd), Held::Pipe(pipe.inode));
            }
            self.unix.clear();
            for socket in sample.unix.iter().filter(|socket| near(socket.tgid)) {
                self.files
                    .insert((socket.tgid, socket.fd), Held::Unix(socket.inode));
                self.unix.insert(socket.inode, socket.clone());
            }
        }
        for connection in sample.connections.iter().filter(|one| near(one.tgid)) {
            let end = End {
                tgid: connection.tgid,
                fd: connection.fd,
            };
            let cookie = connection.cookie;
            let accepted = targets.listens(connection.netns, connection.local.port());
            if self
                .links
                .insert(cookie, link(connection, accepted))
                .is_none()
            {
                self.files
                    .insert((end.tgid, end.fd), Held::Connection(cookie));
                let tuple = tuple(connection.local, connection.remote);
                self.ends.entry(tuple).or_default().push(end);
            }
        }
    }

    /// What each process has under way.
    fn take_stock(&mut self) {
        self.business.clear();
        for (cookie, link) in &self.links {
            let business = self.business.entry(link.tgid).or_default();
            let waits = link.unacknowledged.saturating_add(link.unsent);
            if link.accepted {
                business.clients += 1;
            }
            if link.accepted && link.peer_has_no_room() {
                business.stuck_client = business.stuck_client.max(Some((waits, *cookie)));
            }
        }
        for (cookie, awaited) in &self.awaited {
            let business = self.business.entry(awaited.tgid).or_default();
            let entry = Some((awaited.began_ns, *cookie));
            let older = |known: Option<(u64, u64)>| match known {
                Some(known) => entry.min(Some(known)),
                None => entry,
            };
            match (awaited.accepted, awaited.read) {
                (true, true) => {
                    business.working += 1;
                    business.oldest_request = older(business.oldest_request);
                }
                (true, false) => business.unread += 1,
                (false, _) => {
                    business.outstanding += 1;
                    business.oldest_call = older(business.oldest_call);
                }
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
            .retain(|_, (_, seen_ns)| now_ns.saturating_sub(*seen_ns) < KEEP_LOCKS_NS);
    }

    pub(super) fn held(&self, tgid: u32, fd: u32) -> Option<Held> {
        self.files.get(&(tgid, fd)).copied()
    }

    pub(super) fn link(&self, cookie: u64) -> Option<&Link> {
        self.links.get(&cookie)
    }

    /// Of each endpoint that a target calls: connections, and how many of them are in use. One is in use as well while the
    /// answer streams in.
    pub(super) fn pools(&self, targets: &Targets) -> BTreeMap<(TargetId, SocketAddr), (u64, u64)> {
        let mut pools = BTreeMap::new();
        for (cookie, link) in self.links.iter().filter(|(_, link)| !link.accepted) {
            let Some(target) = targets.of(link.tgid) else {
                continue;
            };
            let in_use = self.awaited.contains_key(cookie) || link.since_data_ns < STREAMS_NS;
            let (used, all) = pools.entry((target, link.remote)).or_insert((0, 0));
            *used += u64::from(in_use);
            *all += 1;
        }
        pools
    }

    pub(super) fn links(&self) -> impl Iterator<Item = (u64, &Link)> {
        self.links.iter().map(|(cookie, link)| (*cookie, link))
    }

    pub(super) fn unix(&self, inode: u64) -> Option<&UnixSocket> {
        self.unix.get(&inode)
    }

    /// The request or call that waits on this connection.
    pub(super) fn awaited(&self, cookie: u64) -> Option<&Awaited> {
        self.awaited.get(&cookie)
    }

    pub(super) fn business(&self, tgid: u32) -> Business {
        self.business.get(&tgid).copied().unwrap_or_default()
    }

    /// Whether this address is known to be a lock, and whether it is an interpreter's.
    pub(super) fn lock(&self, tgid: u32, address: u64) -> Option<bool> {
        let known = self.locks.get(&(tgid, address));
        known.map(|(interpreter, _)| *interpreter)
    }

    pub(super) fn title(&self, tgid: u32) -> Option<&Titled> {
        self.titles.get(&tgid)
    }

    /// The process at the other end of a connection, where it is on this machine. Of several that share it, the youngest:
    /// it was forked to serve it.
    pub(super) fn other_end(&self, link: &Link) -> Option<End> {
        let there = tuple(link.remote, link.local);
        let ends = self.peers.get(&there).or_else(|| self.ends.get(&there))?;
        let others = ends.iter().filter(|end| end.tgid != link.tgid);
        others.max().copied()
    }

    /// The processes that hold the other end of a pipe or of a unix socket.
    pub(super) fn other_holders(&self, tgid: u32, held: Held) -> Vec<u32> {
        let (inode, is_pipe) = match held {
            Held::Pipe(inode) => (Some(inode), true),
            Held::Unix(inode) => (self.unix.get(&inode).and_then(|socket| socket.peer), false),
            Held::Connection(_) => (None, false),
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

    pub(super) fn name(&self, tgid: u32, targets: &Targets) -> String {
        let target = targets.of(tgid).and_then(|target| targets.get(target));
        let name = target.map(|target| target.name.clone());
        let name = name.or_else(|| self.names.get(&tgid).cloned());
        bounded(&name.unwrap_or_else(|| "process".to_owned()), MAX_NAME)
    }

    /// Processes of one service that say of themselves what `says` asks for, with since when.
    pub(super) fn titled(
        &self,
        tgids: &[u32],
        says: impl Fn(&str) -> bool,
    ) -> BTreeMap<u64, (u32, &Titled)> {
        tgids
            .iter()
            .filter_map(|tgid| Some((*tgid, self.titles.get(tgid)?)))
            .filter(|(_, titled)| says(&titled.title))
            .map(|(tgid, titled)| (titled.since_ns, (tgid, titled)))
            .collect()
    }
}

/// IPv4 within IPv6 is IPv4.
fn tuple(local: SocketAddr, remote: SocketAddr) -> (SocketAddr, SocketAddr) {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    (canonical(local), canonical(remote))
}

fn link(connection: &Connection, accepted: bool) -> Link {
    Link {
        tgid: connection.tgid,
        local: connection.local,
        remote: connection.remote,
        accepted,
        unacknowledged: connection.snd_nxt.wrapping_sub(connection.snd_una),
        unsent: connection.write_seq.wrapping_sub(connection.snd_nxt),
        window: connection.snd_wnd,
        since_data_ns: connection.since_received_ns.min(connection.since_sent_ns),
    }
}
