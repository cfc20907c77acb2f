//! What one visit to one kernel object yields.

#[cfg(feature = "user")]
use bytemuck::{Pod, Zeroable};

/// Connections waiting on one listener whose stamps one walk reports; a longer queue says so by `depth`.
pub const MAX_WAITING: u32 = 1024;
/// The bytes of a pipe that holds more buffers than one visit adds up.
pub const PIPE_BYTES_UNKNOWN: u32 = u32::MAX;

/// `PipeRecord::end`: the process can read from the pipe.
pub const PIPE_READ_END: u32 = 1;
/// `PipeRecord::end`: the process can write to the pipe.
pub const PIPE_WRITE_END: u32 = 2;

/// `TargetEntry::flags`: a queue of the process is suspicious, or it stands beside one that has such a queue; mark its
/// busy sockets, and look at what its threads wait for.
pub const TARGET_HOT: u32 = 1;

/// `Header::kind` of each record.
pub const KIND_SOCKET: u16 = 1;
/// See [`ListenerRecord`].
pub const KIND_LISTENER: u16 = 2;
/// See [`PipeRecord`].
pub const KIND_PIPE: u16 = 3;
/// See [`ThreadRecord`].
pub const KIND_THREAD: u16 = 4;
/// See [`ProcessRecord`].
pub const KIND_PROCESS: u16 = 5;
/// See [`UdpRecord`].
pub const KIND_UDP: u16 = 6;
/// See [`UnixRecord`].
pub const KIND_UNIX: u16 = 7;
/// See [`RingRecord`].
pub const KIND_RING: u16 = 8;
/// See [`WaitRecord`].
pub const KIND_WAIT: u16 = 9;
/// See [`CpuRecord`].
pub const KIND_CPU: u16 = 10;
/// See [`HolderRecord`].
pub const KIND_HOLDER: u16 = 11;
/// See [`OperationsRecord`].
pub const KIND_OPERATIONS: u16 = 12;
/// See [`PeerRecord`].
pub const KIND_PEER: u16 = 13;

/// `ListenerRecord::half_open` and `UdpRecord::queued`: the kernel does not say.
pub const UNKNOWN: u32 = u32::MAX;
/// `WaitRecord::syscall`: the thread is in none, or the kernel does not say.
pub const NO_SYSCALL: i32 = -1;
/// Descriptors of one poll(2) that a `WaitRecord` holds.
pub const MAX_POLLED: usize = 8;
/// Longest path in a unix address, `UNIX_PATH_MAX` of include/uapi/linux/un.h.
pub const UNIX_PATH: usize = 108;

/// `WaitRecord::flags`: it has a CPU.
pub const WAIT_ON_CPU: u32 = 1;
/// `WaitRecord::flags`: it counts as waiting for I/O (`in_iowait`).
pub const WAIT_IO: u32 = 2;
/// `WaitRecord::flags`: `word` and `owner` were read.
pub const WAIT_WORD: u32 = 4;

/// `HolderRecord::end`: not a pipe but a unix socket.
pub const HOLDER_SOCKET: u32 = 4;

/// Connections that the map `WANTED` can ask for at once.
pub const MAX_WANTED: usize = 4096;

/// The key in the map `WANTED` of a connection, by the ports that its holder sees.
pub const fn wanted_key(local_port: u16, remote_port: u16) -> u32 {
    (local_port as u32) << 16 | remote_port as u32
}

macro_rules! records {
    ($($(#[$meta:meta])* pub struct $name:ident : $size:literal {
        $($(#[$field_meta:meta])* pub $field:ident : $ty:ty,)*
    })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(Pod, Zeroable))]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size, "padding or a changed field");
    )*};
}

records! {
    /// Every record begins with this.
    pub struct Header: 8 {
        /// One of the `KIND_` constants.
        pub kind: u16,
        /// Bytes of the whole record, this header and any trailing array included.
        pub len: u16,
        /// The process (thread group) as the initial pid namespace numbers it.
        pub tgid: u32,
    }

    /// A TCP connection, as one open file of one process shows it.
    ///
    /// Buffer memory and drops are read only where data waits in that direction, and are 0 otherwise:
    /// they live on cache lines of their own, and an empty queue has no use for them.
    pub struct SocketRecord: 128 {
        pub header: Header,
        /// The kernel's own socket cookie: never reused while the machine runs.
        pub cookie: u64,
        pub fd: u32,
        /// `TCP_ESTABLISHED` …, include/net/tcp_states.h.
        pub state: u8,
        /// `AF_INET` or `AF_INET6`.
        pub family: u8,
        pub local_port: u16,
        pub remote_port: u16,
        pub reserved: u16,
        /// Inode number of the network namespace.
        pub netns: u32,
        pub rcv_nxt: u32,
        pub copied_seq: u32,
        pub write_seq: u32,
        pub snd_una: u32,
        pub snd_nxt: u32,
        /// Window that the peer offers, bytes.
        pub snd_wnd: u32,
        pub rmem_alloc: u32,
        pub rcvbuf: u32,
        pub wmem_queued: u32,
        pub sndbuf: u32,
        pub drops: u32,
        /// Sequence number of the segment that last advanced our acknowledgement or window.
        pub snd_wl1: u32,
        /// Timer ticks (jiffies) since data was received, since data was sent, since anything was received.
        pub since_received: u32,
        pub since_sent: u32,
        pub since_heard: u32,
        /// Segments with data, modulo 2^16: received in the lower half, sent in the upper one.
        pub segments: u32,
        /// IPv4 addresses stand in the first four bytes.
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// A listening TCP socket. `waiting` stamps (u64, oldest first) follow it: the local port in the upper
    /// 16 bits, below them CLOCK_MONOTONIC in µs when the handshake was complete (0: the kernel does not say).
    pub struct ListenerRecord: 72 {
        pub header: Header,
        pub cookie: u64,
        /// CLOCK_MONOTONIC at this visit.
        pub now_ns: u64,
        pub fd: u32,
        /// Connections complete and not accepted.
        pub depth: u32,
        /// The backlog; the kernel refuses when `depth > limit`.
        pub limit: u32,
        /// Handshakes and requests dropped by this listener since it was made.
        pub drops: u32,
        pub netns: u32,
        /// Stamps that follow: at most [`MAX_WAITING`].
        pub waiting: u32,
        pub port: u16,
        pub family: u8,
        pub reserved: u8,
        /// Handshakes under way, or [`UNKNOWN`].
        pub half_open: u32,
        pub local: [u8; 16],
    }

    /// A UDP socket.
    pub struct UdpRecord: 88 {
        pub header: Header,
        pub cookie: u64,
        /// The datagram at the head of the queue; 0: none.
        pub head: u64,
        pub fd: u32,
        pub netns: u32,
        /// Memory of what is not read, and its limit, bytes.
        pub memory: u32,
        pub rcvbuf: u32,
        pub drops: u32,
        /// Datagrams not read, or [`UNKNOWN`].
        pub queued: u32,
        pub local_port: u16,
        pub remote_port: u16,
        pub family: u8,
        pub reserved: [u8; 3],
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// A unix socket. Of a path, the bytes after `sun_family`; its length as the kernel keeps it, the family included.
    pub struct UnixRecord: 288 {
        pub header: Header,
        pub inode: u64,
        /// Inode of the socket at the other end; 0: none.
        pub peer: u64,
        /// The packet at the head of the receive queue; 0: none.
        pub head: u64,
        pub fd: u32,
        pub netns: u32,
        /// `SOCK_STREAM` 1, `SOCK_DGRAM` 2, `SOCK_SEQPACKET` 5.
        pub style: u16,
        pub state: u8,
        pub reserved: u8,
        pub queued: u32,
        pub limit: u32,
        /// Memory of what this socket wrote and nobody has read, and its limit, bytes.
        pub written: u32,
        pub sndbuf: u32,
        /// The same of its peer.
        pub peer_written: u32,
        pub peer_sndbuf: u32,
        pub path_len: u16,
        pub peer_path_len: u16,
        pub path: [u8; UNIX_PATH],
        pub peer_path: [u8; UNIX_PATH],
    }

    /// An io_uring instance.
    pub struct RingRecord: 64 {
        pub header: Header,
        pub id: u64,
        pub fd: u32,
        pub sq_head: u32,
        pub sq_tail: u32,
        pub sq_entries: u32,
        pub cq_head: u32,
        pub cq_tail: u32,
        pub cq_entries: u32,
        pub sq_dropped: u32,
        pub cq_overflow: u32,
        pub reserved: [u32; 3],
    }

    /// One end of a pipe or FIFO.
    pub struct PipeRecord: 56 {
        pub header: Header,
        pub inode: u64,
        pub fd: u32,
        /// [`PIPE_READ_END`], [`PIPE_WRITE_END`], or both.
        pub end: u32,
        /// Buffers ever filled and ever emptied, modulo 2^32; the difference is the depth.
        pub head: u32,
        pub tail: u32,
        /// Buffers it may hold.
        pub limit: u32,
        /// Bytes in it, or [`PIPE_BYTES_UNKNOWN`].
        pub bytes: u32,
        pub readers: u32,
        pub writers: u32,
        pub reserved: u64,
    }

    /// A thread of a target.
    pub struct ThreadRecord: 48 {
        pub header: Header,
        pub tid: u32,
        /// `task_struct.__state`: 0 is runnable.
        pub state: u32,
        /// 1 while it runs on a CPU.
        pub on_cpu: u32,
        pub reserved: u32,
        /// Time spent runnable and waiting for a CPU, ns.
        pub run_delay_ns: u64,
        /// Times it was put on a CPU.
        pub dispatches: u64,
        /// CPU time, ns.
        pub cpu_ns: u64,
    }

    /// What a thread of a target is doing or waiting for.
    pub struct WaitRecord: 184 {
        pub header: Header,
        pub tid: u32,
        /// Its number in its innermost pid namespace.
        pub own_tid: u32,
        pub state: u32,
        /// `WAIT_` flags.
        pub flags: u32,
        pub voluntary: u64,
        pub involuntary: u64,
        pub cpu_ns: u64,
        pub run_delay_ns: u64,
        pub args: [u64; 4],
        /// The system call it sleeps in, or [`NO_SYSCALL`].
        pub syscall: i32,
        /// Of a futex: the word, and the one 8 bytes behind it, where glibc keeps a mutex's owner.
        pub word: u32,
        pub owner: u32,
        /// Of a poll: entries of `polled` that were read.
        pub polled_len: u32,
        /// `struct pollfd`: descriptor, and requested and returned events.
        pub polled: [[u32; 2]; MAX_POLLED],
        pub comm: [u8; 16],
    }

    /// CPU time of one thread of the machine, watched or not.
    pub struct CpuRecord: 24 {
        pub header: Header,
        pub tid: u32,
        pub reserved: u32,
        pub cpu_ns: u64,
    }

    /// Who holds an end of a pipe, or a unix socket.
    pub struct HolderRecord: 24 {
        pub header: Header,
        pub inode: u64,
        pub fd: u32,
        /// `PIPE_` ends, or [`HOLDER_SOCKET`].
        pub end: u32,
    }

    /// Who holds a connection whose ports the agent asked for in the map `WANTED`: perhaps the other end of a target's.
    pub struct PeerRecord: 64 {
        pub header: Header,
        pub cookie: u64,
        pub fd: u32,
        pub netns: u32,
        pub local_port: u16,
        pub remote_port: u16,
        pub family: u8,
        pub reserved: [u8; 3],
        /// IPv4 addresses stand in the first four bytes.
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// Which operations an open file of the agent itself has: how a kind of file is told from others.
    pub struct OperationsRecord: 24 {
        pub header: Header,
        pub fd: u32,
        pub reserved: u32,
        pub operations: u64,
    }

    /// A process of the machine (or of the reader's pid namespace).
    pub struct ProcessRecord: 56 {
        pub header: Header,
        /// The pid as the agent's own /proc shows it.
        pub pid: u32,
        /// Parent process, numbered as `header.tgid`.
        pub parent: u32,
        /// CLOCK_BOOTTIME at its start: with the pid it names the process for good.
        pub start_ns: u64,
        /// Grows with each execve.
        pub exec_id: u64,
        /// 1 for a kernel thread.
        pub kernel: u32,
        pub reserved: u32,
        pub comm: [u8; 16],
    }

    /// A watched process, in the map `TARGETS` under its tgid.
    pub struct TargetEntry: 32 {
        /// CLOCK_BOOTTIME at its start: another process that was given the same pid is not it.
        pub start_ns: u64,
        /// `TARGET_` flags.
        pub flags: u32,
        /// Counted by the walk over files of this number: files open, and RLIMIT_NOFILE (0: unknown).
        pub walk: u32,
        pub limit: u64,
        pub open: u32,
        pub reserved: u32,
    }

    /// Settings of one walk, and where it is, in the one-entry map `WALK`.
    pub struct Walk: 72 {
        /// Busy sockets of hot targets that this walk may still mark.
        pub marks_left: u32,
        /// Its number.
        pub walk: u32,
        /// How long a mark on a busy socket lasts, ns.
        pub mark_ttl_ns: u64,
        /// The operations of io_uring files; 0: not known.
        pub ring_operations: u64,
        /// The operations of sockets' files; 0: not known.
        pub socket_operations: u64,
        /// The agent's own tgid in the initial pid namespace; 0: not known.
        pub own_tgid: u32,
        /// The process of the last visit; 0: none. What follows is of it.
        pub tgid: u32,
        /// 1 where it is watched.
        pub is_watched: u32,
        /// `TARGET_` flags.
        pub flags: u32,
        /// RLIMIT_NOFILE; 0: unknown.
        pub limit: u64,
        /// Files counted, and the descriptor from which on they are not counted yet.
        pub open: u32,
        pub next_fd: u32,
        /// 1: what threads wait for is told of hot targets alone.
        pub only_hot: u32,
        /// Entries of the map `WANTED`: with none, no connection is asked for.
        pub wanted: u32,
    }

    /// Socket-local storage of the sockets that are looked at on every tick.
    pub struct Mark: 16 {
        pub tgid: u32,
        pub fd: u32,
        /// CLOCK_MONOTONIC when the mark of a busy socket lapses; 0 for a listener: it stays.
        pub expires_ns: u64,
    }
}
