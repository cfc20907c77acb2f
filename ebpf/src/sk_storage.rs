//! `iter/bpf_sk_storage_map`: the sockets that carry a mark, and no other.
//!
//! A walk over files costs as much as the targets have sockets. This one costs as much as there are listeners
//! and suspicious connections, so it keeps the fast interval when the other must stretch.
//!
//! Context, net/core/bpf_sk_storage.c (since 5.9): `struct bpf_iter__bpf_sk_storage_map
//! { struct bpf_iter_meta *meta; struct bpf_map *map; struct sock *sk; void *value; }`

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_delete};
use tailback_ebpf::Mark;

use crate::{
    kernel::{IterMeta, MARKS},
    sock::Sock,
    task_file::Found,
    tcp::{Rounds, Tcp},
};

#[repr(C)]
pub struct SkStorageContext {
    meta: *const IterMeta,
    map: *const u8,
    sk: *const u8,
    value: *const Mark,
}

/// Writes a record for every marked socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn marked(ctx: *const SkStorageContext) -> i32 {
    visit(ctx, Rounds::Kernel)
}

/// As `marked`, without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn marked_bounded(ctx: *const SkStorageContext) -> i32 {
    visit(ctx, Rounds::Program)
}

#[inline(always)]
fn visit(ctx: *const SkStorageContext, rounds: Rounds) -> i32 {
    // SAFETY: the kernel passes a context of this shape to programs of this section.
    let (meta, sk, value) = unsafe { ((*ctx).meta, (*ctx).sk, (*ctx).value) };
    if sk.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: the value is this map's, of the size of a `Mark`; `meta` is valid for the time of the visit.
    let (found, expires_ns, seq) = unsafe {
        (
            Found {
                tgid: (*value).tgid,
                fd: (*value).fd,
            },
            (*value).expires_ns,
            (*meta).seq,
        )
    };
    let sock = Sock::new(sk);
    let Some(tcp) = Tcp::from_sock(sock) else {
        if let Some(listener) = Tcp::listening_for(sock) {
            listener.emit_listener(seq, found, rounds);
        }
        return 0;
    };
    if tcp.is_listener() {
        tcp.emit_listener(seq, found, rounds);
        return 0;
    }
    // SAFETY: no arguments.
    if unsafe { bpf_ktime_get_ns() } > expires_ns {
        // SAFETY: the map is live and `sk` is a typed, non-null kernel pointer.
        unsafe {
            bpf_sk_storage_delete((&raw const MARKS).cast_mut().cast(), sk.cast_mut().cast())
        };
    } else {
        tcp.emit_connection(seq, found);
    }
    0
}
