//! TCP sockets: a connection as a `SocketRecord`, a listener with a timestamp for each connection in its accept queue.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{
    bpf_jiffies64, bpf_ktime_get_ns, bpf_loop, bpf_skc_to_tcp_request_sock, bpf_skc_to_tcp_sock,
};
use tailback_ebpf::{
    ABSENT, Header, KIND_LISTENER, KIND_PEER, KIND_SOCKET, ListenerRecord, MAX_WAITING, PeerRecord,
    SocketRecord, UNKNOWN, peer_key,
};

use crate::{
    cast::cast,
    kernel::{
        PEER_PORTS, SCAN, Sink, emit, has_helper, load, load_sk, load_sk_or, offset, probe,
        read_sk, read_sk_or,
    },
    sock::{IPPROTO_MPTCP, IPPROTO_TCP, SOCK_STREAM, Sock},
    task_file::Handle,
};

/// include/net/tcp_states.h
pub const TCP_LISTEN: u8 = 10;

/// How a program loops over an accept queue.
///
/// Each variant needs a program of its own; a read-only flag cannot let the verifier prune the other one. Before 5.13 the
/// kernel rejects a function's address wherever it occurs ("unrecognized bpf_ld_imm64 insn", resolve_pseudo_ldimm64 in
/// kernel/bpf/verifier.c, 5.10), ahead of any pruning.
#[derive(Clone, Copy)]
pub enum QueueLoop {
    /// By `bpf_loop` (5.17): the verifier checks one iteration, whatever their number.
    BpfLoop,
    /// By a bounded loop: the verifier checks every iteration, which takes a few tenths of a second.
    Bounded,
}

/// A TCP socket. Both pointers refer to the same object; the verifier knows one as `struct sock` and the other as
/// `struct tcp_sock`.
pub struct Tcp {
    sock: Sock,
    sk: *const u8,
    tcp: *const u8,
    pub state: u8,
}

impl Tcp {
    /// `None` for a socket that is not TCP (or is MPTCP, whose outer socket has no sequence numbers).
    #[inline(always)]
    pub fn from_sock(sock: Sock) -> Option<Self> {
        let sk = sock.sk;
        let tcp = if has_helper!(typed_sockets) {
            // SAFETY: `sk` is a typed, non-null kernel pointer; the helper returns null for other protocols.
            let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast_mut().cast()) }.cast::<u8>();
            if tcp.is_null() {
                return None;
            }
            tcp.cast_const()
        } else {
            if !sock.is(sock.family(), SOCK_STREAM, IPPROTO_TCP) {
                return None;
            }
            sk
        };
        Some(Self {
            sock,
            sk,
            tcp,
            state: sock.state(),
        })
    }

    /// Like [`Tcp::from_sock`], for an untrusted pointer, which helpers reject.
    #[inline(always)]
    pub fn cast(sock: Sock) -> Option<Self> {
        if !sock.is(sock.family(), SOCK_STREAM, IPPROTO_TCP) {
            return None;
        }
        Some(Self {
            sock,
            sk: sock.sk,
            tcp: cast!(sock.sk, tcp_sock),
            state: sock.state(),
        })
    }

    /// A listener behind an untrusted pointer. Its requests take probe reads, because the helper that recognizes a request
    /// accepts trusted pointers only.
    #[inline(always)]
    pub fn untrusted(listener: Sock) -> Self {
        Self {
            sock: Sock::inner(listener.sk, listener),
            sk: listener.sk,
            tcp: listener.sk,
            state: TCP_LISTEN,
        }
    }

    /// The TCP socket that listens on behalf of an MPTCP one and holds its accept queue. Go servers use MPTCP listeners by
    /// default since Go 1.24. No helper yields its type, so it takes probe reads.
    #[inline(always)]
    pub fn mptcp_listener(sock: Sock) -> Option<Self> {
        if offset!(mptcp_first) == ABSENT
            || !sock.is(sock.family(), SOCK_STREAM, IPPROTO_MPTCP)
            || sock.state() != TCP_LISTEN
        {
            return None;
        }
        let first = probe!(sock.sk, mptcp_first, *const u8);
        if first.is_null() {
            return None;
        }
        Some(Self {
            sock: Sock::inner(first, sock),
            sk: first,
            tcp: first,
            state: TCP_LISTEN,
        })
    }

    #[inline(always)]
    pub fn is_listener(&self) -> bool {
        self.state == TCP_LISTEN
    }

    #[inline(always)]
    pub fn emit_connection(&self, out: impl Sink, handle: Handle) {
        let family = self.sock.family();
        let mut record = SocketRecord {
            header: Header {
                kind: KIND_SOCKET,
                len: size_of::<SocketRecord>() as u16,
                tgid: handle.tgid,
            },
            cookie: self.sock.cookie(),
            fd: handle.fd,
            state: self.state,
            family: family as u8,
            local_port: self.local_port(),
            remote_port: self.remote_port(),
            reserved: 0,
            netns: self.sock.netns(),
            rcv_nxt: load_sk!(self.tcp, tcp_rcv_nxt, u32),
            copied_seq: load_sk!(self.tcp, tcp_copied_seq, u32),
            write_seq: load_sk!(self.tcp, tcp_write_seq, u32),
            snd_una: load_sk!(self.tcp, tcp_snd_una, u32),
            snd_nxt: load_sk!(self.tcp, tcp_snd_nxt, u32),
            snd_wnd: load_sk!(self.tcp, tcp_snd_wnd, u32),
            rmem_alloc: 0,
            rcvbuf: 0,
            wmem_queued: 0,
            sndbuf: 0,
            drops: 0,
            snd_wl1: load_sk_or!(self.tcp, tcp_snd_wl1, u32, 0),
            since_received: 0,
            since_sent: 0,
            since_any_segment: 0,
            segments: self.segments(),
            local: self.sock.local(family),
            remote: self.sock.remote(family),
        };
        if offset!(tcp_lsndtime) != ABSENT {
            // SAFETY: no arguments. The kernel stores the lower 32 bits in its timestamps.
            let now = unsafe { bpf_jiffies64() } as u32;
            record.since_received = now.wrapping_sub(load_sk!(self.tcp, tcp_lrcvtime, u32));
            record.since_sent = now.wrapping_sub(load_sk!(self.tcp, tcp_lsndtime, u32));
            record.since_any_segment = now.wrapping_sub(load_sk!(self.tcp, tcp_rcv_tstamp, u32));
        }
        if record.rcv_nxt != record.copied_seq {
            record.rmem_alloc = load_sk!(self.sk, sk_rmem_alloc, u32);
            record.rcvbuf = load_sk!(self.sk, sk_rcvbuf, u32);
            record.drops = load_sk_or!(self.sk, sk_drops, u32, 0);
        }
        if record.write_seq != record.snd_una {
            record.wmem_queued = load_sk!(self.sk, sk_wmem_queued, u32);
            record.sndbuf = load_sk!(self.sk, sk_sndbuf, u32);
        }
        emit(out, &record);
    }

    #[inline(always)]
    fn segments(&self) -> u32 {
        if offset!(tcp_data_segs_out) == ABSENT {
            return 0;
        }
        let received = load_sk!(self.tcp, tcp_data_segs_in, u32);
        let sent = load_sk!(self.tcp, tcp_data_segs_out, u32);
        received & 0xffff | sent << 16
    }

    /// Whether the agent requested the holder of a connection with these ports.
    #[inline(always)]
    pub fn is_requested_peer(&self) -> bool {
        // SAFETY: an array entry lives as long as its map.
        let any = SCAN
            .get_ptr_mut(0)
            .is_some_and(|scan| unsafe { (*scan).requested_peers } > 0);
        // SAFETY: the value is not read.
        any && unsafe { PEER_PORTS.get(peer_key(self.local_port(), self.remote_port())) }.is_some()
    }

    #[inline(always)]
    fn local_port(&self) -> u16 {
        load_sk!(self.sk, sk_num, u16)
    }

    #[inline(always)]
    fn remote_port(&self) -> u16 {
        u16::from_be(load_sk!(self.sk, sk_dport, u16))
    }

    /// Writes which process holds this connection, and nothing about its queues.
    #[inline(always)]
    pub fn emit_peer(&self, out: impl Sink, handle: Handle) {
        let family = self.sock.family();
        let record = PeerRecord {
            header: Header {
                kind: KIND_PEER,
                len: size_of::<PeerRecord>() as u16,
                tgid: handle.tgid,
            },
            cookie: self.sock.cookie(),
            fd: handle.fd,
            netns: self.sock.netns(),
            local_port: self.local_port(),
            remote_port: self.remote_port(),
            family: family as u8,
            reserved: [0; 3],
            local: self.sock.local(family),
            remote: self.sock.remote(family),
        };
        emit(out, &record);
    }

    /// Whether bytes wait to be read or to be acknowledged.
    #[inline(always)]
    pub fn is_busy(&self) -> bool {
        load_sk!(self.tcp, tcp_rcv_nxt, u32) != load_sk!(self.tcp, tcp_copied_seq, u32)
            || load_sk!(self.tcp, tcp_write_seq, u32) != load_sk!(self.tcp, tcp_snd_una, u32)
    }

    /// The record of the listener itself, without its accept queue.
    #[inline(always)]
    fn listener_record(&self, handle: Handle, waiting: u32) -> ListenerRecord {
        let family = self.sock.family();
        ListenerRecord {
            header: Header {
                kind: KIND_LISTENER,
                len: (size_of::<ListenerRecord>() as u32 + waiting * size_of::<u64>() as u32)
                    as u16,
                tgid: handle.tgid,
            },
            cookie: self.sock.cookie(),
            // SAFETY: no arguments.
            now_ns: unsafe { bpf_ktime_get_ns() },
            fd: handle.fd,
            depth: read_sk!(self.sock, self.sk, sk_ack_backlog, u32),
            limit: read_sk!(self.sock, self.sk, sk_max_ack_backlog, u32),
            drops: read_sk_or!(self.sock, self.sk, sk_drops, u32, 0),
            netns: self.sock.netns(),
            waiting,
            port: read_sk!(self.sock, self.sk, sk_num, u16),
            family: family as u8,
            reserved: 0,
            half_open: read_sk_or!(self.sock, self.tcp, tcp_half_open, u32, UNKNOWN),
            local: self.sock.local(family),
        }
    }

    #[inline(always)]
    pub fn emit_listener_only(&self, out: impl Sink, handle: Handle) {
        emit(out, &self.listener_record(handle, 0));
    }

    /// Writes the listener, then a timestamp for each connection in its accept queue, oldest first.
    ///
    /// The service may accept from the list while we walk it. Entries are freed after accept, so one may have been reused
    /// by the time we read it. Hence the walk is bounded, a fault in any load is harmless, and each timestamp carries the
    /// port, by which the agent discards entries of other listeners.
    #[inline(always)]
    pub fn emit_listener(&self, out: impl Sink, handle: Handle, queue_loop: QueueLoop) {
        if offset!(req_snt_synack) == ABSENT {
            return self.emit_listener_only(out, handle);
        }
        let depth = read_sk!(self.sock, self.sk, sk_ack_backlog, u32);
        let waiting = if depth > MAX_WAITING {
            MAX_WAITING
        } else {
            depth
        };
        emit(out, &self.listener_record(handle, waiting));
        let head = read_sk!(self.sock, self.tcp, tcp_accept_head, *const u8);
        match queue_loop {
            QueueLoop::BpfLoop => emit_waiting(out, head, waiting, self.sock.is_typed),
            QueueLoop::Bounded => {
                emit_waiting_bounded(out, head, waiting, self.sock.is_typed);
            }
        }
    }
}

/// Progress along an accept queue. It lives on the program's stack, where the verifier tracks the types of both pointers.
#[repr(C)]
struct Queue<S> {
    out: S,
    request: *const u8,
}

/// Writes a timestamp for each waiting connection, oldest first, using `bpf_loop`.
#[inline(always)]
fn emit_waiting<S: Sink>(out: S, head: *const u8, waiting: u32, is_typed: bool) {
    let mut queue = Queue { out, request: head };
    let round = if is_typed {
        emit_first::<S> as *mut c_void
    } else {
        emit_first_probed::<S> as *mut c_void
    };
    // SAFETY: the callback takes the struct passed here and runs before the helper returns.
    unsafe { bpf_loop(waiting, round, (&raw mut queue).cast(), 0) };
}

/// One round, for the next connection; returns 0 to continue. `bpf_loop` passes the round's index as `u64`
/// (kernel/bpf/bpf_iter.c, since 5.17).
///
/// A kernel with `bpf_loop` has typed sockets (5.11), and its verifier tracks the types of kernel pointers on the caller's
/// stack. Before 6.7 it checks one round. Since then it repeats until its state matches that of an earlier round
/// (kernel/bpf/verifier.c, calls_callback), which happens soon because a request points to a request.
#[inline(never)]
extern "C" fn emit_first<S: Sink>(_index: u64, queue: *mut Queue<S>) -> i64 {
    // SAFETY: the caller's struct, which outlives the call.
    let (out, request) = unsafe { ((*queue).out, (*queue).request) };
    emit(out, &timestamp(request));
    let next = load!(request, req_dl_next, *const u8);
    // SAFETY: as above.
    unsafe { (*queue).request = next };
    0
}

/// Like [`emit_first`], for a listener whose type the verifier does not know.
#[inline(never)]
extern "C" fn emit_first_probed<S: Sink>(_index: u64, queue: *mut Queue<S>) -> i64 {
    // SAFETY: as above.
    let (out, request) = unsafe { ((*queue).out, (*queue).request) };
    emit(out, &probed_timestamp(request));
    let next = probe!(request, req_dl_next, *const u8);
    // SAFETY: as above.
    unsafe { (*queue).request = next };
    0
}

/// Like [`emit_waiting`], with a bounded loop.
///
/// Each branch in the loop costs the verifier a pending state per round, and it allows 8,192 in total
/// (`BPF_COMPLEXITY_LIMIT_JMP_SEQ`). So checks that the agent can do are left to the agent.
#[inline(always)]
fn emit_waiting_bounded(out: impl Sink, head: *const u8, waiting: u32, is_typed: bool) {
    let mut request = head;
    let mut written = 0;
    while written < waiting {
        let (timestamp, next) = if is_typed && has_helper!(typed_sockets) {
            (timestamp(request), load!(request, req_dl_next, *const u8))
        } else {
            (
                probed_timestamp(request),
                probe!(request, req_dl_next, *const u8),
            )
        };
        emit(out, &timestamp);
        request = next;
        written += 1;
    }
}

/// When the handshake of a waiting connection completed: CLOCK_MONOTONIC in µs, with the port in the upper 16 bits;
/// 0 if unknown.
///
/// `snt_synack` is when the SYN-ACK was sent. The handshake completed one round trip later, and the child socket's first
/// RTT estimate is that very round trip. Null pointers need no check: the helpers return null for them, and a typed load
/// through one yields 0.
#[inline(always)]
fn timestamp(request: *const u8) -> u64 {
    // SAFETY: a typed kernel pointer; the helper returns null for anything but a request.
    let typed = unsafe { bpf_skc_to_tcp_request_sock(request.cast_mut().cast()) }.cast::<u8>();
    if typed.is_null() {
        return 0;
    }
    let child = load!(request, req_sk, *const u8);
    // SAFETY: as above, for anything but a TCP socket.
    let tcp = unsafe { bpf_skc_to_tcp_sock(child.cast_mut().cast()) }.cast::<u8>();
    if tcp.is_null() {
        return 0;
    }
    let sent_us = load!(typed, req_snt_synack, u64);
    if sent_us == 0 {
        return 0;
    }
    let round_trip_us = u64::from(load!(tcp, tcp_srtt_us, u32) >> 3);
    // Read the port from the request, which keeps it when the client resets the connection; the child does not. Both
    // begin with a `struct sock_common`.
    let port = u64::from(load!(request, sk_num, u16));
    port << 48 | (sent_us + round_trip_us)
}

/// Like [`timestamp`], by probe reads, which yield zeroes for a null pointer.
#[inline(always)]
fn probed_timestamp(request: *const u8) -> u64 {
    let child = probe!(request, req_sk, *const u8);
    let sent_us = probe!(request, req_snt_synack, u64);
    if sent_us == 0 {
        return 0;
    }
    let round_trip_us = u64::from(probe!(child, tcp_srtt_us, u32) >> 3);
    u64::from(probe!(request, sk_num, u16)) << 48 | (sent_us + round_trip_us)
}
