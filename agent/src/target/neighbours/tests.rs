use super::*;
use crate::sample::fixture::silent_connection;

const OWN: u32 = 99;

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn process(tgid: u32, parent: u32, comm: &str) -> ProcessInfo {
    ProcessInfo {
        tgid,
        pid: tgid,
        parent,
        start_ns: u64::from(tgid),
        exec_id: 1,
        kernel: false,
        comm: comm.to_owned(),
    }
}

fn connection(tgid: u32, local: u16, remote: u16) -> Connection {
    Connection {
        cookie: u64::from(local) << 16 | u64::from(remote),
        tgid,
        fd: 3,
        local: address(local),
        remote: address(remote),
        ..silent_connection()
    }
}

fn peer(tgid: u32, local: u16, remote: u16) -> Peer {
    Peer {
        netns: 1,
        local: address(local),
        remote: address(remote),
        tgid,
        fd: 7,
        name: String::new(),
    }
}

fn listener(tgid: u32, port: u16) -> ListenerInfo {
    ListenerInfo {
        tgid,
        cookie: u64::from(port),
        netns: 1,
        address: address(port),
    }
}

/// A machine on which 10 calls 20 on port 200, 20 calls 30 on port 300, and 30 has siblings.
struct World {
    processes: Vec<ProcessInfo>,
    connections: Vec<Connection>,
    pipes: Vec<Pipe>,
    unix: Vec<UnixSocket>,
    peers: Vec<Peer>,
    holders: Vec<Holder>,
    listeners: Vec<ListenerInfo>,
    /// A process that waits for a lock, and the one that holds it.
    locks: Vec<(u32, u32)>,
}

impl World {
    fn chain() -> Self {
        Self {
            processes: vec![
                process(1, 0, "init"),
                process(10, 1, "web"),
                process(20, 1, "api"),
                process(29, 1, "db"),
                process(30, 29, "db"),
                process(31, 29, "db"),
                process(OWN, 1, "tailback"),
            ],
            connections: vec![
                connection(10, 1_001, 200),
                connection(20, 200, 1_001),
                connection(20, 1_002, 300),
                connection(30, 300, 1_002),
            ],
            pipes: Vec::new(),
            unix: Vec::new(),
            peers: vec![
                peer(20, 200, 1_001),
                peer(10, 1_001, 200),
                peer(30, 300, 1_002),
            ],
            holders: Vec::new(),
            listeners: vec![listener(20, 200), listener(29, 300)],
            locks: Vec::new(),
        }
    }

    fn find(&self, focused: &[u32]) -> FoundNeighbours {
        self.find_with(focused, focused)
    }

    fn find_with(&self, focused: &[u32], selected: &[u32]) -> FoundNeighbours {
        let served = |_, port| {
            let mut listeners = self.listeners.iter();
            listeners.any(|listener| listener.address.port() == port)
        };
        let mut ends = ends(&self.connections, &self.pipes, &self.unix, served);
        let holder = |(waiter, holder): &(u32, u32)| (*waiter, End::Process(*holder));
        ends.extend(self.locks.iter().map(holder));
        let host = HostView {
            processes: &self.processes,
            ends: &ends,
            peers: &self.peers,
            holders: &self.holders,
            listeners: &self.listeners,
            own_pid: OWN,
        };
        find_neighbours(
            &focused.iter().copied().collect(),
            &selected.iter().copied().collect(),
            &host,
            &mut |a, b| a.comm == b.comm,
        )
    }

    fn neighbours(&self, focused: &[u32]) -> Vec<u32> {
        self.find(focused).tgids.into_iter().collect()
    }
}

#[test]
fn a_chain_of_calls_is_followed_to_its_end() {
    assert_eq!(World::chain().neighbours(&[10]), [20, 29, 30, 31]);
}

#[test]
fn the_holder_of_a_lock_is_a_neighbour_and_what_it_calls() {
    let mut world = World::chain();
    world.processes.insert(1, process(5, 1, "cron"));
    world.locks.push((5, 20));
    assert_eq!(world.neighbours(&[5]), [20, 29, 30, 31]);
}

#[test]
fn a_client_of_a_focused_service_is_not_a_neighbour() {
    assert_eq!(World::chain().neighbours(&[20]), [29, 30, 31]);
    assert!(World::chain().neighbours(&[30]).is_empty());
}

#[test]
fn a_client_that_does_not_read_is_a_neighbour() {
    let mut world = World::chain();
    world.connections[1].write_seq = 4_096;
    assert_eq!(world.neighbours(&[20]), [10, 29, 30, 31]);
}

#[test]
fn the_listener_of_a_connection_that_is_not_accepted_yet_is_a_neighbour() {
    let mut world = World::chain();
    world.peers.clear();
    world.processes.truncate(4);
    assert_eq!(world.neighbours(&[20]), [29]);
    // It listens on the unspecified address: it is the peer only if the remote address is this machine's.
    world.listeners[1].address = SocketAddr::from(([0, 0, 0, 0], 300));
    assert_eq!(world.neighbours(&[20]), [29]);
    world.connections[2].remote = SocketAddr::from(([10, 0, 0, 9], 300));
    assert!(world.neighbours(&[20]).is_empty());
}

#[test]
fn the_agent_init_and_kernel_threads_are_never_neighbours() {
    let mut world = World::chain();
    for tgid in [1, OWN, 40] {
        world.peers[0].tgid = tgid;
        world.processes.retain(|process| process.tgid != 40);
        let at = world.processes.partition_point(|process| process.tgid < 40);
        let kernel = ProcessInfo {
            kernel: true,
            ..process(40, 2, "kworker")
        };
        world.processes.insert(at, kernel);
        assert!(world.neighbours(&[10]).is_empty(), "{tgid}");
    }
}

#[test]
fn a_child_that_called_exec_is_not_a_sibling() {
    let mut world = World::chain();
    let driver = world.processes[3].clone();
    assert_eq!((driver.tgid, driver.comm.as_str()), (29, "db"));
    world.processes[4].exec_id = 2;
    assert_eq!(world.neighbours(&[10]), [20, 30]);
}

#[test]
fn neighbours_are_at_most_four_hops_away() {
    let mut world = World::chain();
    world.processes = (1..20)
        .map(|tgid| process(tgid, 0, &tgid.to_string()))
        .collect();
    world.connections = (2..10)
        .map(|tgid| connection(tgid, 1_000 + tgid as u16, 200 + tgid as u16))
        .collect();
    world.peers = (2..10)
        .map(|tgid| peer(tgid + 1, 200 + tgid as u16, 1_000 + tgid as u16))
        .collect();
    assert_eq!(world.neighbours(&[2]), [3, 4, 5, 6]);
}

#[test]
fn the_limit_counts_only_processes_that_are_not_selected() {
    let mut world = World::chain();
    world.processes = (1..200)
        .map(|tgid| process(tgid, 0, &tgid.to_string()))
        .collect();
    let port = |tgid: u32| 1_000 + tgid as u16;
    world.connections = (3..110).map(|at| connection(2, port(at), 200)).collect();
    world.peers = (3..110).map(|at| peer(at, 200, port(at))).collect();
    world.listeners.clear();
    world.processes.retain(|process| process.tgid != OWN);
    let found = world.find(&[2]);
    assert_eq!(
        (found.tgids.len(), found.left_out),
        (MAX_NEIGHBOURS, 106 - MAX_NEIGHBOURS)
    );
    let all: Vec<u32> = (1..200).collect();
    let found = world.find_with(&[2], &all);
    assert_eq!((found.tgids.len(), found.left_out), (106, 0));
}

fn pipe(tgid: u32, reads: bool, unread: u32) -> Pipe {
    Pipe {
        inode: 5,
        tgid,
        fd: 1,
        reads,
        writes: !reads,
        head: unread,
        tail: 0,
        limit: 16,
        bytes: None,
        readers: 1,
        writers: 1,
        path: None,
    }
}

fn holder(tgid: u32, inode: u64, reads: bool) -> Holder {
    Holder {
        inode,
        tgid,
        name: String::new(),
        fd: 0,
        reads,
        writes: !reads,
    }
}

#[test]
fn a_pipe_leads_to_the_process_that_keeps_it_full_or_empty() {
    let mut world = World::chain();
    world.connections.clear();
    world.holders = vec![holder(10, 5, false), holder(20, 5, true)];
    world.pipes = vec![pipe(10, false, 9)];
    assert_eq!(world.neighbours(&[10]), [20]);
    world.pipes = vec![pipe(10, false, 0)];
    assert!(world.neighbours(&[10]).is_empty());
    world.pipes = vec![pipe(20, true, 0)];
    assert_eq!(world.neighbours(&[20]), [10]);
    world.pipes = vec![pipe(20, true, 9)];
    assert!(world.neighbours(&[20]).is_empty());
}

#[test]
fn a_unix_socket_leads_to_the_service_and_to_a_client_that_does_not_read() {
    let mut world = World::chain();
    world.connections.clear();
    world.holders = vec![holder(10, 50, true), holder(20, 60, true)];
    let socket = |tgid, path: Option<&str>, peer, unread_by_peer| UnixSocket {
        inode: 110 - peer,
        peer: Some(peer),
        tgid,
        fd: 4,
        netns: 1,
        style: UnixStyle::Stream,
        listening: false,
        path: path.map(str::to_owned),
        peer_path: None,
        queued: 0,
        limit: 0,
        head: 0,
        unread_by_peer,
        sndbuf: 1,
        unread: 0,
        peer_sndbuf: 1,
    };
    world.unix = vec![socket(10, None, 60, 0)];
    assert_eq!(world.neighbours(&[10]), [20]);
    world.unix = vec![socket(20, Some("/run/s"), 50, 0)];
    assert!(world.neighbours(&[20]).is_empty());
    world.unix = vec![socket(20, Some("/run/s"), 50, 800)];
    assert_eq!(world.neighbours(&[20]), [10]);
}
