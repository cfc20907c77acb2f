//! `iter/task_file`: every open file of every task (the kernel shows a file table once per process).
//!
//! Context, kernel/bpf/task_iter.c (since 5.8):
//! `struct bpf_iter__task_file { struct bpf_iter_meta *meta; struct task_struct *task; u32 fd; struct file *file; }`

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, seq_file},
    helpers::generated::{
        bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_sk_storage_get, bpf_sock_from_file,
    },
};
use tailback_ebpf::{
    ABSENT, Header, KIND_PIPE, Mark, PIPE_BYTES_UNKNOWN, PIPE_READ_END, PIPE_WRITE_END, PipeRecord,
    TARGET_HOT,
};

use crate::{
    kernel::{IterMeta, MARKS, WALK, emit, load, offset, target_flags},
    tcp::{Found, Tcp},
};

#[repr(C)]
pub struct TaskFileContext {
    meta: *const IterMeta,
    task: *const u8,
    fd: u32,
    file: *const u8,
}

/// include/uapi/linux/stat.h
const S_IFMT: u16 = 0o170_000;
const S_IFIFO: u16 = 0o010_000;
/// include/linux/fs.h
const FMODE_READ: u32 = 1;
const FMODE_WRITE: u32 = 2;
/// Buffers of one pipe whose bytes are added up: the default ring.
const PIPE_BUFFERS_READ: u32 = 16;

/// Writes a record for every TCP socket and pipe that a target holds open.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn files(ctx: *const TaskFileContext) -> i32 {
    if let Some((seq, task, found, file)) = file_of(ctx)
        && let Some(flags) = target_flags(task, found.tgid)
    {
        visit(seq, found, file, flags);
    }
    0
}

/// Writes a record for every listening socket of every process: who listens on which port.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn listeners(ctx: *const TaskFileContext) -> i32 {
    if let Some((seq, _, found, file)) = file_of(ctx)
        && let Some(sk) = sock_of(file)
        && let Some(tcp) = Tcp::from_sock(sk)
        && tcp.is_listener()
    {
        tcp.emit_listener_only(seq, found);
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

#[inline(always)]
fn sock_of(file: *const u8) -> Option<*const u8> {
    // SAFETY: a typed, non-null kernel pointer; the helper answers null for what is not a socket.
    let socket = unsafe { bpf_sock_from_file(file.cast_mut().cast()) }.cast::<u8>();
    if socket.is_null() {
        return None;
    }
    let sk = load!(socket, socket_sk, *const u8);
    if sk.is_null() { None } else { Some(sk) }
}

#[inline(always)]
fn visit(seq: *mut seq_file, found: Found, file: *const u8, flags: u32) {
    let Some(sk) = sock_of(file) else {
        if offset!(inode_pipe) != ABSENT {
            visit_pipe(seq, found, file);
        }
        return;
    };
    let Some(tcp) = Tcp::from_sock(sk) else {
        return;
    };
    if tcp.is_listener() {
        mark(sk, found, 0);
        tcp.emit_listener(seq, found);
    } else {
        if flags & TARGET_HOT != 0 && tcp.is_busy() {
            mark_busy(sk, found);
        }
        tcp.emit_connection(seq, found);
    }
}

/// Marks a busy socket of a hot target for a closer look, as long as this walk may mark more.
#[inline(always)]
fn mark_busy(sk: *const u8, found: Found) {
    let Some(walk) = WALK.get_ptr_mut(0) else {
        return;
    };
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

#[inline(always)]
fn visit_pipe(seq: *mut seq_file, found: Found, file: *const u8) {
    let inode = load!(file, file_inode, *const u8);
    if load!(inode, inode_mode, u16) & S_IFMT != S_IFIFO {
        return;
    }
    let pipe = load!(inode, inode_pipe, *const u8);
    if pipe.is_null() {
        return;
    }
    let mode = load!(file, file_mode, u32);
    let mut end = 0;
    if mode & FMODE_READ != 0 {
        end |= PIPE_READ_END;
    }
    if mode & FMODE_WRITE != 0 {
        end |= PIPE_WRITE_END;
    }
    let head = load!(pipe, pipe_head, u32);
    let tail = load!(pipe, pipe_tail, u32);
    emit(
        seq,
        &PipeRecord {
            header: Header {
                kind: KIND_PIPE,
                len: size_of::<PipeRecord>() as u16,
                tgid: found.tgid,
            },
            inode: load!(inode, inode_ino, u64),
            fd: found.fd,
            end,
            head,
            tail,
            limit: load!(pipe, pipe_max_usage, u32),
            bytes: pipe_bytes(pipe, head, tail),
            readers: load!(pipe, pipe_readers, u32),
            writers: load!(pipe, pipe_writers, u32),
            reserved: 0,
        },
    );
}

/// Bytes in the pipe: each occupied buffer of the ring holds up to a page.
#[inline(always)]
fn pipe_bytes(pipe: *const u8, head: u32, tail: u32) -> u32 {
    let used = head.wrapping_sub(tail);
    if used == 0 {
        return 0;
    }
    if used > PIPE_BUFFERS_READ {
        return PIPE_BYTES_UNKNOWN;
    }
    let ring = load!(pipe, pipe_bufs, *const u8);
    let mask = load!(pipe, pipe_ring_size, u32).wrapping_sub(1);
    let mut bytes: u32 = 0;
    let mut i = 0;
    while i < PIPE_BUFFERS_READ {
        if i >= used {
            break;
        }
        let slot = u64::from(tail.wrapping_add(i) & mask);
        let at = slot * u64::from(offset!(pipe_buffer_size)) + u64::from(offset!(pipe_buffer_len));
        let mut len: u32 = 0;
        // The ring is an array behind a pointer, which typed loads cannot index: this one is a probe read.
        // SAFETY: the helper checks the address; `len` is a live u32.
        let read = unsafe {
            bpf_probe_read_kernel(
                (&raw mut len).cast(),
                size_of::<u32>() as u32,
                ring.wrapping_add(at as usize).cast(),
            )
        };
        if read != 0 {
            return PIPE_BYTES_UNKNOWN;
        }
        bytes = bytes.wrapping_add(len);
        i += 1;
    }
    bytes
}
