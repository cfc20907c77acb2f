//! One look at all queues of all targets, as plain data.
//!
//! Everything after this module is a pure function of a stream of samples: time comes with the sample, and
//! nothing else from the world. A recording of the stream replays to the same output, byte for byte.
#![forbid(unsafe_code)]

pub mod anonymize;
pub mod cut;
pub mod file;
pub mod texts;

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
    /// UDP sockets seen, once each.
    pub datagrams: Vec<DatagramSocket>,
    /// Unix sockets seen, once each.
    pub unix: Vec<UnixSocket>,
    /// io_uring instances seen, once each.
    pub rings: Vec<Ring>,
    /// Open files of each process.
    pub files: Vec<Files>,
    /// Threads of the targets that were walked.
    pub threads: Vec<Thread>,
    /// What threads of the targets are doing or waiting for; in samples with the walk `waits`.
    pub waits: Vec<Wait>,
    /// Counters of the network namespaces in which targets listen.
    pub networks: Vec<Network>,
    /// Control groups that hold targets; in samples with the walk `system`.
    pub cgroups: Vec<Cgroup>,
    /// The machine; in samples with the walk `system`.
    pub machine: Option<Machine>,
    /// CPU time of the machine's processes; in samples with the walk `cpu_users`.
    pub cpu_users: Vec<CpuUser>,
    /// Who listens where on this machine, watched or not: present whenever that changes.
    pub listening: Option<Vec<Listening>>,
    /// Who holds the other ends of the targets' pipes and unix sockets, watched or not: present whenever that changes.
    pub holders: Option<Vec<Holder>>,
    /// What threads of suspicious targets, and of those around them, are doing or waiting for; in samples with the walk
    /// `profile`.
    pub profile: Vec<Wait>,
    /// Who holds the other ends of the connections of suspicious targets on this machine, watched or not: present
    /// whenever that was looked for.
    pub peers: Option<Vec<Peer>>,
    /// What the processes of suspicious targets, and of those around them, say of themselves; of each process the
    /// first time, and whenever it changes.
    pub titles: Vec<Title>,
    /// What targets wrote to their logs of full queues since the last sample.
    pub messages: Vec<Message>,
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
    /// All listeners, and the busy connections of focused targets.
    pub focused_sockets: bool,
    /// All threads of all targets.
    pub threads: bool,
    /// What each thread of each target waits for.
    pub waits: bool,
    /// Control groups and the machine.
    pub system: bool,
    /// CPU time of all processes.
    pub cpu_users: bool,
    /// What each thread of each suspicious target waits for, and of those around it.
    pub profile: bool,
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
    /// Not asked for: watched while a target that is waits for it.
    pub followed: bool,
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
    /// Handshakes under way (`reqsk_queue_len`), where the kernel says.
    pub half_open: Option<u32>,
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
    /// Sequence number of the segment that last advanced our acknowledgement or window.
    pub snd_wl1: u32,
    /// Since data was last received, and last sent, ns; the kernel's resolution is its timer tick. 0 where the kernel
    /// does not say.
    pub since_received_ns: u64,
    pub since_sent_ns: u64,
    /// Since anything at all was last received, a bare acknowledgement too, ns.
    pub since_heard_ns: u64,
    /// Segments with data, modulo 2^16: received in the lower half, sent in the upper one; 0 where the kernel does not say.
    /// No verdict rests on them, and recordings go without.
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
    /// Memory of what is not read, and its limit, bytes.
    pub memory: u32,
    pub rcvbuf: u32,
    /// Datagrams not read; `None` where the kernel does not say.
    pub queued: Option<u32>,
    /// Datagrams dropped since it was made.
    pub drops: u32,
    /// Names the datagram at the head of the queue; another one has another name. 0: none.
    pub head: u64,
}

/// What a unix socket carries.
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
    /// Inode of the socket at the other end, where there is one and the kernel says.
    pub peer: Option<u64>,
    pub tgid: u32,
    pub fd: u32,
    pub netns: u32,
    pub style: UnixStyle,
    pub listening: bool,
    /// The path it is bound to (an accepted socket has its listener's); abstract names begin with `@`.
    pub path: Option<String>,
    /// The path that its peer is bound to.
    pub peer_path: Option<String>,
    /// Packets in its receive queue: for a listener the connections that wait to be accepted, for datagrams the
    /// datagrams, for a stream the pieces that were written.
    pub queued: u32,
    /// Listener: its backlog. Datagrams: how many may wait (net.unix.max_dgram_qlen).
    pub limit: u32,
    /// Names the packet at the head of the receive queue; another one has another name. 0: none.
    pub head: u64,
    /// Bytes that it wrote and nobody has read, as memory, and the most that is allowed.
    pub unread_by_peer: u32,
    pub sndbuf: u32,
    /// The same of its peer: what waits here, of what may wait.
    pub unread: u32,
    pub peer_sndbuf: u32,
}

/// An io_uring instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Names the instance for as long as it lives.
    pub id: u64,
    pub tgid: u32,
    pub fd: u32,
    /// Entries ever submitted and ever taken by the kernel, modulo 2^32.
    pub sq_tail: u32,
    pub sq_head: u32,
    pub sq_entries: u32,
    /// Completions ever made and ever taken by the process, modulo 2^32.
    pub cq_tail: u32,
    pub cq_head: u32,
    pub cq_entries: u32,
    /// Invalid submissions, and completions for which there was no room, since it was made.
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
    /// A FIFO's path, as the process that holds it sees it.
    pub path: Option<String>,
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

/// What a thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Has a CPU.
    Running,
    /// Wants one.
    Runnable,
    /// Waits for an event.
    Sleeping,
    /// Waits for something that cannot be interrupted: mostly a disk.
    Uninterruptible,
    /// Stopped by a signal or a debugger, or frozen.
    Stopped,
    /// Ending.
    Dead,
}

/// What one thread of a target is doing or waiting for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    pub tgid: u32,
    pub tid: u32,
    /// Its own number as the process itself sees it (its innermost pid namespace): what a lock's owner field holds.
    pub own_tid: u32,
    /// Its name, with control characters escaped.
    pub comm: String,
    pub state: State,
    /// Counts as waiting for a disk (`in_iowait`).
    pub io: bool,
    /// The system call that it is in, by the number of the machine's architecture, and its first arguments; `None`
    /// while it runs, or where the kernel does not say.
    pub syscall: Option<Syscall>,
    /// Voluntary and involuntary context switches since it began.
    pub voluntary: u64,
    pub involuntary: u64,
    /// CPU time and time spent waiting for a CPU, ns, since it began.
    pub cpu_ns: u64,
    pub run_delay_ns: u64,
}

/// A system call that a thread is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Syscall {
    pub number: i32,
    pub args: [u64; 4],
    /// What its arguments point to, where that tells what it waits for.
    pub detail: Detail,
}

/// What stands in user memory behind a system call's arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// Nothing was read.
    #[default]
    None,
    /// futex: the word, and what glibc keeps as the owner of a mutex beside it.
    Futex { word: u32, owner: u32 },
    /// poll: descriptor and events of the first entries.
    Poll(Vec<(i32, i16)>),
    /// A call on one file: its path, where it has one.
    File {
        path: String,
        device: Option<String>,
    },
}

/// Time that tasks stalled for want of a resource, ns since boot (pressure stall information).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    /// Some tasks stalled; all stalled.
    pub some_ns: u64,
    pub full_ns: u64,
}

/// A control group in which targets run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// As `Target::cgroup` names it.
    pub path: String,
    /// CPUs that its quota allows, in thousandths; `None` without a quota.
    pub quota_millicpus: Option<u64>,
    /// Periods in which it was throttled, and for how long, ns, since it was made.
    pub throttled_periods: Option<u64>,
    pub throttled_ns: Option<u64>,
    /// CPU time of all its processes, ns.
    pub cpu_ns: Option<u64>,
    /// Memory and its limit, bytes; no limit is `None`.
    pub memory: Option<u64>,
    /// Of the memory, what can be dropped at once (inactive page cache), bytes.
    pub reclaimable: Option<u64>,
    pub memory_limit: Option<u64>,
    /// Times that the limit was hit, and processes killed for it.
    pub limit_hits: Option<u64>,
    pub oom_kills: Option<u64>,
    pub cpu_stall: Option<Stall>,
    pub memory_stall: Option<Stall>,
    pub io_stall: Option<Stall>,
}

/// The machine as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpus: u32,
    /// Since boot, ns: CPU time used, idle, and taken by the hypervisor.
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

/// A process of the machine, watched or not, that used CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUser {
    pub tgid: u32,
    pub name: String,
    pub cgroup: Option<String>,
    /// CPU time of its threads since the previous sample with the walk `cpu_users`, ns.
    pub cpu_ns: u64,
}

/// A process that listens on an address of this machine.
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

/// A process that holds one end of a connection of which a target holds the other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    pub netns: u32,
    /// As this process sees them: its `remote` is the target's `local`.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub tgid: u32,
    pub fd: u32,
    pub name: String,
}

/// What a process has put in the place of its command line (`postgres: bob shop [local] UPDATE waiting`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    pub tgid: u32,
    /// With control characters escaped, bounded.
    pub title: String,
}

/// Lines in a target's log that tell of a full queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub tgid: u32,
    /// The file.
    pub path: String,
    /// Which of the known messages it is, by its name in the table.
    pub name: String,
    pub count: u32,
    /// The first such line since the last look, with control characters escaped, bounded.
    pub line: String,
    /// CLOCK_MONOTONIC between which that line was written, ns: it was not there at the one, and was at the other.
    pub not_before_ns: u64,
    pub not_after_ns: u64,
}

/// Counters of one network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub netns: u32,
    /// `TcpPassiveOpens`: connections that ever entered an accept queue.
    pub passive_opens: u64,
    /// Listening sockets in it that no target holds: what they take is in the counters, too.
    pub others: u32,
    /// `ListenOverflows`: handshakes refused because an accept queue was full.
    pub listen_overflows: u64,
    /// `TCPReqQFullDrop`: SYNs dropped because too many handshakes were under way.
    pub syn_drops: u64,
    /// `SyncookiesSent`: handshakes that were answered without being remembered.
    pub syn_cookies: u64,
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
    pub files_scan_ns: u64,
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
