//! UDP sockets: receive memory in use, its limit, and drops.

use tailback_ebpf::{ABSENT, Header, KIND_UDP, UNKNOWN, UdpRecord};

use crate::{
    kernel::{Sink, emit, load_sk, load_sk_or, offset, probe},
    sock::{Sock, packet_fingerprint},
    task_file::Handle,
};

/// Writes the record of one UDP socket.
#[inline(always)]
pub fn emit_udp(out: impl Sink, handle: Handle, sock: &Sock) {
    let sk = sock.sk;
    let family = sock.family();
    // The kernel releases receive memory in batches; the deficit is what has been read but not released
    // (udp_rqueue_get, include/net/udp.h). A typed load needs a cast that kernels before 6.2 lack.
    let deficit = probe!(sk, udp_forward_deficit, u32);
    // Readers take packets from a second queue of the socket (`reader_queue`). If that is empty, a reader moves the
    // whole receive queue there before it reads.
    let (in_reader_queue, received) = (
        probe!(sk, udp_reader_qlen, u32),
        load_sk!(sk, sk_receive_qlen, u32),
    );
    let queued = in_reader_queue.wrapping_add(received);
    let head = if in_reader_queue > 0 {
        packet_fingerprint(probe!(sk, udp_reader_next, u64))
    } else if received > 0 {
        packet_fingerprint(probe!(sk, sk_receive_next, u64))
    } else {
        0
    };
    let record = UdpRecord {
        header: Header {
            kind: KIND_UDP,
            len: size_of::<UdpRecord>() as u16,
            tgid: handle.tgid,
        },
        cookie: sock.cookie(),
        head,
        fd: handle.fd,
        netns: sock.netns(),
        memory: load_sk!(sk, sk_rmem_alloc, u32).wrapping_sub(deficit),
        rcvbuf: load_sk!(sk, sk_rcvbuf, u32),
        drops: drops(sk),
        queued: if offset!(udp_reader_qlen) == ABSENT {
            UNKNOWN
        } else {
            queued
        },
        local_port: load_sk!(sk, sk_num, u16),
        remote_port: u16::from_be(load_sk!(sk, sk_dport, u16)),
        family: family as u8,
        reserved: [0; 3],
        local: sock.local(family),
        remote: sock.remote(family),
    };
    emit(out, &record);
}

/// Since 6.18 UDP drops are split over two counters, one for each half of the NUMA nodes (sk_drops_read, include/net/sock.h).
#[inline(always)]
fn drops(sk: *const u8) -> u32 {
    let counted = load_sk_or!(sk, sk_drops, u32, 0);
    if offset!(sk_drop_counters) == ABSENT {
        return counted;
    }
    let counters = load_sk!(sk, sk_drop_counters, *const u8);
    if counters.is_null() {
        return counted;
    }
    load_sk!(counters, drop_counters_0, u32).wrapping_add(load_sk!(counters, drop_counters_1, u32))
}
