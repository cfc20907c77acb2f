//! One sample of all queues of all targets, as plain data.
//!
//! Everything downstream is a pure function of the stream of samples, which also carry the time. A recording of the
//! stream replays to the same output, byte for byte. Recordings are positional: never reorder or insert fields.
#![forbid(unsafe_code)]

pub mod anonymize;
pub mod cut;
pub mod file;
pub mod texts;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// CLOCK_MONOTONIC when sampling began, ns.
    pub mono_ns: u64,
    /// Wall clock at the same moment, ns since 1970.
    pub unix_ns: u64,
    /// The watched services; in the first sample, and whenever they change.
    pub targets: Option<Vec<Target>>,
    /// The scans that this sample includes.
    pub scans: Scans,
    /// Listeners, each once.
    pub listeners: Vec<Listener>,
    /// Connections, each once.
    pub connections: Vec<Connection>,
    /// Pipe ends: one entry per process and descriptor.
    pub pipes: Vec<Pipe>,
    /// UDP sockets, each once.
    pub datagrams: Vec<DatagramSocket>,
    /// Unix sockets, each once.
    pub unix: Vec<UnixSocket>,
    /// io_uring instances, each once.
    pub rings: Vec<Ring>,
    /// Open files of each process.
    pub files: Vec<Files>,
    /// Threads of the targets; in samples with the scan `threads`.
    pub threads: Vec<Thread>,
    /// What threads of the targets are doing or waiting for; in samples with the scan `waits`.
    pub waits: Vec<Wait>,
    /// Counters of the network namespaces in which targets listen.
    pub networks: Vec<Network>,
    /// Control groups that hold targets; in samples with the scan `system`.
    pub cgroups: Vec<Cgroup>,
    /// The machine; in samples with the scan `system`.
    pub machine: Option<Machine>,
    /// CPU time of the machine's processes; in samples with the scan `cpu_users`.
    pub cpu_users: Vec<CpuUser>,
    /// All processes that listen on this host, and where; present when that changes.
    pub listening: Option<Vec<Listening>>,
    /// All processes that hold the other ends of the targets' pipes and unix sockets; present when that changes.
    pub holders: Option<Vec<Holder>>,
    /// What threads of focused targets and their neighbours are doing or waiting for; in samples with the scan `profile`.
    pub profile: Vec<Wait>,
    /// All processes on this host that hold the other ends of focused targets' connections; present when that was
    /// scanned.
    pub peers: Option<Vec<Peer>>,
    /// Process titles of focused targets and their neighbours; for each process at first and when the title changes.
    pub titles: Vec<Title>,
    /// Messages about full queues that targets wrote to their logs since the last sample.
    pub messages: Vec<Message>,
    /// The agent's own counters; in the first sample of each report interval.
    pub agent: Option<AgentReport>,
    /// Conditions of the agent itself that a user should know about.
    pub notices: Vec<Notice>,
}

/// Which scans a sample includes. An object that is absent from a sample is gone only if the scan that reports it is included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scans {
    /// All sockets and pipes of all targets.
    pub files: bool,
    /// All listeners, and the busy connections of focused targets.
    pub focused_sockets: bool,
    /// All threads of all targets.
    pub threads: bool,
    /// What each thread of each target waits for.
    pub waits: bool,
    /// Control groups and the host.
    pub system: bool,
    /// CPU time of all processes.
    pub cpu_users: bool,
    /// What each thread of each focused target and its neighbours waits for.
    pub profile: bool,
}

/// Identifies a target while it is watched; never reused.
pub type TargetId = u32;

/// One watched service: all processes that serve together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub id: TargetId,
    /// `service.name`: from the process's OTEL_SERVICE_NAME, else from its executable.
    pub name: String,
    /// The process that started the others (lowest start time), as the agent's /proc numbers it.
    pub pid: u32,
    /// CLOCK_BOOTTIME at which that process started, ns.
    pub start_ns: u64,
    /// Base name of its executable.
    pub exe: String,
    /// `comm` of that process, with control characters escaped.
    pub comm: String,
    /// Container id from the cgroup path, if it runs in a container.
    pub container: Option<String>,
    /// Its cgroup path.
    pub cgroup: Option<String>,
    /// Resource attributes from the service's OTEL_RESOURCE_ATTRIBUTES.
    pub attributes: Vec<(String, String)>,
    /// Number of CPUs that it may run on.
    pub cpus: u32,
    /// All its processes, numbered as in the initial pid namespace.
    pub tgids: Vec<u32>,
    /// A neighbour: not requested by the user, but watched while a requested target has connections to it.
    pub is_neighbour: bool,
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
    /// Established connections that are not accepted yet.
    pub depth: u32,
    /// Backlog; the kernel rejects new connections while `depth` exceeds it.
    pub limit: u32,
    /// Handshakes and requests dropped since its creation.
    pub drops: u32,
    /// Half-open handshakes (`reqsk_queue_len`); `None` if this kernel does not report them.
    pub half_open: Option<u32>,
    /// CLOCK_MONOTONIC when it was read, ns.
    pub seen_ns: u64,
    /// Age of each waiting connection with a kernel timestamp, ns, oldest first.
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
    /// Window advertised by the peer, bytes.
    pub snd_wnd: u32,
    /// Memory of the receive queue and its limit, bytes; 0 while nothing is unread.
    pub rmem_alloc: u32,
    pub rcvbuf: u32,
    /// Memory of the send queue and its limit, bytes; 0 while all is acknowledged.
    pub wmem_queued: u32,
    pub sndbuf: u32,
    /// Segments dropped; read only while something is unread.
    pub drops: u32,
    /// Sequence number of the segment that last advanced our acknowledgement or window.
    pub snd_wl1: u32,
    /// Time since data was last received, and last sent, ns; the kernel's resolution is its timer tick. 0 if this kernel
    /// does not report it.
    pub since_received_ns: u64,
    pub since_sent_ns: u64,
    /// Time since any segment was last received, pure acknowledgements included, ns.
    pub since_any_segment_ns: u64,
    /// Segments with data, modulo 2^16: received in the lower half, sent in the upper half; 0 if this kernel does not report
    /// them. No verdict uses them, so recordings omit them.
    #[serde(skip)]
    pub segments: u32,
}

/// A UDP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramSocket {
    pub cookie: u64,
    pub tgid: u32,
    pub fd: u32,
    pub netns: u32,
    pub local: SocketAddr,
    /// Port 0: not connected.
    pub remote: SocketAddr,
    /// Memory of unread datagrams, and its limit, bytes.
    pub memory: u32,
    pub rcvbuf: u32,
    /// Unread datagrams; `None` if this kernel does not report them.
    pub queued: Option<u32>,
    /// Datagrams dropped since its creation.
    pub drops: u32,
    /// Identity of the datagram at the head of the queue; 0 if there is none.
    pub head: u64,
}

/// The type of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum UnixStyle {
    Stream,
    Datagram,
    SeqPacket,
}

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Its inode number.
    pub inode: u64,
    /// Inode of the peer socket, if there is one and the kernel reports it.
    pub peer: Option<u64>,
    pub tgid: u32,
    pub fd: u32,
    pub netns: u32,
    pub style: UnixStyle,
    pub listening: bool,
    /// The path it is bound to (an accepted socket has its listener's); abstract names start with `@`.
    pub path: Option<String>,
    /// The path of its peer.
    pub peer_path: Option<String>,
    /// Packets in its receive queue: connections to accept for a listener, datagrams for a datagram socket, written chunks
    /// for a stream.
    pub queued: u32,
    /// Listener: its backlog. Datagram socket: the most queued datagrams (net.unix.max_dgram_qlen).
    pub limit: u32,
    /// Identity of the packet at the head of the receive queue; 0 if there is none.
    pub head: u64,
    /// Memory of what it wrote and its peer has not read, and the limit, bytes.
    pub unread_by_peer: u32,
    pub sndbuf: u32,
    /// The same for the other direction: unread here, and the peer's limit.
    pub unread: u32,
    pub peer_sndbuf: u32,
}

/// An io_uring instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Identity of the instance during its lifetime.
    pub id: u64,
    pub tgid: u32,
    pub fd: u32,
    /// Entries submitted by the process and consumed by the kernel, modulo 2^32.
    pub sq_tail: u32,
    pub sq_head: u32,
    pub sq_entries: u32,
    /// Completions posted by the kernel and consumed by the process, modulo 2^32.
    pub cq_tail: u32,
    pub cq_head: u32,
    pub cq_entries: u32,
    /// Invalid submissions, and completions dropped for lack of room, since its creation.
    pub sq_dropped: u32,
    pub cq_overflow: u32,
}

/// The open files of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    pub tgid: u32,
    pub open: u32,
    /// RLIMIT_NOFILE, soft.
    pub limit: u64,
}

/// One end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    pub inode: u64,
    pub tgid: u32,
    pub fd: u32,
    pub reads: bool,
    pub writes: bool,
    /// Buffers filled and emptied since its creation, modulo 2^32.
    pub head: u32,
    pub tail: u32,
    /// Capacity in buffers.
    pub limit: u32,
    /// Bytes in it; `None` if too many buffers are in use to add them up.
    pub bytes: Option<u32>,
    /// Open read and write ends over all processes.
    pub readers: u32,
    pub writers: u32,
    /// A FIFO's path as seen by the process that holds it.
    pub path: Option<String>,
}

/// A thread of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    pub tgid: u32,
    pub tid: u32,
    /// Runnable, whether or not it has a CPU.
    pub runnable: bool,
    /// Running on a CPU.
    pub on_cpu: bool,
    /// Time spent runnable without a CPU, ns, since its start.
    pub run_delay_ns: u64,
    /// Times it was scheduled on a CPU since its start.
    pub dispatches: u64,
    /// CPU time since its start, ns.
    pub cpu_ns: u64,
}

/// The scheduler state of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Running on a CPU.
    Running,
    /// Waits for a CPU.
    Runnable,
    /// Interruptible sleep: waits for an event.
    Sleeping,
    /// In uninterruptible sleep, mostly waiting for a disk.
    Uninterruptible,
    /// Stopped by a signal or a debugger, or frozen.
    Stopped,
    /// Exiting.
    Dead,
}

/// What one thread of a target is doing or waiting for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    pub tgid: u32,
    pub tid: u32,
    /// Its thread id in its innermost pid namespace, which is the value in a lock's owner field.
    pub own_tid: u32,
    /// Its name (`comm`), with control characters escaped.
    pub comm: String,
    pub state: State,
    /// Waiting for a disk according to the kernel (`in_iowait`).
    pub io: bool,
    /// The system call that it is in, numbered as on this architecture, with its first arguments. `None` while it runs, or
    /// if this kernel does not report it.
    pub syscall: Option<Syscall>,
    /// Voluntary and involuntary context switches since its start.
    pub voluntary: u64,
    pub involuntary: u64,
    /// CPU time and time spent runnable without a CPU, ns, since its start.
    pub cpu_ns: u64,
    pub run_delay_ns: u64,
}

/// A system call that a thread is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Syscall {
    pub number: i32,
    pub args: [u64; 4],
    /// What its arguments point to, if that shows what the thread waits for.
    pub detail: Detail,
}

/// User memory that a system call's arguments point to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// Nothing was read.
    #[default]
    None,
    /// futex: the futex word and glibc's owner field of the mutex.
    Futex { word: u32, owner: u32 },
    /// poll: descriptor and events of the first entries.
    Poll(Vec<(i32, i16)>),
    /// A call on a file: its path, if it has one.
    File {
        path: String,
        device: Option<String>,
    },
}

/// Time that tasks stalled on a resource, ns since boot (pressure stall information, PSI).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// At least one task stalled; all tasks stalled.
    pub some_ns: u64,
    pub full_ns: u64,
}

/// A control group in which targets run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// As in `Target::cgroup`.
    pub path: String,
    /// CPU quota in thousandths of a CPU; `None` without a quota.
    pub quota_millicpus: Option<u64>,
    /// Throttled periods and throttled time (ns) since its creation.
    pub throttled_periods: Option<u64>,
    pub throttled_ns: Option<u64>,
    /// CPU time of all its processes, ns.
    pub cpu_ns: Option<u64>,
    /// Memory use and limit, bytes; `None` without a limit.
    pub memory: Option<u64>,
    /// The part of the memory that can be reclaimed at once (inactive page cache), bytes.
    pub reclaimable: Option<u64>,
    pub memory_limit: Option<u64>,
    /// Times that the limit was hit, and processes killed for that.
    pub limit_hits: Option<u64>,
    pub oom_kills: Option<u64>,
    pub cpu_stall: Option<Stall>,
    pub memory_stall: Option<Stall>,
    pub io_stall: Option<Stall>,
}

/// The whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpus: u32,
    /// CPU time since boot, ns: used, idle, and stolen by the hypervisor.
    pub busy_ns: u64,
    pub idle_ns: u64,
    pub steal_ns: u64,
    pub memory: u64,
    pub memory_available: u64,
    pub oom_kills: u64,
    pub cpu_stall: Option<Stall>,
    pub memory_stall: Option<Stall>,
    pub io_stall: Option<Stall>,
}

/// A process on the host, watched or not, that used CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUser {
    pub tgid: u32,
    pub name: String,
    pub cgroup: Option<String>,
    /// CPU time of its threads since the previous sample with the scan `cpu_users`, ns.
    pub cpu_ns: u64,
}

/// A process that listens on an address of this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Listening {
    pub netns: u32,
    pub address: SocketAddr,
    pub tgid: u32,
    pub name: String,
}

/// A process that holds an end of a pipe or a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holder {
    /// Inode of the pipe, or of the unix socket.
    pub inode: u64,
    pub tgid: u32,
    pub name: String,
    pub fd: u32,
    pub reads: bool,
    pub writes: bool,
}

/// A process at the other end of a target's connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    pub netns: u32,
    /// Addresses from this process's side: its `remote` is the target's `local`.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub tgid: u32,
    pub fd: u32,
    pub name: String,
}

/// A process title, which the process wrote over its command line (`postgres: bob shop [local] UPDATE waiting`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    pub tgid: u32,
    /// With control characters escaped, bounded in length.
    pub title: String,
}

/// Lines in a target's log that report a full queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub tgid: u32,
    /// Path of the log file.
    pub path: String,
    /// Name of the message in the table of known messages.
    pub name: String,
    pub count: u32,
    /// The first such line since the last sample, with control characters escaped, bounded in length.
    pub line: String,
    /// The line was written between these times (CLOCK_MONOTONIC, ns): absent at the first, present at the second.
    pub not_before_ns: u64,
    pub not_after_ns: u64,
}

/// Counters of one network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub netns: u32,
    /// `TcpPassiveOpens`: connections that entered an accept queue.
    pub passive_opens: u64,
    /// Listening sockets that no target holds; the counters include their connections.
    pub others: u32,
    /// `ListenOverflows`: handshakes rejected because an accept queue was full.
    pub listen_overflows: u64,
    /// `TCPReqQFullDrop`: SYNs dropped because too many handshakes were half open.
    pub syn_drops: u64,
    /// `SyncookiesSent`: handshakes answered with a SYN cookie, without kernel state.
    pub syn_cookies: u64,
}

/// Counters of the agent and its cost, since its start unless stated otherwise. Field names are JSON keys.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    pub samples: u64,
    pub records: u64,
    /// CPU time of the whole agent, ns.
    pub cpu_ns: u64,
    /// CPU usage over the last report interval, as a fraction of one core.
    pub cpu_share: f64,
    pub rss_bytes: u64,
    /// CPU time of the last file scan, ns.
    pub files_scan_ns: u64,
    /// Current interval of file scans, ns.
    pub files_interval_ns: u64,
    pub targets: u32,
    pub processes: u32,
    /// Base samples that began more than a whole interval late.
    pub late_samples: u64,
    /// Samples that could not be recorded.
    pub samples_not_recorded: u64,
    /// Spans passed to the exporter, delivered, and dropped (for lack of room, or refused by the collector).
    pub spans: u64,
    pub spans_delivered: u64,
    pub spans_dropped: u64,
}

/// A condition of the agent itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// A short name from a closed list, for programs.
    pub code: String,
    pub text: String,
}
