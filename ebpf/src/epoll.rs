//! epoll: files that are ready and that no thread has taken yet.
//!
//! `struct eventpoll` is behind a `void *` in the file, and its list is walked without its lock, so all of it takes
//! probe reads. A level-triggered file stays in the list after its event was delivered, until the next epoll_wait finds
//! that the file is no longer ready. So each listed file is checked for input (`has_input`).

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use tailback_ebpf::{ABSENT, EPOLL_MORE, EpollRecord, Header, KIND_EPOLL, MAX_READY_FILES, Scan};

use crate::{
    kernel::{SCAN, Sink, emit, load, offset, probe, probe_at, read_barrier},
    pipe::{FMODE_READ, S_IFIFO, S_IFMT},
    sock::{AF_UNIX, IPPROTO_TCP, IPPROTO_UDP},
    task_file::Handle,
};

/// include/net/tcp_states.h
const TCP_LISTEN: u8 = 10;
/// Attempts at one list: a thread that takes its events changes the list meanwhile.
const ATTEMPTS: u32 = 2;

/// Reports how many files of an epoll instance have something to read. Nothing is reported if its list changes during each attempt.
#[inline(always)]
pub fn emit_epoll(out: impl Sink, handle: Handle, file: *const u8, scan: *mut Scan) {
    let head = load!(file, file_private_data, u64) + u64::from(offset!(epoll_ready));
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let first = probe_at::<u64>(head as *const u8, 0);
        // SAFETY: an array entry lives as long as its map; only one scan runs at a time. The same below.
        unsafe {
            (*scan).ready_next = first;
            (*scan).ready_head = head;
            (*scan).ready_files = 0;
            (*scan).ready_is_complete = 0;
        }
        // SAFETY: the callback takes no context and runs before the helper returns.
        let rounds = unsafe {
            bpf_loop(
                MAX_READY_FILES + 1,
                visit_ready as *mut c_void,
                core::ptr::null_mut(),
                0,
            )
        };
        let is_cut = rounds > i64::from(MAX_READY_FILES);
        read_barrier();
        let is_same = probe_at::<u64>(head as *const u8, 0) == first;
        // SAFETY: as above.
        let (ready, is_complete) = unsafe { ((*scan).ready_files, (*scan).ready_is_complete) };
        if is_same && (is_complete == 1 || is_cut) {
            let record = EpollRecord {
                header: Header {
                    kind: KIND_EPOLL,
                    len: size_of::<EpollRecord>() as u16,
                    tgid: handle.tgid,
                },
                fd: handle.fd,
                ready,
                flags: if is_cut { EPOLL_MORE } else { 0 },
                reserved: 0,
            };
            emit(out, &record);
            return;
        }
    }
}

/// Visits one entry; returns 1 to stop.
#[inline(never)]
extern "C" fn visit_ready(_index: u64, _context: *mut c_void) -> i64 {
    let Some(scan) = SCAN.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: as above.
    let (node, head) = unsafe { ((*scan).ready_next, (*scan).ready_head) };
    if node == head {
        // SAFETY: as above.
        unsafe { (*scan).ready_is_complete = 1 };
        return 1;
    }
    let item = node.wrapping_sub(u64::from(offset!(epitem_ready_link))) as *const u8;
    let next = probe_at::<u64>(node as *const u8, 0);
    // An entry that was removed points to itself; an entry whose memory was reused may point anywhere.
    if next == node || next == 0 {
        return 1;
    }
    let file = probe!(item, epitem_file, *const u8);
    let is_ready = has_input(file, scan);
    // SAFETY: as above.
    unsafe {
        (*scan).ready_files += u32::from(is_ready);
        (*scan).ready_next = next;
    }
    0
}

/// Whether a file that epoll lists as ready has something to read. Files of other types than these count as they are listed.
#[inline(always)]
fn has_input(file: *const u8, scan: *const Scan) -> bool {
    // SAFETY: as above.
    let (socket_operations, eventfd_operations) =
        unsafe { ((*scan).socket_operations, (*scan).eventfd_operations) };
    let operations = probe!(file, file_op, u64);
    let private = probe!(file, file_private_data, *const u8);
    if operations == socket_operations {
        return socket_has_input(probe!(private, socket_sk, *const u8));
    }
    if operations == eventfd_operations {
        return probe!(private, eventfd_count, u64) != 0;
    }
    let inode = probe!(file, file_inode, *const u8);
    if probe!(inode, inode_mode, u16) & S_IFMT != S_IFIFO {
        return true;
    }
    let pipe = probe!(inode, inode_pipe, *const u8);
    let reads = probe!(file, file_mode, u32) & FMODE_READ != 0;
    reads && probe!(pipe, pipe_head, u32) != probe!(pipe, pipe_tail, u32)
}

#[inline(always)]
fn socket_has_input(sk: *const u8) -> bool {
    let is_queued = probe!(sk, sk_receive_qlen, u32) != 0;
    let protocol = probe!(sk, sk_protocol, u16);
    if probe!(sk, sk_state, u8) == TCP_LISTEN {
        let is_unix = probe!(sk, sk_family, u16) == AF_UNIX;
        return if is_unix {
            is_queued
        } else {
            probe!(sk, sk_ack_backlog, u32) != 0
        };
    }
    if protocol == IPPROTO_TCP {
        return probe!(sk, tcp_rcv_nxt, u32) != probe!(sk, tcp_copied_seq, u32);
    }
    if protocol == IPPROTO_UDP && offset!(udp_reader_qlen) != ABSENT {
        return is_queued || probe!(sk, udp_reader_qlen, u32) != 0;
    }
    is_queued
}
