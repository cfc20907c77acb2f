//! TCP sockets: a connection as a `SocketRecord`, a listener with the ages of those that wait on it.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{
    bpf_jiffies64, bpf_ktime_get_ns, bpf_loop, bpf_skc_to_tcp_request_sock, bpf_skc_to_tcp_sock,
};
use tailback_ebpf::{
    ABSENT, Header, KIND_LISTENER, KIND_PEER, KIND_SOCKET, ListenerRecord, MAX_WAITING, PeerRecord,
    SocketRecord, UNKNOWN, wanted_key,
};

use crate::{
    cast::cast,
    kernel::{
        Sink, WALK, WANTED, emit, load, load_sk, load_sk_or, offset, probe, read_sk, read_sk_or,
        way,
    },
    sock::{IPPROTO_MPTCP, IPPROTO_TCP, SOCK_STREAM, Sock},
    task_file::Found,
};

/// include/net/tcp_states.h
pub const TCP_LISTEN: u8 = 10;

/// Who counts the rounds of the walk over an accept queue.
///
/// Each is a program of its own, for here no flag can let the verifier prune the other one: before 5.13 the kernel
/// refuses a function's address wherever it stands ("unrecognized bpf_ld_imm64 insn", resolve_pseudo_ldimm64 in
/// kernel/bpf/verifier.c, 5.10), ahead of any pruning.
#[derive(Clone, Copy)]
pub enum Rounds {
    /// The kernel, by `bpf_loop` (5.17): the verifier looks at one round, whatever their number.
    Kernel,
    /// The program: the verifier walks all of them, for some tenths of a second.
    Program,
}

/// A TCP socket in a state that has queues. Both pointers name the same object; the verifier knows one as
/// `struct sock` and the other as `struct tcp_sock`.
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
        let tcp = if way!(typed_sockets) {
            // SAFETY: `sk` is a typed, non-null kernel pointer; the helper answers null for other protocols.
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

    /// As [`Tcp::from_sock`], of a socket that the kernel has not handed out: no helper takes it.
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

    /// A listener that the kernel has not handed out: requests are told from others by a helper that takes only what it
    /// has.
    #[inline(always)]
    pub fn untyped(listener: Sock) -> Self {
        Self {
            sock: Sock::found(listener.sk, listener),
            sk: listener.sk,
            tcp: listener.sk,
            state: TCP_LISTEN,
        }
    }

    /// The TCP socket that listens for an MPTCP one: what waits for accept waits there. Go's servers listen so unless they are
    /// told otherwise (1.24). No helper gives its type, so it is probed.
    #[inline(always)]
    pub fn listening_for(sock: Sock) -> Option<Self> {
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
            sock: Sock::found(first, sock),
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
    pub fn emit_connection(&self, out: impl Sink, found: Found) {
        let family = self.sock.family();
        let mut record = SocketRecord {
            header: Header {
                kind: KIND_SOCKET,
                len: size_of::<SocketRecord>() as u16,
                tgid: found.tgid,
            },
            cookie: self.sock.cookie(),
            fd: found.fd,
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
            since_heard: 0,
            segments: self.segments(),
            local: self.sock.local(family),
            remote: self.sock.remote(family),
        };
        if offset!(tcp_lsndtime) != ABSENT {
            // SAFETY: no arguments. The kernel's own stamps are its lower 32 bits.
            let now = unsafe { bpf_jiffies64() } as u32;
            record.since_received = now.wrapping_sub(load_sk!(self.tcp, tcp_lrcvtime, u32));
            record.since_sent = now.wrapping_sub(load_sk!(self.tcp, tcp_lsndtime, u32));
            record.since_heard = now.wrapping_sub(load_sk!(self.tcp, tcp_rcv_tstamp, u32));
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

    /// The agent asks who holds a connection of these ports.
    #[inline(always)]
    pub fn is_wanted(&self) -> bool {
        // SAFETY: an array entry lives as long as its map.
        let any = WALK
            .get_ptr_mut(0)
            .is_some_and(|walk| unsafe { (*walk).wanted } > 0);
        // SAFETY: only whether there is an entry matters.
        any && unsafe { WANTED.get(wanted_key(self.local_port(), self.remote_port())) }.is_some()
    }

    #[inline(always)]
    fn local_port(&self) -> u16 {
        load_sk!(self.sk, sk_num, u16)
    }

    #[inline(always)]
    fn remote_port(&self) -> u16 {
        u16::from_be(load_sk!(self.sk, sk_dport, u16))
    }

    /// Who holds this connection, and no more.
    #[inline(always)]
    pub fn emit_peer(&self, out: impl Sink, found: Found) {
        let family = self.sock.family();
        let record = PeerRecord {
            header: Header {
                kind: KIND_PEER,
                len: size_of::<PeerRecord>() as u16,
                tgid: found.tgid,
            },
            cookie: self.sock.cookie(),
            fd: found.fd,
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

    /// Bytes wait to be read, or to be acknowledged.
    #[inline(always)]
    pub fn is_busy(&self) -> bool {
        load_sk!(self.tcp, tcp_rcv_nxt, u32) != load_sk!(self.tcp, tcp_copied_seq, u32)
            || load_sk!(self.tcp, tcp_write_seq, u32) != load_sk!(self.tcp, tcp_snd_una, u32)
    }

    /// The listener itself, without looking at those that wait: enough to know who listens where.
    #[inline(always)]
    fn listener_record(&self, found: Found, waiting: u32) -> ListenerRecord {
        let family = self.sock.family();
        ListenerRecord {
            header: Header {
                kind: KIND_LISTENER,
                len: (size_of::<ListenerRecord>() as u32 + waiting * size_of::<u64>() as u32)
                    as u16,
                tgid: found.tgid,
            },
            cookie: self.sock.cookie(),
            // SAFETY: no arguments.
            now_ns: unsafe { bpf_ktime_get_ns() },
            fd: found.fd,
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
    pub fn emit_listener_only(&self, out: impl Sink, found: Found) {
        emit(out, &self.listener_record(found, 0));
    }

    /// The listener, then a stamp for each connection that waits to be accepted, oldest first.
    ///
    /// The queue is a list that the service itself takes from while we walk it. Its entries are freed after
    /// accept, so one may have been reused by the time we read it: the walk is bounded, the kernel lets every load
    /// fault harmlessly, and the stamp carries the port, so that the agent can tell a stranger.
    #[inline(always)]
    pub fn emit_listener(&self, out: impl Sink, found: Found, rounds: Rounds) {
        if offset!(req_snt_synack) == ABSENT {
            return self.emit_listener_only(out, found);
        }
        let depth = read_sk!(self.sock, self.sk, sk_ack_backlog, u32);
        let waiting = if depth > MAX_WAITING {
            MAX_WAITING
        } else {
            depth
        };
        emit(out, &self.listener_record(found, waiting));
        let head = read_sk!(self.sock, self.tcp, tcp_accept_head, *const u8);
        match rounds {
            Rounds::Kernel => emit_waiting(out, head, waiting, self.sock.is_typed),
            Rounds::Program => {
                emit_waiting_in_rounds(out, head, waiting, self.sock.is_typed);
            }
        }
    }
}

/// Where the walk over an accept queue is: on the stack of the program, whose slots keep for the verifier what kernel
/// types the two pointers have.
#[repr(C)]
struct Queue<S> {
    out: S,
    request: *const u8,
}

/// A stamp for each of those that wait, from the oldest on, in rounds of `bpf_loop`.
#[inline(always)]
fn emit_waiting<S: Sink>(out: S, head: *const u8, waiting: u32, is_typed: bool) {
    let mut queue = Queue { out, request: head };
    let round = if is_typed {
        emit_first::<S> as *mut c_void
    } else {
        emit_first_probed::<S> as *mut c_void
    };
    // SAFETY: the function takes what is passed here, and is called before the helper returns.
    unsafe { bpf_loop(waiting, round, (&raw mut queue).cast(), 0) };
}

/// One round, for the first of those that are left; 0 goes on. `bpf_loop` passes the number of the round as `u64`
/// (kernel/bpf/bpf_iter.c, since 5.17).
///
/// A kernel that has `bpf_loop` has typed sockets (5.11), and its verifier keeps the types of kernel pointers in the
/// caller's stack. Before 6.7 it looks at a round once; since then until what it knows of the stack is what it knew
/// in a round before (kernel/bpf/verifier.c, calls_callback): soon, for a request leads to a request.
#[inline(never)]
extern "C" fn emit_first<S: Sink>(_index: u64, queue: *mut Queue<S>) -> i64 {
    // SAFETY: the caller's, which waits for us.
    let (out, request) = unsafe { ((*queue).out, (*queue).request) };
    emit(out, &stamp(request));
    let next = load!(request, req_dl_next, *const u8);
    // SAFETY: as above.
    unsafe { (*queue).request = next };
    0
}

/// As [`emit_first`], of a listener whose type the verifier does not know.
#[inline(never)]
extern "C" fn emit_first_probed<S: Sink>(_index: u64, queue: *mut Queue<S>) -> i64 {
    // SAFETY: as above.
    let (out, request) = unsafe { ((*queue).out, (*queue).request) };
    emit(out, &probed_stamp(request));
    let next = probe!(request, req_dl_next, *const u8);
    // SAFETY: as above.
    unsafe { (*queue).request = next };
    0
}

/// As [`emit_waiting`], in a loop of our own.
///
/// Every branch in it costs the verifier a pending state per round, 8,192 in all (`BPF_COMPLEXITY_LIMIT_JMP_SEQ`):
/// hence no checks here that the agent can make as well.
#[inline(always)]
fn emit_waiting_in_rounds(out: impl Sink, head: *const u8, waiting: u32, is_typed: bool) {
    let mut request = head;
    let mut written = 0;
    while written < waiting {
        let (stamp, next) = if is_typed && way!(typed_sockets) {
            (stamp(request), load!(request, req_dl_next, *const u8))
        } else {
            (
                probed_stamp(request),
                probe!(request, req_dl_next, *const u8),
            )
        };
        emit(out, &stamp);
        request = next;
        written += 1;
    }
}

/// When the handshake of a waiting connection was complete, µs of CLOCK_MONOTONIC, with its port in the upper 16 bits;
/// 0 where the kernel does not say.
///
/// `snt_synack` is when the SYN-ACK went out; the handshake was complete one round trip later, and the
/// child's first round-trip estimate is just that one. Nulls need no check: the helpers answer null to them, and
/// a typed load through one yields 0.
#[inline(always)]
fn stamp(request: *const u8) -> u64 {
    // SAFETY: a typed kernel pointer; the helper answers null for anything but a request.
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
    // The request keeps the port when its client resets the connection; the child does not. Both begin with a
    // `struct sock_common`.
    let port = u64::from(load!(request, sk_num, u16));
    port << 48 | (sent_us + round_trip_us)
}

/// As [`stamp`], by probe reads: of a null pointer they yield zeroes, and no time.
#[inline(always)]
fn probed_stamp(request: *const u8) -> u64 {
    let child = probe!(request, req_sk, *const u8);
    let sent_us = probe!(request, req_snt_synack, u64);
    if sent_us == 0 {
        return 0;
    }
    let round_trip_us = u64::from(probe!(child, tcp_srtt_us, u32) >> 3);
    u64::from(probe!(request, sk_num, u16)) << 48 | (sent_us + round_trip_us)
}
