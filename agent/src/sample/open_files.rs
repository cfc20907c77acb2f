//! What the targets have open: sockets, pipes, io_uring and epoll instances.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

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
    /// Sequence number of the peer's segment with which the kernel last updated our send window.
    pub snd_wl1: u32,
    /// Time since data was last received, and last sent, ns; the kernel's resolution is its timer tick. 0 if this kernel
    /// does not report it. Within one tick, the time received is larger by 1 ns if data was sent last.
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

/// An epoll instance, as one process holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    pub tgid: u32,
    pub fd: u32,
    /// Files that have something to read, and that no thread has taken.
    pub ready: u32,
    /// There are more than were counted.
    pub more: bool,
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
