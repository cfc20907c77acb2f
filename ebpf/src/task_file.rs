//! `iter/task_file`: every open file of every task. Most kernels visit a file table once per process, 6.1 once per thread.
//!
//! Context, kernel/bpf/task_iter.c (since 5.8):
//! `struct bpf_iter__task_file { struct bpf_iter_meta *meta; struct task_struct *task; u32 fd; struct file *file; }`

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, seq_file},
    helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_get},
};
use tailback_ebpf::{
    ABSENT, FocusedSocket, Header, KIND_OPERATIONS, OperationsRecord, Scan, TARGET_FOCUSED,
};

use crate::{
    buffer_sink::already_reported,
    epoll::emit_epoll,
    kernel::{
        FOCUSED_SOCKETS, IterMeta, SCAN, Sink, TARGETS, at_target, emit, end_scan, has_helper,
        load, offset,
    },
    log::debug,
    pipe::Pipe,
    sock::{AF_UNIX, IPPROTO_UDP, SOCK_DGRAM, Sock},
    tcp::{QueueLoop, Tcp},
    udp::emit_udp,
    unix::{self, emit_unix},
    uring::emit_ring,
};

#[repr(C)]
pub struct TaskFileContext {
    meta: *const IterMeta,
    task: *const u8,
    fd: u32,
    file: *const u8,
}

/// An open file: a process and its file descriptor.
#[derive(Clone, Copy)]
pub struct Handle {
    pub tgid: u32,
    pub fd: u32,
}

/// For every target, writes a record of each open file that has a queue, and counts the open files.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn files(ctx: *const TaskFileContext) -> i32 {
    visit_file(ctx, QueueLoop::BpfLoop)
}

/// Like `files`, without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn files_bounded(ctx: *const TaskFileContext) -> i32 {
    visit_file(ctx, QueueLoop::Bounded)
}

#[inline(always)]
fn visit_file(ctx: *const TaskFileContext, queue_loop: QueueLoop) -> i32 {
    let Some((seq, task, handle, file)) = file_of(ctx) else {
        report_count();
        end_scan();
        return 0;
    };
    if is_new_process(handle.tgid) {
        report_count();
    }
    if let Some(scan) = at_target(task, handle.tgid) {
        count(scan, task, handle.fd);
        if !already_reported(handle.fd) {
            visit(seq, handle, file, scan, queue_loop);
        }
    }
    0
}

/// Writes a record for every listening socket, pipe end and unix socket of every process, and for the requested
/// connections. They show which process listens where, and which holds the other end of a target's files.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn holders(ctx: *const TaskFileContext) -> i32 {
    let Some((seq, _, handle, file)) = file_of(ctx) else {
        return 0;
    };
    let Some(sock) = Sock::of(file) else {
        if offset!(inode_pipe) != ABSENT
            && let Some(pipe) = Pipe::of(file)
        {
            pipe.emit_holder(seq, handle);
        }
        return 0;
    };
    if sock.family() == AF_UNIX {
        if offset!(unix_peer) != ABSENT {
            unix::emit_holder(seq, handle, &sock);
        }
    } else if let Some(tcp) = Tcp::from_sock(sock) {
        if tcp.is_listener() {
            tcp.emit_listener_only(seq, handle);
        } else if tcp.is_requested_peer() {
            tcp.emit_peer(seq, handle);
        }
    } else if let Some(listener) = Tcp::mptcp_listener(sock) {
        listener.emit_listener_only(seq, handle);
    }
    0
}

/// Writes the address of the `file_operations` of each open file of the agent itself.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn file_operations(ctx: *const TaskFileContext) -> i32 {
    if let Some((seq, _, handle, file)) = file_of(ctx)
        && let Some(scan) = SCAN.get_ptr_mut(0)
        // SAFETY: an array entry lives as long as its map.
        && unsafe { (*scan).own_tgid } == handle.tgid
        && offset!(file_op) != ABSENT
    {
        let record = OperationsRecord {
            header: Header {
                kind: KIND_OPERATIONS,
                len: size_of::<OperationsRecord>() as u16,
                tgid: handle.tgid,
            },
            fd: handle.fd,
            reserved: 0,
            operations: load!(file, file_op, u64),
        };
        emit(seq, &record);
    }
    0
}

/// The file of this visit; `None` at the end of the scan, when the kernel calls once more without a file.
#[inline(always)]
fn file_of(ctx: *const TaskFileContext) -> Option<(*mut seq_file, *const u8, Handle, *const u8)> {
    // SAFETY: the kernel passes a context of this shape to programs of this section.
    let (meta, task, fd, file) = unsafe { ((*ctx).meta, (*ctx).task, (*ctx).fd, (*ctx).file) };
    if task.is_null() || file.is_null() {
        return None;
    }
    let tgid = load!(task, task_tgid, u32);
    // SAFETY: `meta` is valid for the time of the visit.
    Some((unsafe { (*meta).seq }, task, Handle { tgid, fd }, file))
}

/// Whether the previous visit was to another process.
#[inline(always)]
fn is_new_process(tgid: u32) -> bool {
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    SCAN.get_ptr_mut(0)
        .is_some_and(|scan| unsafe { (*scan).tgid } != tgid)
}

/// Counts this file, once per scan: if the buffer is full the kernel visits the same file again, and some kernels (6.1)
/// visit the whole table once per thread. Descriptors arrive in ascending order.
#[inline(always)]
fn count(scan: *mut Scan, task: *const u8, fd: u32) {
    // SAFETY: as above.
    unsafe {
        if (*scan).open == 0 {
            (*scan).limit = nofile(task);
        }
    }
    count_fd(scan, fd);
}

#[inline(always)]
pub fn count_fd(scan: *mut Scan, fd: u32) {
    // SAFETY: as above.
    unsafe {
        if fd >= (*scan).next_fd {
            (*scan).open += 1;
            (*scan).next_fd = fd + 1;
        }
    }
}

/// Stores the number of open files in the entry of the process that the scan has just finished.
#[inline(always)]
pub fn report_count() {
    let Some(scan) = SCAN.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: map entries outlive the visit; only one scan runs at a time.
    unsafe {
        if (*scan).open > 0
            && let Some(entry) = TARGETS.get_ptr_mut((*scan).tgid)
        {
            (*entry).scan = (*scan).number;
            (*entry).open = (*scan).open;
            (*entry).limit = (*scan).limit;
            // Two arguments at most: with more, `files_bounded` exceeds the 512 bytes of stack.
            debug!(
                "file scan: pid {} has {} open files",
                (*scan).tgid,
                (*scan).open
            );
        }
    }
}

/// RLIMIT_NOFILE, soft.
#[inline(always)]
pub fn nofile(task: *const u8) -> u64 {
    /// `rlim[RLIMIT_NOFILE].rlim_cur`, include/uapi/asm-generic/resource.h
    const NOFILE: usize = 7 * 16;
    if offset!(signal_rlim) == ABSENT {
        return 0;
    }
    let signal = load!(task, task_signal, *const u8);
    load!(signal.wrapping_add(NOFILE), signal_rlim, u64)
}

#[inline(always)]
fn visit(
    seq: *mut seq_file,
    handle: Handle,
    file: *const u8,
    scan: *mut Scan,
    queue_loop: QueueLoop,
) {
    let Some(sock) = Sock::of(file) else {
        return visit_non_socket(seq, handle, file, scan, queue_loop);
    };
    let family = sock.family();
    if family == AF_UNIX {
        if offset!(unix_peer) != ABSENT {
            emit_unix(seq, handle, &sock);
        }
        return;
    }
    let Some(tcp) = Tcp::from_sock(sock) else {
        if let Some(listener) = Tcp::mptcp_listener(sock) {
            focus(sock.sk, handle, 0);
            listener.emit_listener(seq, handle, queue_loop);
            return;
        }
        if offset!(udp_forward_deficit) != ABSENT && sock.is(family, SOCK_DGRAM, IPPROTO_UDP) {
            emit_udp(seq, handle, &sock);
        }
        return;
    };
    if tcp.is_listener() {
        focus(sock.sk, handle, 0);
        tcp.emit_listener(seq, handle, queue_loop);
    } else {
        // SAFETY: an array entry lives as long as its map.
        if unsafe { (*scan).flags } & TARGET_FOCUSED != 0 && tcp.is_busy() {
            focus_busy(sock.sk, handle, scan);
        }
        tcp.emit_connection(seq, handle);
    }
}

/// Reports a pipe, an io_uring instance or an epoll instance. The last takes `bpf_loop`.
#[inline(always)]
pub fn visit_non_socket(
    out: impl Sink,
    handle: Handle,
    file: *const u8,
    scan: *mut Scan,
    queue_loop: QueueLoop,
) {
    if offset!(inode_pipe) != ABSENT
        && let Some(pipe) = Pipe::of(file)
    {
        pipe.emit(out, handle);
        return;
    }
    // SAFETY: an array entry lives as long as its map.
    let (ring_operations, epoll_operations) =
        unsafe { ((*scan).ring_operations, (*scan).epoll_operations) };
    if offset!(ring_rings) != ABSENT
        && ring_operations != 0
        && load!(file, file_op, u64) == ring_operations
    {
        emit_ring(out, handle, file);
    } else if matches!(queue_loop, QueueLoop::BpfLoop)
        && offset!(epoll_ready) != ABSENT
        && epoll_operations != 0
        && load!(file, file_op, u64) == epoll_operations
    {
        emit_epoll(out, handle, file, scan);
    }
}

/// Adds a busy socket of a focused target to `FOCUSED_SOCKETS`, if this scan has slots left.
#[inline(always)]
fn focus_busy(sk: *const u8, handle: Handle, scan: *mut Scan) {
    // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
    let (left, ttl_ns) = unsafe { ((*scan).focus_slots_left, (*scan).focus_ttl_ns) };
    if left == 0 {
        return;
    }
    // SAFETY: as above.
    unsafe { (*scan).focus_slots_left = left - 1 };
    // SAFETY: no arguments.
    focus(sk, handle, unsafe { bpf_ktime_get_ns() } + ttl_ns);
}

/// Adds a socket to `FOCUSED_SOCKETS`, or renews its entry.
#[inline(always)]
fn focus(sk: *const u8, handle: Handle, expires_ns: u64) {
    if !has_helper!(sk_storage) {
        return;
    }
    // SAFETY: the map is live and `sk` is a typed, non-null kernel pointer.
    let mark = unsafe {
        bpf_sk_storage_get(
            (&raw const FOCUSED_SOCKETS).cast_mut().cast(),
            sk.cast_mut().cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<FocusedSocket>();
    if !mark.is_null() {
        // SAFETY: storage of this socket, of the size of a `FocusedSocket`.
        unsafe {
            (*mark).tgid = handle.tgid;
            (*mark).fd = handle.fd;
            (*mark).expires_ns = expires_ns;
        }
    }
}
