//! `iter/task`, once for a process: all of its open files in one visit.
//!
//! The kernel's own walk takes and drops a reference to each file, and what a socket needs is then waited for, one socket
//! after the other. Here one visit reads the table itself, some descriptors at a time: first all their files, then all
//! their sockets, then what is needed of each, so that many waits for memory pass at once.
//!
//! Nothing is held meanwhile but RCU, under which the table stays in place; files and sockets may be closed and their
//! memory be given to others. So a record stands only if, after it was written, the descriptor still has the same file
//! and the socket the same cookie, which the kernel gives out once. What needs more than reading is left to the kernel's
//! own walk: sockets without a cookie, and those that are to be marked.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_kernel};
use tailback_ebpf::{
    ABSENT, BATCH, ListenerRecord, MAX_QUICK_FDS, MAX_WAITING, SHEET_BYTES, Sheet, TARGET_HOT, Walk,
};

use crate::{
    cast::cast,
    kernel::{WALK, at_target, load, load_or, offset, way},
    on_sheet::{OnSheet, SHEET, leave},
    sock::{AF_UNIX, IPPROTO_UDP, SOCK_DGRAM, Sock},
    task::{TaskContext, task_of},
    task_file::{Found, count_one, nofile, tell_count, visit_other},
    tcp::{Rounds, Tcp},
    udp::emit_udp,
    unix::fill_unix,
};

/// What one batch may write: the largest record, which a listener's is, of each.
const BATCH_BYTES: u32 =
    BATCH as u32 * (size_of::<ListenerRecord>() as u32 + MAX_WAITING * size_of::<u64>() as u32);

/// Where the walk is.
#[repr(C)]
struct Files {
    /// The table's array of files, and its length.
    array: u64,
    len: u32,
    /// The first descriptor of the batch.
    fd: u32,
    tgid: u32,
    is_focused: u32,
}

/// Writes a record for everything that the process of this task holds open and that has a queue on the sheet, and counts
/// its files.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn quick_files(ctx: *const TaskContext) -> i32 {
    let Some((_, task)) = task_of(ctx) else {
        return 0;
    };
    let Some(sheet) = SHEET.get_ptr_mut(0) else {
        return 0;
    };
    let tgid = load!(task, task_tgid, u32);
    let Some(walk) = at_target(task, tgid) else {
        return 0;
    };
    let table = load!(task, task_files, *const u8);
    if table.is_null() {
        return 0;
    }
    // A thread with files of its own, or another process that shares these: the kernel's own walk can tell.
    let signal = load!(task, task_signal, *const u8);
    if load!(table, files_count, u32) != load!(signal, signal_nr_threads, u32) {
        return 0;
    }
    let fdt = load!(table, files_fdt, *const u8);
    if fdt.is_null() {
        return 0;
    }
    let array = load!(fdt, fdt_fd, u64);
    // SAFETY: entries of maps, which outlive the visit; only one walk runs at a time.
    unsafe {
        if (*walk).open == 0 {
            (*walk).limit = nofile(task);
        }
        let mut files = Files {
            array,
            len: load_len(fdt),
            fd: (*sheet).next_fd,
            tgid,
            is_focused: (*walk).flags & TARGET_HOT,
        };
        bpf_loop(
            MAX_QUICK_FDS / BATCH as u32,
            look_at_batch as *mut c_void,
            (&raw mut files).cast(),
            0,
        );
        // The process ended or has another table, or the table grew, and what was read may be anyone's.
        if still(task, table, array) {
            (*sheet).next_fd = files.fd;
            (*sheet).is_whole = u32::from(files.fd >= files.len);
            tell_count();
        } else {
            (*sheet).used = 0;
            (*sheet).is_full = 1;
        }
    }
    0
}

#[inline(always)]
fn load_len(fdt: *const u8) -> u32 {
    load!(fdt, fdt_max_fds, u32)
}

#[inline(always)]
fn still(task: *const u8, table: *const u8, array: u64) -> bool {
    if load!(task, task_files, u64) != table as u64 {
        return false;
    }
    let fdt = load!(table, files_fdt, *const u8);
    !fdt.is_null() && load!(fdt, fdt_fd, u64) == array
}

/// 1 once there is nothing left, or no room.
#[inline(never)]
extern "C" fn look_at_batch(_index: u64, files: *mut Files) -> i64 {
    let Some(sheet) = SHEET.get_ptr_mut(0) else {
        return 1;
    };
    let Some(walk) = WALK.get_ptr_mut(0) else {
        return 1;
    };
    // SAFETY: the caller's, which waits for us, and an entry of a map.
    unsafe {
        let fd = (*files).fd;
        if fd >= (*files).len || fd >= MAX_QUICK_FDS || (*sheet).used > SHEET_BYTES - BATCH_BYTES {
            return 1;
        }
        bpf_probe_read_kernel(
            (&raw mut (*sheet).files).cast(),
            size_of::<[u64; BATCH]>() as u32,
            ((*files).array + u64::from(fd) * 8) as *const c_void,
        );
        find_sockets(sheet, (*walk).socket_operations);
        (*sheet).listeners = 0;
        (*sheet).others = 0;
        let each = |look: *mut c_void| bpf_loop(BATCH as u32, look, files.cast(), 0);
        each(look_at_connection as *mut c_void);
        if (*sheet).listeners != 0 {
            each(look_at_listener as *mut c_void);
        }
        if (*sheet).others != 0 {
            each(look_at_other as *mut c_void);
        }
        (*files).fd = fd + BATCH as u32;
    }
    0
}

/// Follows all files of the batch to their sockets, and touches what will be read of these.
#[inline(always)]
unsafe fn find_sockets(sheet: *mut Sheet, socket_operations: u64) {
    for i in 0..BATCH {
        // SAFETY: within the array of a live map entry, here and below.
        let file = unsafe { (*sheet).files[i] } as *const u8;
        let mut socket = 0;
        if !file.is_null() {
            let file = cast!(file, file);
            if load!(file, file_op, u64) == socket_operations {
                socket = load!(file, file_private_data, u64);
            }
        }
        // SAFETY: as above.
        unsafe { (*sheet).sockets[i] = socket };
    }
    for i in 0..BATCH {
        // SAFETY: as above.
        let socket = unsafe { (*sheet).sockets[i] } as *const u8;
        let mut sk = 0;
        if !socket.is_null() {
            sk = load!(cast!(socket, socket), socket_sk, u64);
        }
        // SAFETY: as above.
        unsafe { (*sheet).sks[i] = sk };
    }
    for i in 0..BATCH {
        // SAFETY: as above.
        let sk = unsafe { (*sheet).sks[i] } as *const u8;
        if !sk.is_null() {
            touch(cast!(sk, sock), cast!(sk, tcp_sock));
        }
    }
}

/// Loads from each cache line that a connection's record needs.
#[inline(always)]
fn touch(sk: *const u8, tcp: *const u8) {
    load!(sk, sk_state, u8);
    load!(sk, sk_cookie, u64);
    load!(sk, sk_protocol, u16);
    load!(tcp, tcp_rcv_nxt, u32);
    load!(tcp, tcp_copied_seq, u32);
    load!(tcp, tcp_write_seq, u32);
    load_or!(tcp, tcp_lrcvtime, u32, 0);
    load_or!(tcp, tcp_data_segs_in, u32, 0);
}

/// One file of the batch.
struct Look {
    sheet: *mut Sheet,
    walk: *mut Walk,
    found: Found,
    file: *const u8,
    sk: *const u8,
    /// Its cookie before anything else was read.
    cookie: u64,
    /// Where the table has the file.
    place: *const u8,
    /// What the sheet held before.
    used: u32,
    bit: u32,
}

impl Look {
    #[inline(always)]
    fn at(index: u64, files: *const Files) -> Option<Self> {
        let i = index as usize & (BATCH - 1);
        let sheet = SHEET.get_ptr_mut(0)?;
        let walk = WALK.get_ptr_mut(0)?;
        // SAFETY: within the arrays of a live map entry; the caller's, which waits for us.
        let (file, sk, used, fd, tgid, array) = unsafe {
            (
                at(&raw const (*sheet).files, i) as *const u8,
                at(&raw const (*sheet).sks, i) as *const u8,
                (*sheet).used,
                (*files).fd + i as u32,
                (*files).tgid,
                (*files).array,
            )
        };
        if file.is_null() {
            return None;
        }
        let mut look = Self {
            sheet,
            walk,
            found: Found { tgid, fd },
            file,
            sk,
            cookie: 0,
            place: (array + u64::from(fd) * 8) as *const u8,
            used,
            bit: 1 << i,
        };
        if !sk.is_null() {
            look.sk = cast!(sk, sock);
            look.cookie = load!(look.sk, sk_cookie, u64);
        }
        Some(look)
    }

    #[inline(always)]
    fn leave(&self) {
        leave(self.sheet, self.found.fd);
    }

    /// What was written stands if the descriptor still has the file, and the socket its cookie.
    #[inline(always)]
    fn confirm(&self) {
        let now = load_first(cast!(self.place, list_head));
        let is_same = now == self.file as u64
            && (self.sk.is_null() || load!(self.sk, sk_cookie, u64) == self.cookie);
        if !is_same {
            // SAFETY: an array entry lives as long as its map; only one walk runs at a time.
            unsafe { (*self.sheet).used = self.used };
            self.leave();
        }
    }
}

#[inline(always)]
unsafe fn at(array: *const [u64; BATCH], index: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { *array.cast::<u64>().add(index) }
}

#[inline(always)]
fn load_first(at: *const u8) -> u64 {
    // SAFETY: a BTF-typed kernel pointer; the kernel handles a fault in such a load.
    unsafe { core::ptr::read_volatile(at.cast::<u64>()) }
}

/// Counts the file, and tells of a connection. Listeners and all else are put aside: each kind of record has its own
/// function, for all that the programs may have on their stacks is 512 bytes.
#[inline(never)]
extern "C" fn look_at_connection(index: u64, files: *mut Files) -> i64 {
    let Some(look) = Look::at(index, files) else {
        return 0;
    };
    count_one(look.walk, look.found.fd);
    // SAFETY: a live map entry, here and below; the caller's, which waits for us.
    let others = unsafe { &raw mut (*look.sheet).others };
    // SAFETY: as above.
    let listeners = unsafe { &raw mut (*look.sheet).listeners };
    // SAFETY: as above.
    let is_focused = unsafe { (*files).is_focused } != 0;
    if look.sk.is_null() {
        // SAFETY: as above.
        unsafe { *others |= look.bit };
        return 0;
    }
    let sock = Sock::cast(look.sk);
    let Some(tcp) = Tcp::cast(sock) else {
        // SAFETY: as above.
        unsafe {
            if Tcp::listening_for(sock).is_some() {
                *listeners |= look.bit;
            } else {
                *others |= look.bit;
            }
        }
        return 0;
    };
    if tcp.is_listener() {
        // SAFETY: as above.
        unsafe { *listeners |= look.bit };
    } else if look.cookie == 0 || is_focused && tcp.is_busy() {
        look.leave();
    } else {
        tcp.emit_connection(OnSheet(look.sheet), look.found);
        look.confirm();
    }
    0
}

/// Tells of a listener. One that is not marked yet has nothing in its storage.
#[inline(never)]
extern "C" fn look_at_listener(index: u64, files: *mut Files) -> i64 {
    let Some(look) = Look::at(index, files) else {
        return 0;
    };
    // SAFETY: a live map entry.
    if unsafe { (*look.sheet).listeners } & look.bit == 0 || look.sk.is_null() {
        return 0;
    }
    let is_marked = !way!(marks) || load!(look.sk, sk_bpf_storage, u64) != 0;
    if look.cookie == 0 || !is_marked {
        look.leave();
        return 0;
    }
    let sock = Sock::cast(look.sk);
    let listener = match Tcp::listening_for(sock) {
        Some(listener) => listener,
        None => Tcp::untyped(sock),
    };
    listener.emit_listener(OnSheet(look.sheet), look.found, Rounds::Kernel);
    look.confirm();
    0
}

/// Tells of what is no TCP socket.
#[inline(never)]
extern "C" fn look_at_other(index: u64, files: *mut Files) -> i64 {
    let Some(look) = Look::at(index, files) else {
        return 0;
    };
    // SAFETY: a live map entry.
    if unsafe { (*look.sheet).others } & look.bit == 0 {
        return 0;
    }
    let out = OnSheet(look.sheet);
    if look.sk.is_null() {
        visit_other(out, look.found, cast!(look.file, file), look.walk);
        look.confirm();
        return 0;
    }
    let sock = Sock::cast(look.sk);
    let family = sock.family();
    if family == AF_UNIX {
        if offset!(unix_peer) != ABSENT
            && let Some(record) = out.room()
        {
            fill_unix(record, look.found, &sock);
        }
    } else if offset!(udp_forward_deficit) != ABSENT && sock.is(family, SOCK_DGRAM, IPPROTO_UDP) {
        if look.cookie == 0 {
            look.leave();
            return 0;
        }
        emit_udp(out, look.found, &sock);
    }
    look.confirm();
    0
}
