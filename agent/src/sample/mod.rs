//! One look at all queues of all targets, as plain data.
//!
//! Everything after this module is a pure function of a stream of samples: time comes with the sample, and
//! nothing else from the world. A recording of the stream replays to the same output, byte for byte.

pub mod file;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One tick.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// CLOCK_MONOTONIC when the tick began, ns.
    pub mono_ns: u64,
    /// Wall clock at the same moment, ns since 1970.
    pub unix_ns: u64,
    /// The watched services, present in the first sample and whenever they change.
    pub targets: Option<Vec<Target>>,
    /// Which walks this tick made.
    pub walks: Walks,
    /// Listeners seen, once each.
    pub listeners: Vec<Listener>,
    /// Connections seen, once each.
    pub connections: Vec<Connection>,
    /// Pipe ends seen: one entry per process and descriptor.
    pub pipes: Vec<Pipe>,
    /// Threads of the targets that were walked.
    pub threads: Vec<Thread>,
    /// Counters of the network namespaces in which targets listen.
    pub networks: Vec<Network>,
    /// What the agent itself did, with the first sample of each report interval.
    pub agent: Option<AgentReport>,
    /// What a person should know about the watching itself, in words.
    pub notices: Vec<Notice>,
}

/// Which parts of a sample are complete: absence of an object means that it is gone only where its walk was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walks {
    /// All sockets and pipes of all targets.
    pub files: bool,
    /// All listeners, and the connections marked for a closer look.
    pub marked: bool,
    /// All threads of all targets.
    pub threads: bool,
}

/// Names a target for as long as it is watched; never reused.
pub type TargetId = u32;

/// One watched service: the processes that serve together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub id: TargetId,
    /// `service.name`: from the process's own OTEL_SERVICE_NAME, else from what it executes.
    pub name: String,
    /// The process that started the others (lowest start time), as the agent's /proc numbers it.
    pub pid: u32,
    /// CLOCK_BOOTTIME at which that process started, ns.
    pub start_ns: u64,
    /// Base name of its executable.
    pub exe: String,
    /// `comm` of that process, with control characters escaped.
    pub comm: String,
    /// Container id, from the cgroup path, where it is in one.
    pub container: Option<String>,
    /// Its cgroup path.
    pub cgroup: Option<String>,
    /// Further resource attributes that the service names in OTEL_RESOURCE_ATTRIBUTES.
    pub attributes: Vec<(String, String)>,
    /// CPUs that it may run on.
    pub cpus: u32,
    /// All its processes, numbered as in the initial pid namespace.
    pub tgids: Vec<u32>,
}

/// A listening TCP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// The kernel's socket cookie: never reused.
    pub cookie: u64,
    /// One of the processes that hold it open.
    pub tgid: u32,
    /// Inode of its network namespace.
    pub netns: u32,
    pub address: SocketAddr,
    /// Connections complete and not accepted.
    pub depth: u32,
    /// Backlog; the kernel refuses when `depth` exceeds it.
    pub limit: u32,
    /// Drops since it was made: handshakes and requests.
    pub drops: u32,
    /// CLOCK_MONOTONIC of this look, ns.
    pub seen_ns: u64,
    /// Age of each waiting connection that the kernel timed, ns, oldest first.
    pub ages_ns: Vec<u64>,
}

/// A TCP connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The kernel's socket cookie: never reused.
    pub cookie: u64,
    pub tgid: u32,
    pub fd: u32,
    pub netns: u32,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// include/net/tcp_states.h
    pub state: u8,
    /// Sequence numbers, modulo 2^32, as the kernel names them.
    pub rcv_nxt: u32,
    pub copied_seq: u32,
    pub write_seq: u32,
    pub snd_una: u32,
    pub snd_nxt: u32,
    /// Window that the peer offers, bytes.
    pub snd_wnd: u32,
    /// Memory of the receive queue and its limit, bytes; 0 while nothing is unread.
    pub rmem_alloc: u32,
    pub rcvbuf: u32,
    /// Memory of the send queue and its limit, bytes; 0 while all is acknowledged.
    pub wmem_queued: u32,
    pub sndbuf: u32,
    /// Segments dropped; read only while something is unread.
    pub drops: u32,
}

/// One end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    pub inode: u64,
    pub tgid: u32,
    pub fd: u32,
    pub reads: bool,
    pub writes: bool,
    /// Buffers ever filled and emptied, modulo 2^32.
    pub head: u32,
    pub tail: u32,
    /// Buffers it may hold.
    pub limit: u32,
    /// Bytes in it, where few enough buffers are used to add them up.
    pub bytes: Option<u32>,
    /// Open read and write ends, all processes together.
    pub readers: u32,
    pub writers: u32,
}

/// A thread of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    pub tgid: u32,
    pub tid: u32,
    /// Wants a CPU (and may have one).
    pub runnable: bool,
    /// Has a CPU.
    pub on_cpu: bool,
    /// Time spent wanting a CPU without having one, ns, since its start.
    pub run_delay_ns: u64,
    /// Times it was given a CPU, since its start.
    pub dispatches: u64,
    /// CPU time, ns, since its start.
    pub cpu_ns: u64,
}

/// Counters of one network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub netns: u32,
    /// `TcpPassiveOpens`: connections that ever entered an accept queue.
    pub passive_opens: u64,
    /// Listening sockets in it that no target holds: what they take is in the counters, too.
    pub others: u32,
    /// `ListenOverflows`: handshakes refused because an accept queue was full.
    pub listen_overflows: u64,
}

/// What the agent did and what that cost, since its start unless a name says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    pub ticks: u64,
    pub records: u64,
    /// CPU time of the whole agent, ns.
    pub cpu_ns: u64,
    /// CPU share of one core over the last report interval, 0 to 1.
    pub cpu_share: f64,
    pub rss_bytes: u64,
    /// Cost of the last walk over files, ns of CPU.
    pub files_walk_ns: u64,
    /// Interval at which files are walked now, ns.
    pub files_interval_ns: u64,
    pub targets: u32,
    pub processes: u32,
    /// Ticks that began late by more than half their interval.
    pub late_ticks: u64,
    /// Samples that could not be recorded.
    pub samples_not_recorded: u64,
    /// Spans handed to the exporter, delivered, and dropped for want of room or because the collector refused them.
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
}

/// A sentence about the watching itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// A closed list of short names, for programs.
    pub code: String,
    pub text: String,
}
