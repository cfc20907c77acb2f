//! `iter/bpf_sk_storage_map`: only the sockets in `FOCUSED_SOCKETS`.
//!
//! The cost of a file scan grows with the number of sockets that the targets hold. The cost of this scan grows with the
//! number of listeners and busy focused connections, so it keeps the short interval when the file scan has to slow down.
//!
//! Context, net/core/bpf_sk_storage.c (since 5.9): `struct bpf_iter__bpf_sk_storage_map
//! { struct bpf_iter_meta *meta; struct bpf_map *map; struct sock *sk; void *value; }`

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_delete};
use tailback_ebpf::FocusedSocket;

use crate::{
    kernel::{FOCUSED_SOCKETS, IterMeta},
    sock::Sock,
    task_file::Handle,
    tcp::{QueueLoop, Tcp},
};

#[repr(C)]
pub struct SkStorageContext {
    meta: *const IterMeta,
    map: *const u8,
    sk: *const u8,
    value: *const FocusedSocket,
}

/// Writes a record for every focused socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn focused_sockets(ctx: *const SkStorageContext) -> i32 {
    visit(ctx, QueueLoop::BpfLoop)
}

/// Like `focused_sockets`, without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn focused_sockets_bounded(ctx: *const SkStorageContext) -> i32 {
    visit(ctx, QueueLoop::Bounded)
}

#[inline(always)]
fn visit(ctx: *const SkStorageContext, queue_loop: QueueLoop) -> i32 {
    // SAFETY: the kernel passes a context of this shape to programs of this section.
    let (meta, sk, value) = unsafe { ((*ctx).meta, (*ctx).sk, (*ctx).value) };
    if sk.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: a value of this map, so a `FocusedSocket`; `meta` is valid during the visit.
    let (handle, expires_ns, seq) = unsafe {
        (
            Handle {
                tgid: (*value).tgid,
                fd: (*value).fd,
            },
            (*value).expires_ns,
            (*meta).seq,
        )
    };
    let sock = Sock::new(sk);
    let Some(tcp) = Tcp::from_sock(sock) else {
        if let Some(listener) = Tcp::mptcp_listener(sock) {
            listener.emit_listener(seq, handle, queue_loop);
        }
        return 0;
    };
    if tcp.is_listener() {
        tcp.emit_listener(seq, handle, queue_loop);
        return 0;
    }
    // SAFETY: no arguments.
    if unsafe { bpf_ktime_get_ns() } > expires_ns {
        // SAFETY: the map is live and `sk` is a typed, non-null kernel pointer.
        unsafe {
            bpf_sk_storage_delete(
                (&raw const FOCUSED_SOCKETS).cast_mut().cast(),
                sk.cast_mut().cast(),
            )
        };
    } else {
        tcp.emit_connection(seq, handle);
    }
    0
}
