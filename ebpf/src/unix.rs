//! Unix sockets: what was written and not read, on either side, and what waits on a listener.
//!
//! Memory of a message belongs to the socket that wrote it until it is read (sock_alloc_send_pskb), so the queue of one
//! end is what its peer has written. Whatever hangs behind a `void *` or an embedded array is read by probe reads.

use aya_ebpf::{bindings::seq_file, helpers::generated::bpf_probe_read_kernel};
use tailback_ebpf::{
    HOLDER_SOCKET, Header, HolderRecord, KIND_HOLDER, KIND_UNIX, UNIX_PATH, UnixRecord,
};

use crate::{
    kernel::{emit, load_sk, offset, probe, probe_at},
    sock::{Sock, packet},
    task_file::Found,
};

#[inline(always)]
pub fn emit_unix(seq: *mut seq_file, found: Found, sock: &Sock) {
    let sk = sock.sk;
    let peer = probe!(sk, unix_peer, *const u8);
    let queued = load_sk!(sk, sk_receive_qlen, u32);
    let mut record = UnixRecord {
        header: Header {
            kind: KIND_UNIX,
            len: size_of::<UnixRecord>() as u16,
            tgid: found.tgid,
        },
        inode: inode(sk),
        peer: 0,
        head: if queued > 0 {
            packet(load_sk!(sk, sk_receive_next, u64))
        } else {
            0
        },
        fd: found.fd,
        netns: sock.netns(),
        style: load_sk!(sk, sk_type, u16),
        state: sock.state(),
        reserved: 0,
        queued,
        limit: load_sk!(sk, sk_max_ack_backlog, u32),
        written: written(sk),
        sndbuf: load_sk!(sk, sk_sndbuf, u32),
        peer_written: 0,
        peer_sndbuf: 0,
        path_len: 0,
        peer_path_len: 0,
        path: [0; UNIX_PATH],
        peer_path: [0; UNIX_PATH],
    };
    record.path_len = path(sk, &mut record.path);
    if !peer.is_null() {
        record.peer = inode(peer);
        record.peer_written = written(peer);
        record.peer_sndbuf = probe!(peer, sk_sndbuf, u32);
        record.peer_path_len = path(peer, &mut record.peer_path);
    }
    emit(seq, &record);
}

#[inline(always)]
pub fn emit_holder(seq: *mut seq_file, found: Found, sock: &Sock) {
    let record = HolderRecord {
        header: Header {
            kind: KIND_HOLDER,
            len: size_of::<HolderRecord>() as u16,
            tgid: found.tgid,
        },
        inode: inode(sock.sk),
        fd: found.fd,
        end: HOLDER_SOCKET,
    };
    emit(seq, &record);
}

/// Memory of what was written and not read. The count begins at 1 (sk_wmem_alloc_get, include/net/sock.h).
#[inline(always)]
fn written(sk: *const u8) -> u32 {
    match probe!(sk, sk_wmem_alloc, u32) {
        0 => 0,
        held => held - 1,
    }
}

/// A socket and its inode are one allocation (SOCK_INODE, include/net/sock.h).
#[inline(always)]
fn inode(sk: *const u8) -> u64 {
    let socket = probe!(sk, sk_socket, *const u8);
    if socket.is_null() {
        // Not accepted yet, or closed.
        return 0;
    }
    probe_at(
        socket,
        u64::from(offset!(socket_alloc_inode)) + u64::from(offset!(inode_ino)),
    )
}

/// The address that a socket is bound to, without its family; answers its length as the kernel keeps it.
#[inline(always)]
fn path(sk: *const u8, path: &mut [u8; UNIX_PATH]) -> u16 {
    /// `sun_family` stands before the path.
    const FAMILY: usize = 2;
    let address = probe!(sk, unix_addr, *const u8);
    if address.is_null() {
        return 0;
    }
    let from = address.wrapping_add(offset!(unix_address_name) as usize + FAMILY);
    // SAFETY: the helper checks the address; `path` is a live array of this size. The kernel's copy may be shorter:
    // what follows it is memory of the same slab, and the length says where to stop.
    unsafe { bpf_probe_read_kernel(path.as_mut_ptr().cast(), UNIX_PATH as u32, from.cast()) };
    probe!(address, unix_address_len, u32) as u16
}
