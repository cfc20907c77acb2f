//! UDP sockets: memory of what is not read, its limit, and what was dropped.

use tailback_ebpf::{ABSENT, Header, KIND_UDP, UNKNOWN, UdpRecord};

use crate::{
    kernel::{Sink, emit, load_sk, load_sk_or, offset, probe},
    sock::{Sock, packet},
    task_file::Found,
};

/// The kernel's record of one UDP socket.
#[inline(always)]
pub fn emit_udp(out: impl Sink, found: Found, sock: &Sock) {
    let sk = sock.sk;
    let family = sock.family();
    // The kernel gives memory back in batches: what is read and not yet given back is the deficit
    // (udp_rqueue_get, include/net/udp.h). Its own type needs a cast that kernels before 6.2 lack.
    let deficit = probe!(sk, udp_forward_deficit, u32);
    // A reader moves the whole receive queue aside before it takes from it.
    let (aside, received) = (
        probe!(sk, udp_reader_qlen, u32),
        load_sk!(sk, sk_receive_qlen, u32),
    );
    let queued = aside.wrapping_add(received);
    let head = if aside > 0 {
        packet(probe!(sk, udp_reader_next, u64))
    } else if received > 0 {
        packet(probe!(sk, sk_receive_next, u64))
    } else {
        0
    };
    let record = UdpRecord {
        header: Header {
            kind: KIND_UDP,
            len: size_of::<UdpRecord>() as u16,
            tgid: found.tgid,
        },
        cookie: sock.cookie(),
        head,
        fd: found.fd,
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

/// Since 6.18 these drops are counted in two places of their own (sk_drops_read, include/net/sock.h).
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
