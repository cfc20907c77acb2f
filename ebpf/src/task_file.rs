//! `iter/task_file`: every open file of every task (the kernel shows a file table once per process).
//!
//! Context, kernel/bpf/task_iter.c (since 5.8):
//! `struct bpf_iter__task_file { struct bpf_iter_meta *meta; struct task_struct *task; u32 fd; struct file *file; }`

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, seq_file},
    helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_get},
};
use tailback_ebpf::{ABSENT, Header, KIND_OPERATIONS, Mark, OperationsRecord, TARGET_HOT, Walk};

use crate::{
    kernel::{
        IterMeta, MARKS, Sink, TARGETS, WALK, at_target, emit, end_of_walk, load, offset, way,
    },
    on_sheet::is_told,
    pipe::Pipe,
    sock::{AF_UNIX, IPPROTO_UDP, SOCK_DGRAM, Sock},
    tcp::{Rounds, Tcp},
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

/// The open file that a visit is about.
#[derive(Clone, Copy)]
pub struct Found {
    pub tgid: u32,
    pub fd: u32,
}

/// Writes a record for everything that a target holds open and that has a queue, and counts its files.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn files(ctx: *const TaskFileContext) -> i32 {
    visit_file(ctx, Rounds::Kernel)
}

/// As `files`, without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn files_bounded(ctx: *const TaskFileContext) -> i32 {
    visit_file(ctx, Rounds::Program)
}

#[inline(always)]
fn visit_file(ctx: *const TaskFileContext, rounds: Rounds) -> i32 {
    let Some((seq, task, found, file)) = file_of(ctx) else {
        tell_count();
        end_of_walk();
        return 0;
    };
    if is_another(found.tgid) {
        tell_count();
    }
    if let Some(walk) = at_target(task, found.tgid) {
        count(walk, task, found.fd);
        if !is_told(found.fd) {
            visit(seq, found, file, walk, rounds);
        }
    }
    0
}

/// Writes a record for every listening socket, pipe end and unix socket of every process, and for the connections that
/// are asked for: who listens where, and who holds the other ends of what targets hold.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn holders(ctx: *const TaskFileContext) -> i32 {
    let Some((seq, _, found, file)) = file_of(ctx) else {
        return 0;
    };
    let Some(sock) = Sock::of(file) else {
        if offset!(inode_pipe) != ABSENT
            && let Some(pipe) = Pipe::of(file)
        {
            pipe.emit_holder(seq, found);
        }
        return 0;
    };
    if sock.family() == AF_UNIX {
        if offset!(unix_peer) != ABSENT {
            unix::emit_holder(seq, found, &sock);
        }
    } else if let Some(tcp) = Tcp::from_sock(sock) {
        if tcp.is_listener() {
            tcp.emit_listener_only(seq, found);
        } else if tcp.is_wanted() {
            tcp.emit_peer(seq, found);
        }
    } else if let Some(listener) = Tcp::listening_for(sock) {
        listener.emit_listener_only(seq, found);
    }
    0
}

/// Writes which operations each open file of the agent itself has.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn operations(ctx: *const TaskFileContext) -> i32 {
    if let Some((seq, _, found, file)) = file_of(ctx)
        && let Some(walk) = WALK.get_ptr_mut(0)
        // SAFETY: an array entry lives as long as its map.
        && unsafe { (*walk).own_tgid } == found.tgid
        && offset!(file_op) != ABSENT
    {
        let record = OperationsRecord {
            header: Header {
                kind: KIND_OPERATIONS,
                len: size_of::<OperationsRecord>() as u16,
                tgid: found.tgid,
            },
            fd: found.fd,
            reserved: 0,
            operations: load!(file, file_op, u64),
        };
        emit(seq, &record);
    }
    0
}

/// The file of this visit; `None` at the end of the walk, when the kernel calls once more without one.
#[inline(always)]
fn file_of(ctx: *const TaskFileContext) -> Option<(*mut seq_file, *const u8, Found, *const u8)> {
    // SAFETY: the kernel passes a context of this shape to programs of this section.
    let (meta, task, fd, file) = unsafe { ((*ctx).meta, (*ctx).task, (*ctx).fd, (*ctx).file) };
    if task.is_null() || file.is_null() {
        return None;
    }
    let tgid = load!(task, task_tgid, u32);
    // SAFETY: `meta` is valid for the time of the visit.
    Some((unsafe { (*meta).seq }, task, Found { tgid, fd }, file))
}

/// Whether the visit before this one was of another process.
#[inline(always)]
fn is_another(tgid: u32) -> bool {
    // SAFETY: an array entry lives as long as its map; only one walk runs at a time.
    WALK.get_ptr_mut(0)
        .is_some_and(|walk| unsafe { (*walk).tgid } != tgid)
}

/// Counts this file, once per walk: when the buffer is full the kernel shows the same file again, and some kernels (6.1)
/// show the whole table once for each thread. Descriptors come in ascending order.
#[inline(always)]
fn count(walk: *mut Walk, task: *const u8, fd: u32) {
    // SAFETY: as above.
    unsafe {
        if (*walk).open == 0 {
            (*walk).limit = nofile(task);
        }
    }
    count_one(walk, fd);
}

#[inline(always)]
pub fn count_one(walk: *mut Walk, fd: u32) {
    // SAFETY: as above.
    unsafe {
        if fd >= (*walk).next_fd {
            (*walk).open += 1;
            (*walk).next_fd = fd + 1;
        }
    }
}

/// The process is done with: what was counted goes to its entry.
#[inline(always)]
pub fn tell_count() {
    let Some(walk) = WALK.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: entries of maps, which outlive the visit; only one walk runs at a time.
    unsafe {
        if (*walk).open > 0
            && let Some(entry) = TARGETS.get_ptr_mut((*walk).tgid)
        {
            (*entry).walk = (*walk).walk;
            (*entry).open = (*walk).open;
            (*entry).limit = (*walk).limit;
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
fn visit(seq: *mut seq_file, found: Found, file: *const u8, walk: *mut Walk, rounds: Rounds) {
    let Some(sock) = Sock::of(file) else {
        return visit_other(seq, found, file, walk);
    };
    let family = sock.family();
    if family == AF_UNIX {
        if offset!(unix_peer) != ABSENT {
            emit_unix(seq, found, &sock);
        }
        return;
    }
    let Some(tcp) = Tcp::from_sock(sock) else {
        if let Some(listener) = Tcp::listening_for(sock) {
            mark(sock.sk, found, 0);
            listener.emit_listener(seq, found, rounds);
            return;
        }
        if offset!(udp_forward_deficit) != ABSENT && sock.is(family, SOCK_DGRAM, IPPROTO_UDP) {
            emit_udp(seq, found, &sock);
        }
        return;
    };
    if tcp.is_listener() {
        mark(sock.sk, found, 0);
        tcp.emit_listener(seq, found, rounds);
    } else {
        // SAFETY: an array entry lives as long as its map.
        if unsafe { (*walk).flags } & TARGET_HOT != 0 && tcp.is_busy() {
            mark_busy(sock.sk, found, walk);
        }
        tcp.emit_connection(seq, found);
    }
}

/// What is no socket.
#[inline(always)]
pub fn visit_other(out: impl Sink, found: Found, file: *const u8, walk: *const Walk) {
    if offset!(inode_pipe) != ABSENT
        && let Some(pipe) = Pipe::of(file)
    {
        pipe.emit(out, found);
        return;
    }
    // SAFETY: an array entry lives as long as its map.
    let ring_operations = unsafe { (*walk).ring_operations };
    if offset!(ring_rings) != ABSENT
        && ring_operations != 0
        && load!(file, file_op, u64) == ring_operations
    {
        emit_ring(out, found, file);
    }
}

/// Marks a busy socket of a hot target for a closer look, as long as this walk may mark more.
#[inline(always)]
fn mark_busy(sk: *const u8, found: Found, walk: *mut Walk) {
    // SAFETY: an array entry lives as long as its map; only one walk runs at a time.
    let (left, ttl_ns) = unsafe { ((*walk).marks_left, (*walk).mark_ttl_ns) };
    if left == 0 {
        return;
    }
    // SAFETY: as above.
    unsafe { (*walk).marks_left = left - 1 };
    // SAFETY: no arguments.
    mark(sk, found, unsafe { bpf_ktime_get_ns() } + ttl_ns);
}

#[inline(always)]
fn mark(sk: *const u8, found: Found, expires_ns: u64) {
    if !way!(marks) {
        return;
    }
    // SAFETY: the map is live and `sk` is a typed, non-null kernel pointer.
    let mark = unsafe {
        bpf_sk_storage_get(
            (&raw const MARKS).cast_mut().cast(),
            sk.cast_mut().cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    }
    .cast::<Mark>();
    if !mark.is_null() {
        // SAFETY: storage of this socket, of the size of a `Mark`.
        unsafe {
            (*mark).tgid = found.tgid;
            (*mark).fd = found.fd;
            (*mark).expires_ns = expires_ns;
        }
    }
}
