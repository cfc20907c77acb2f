//! The records that the eBPF programs write, one per kernel object visited, and the map entries that they share with the agent.

#[cfg(feature = "user")]
use bytemuck::{Pod, Zeroable};

/// Maximum number of timestamps reported per listener and scan; a longer accept queue shows only in `depth`. Bounds the
/// loop and the size of a record (72 bytes + 8 KiB).
pub const MAX_WAITING: u32 = 1024;
/// `PipeRecord::bytes`: the pipe holds more buffers than one visit sums up.
pub const PIPE_BYTES_UNKNOWN: u32 = u32::MAX;

/// `PipeRecord::end`: the process can read from the pipe.
pub const PIPE_READ_END: u32 = 1;
/// `PipeRecord::end`: the process can write to the pipe.
pub const PIPE_WRITE_END: u32 = 2;

/// `TargetEntry::flags`: the process is focused (it has an unhealthy queue, or is a neighbour of one that has). Its busy
/// sockets are polled on every sample, and its threads are profiled.
pub const TARGET_FOCUSED: u32 = 1;

/// Value of `Header::kind`, like all constants down to [`KIND_CGROUP`]. See [`SocketRecord`].
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
/// See [`EpollRecord`].
pub const KIND_EPOLL: u16 = 14;

/// See [`CgroupRecord`].
pub const KIND_CGROUP: u16 = 15;

/// Maximum number of levels reported of a process's control groups in one hierarchy: its own and its parents.
pub const MAX_CGROUP_LEVELS: u32 = 16;
/// Longest name of a control group that is reported, with the terminating zero; those of container runtimes have up to 90 bytes.
pub const CGROUP_NAME: usize = 128;

/// `CgroupRecord::controller`. Values of a record: quota and period, ns; throttled periods; throttled time, ns.
pub const CONTROLLER_CPU: u32 = 0;
/// Values: pages in use; `max` and `high` limit, pages; times that `max` was hit, as counted by cgroup v1; events `high`, `max`
/// and `oom_kill`.
pub const CONTROLLER_MEMORY: u32 = 1;
/// No values: the groups that limits on I/O belong to.
pub const CONTROLLER_IO: u32 = 2;
/// No controller: the group in the unified hierarchy. Values: stall time, ns, in the order of `enum psi_states`: some and
/// full for I/O, memory and CPU. 0 if the kernel does not count it.
pub const CONTROLLER_NONE: u32 = 3;

/// `ListenerRecord::half_open` and `UdpRecord::queued`: this kernel does not have the field.
pub const UNKNOWN: u32 = u32::MAX;
/// `WaitRecord::syscall`: the thread is not in a system call, or the number could not be read.
pub const NO_SYSCALL: i32 = -1;
/// Entries of a poll(2) array that a `WaitRecord` holds.
pub const MAX_POLLED: usize = 8;
/// Longest path in a unix address, `UNIX_PATH_MAX` of include/uapi/linux/un.h.
pub const UNIX_PATH: usize = 108;

/// `WaitRecord::flags`: the thread is running on a CPU.
pub const WAIT_ON_CPU: u32 = 1;
/// `WaitRecord::flags`: the thread is in I/O wait (`in_iowait`).
pub const WAIT_IO: u32 = 2;
/// `WaitRecord::flags`: `word` and `owner` were read.
pub const WAIT_WORD: u32 = 4;

/// Number of bases of the direct map of physical memory that one scan tries ([`Scan::candidate`]). Few, because the
/// verifier checks each round of the loop when the program is loaded: with 64 that took 0.74 s of CPU time, most of the
/// agent's start. The price is more scans: about 128 on a machine with 1 TiB, if the base is found last.
pub const PAGE_OFFSET_CANDIDATES: u64 = 8;

/// Ready files of one epoll instance that a visit counts. Bounds the walk along its list.
pub const MAX_READY_FILES: u32 = 1024;
/// `EpollRecord::flags`: there are more ready files than were counted.
pub const EPOLL_MORE: u32 = 1;

/// `HolderRecord::end`: a unix socket, not a pipe.
pub const HOLDER_SOCKET: u32 = 4;

/// Capacity of the map `PEER_PORTS`: connections whose holders can be requested at once.
pub const MAX_REQUESTED_PEERS: usize = 4096;

/// Key of a connection in the map `PEER_PORTS`: its ports as its holder sees them.
pub const fn peer_key(local_port: u16, remote_port: u16) -> u32 {
    (local_port as u32) << 16 | remote_port as u32
}

/// Lines per second that the programs write with `--log-bpf`. At up to 512 bytes a line, a second's worth fits into less than
/// half of the 128 KiB ring buffer of aya-log.
pub const LOG_LINES_PER_SECOND: u64 = 100;

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
    /// The start of every record.
    pub struct Header: 8 {
        /// One of the `KIND_` constants.
        pub kind: u16,
        /// Bytes of the whole record, this header and any trailing array included.
        pub len: u16,
        /// Process (thread group) id in the initial pid namespace.
        pub tgid: u32,
    }

    /// A TCP connection, seen through one open file of one process.
    ///
    /// Buffer memory and drops are read only if data is queued in that direction, and are 0 otherwise: they live on
    /// separate cache lines, and an empty queue does not need them.
    pub struct SocketRecord: 128 {
        pub header: Header,
        /// Socket cookie: unique until reboot.
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
        /// Window advertised by the peer, bytes.
        pub snd_wnd: u32,
        pub rmem_alloc: u32,
        pub rcvbuf: u32,
        pub wmem_queued: u32,
        pub sndbuf: u32,
        pub drops: u32,
        /// Sequence number of the peer's segment with which the kernel last updated our send window.
        pub snd_wl1: u32,
        /// Jiffies since data was received, since data was sent, since any segment was received.
        pub since_received: u32,
        pub since_sent: u32,
        pub since_any_segment: u32,
        /// Data segments received (lower 16 bits) and sent (upper 16 bits), each modulo 2^16.
        pub segments: u32,
        /// An IPv4 address occupies the first four bytes.
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// A listening TCP socket, followed by `waiting` timestamps (u64, oldest first). A timestamp holds the local port in its
    /// upper 16 bits and, below, CLOCK_MONOTONIC in µs when the handshake completed (0: unknown).
    pub struct ListenerRecord: 72 {
        pub header: Header,
        pub cookie: u64,
        /// CLOCK_MONOTONIC at the time of the visit.
        pub now_ns: u64,
        pub fd: u32,
        /// Established connections that are not accepted yet.
        pub depth: u32,
        /// The backlog; the kernel rejects new connections while `depth > limit`.
        pub limit: u32,
        /// Handshakes and requests dropped since the listener was created.
        pub drops: u32,
        pub netns: u32,
        /// Number of timestamps that follow, at most [`MAX_WAITING`].
        pub waiting: u32,
        pub port: u16,
        pub family: u8,
        pub reserved: u8,
        /// Half-open connections (handshakes in progress), or [`UNKNOWN`].
        pub half_open: u32,
        pub local: [u8; 16],
    }

    /// A UDP socket.
    pub struct UdpRecord: 88 {
        pub header: Header,
        pub cookie: u64,
        /// Fingerprint of the datagram at the head of the receive queue; 0: empty.
        pub head: u64,
        pub fd: u32,
        pub netns: u32,
        /// Receive memory in use, and its limit, bytes.
        pub memory: u32,
        pub rcvbuf: u32,
        pub drops: u32,
        /// Unread datagrams, or [`UNKNOWN`].
        pub queued: u32,
        pub local_port: u16,
        pub remote_port: u16,
        pub family: u8,
        pub reserved: [u8; 3],
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// A unix socket. `path` excludes `sun_family`; `path_len` includes it, as in the kernel.
    pub struct UnixRecord: 288 {
        pub header: Header,
        pub inode: u64,
        /// Inode of the peer socket; 0: none.
        pub peer: u64,
        /// Fingerprint of the packet at the head of the receive queue; 0: empty.
        pub head: u64,
        pub fd: u32,
        pub netns: u32,
        /// `SOCK_STREAM` 1, `SOCK_DGRAM` 2, `SOCK_SEQPACKET` 5.
        pub style: u16,
        pub state: u8,
        pub reserved: u8,
        pub queued: u32,
        pub limit: u32,
        /// Memory of data that this socket wrote and its peer has not read, and the limit, bytes.
        pub written: u32,
        pub sndbuf: u32,
        /// The same for the peer.
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

    /// An epoll instance.
    pub struct EpollRecord: 24 {
        pub header: Header,
        pub fd: u32,
        /// Files that have something to read and that no thread has taken.
        pub ready: u32,
        /// `EPOLL_` flags.
        pub flags: u32,
        pub reserved: u32,
    }

    /// One end of a pipe or FIFO.
    pub struct PipeRecord: 56 {
        pub header: Header,
        pub inode: u64,
        pub fd: u32,
        /// [`PIPE_READ_END`], [`PIPE_WRITE_END`], or both.
        pub end: u32,
        /// Buffers filled and emptied since the pipe was created, modulo 2^32; the difference is the depth.
        pub head: u32,
        pub tail: u32,
        /// Maximum number of buffers.
        pub limit: u32,
        /// Bytes in the pipe, or [`PIPE_BYTES_UNKNOWN`].
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
        /// 1 if it is running on a CPU.
        pub on_cpu: u32,
        pub reserved: u32,
        /// Total time spent runnable but waiting for a CPU (`sched_info.run_delay`), ns.
        pub run_delay_ns: u64,
        /// Times it was scheduled on a CPU (`sched_info.pcount`).
        pub dispatches: u64,
        /// CPU time, ns.
        pub cpu_ns: u64,
    }

    /// What a thread of a target is doing or blocked on.
    pub struct WaitRecord: 184 {
        pub header: Header,
        pub tid: u32,
        /// Thread id in its innermost pid namespace.
        pub own_tid: u32,
        pub state: u32,
        /// `WAIT_` flags.
        pub flags: u32,
        /// Voluntary and involuntary context switches since its start.
        pub voluntary: u64,
        pub involuntary: u64,
        pub cpu_ns: u64,
        pub run_delay_ns: u64,
        /// The first arguments of the system call. For a thread that is not asleep, the first is its instruction pointer when it
        /// last left user mode; 0 if unknown.
        pub args: [u64; 4],
        /// Number of the system call that it sleeps in, or [`NO_SYSCALL`].
        pub syscall: i32,
        /// In a futex call: the futex word, and the word 8 bytes after it, where glibc keeps the owner of a mutex.
        pub word: u32,
        pub owner: u32,
        /// In a poll call: number of valid entries in `polled`.
        pub polled_len: u32,
        /// `struct pollfd`: descriptor, then requested and returned events.
        pub polled: [[u32; 2]; MAX_POLLED],
        pub comm: [u8; 16],
    }

    /// CPU time of one thread on this host, watched or not.
    pub struct CpuRecord: 24 {
        pub header: Header,
        pub tid: u32,
        pub reserved: u32,
        pub cpu_ns: u64,
    }

    /// A process that holds an end of a pipe, or a unix socket.
    pub struct HolderRecord: 24 {
        pub header: Header,
        pub inode: u64,
        pub fd: u32,
        /// A combination of the `PIPE_` ends, or [`HOLDER_SOCKET`].
        pub end: u32,
    }

    /// A process that holds a connection whose ports are in the map `PEER_PORTS`: possibly the other end of a target's
    /// connection.
    pub struct PeerRecord: 64 {
        pub header: Header,
        pub cookie: u64,
        pub fd: u32,
        pub netns: u32,
        pub local_port: u16,
        pub remote_port: u16,
        pub family: u8,
        pub reserved: [u8; 3],
        /// An IPv4 address occupies the first four bytes.
        pub local: [u8; 16],
        pub remote: [u8; 16],
    }

    /// A control group of a target's process, or one of its parents.
    pub struct CgroupRecord: 216 {
        pub header: Header,
        /// The id of the group in its hierarchy: the inode number of its directory.
        pub id: u64,
        /// One of the `CONTROLLER_` constants.
        pub controller: u32,
        /// 0 for the process's own group, 1 for its parent, …
        pub level: u32,
        /// The hierarchy, as in the first column of /proc/PID/cgroup; 0 is the unified one (cgroup v2).
        pub hierarchy: u32,
        /// 1 if `values` were read.
        pub has_values: u32,
        pub values: [u64; 7],
        /// The name of its directory, empty for the root.
        pub name: [u8; CGROUP_NAME],
    }

    /// The `struct file_operations` of an open file of the agent: its address identifies the file type.
    pub struct OperationsRecord: 24 {
        pub header: Header,
        pub fd: u32,
        pub reserved: u32,
        pub operations: u64,
    }

    /// A process visible in the agent's pid namespace.
    pub struct ProcessRecord: 56 {
        pub header: Header,
        /// The pid in the agent's pid namespace, as its /proc shows it.
        pub pid: u32,
        /// Parent process, in the initial pid namespace.
        pub parent: u32,
        /// CLOCK_BOOTTIME at its start; with the pid it identifies the process until reboot.
        pub start_ns: u64,
        /// `self_exec_id`: incremented by each execve.
        pub exec_id: u64,
        /// 1 for a kernel thread.
        pub kernel: u32,
        pub reserved: u32,
        pub comm: [u8; 16],
    }

    /// A watched process, in the map `TARGETS`, keyed by its tgid.
    pub struct TargetEntry: 32 {
        /// CLOCK_BOOTTIME at its start: distinguishes it from a later process with the same pid.
        pub start_ns: u64,
        /// `TARGET_` flags.
        pub flags: u32,
        /// Number of the scan ([`Scan::number`]) that wrote `open` and `limit`.
        pub scan: u32,
        /// RLIMIT_NOFILE, soft; 0: unknown.
        pub limit: u64,
        /// Open files.
        pub open: u32,
        pub reserved: u32,
    }

    /// Settings and progress of the current scan: the single entry of the map `SCAN`.
    pub struct Scan: 168 {
        /// Busy sockets of focused targets that this scan may still add to `FOCUSED_SOCKETS`.
        pub focus_slots_left: u32,
        /// Sequence number of the file scan.
        pub number: u32,
        /// How long a busy socket stays in `FOCUSED_SOCKETS`, ns.
        pub focus_ttl_ns: u64,
        /// Address of the `file_operations` of io_uring files; 0: unknown.
        pub ring_operations: u64,
        /// Address of the `file_operations` of sockets; 0: unknown.
        pub socket_operations: u64,
        /// Addresses of the `file_operations` of epoll instances and eventfds; 0: unknown.
        pub epoll_operations: u64,
        pub eventfd_operations: u64,
        /// The agent's own tgid in the initial pid namespace; 0: unknown.
        pub own_tgid: u32,
        /// Process of the latest visit (0: none). The fields down to `next_fd` describe it.
        pub tgid: u32,
        /// 1: it is a target.
        pub is_watched: u32,
        /// `TARGET_` flags.
        pub flags: u32,
        /// RLIMIT_NOFILE; 0: unknown.
        pub limit: u64,
        /// Files counted so far, and the first descriptor not counted yet.
        pub open: u32,
        pub next_fd: u32,
        /// 1: report only the threads of focused targets.
        pub only_focused: u32,
        /// Entries in the map `PEER_PORTS`; 0 skips the lookups.
        pub requested_peers: u32,
        /// The walk along a list of ready files: its next entry, its head, the files counted so far, and 1 once its end is
        /// reached. Kept here because the stack has no room for it.
        pub ready_next: u64,
        pub ready_head: u64,
        pub ready_files: u32,
        pub ready_is_complete: u32,
        /// Base of the kernel's direct map of physical memory (`page_offset_base`); 0: unknown, and memory of targets is not read.
        pub page_offset: u64,
        /// End of the physical memory.
        pub memory_end: u64,
        /// Bits of a page-table entry that hold a physical address.
        pub address_mask: u64,
        /// aarch64: log2 of the memory that an entry of the top-level page table covers, and of the memory that a process can
        /// address.
        pub top_bits: u32,
        pub user_bits: u32,
        /// While `page_offset` is being searched: the first candidate to try, and a word of the agent's own memory to find.
        pub candidate: u64,
        pub own_address: u64,
        pub own_word: u64,
    }

    /// Socket-local storage of the sockets that every sample polls: listeners, and busy sockets of focused targets.
    pub struct FocusedSocket: 16 {
        pub tgid: u32,
        pub fd: u32,
        /// CLOCK_MONOTONIC when a busy socket expires; 0 for a listener, which never expires.
        pub expires_ns: u64,
    }

    /// Rate limit of `--log-bpf`, in the single entry of the map `LOG_LIMIT`. Unused unless the flag is given.
    pub struct LogLimit: 24 {
        /// CLOCK_MONOTONIC in whole seconds: the window that `lines` counts in.
        pub second: u64,
        /// Lines written in this window.
        pub lines: u64,
        /// Lines suppressed since the object was loaded.
        pub suppressed: u64,
    }
}
