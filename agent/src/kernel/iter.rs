//! Creates the links of BPF iterators that are bound to one process or map, and those of tracepoints, by calling
//! `bpf(2)` directly. aya cannot create the former; of the latter, the agent keeps the descriptors itself.
//!
//! include/uapi/linux/bpf.h: `BPF_LINK_CREATE` with `iter_info` (5.8), bound to a process since 6.1.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;

/// What an iterator visits.
#[derive(Clone, Copy, Debug)]
pub(super) enum IterScope {
    /// Every object that the agent's pid namespace shows.
    All,
    /// One process, by its pid in the agent's namespace.
    Process(u32),
    /// One thread, by its id in the agent's namespace.
    Thread(u32),
    /// The elements of one map.
    Map(RawFd),
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    padding: u32,
}

/// The part of `union bpf_attr` that `BPF_ITER_CREATE` reads.
#[repr(C)]
struct IterCreate {
    link_fd: u32,
    flags: u32,
}

/// An iterator that can be run repeatedly. Closing it leaves nothing in the kernel.
pub(super) struct Link(OwnedFd);

impl Link {
    /// Binds a loaded program to what it visits.
    pub(super) fn create(program: BorrowedFd<'_>, over: IterScope) -> io::Result<Self> {
        // `union bpf_iter_link_info`: `map.map_fd` at 0, or `task.{tid, pid, pid_fd}`. A kernel that does not know a
        // member rejects non-zero bytes there, so an unsupported binding is an error and never ignored.
        let (info, info_len): ([u32; 4], u32) = match over {
            IterScope::All => ([0; 4], 0),
            IterScope::Process(pid) => ([0, pid, 0, 0], 16),
            IterScope::Thread(tid) => ([tid, 0, 0, 0], 16),
            IterScope::Map(fd) => ([fd as u32, 0, 0, 0], 16),
        };
        let attr = LinkCreate {
            prog_fd: program.as_raw_fd() as u32,
            target_fd: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iter_info: if info_len == 0 {
                0
            } else {
                info.as_ptr() as u64
            },
            iter_info_len: info_len,
            padding: 0,
        };
        bpf(BPF_LINK_CREATE, &attr).map(Self)
    }

    /// Starts one scan.
    pub(super) fn open(&self) -> io::Result<File> {
        let attr = IterCreate {
            link_fd: self.0.as_raw_fd() as u32,
            flags: 0,
        };
        bpf(BPF_ITER_CREATE, &attr).map(File::from)
    }
}

/// The part of `union bpf_attr` that `BPF_RAW_TRACEPOINT_OPEN` reads.
#[repr(C)]
struct TracepointOpen {
    /// 0: the program knows its tracepoint.
    name: u64,
    prog_fd: u32,
    padding: u32,
}

/// Attaches a loaded program to its tracepoint until the descriptor is closed.
pub(super) fn attach_tracepoint(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attr = TracepointOpen {
        name: 0,
        prog_fd: program.as_raw_fd() as u32,
        padding: 0,
    };
    bpf(BPF_RAW_TRACEPOINT_OPEN, &attr)
}

/// Calls `bpf(2)` with a command that returns a file descriptor.
fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is a live struct of the size passed. The kernel only reads it, and what `iter_info` points to, which
    // outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            core::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just created this descriptor (with O_CLOEXEC), and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
