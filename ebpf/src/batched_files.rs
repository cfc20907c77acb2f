//! `iter/task`, bound to one thread: all open files of its process in a single visit.
//!
//! The kernel's own iterator takes and drops a reference to each file, and stalls on the cache misses of one socket after
//! the other. This program reads the file table itself, in batches of descriptors: first all their files, then all their
//! sockets, then the fields of each socket. The cache misses of a batch overlap.
//!
//! The program holds nothing but the RCU read lock. That keeps the table in place, but files and sockets may be closed
//! and their memory reused. So a record counts only if, once it is written, the descriptor still has the same file and
//! the socket the same cookie, which the kernel never reuses. What takes more than reading is deferred to the kernel's
//! own iterator: sockets without a cookie, and sockets to be added to `FOCUSED_SOCKETS`.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_kernel};
use tailback_ebpf::{
    ABSENT, BATCH_FDS, ListenerRecord, MAX_BATCHED_FDS, MAX_WAITING, OUTPUT_BYTES, OutputBuffer,
    Scan, TARGET_FOCUSED,
};

use crate::{
    buffer_sink::{BufferSink, OUTPUT, defer},
    cast::cast,
    kernel::{SCAN, at_target, has_helper, load, load_or, offset, read_barrier},
    log::debug,
    sock::{AF_UNIX, IPPROTO_UDP, SOCK_DGRAM, Sock},
    task::{TaskContext, task_of},
    task_file::{Handle, count_fd, nofile, report_count, visit_non_socket},
    tcp::{QueueLoop, Tcp},
    udp::emit_udp,
    unix::fill_unix,
};

/// Upper bound of what one batch writes, bytes: the largest record, a listener's, for each descriptor.
const BATCH_BYTES: u32 =
    BATCH_FDS as u32 * (size_of::<ListenerRecord>() as u32 + MAX_WAITING * size_of::<u64>() as u32);

/// Progress along the file table.
#[repr(C)]
struct Files {
    /// Address and length of the table's array of files.
    array: u64,
    len: u32,
    /// The first descriptor of the batch.
    fd: u32,
    tgid: u32,
    is_focused: u32,
}

/// Writes a record for every open file of this task's process that has a queue to the output buffer, and counts its files.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn batched_files(ctx: *const TaskContext) -> i32 {
    let Some((_, task)) = task_of(ctx) else {
        return 0;
    };
    let Some(output) = OUTPUT.get_ptr_mut(0) else {
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    let Some(scan) = at_target(task, tgid) else {
        return 0;
    };
    let table = load!(task, task_files, *const u8);
    if table.is_null() {
        return 0;
    }
    // A thread with a file table of its own, or a table that processes share, is left to the kernel's own iterator.
    let signal = load!(task, task_signal, *const u8);
    if load!(table, files_count, u32) != load!(signal, signal_nr_threads, u32) {
        debug!("pid {}: not all threads share one file table", tgid);
        return 0;
    }
    let fdt = load!(table, files_fdt, *const u8);
    if fdt.is_null() {
        return 0;
    }
    let array = load!(fdt, fdt_fd, u64);
    // SAFETY: map entries outlive the visit; only one scan runs at a time.
    unsafe {
        if (*scan).open == 0 {
            (*scan).limit = nofile(task);
        }
        let mut files = Files {
            array,
            len: load_len(fdt),
            fd: (*output).next_fd,
            tgid,
            is_focused: (*scan).flags & TARGET_FOCUSED,
        };
        bpf_loop(
            MAX_BATCHED_FDS / BATCH_FDS as u32,
            visit_batch as *mut c_void,
            (&raw mut files).cast(),
            0,
        );
        // If the process ended, replaced its table or grew it, the memory that was read may belong to something else.
        if is_unchanged(task, table, array) {
            (*output).next_fd = files.fd;
            (*output).is_complete = u32::from(files.fd >= files.len);
            report_count();
            debug!(
                "batched file scan: pid {} up to descriptor {} of {}, {} deferred, {} bytes of records",
                tgid,
                files.fd,
                files.len,
                (*output).deferred,
                (*output).used
            );
        } else {
            (*output).used = 0;
            (*output).is_full = 1;
            debug!("pid {}: the file table changed during the scan", tgid);
        }
    }
    0
}

#[inline(always)]
fn load_len(fdt: *const u8) -> u32 {
    load!(fdt, fdt_max_fds, u32)
}

#[inline(always)]
fn is_unchanged(task: *const u8, table: *const u8, array: u64) -> bool {
    read_barrier();
    if load!(task, task_files, u64) != table as u64 {
        return false;
    }
    let fdt = load!(table, files_fdt, *const u8);
    !fdt.is_null() && load!(fdt, fdt_fd, u64) == array
}

/// Processes one batch; returns 1 to stop at the end of the table, or if the output buffer cannot take another batch.
#[inline(never)]
extern "C" fn visit_batch(_index: u64, files: *mut Files) -> i64 {
    let Some(output) = OUTPUT.get_ptr_mut(0) else {
        return 1;
    };
    let Some(scan) = SCAN.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: the caller's struct, which outlives the call, and a map entry.
    unsafe {
        let fd = (*files).fd;
        if fd >= (*files).len
            || fd >= MAX_BATCHED_FDS
            || (*output).used > OUTPUT_BYTES - BATCH_BYTES
        {
            return 1;
        }
        bpf_probe_read_kernel(
            (&raw mut (*output).files).cast(),
            size_of::<[u64; BATCH_FDS]>() as u32,
            ((*files).array + u64::from(fd) * 8) as *const c_void,
        );
        find_sockets(output, (*scan).socket_operations);
        (*output).listeners = 0;
        (*output).others = 0;
        let each = |visit: *mut c_void| bpf_loop(BATCH_FDS as u32, visit, files.cast(), 0);
        each(visit_connection as *mut c_void);
        if (*output).listeners != 0 {
            each(visit_listener as *mut c_void);
        }
        if (*output).others != 0 {
            each(visit_non_tcp as *mut c_void);
        }
        (*files).fd = fd + BATCH_FDS as u32;
    }
    0
}

/// Follows all files of the batch to their sockets, and pulls the fields that will be read into the cache.
#[inline(always)]
unsafe fn find_sockets(output: *mut OutputBuffer, socket_operations: u64) {
    for i in 0..BATCH_FDS {
        // SAFETY: within the array of a live map entry, here and below.
        let file = unsafe { (*output).files[i] } as *const u8;
        let mut socket = 0;
        if !file.is_null() {
            let file = cast!(file, file);
            if load!(file, file_op, u64) == socket_operations {
                socket = load!(file, file_private_data, u64);
            }
        }
        // SAFETY: as above.
        unsafe { (*output).sockets[i] = socket };
    }
    for i in 0..BATCH_FDS {
        // SAFETY: as above.
        let socket = unsafe { (*output).sockets[i] } as *const u8;
        let mut sk = 0;
        if !socket.is_null() {
            sk = load!(cast!(socket, socket), socket_sk, u64);
        }
        // SAFETY: as above.
        unsafe { (*output).sks[i] = sk };
    }
    for i in 0..BATCH_FDS {
        // SAFETY: as above.
        let sk = unsafe { (*output).sks[i] } as *const u8;
        if !sk.is_null() {
            prefetch(cast!(sk, sock), cast!(sk, tcp_sock));
        }
    }
}

/// Loads from each cache line that a connection's record needs.
#[inline(always)]
fn prefetch(sk: *const u8, tcp: *const u8) {
    load!(sk, sk_state, u8);
    load!(sk, sk_cookie, u64);
    load!(sk, sk_protocol, u16);
    load!(tcp, tcp_rcv_nxt, u32);
    load!(tcp, tcp_copied_seq, u32);
    load!(tcp, tcp_write_seq, u32);
    load_or!(tcp, tcp_lrcvtime, u32, 0);
    load_or!(tcp, tcp_data_segs_in, u32, 0);
}

/// The visit of one descriptor of the batch.
struct Visit {
    output: *mut OutputBuffer,
    scan: *mut Scan,
    handle: Handle,
    file: *const u8,
    sk: *const u8,
    /// The socket's cookie before any other field was read.
    cookie: u64,
    /// Address of the descriptor's slot in the table.
    slot: *const u8,
    /// Bytes in the output buffer before this visit.
    used: u32,
    bit: u32,
}

impl Visit {
    #[inline(always)]
    fn at(index: u64, files: *const Files) -> Option<Self> {
        let i = index as usize & (BATCH_FDS - 1);
        let output = OUTPUT.get_ptr_mut(0)?;
        let scan = SCAN.get_ptr_mut(0)?;
        // SAFETY: within the arrays of a live map entry; the caller's struct outlives the call.
        let (file, sk, used, fd, tgid, array) = unsafe {
            (
                at(&raw const (*output).files, i) as *const u8,
                at(&raw const (*output).sks, i) as *const u8,
                (*output).used,
                (*files).fd + i as u32,
                (*files).tgid,
                (*files).array,
            )
        };
        if file.is_null() {
            return None;
        }
        let mut visit = Self {
            output,
            scan,
            handle: Handle { tgid, fd },
            file,
            sk,
            cookie: 0,
            slot: (array + u64::from(fd) * 8) as *const u8,
            used,
            bit: 1 << i,
        };
        if !sk.is_null() {
            visit.sk = cast!(sk, sock);
            visit.cookie = load!(visit.sk, sk_cookie, u64);
            read_barrier();
        }
        Some(visit)
    }

    #[inline(always)]
    fn defer(&self) {
        defer(self.output, self.handle.fd);
    }

    /// Keeps the record if the descriptor still has the same file, and the socket the same cookie; else discards and defers.
    #[inline(always)]
    fn confirm(&self) {
        read_barrier();
        let now = load_first(cast!(self.slot, list_head));
        let is_same = now == self.file as u64
            && (self.sk.is_null() || load!(self.sk, sk_cookie, u64) == self.cookie);
        if !is_same {
            // SAFETY: an array entry lives as long as its map; only one scan runs at a time.
            unsafe { (*self.output).used = self.used };
            self.defer();
        }
    }
}

#[inline(always)]
unsafe fn at(array: *const [u64; BATCH_FDS], index: usize) -> u64 {
    // SAFETY: the caller guarantees that the index is within the array.
    unsafe { *array.cast::<u64>().add(index) }
}

#[inline(always)]
fn load_first(at: *const u8) -> u64 {
    // SAFETY: a BTF-typed kernel pointer; the kernel handles a fault in such a load.
    unsafe { core::ptr::read_volatile(at.cast::<u64>()) }
}

/// Counts the file and writes the record of a connection. Listeners and other files are noted for a later pass: each kind of
/// record has a function of its own, to fit into the 512 bytes of stack.
#[inline(never)]
extern "C" fn visit_connection(index: u64, files: *mut Files) -> i64 {
    let Some(visit) = Visit::at(index, files) else {
        return 0;
    };
    count_fd(visit.scan, visit.handle.fd);
    // SAFETY: a live map entry, here and below; the caller's struct outlives the call.
    let others = unsafe { &raw mut (*visit.output).others };
    // SAFETY: as above.
    let listeners = unsafe { &raw mut (*visit.output).listeners };
    // SAFETY: as above.
    let is_focused = unsafe { (*files).is_focused } != 0;
    if visit.sk.is_null() {
        // SAFETY: as above.
        unsafe { *others |= visit.bit };
        return 0;
    }
    let sock = Sock::cast(visit.sk);
    let Some(tcp) = Tcp::cast(sock) else {
        // SAFETY: as above.
        unsafe {
            if Tcp::mptcp_listener(sock).is_some() {
                *listeners |= visit.bit;
            } else {
                *others |= visit.bit;
            }
        }
        return 0;
    };
    if tcp.is_listener() {
        // SAFETY: as above.
        unsafe { *listeners |= visit.bit };
    } else if visit.cookie == 0 || is_focused && tcp.is_busy() {
        visit.defer();
    } else {
        tcp.emit_connection(BufferSink(visit.output), visit.handle);
        visit.confirm();
    }
    0
}

/// Writes the record of a listener. One that is not in `FOCUSED_SOCKETS` yet has empty socket storage.
#[inline(never)]
extern "C" fn visit_listener(index: u64, files: *mut Files) -> i64 {
    let Some(visit) = Visit::at(index, files) else {
        return 0;
    };
    // SAFETY: a live map entry.
    if unsafe { (*visit.output).listeners } & visit.bit == 0 || visit.sk.is_null() {
        return 0;
    }
    let has_storage = !has_helper!(sk_storage) || load!(visit.sk, sk_bpf_storage, u64) != 0;
    if visit.cookie == 0 || !has_storage {
        visit.defer();
        return 0;
    }
    let sock = Sock::cast(visit.sk);
    let listener = match Tcp::mptcp_listener(sock) {
        Some(listener) => listener,
        None => Tcp::untrusted(sock),
    };
    listener.emit_listener(BufferSink(visit.output), visit.handle, QueueLoop::BpfLoop);
    visit.confirm();
    0
}

/// Writes the record of a file that is not a TCP socket.
#[inline(never)]
extern "C" fn visit_non_tcp(index: u64, files: *mut Files) -> i64 {
    let Some(visit) = Visit::at(index, files) else {
        return 0;
    };
    // SAFETY: a live map entry.
    if unsafe { (*visit.output).others } & visit.bit == 0 {
        return 0;
    }
    let out = BufferSink(visit.output);
    if visit.sk.is_null() {
        visit_non_socket(
            out,
            visit.handle,
            cast!(visit.file, file),
            visit.scan,
            QueueLoop::BpfLoop,
        );
        visit.confirm();
        return 0;
    }
    let sock = Sock::cast(visit.sk);
    let family = sock.family();
    if family == AF_UNIX {
        if offset!(unix_peer) != ABSENT
            && let Some(record) = out.reserve()
        {
            fill_unix(record, visit.handle, &sock);
        }
    } else if offset!(udp_forward_deficit) != ABSENT && sock.is(family, SOCK_DGRAM, IPPROTO_UDP) {
        if visit.cookie == 0 {
            visit.defer();
            return 0;
        }
        emit_udp(out, visit.handle, &sock);
    }
    visit.confirm();
    0
}
