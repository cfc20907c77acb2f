//! Unix sockets: unread data in each direction, and the backlog of a listener.
//!
//! The memory of a message is charged to the socket that wrote it until it is read (sock_alloc_send_pskb), so the receive
//! queue of one end is what its peer has written. Fields behind a `void *` or an embedded array take probe reads.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use tailback_ebpf::{
    HOLDER_SOCKET, Header, HolderRecord, KIND_HOLDER, KIND_UNIX, UNIX_PATH, UnixRecord,
};

use crate::{
    kernel::{Sink, emit, load_sk, offset, probe, probe_at},
    sock::{Sock, packet_fingerprint},
    task_file::Handle,
};

#[inline(always)]
pub fn emit_unix(out: impl Sink, handle: Handle, sock: &Sock) {
    let mut record = MaybeUninit::<UnixRecord>::uninit();
    fill_unix(record.as_mut_ptr(), handle, sock);
    // SAFETY: `fill_unix` initialized every field.
    emit(out, unsafe { record.assume_init_ref() });
}

/// Fills the record field by field, so that no second copy of its 288 bytes takes up the 512-byte stack.
#[inline(always)]
pub fn fill_unix(record: *mut UnixRecord, handle: Handle, sock: &Sock) {
    let sk = sock.sk;
    let peer = probe!(sk, unix_peer, *const u8);
    let queued = load_sk!(sk, sk_receive_qlen, u32);
    let head = if queued > 0 {
        packet_fingerprint(probe!(sk, sk_receive_next, u64))
    } else {
        0
    };
    let (style, limit, sndbuf) = (
        load_sk!(sk, sk_type, u16),
        load_sk!(sk, sk_max_ack_backlog, u32),
        load_sk!(sk, sk_sndbuf, u32),
    );
    let (mut peer_inode, mut peer_written, mut peer_sndbuf, mut peer_path_len) = (0, 0, 0, 0);
    if !peer.is_null() {
        peer_inode = inode(peer);
        // A connection that is not accepted has no inode yet; its one packet is the connection request itself.
        peer_written = if peer_inode == 0 { 0 } else { written(peer) };
        peer_sndbuf = probe!(peer, sk_sndbuf, u32);
    }
    // SAFETY: the caller's record; each field is written once.
    unsafe {
        (*record).path = [0; UNIX_PATH];
        (*record).peer_path = [0; UNIX_PATH];
        (*record).path_len = path(sk, &raw mut (*record).path);
        if !peer.is_null() {
            peer_path_len = path(peer, &raw mut (*record).peer_path);
        }
        (*record).header = Header {
            kind: KIND_UNIX,
            len: size_of::<UnixRecord>() as u16,
            tgid: handle.tgid,
        };
        (*record).inode = inode(sk);
        (*record).peer = peer_inode;
        (*record).head = head;
        (*record).fd = handle.fd;
        (*record).netns = sock.netns();
        (*record).style = style;
        (*record).state = sock.state();
        (*record).reserved = 0;
        (*record).queued = queued;
        (*record).limit = limit;
        (*record).written = written(sk);
        (*record).sndbuf = sndbuf;
        (*record).peer_written = peer_written;
        (*record).peer_sndbuf = peer_sndbuf;
        (*record).peer_path_len = peer_path_len;
    }
}

#[inline(always)]
pub fn emit_holder(out: impl Sink, handle: Handle, sock: &Sock) {
    let record = HolderRecord {
        header: Header {
            kind: KIND_HOLDER,
            len: size_of::<HolderRecord>() as u16,
            tgid: handle.tgid,
        },
        inode: inode(sock.sk),
        fd: handle.fd,
        end: HOLDER_SOCKET,
    };
    emit(out, &record);
}

/// Memory of data written but not read, bytes. The counter starts at 1 (sk_wmem_alloc_get, include/net/sock.h).
#[inline(always)]
fn written(sk: *const u8) -> u32 {
    match probe!(sk, sk_wmem_alloc, u32) {
        0 => 0,
        held => held - 1,
    }
}

/// The inode number. A socket and its inode share one allocation (SOCK_INODE, include/net/sock.h).
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

/// Reads the address that a socket is bound to, without the family; returns its length including the family.
#[inline(always)]
fn path(sk: *const u8, path: *mut [u8; UNIX_PATH]) -> u16 {
    /// Size of `sun_family`, which precedes the path.
    const FAMILY: usize = 2;
    let address = probe!(sk, unix_addr, *const u8);
    if address.is_null() {
        return 0;
    }
    let from = address.wrapping_add(offset!(unix_address_name) as usize + FAMILY);
    // SAFETY: the helper checks the address; `path` is a live array of this size. The kernel's address may be shorter:
    // the bytes after it belong to the same slab, and the agent stops at the length.
    unsafe { bpf_probe_read_kernel(path.cast(), UNIX_PATH as u32, from.cast()) };
    probe!(address, unix_address_len, u32) as u16
}
