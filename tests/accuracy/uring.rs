//! An io_uring instance, set up and filled with raw system calls.

use std::{
    ffi::{c_long, c_uint},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::lines::unix_ns;

use crate::{
    accept::report_losses,
    report::Report,
    sampling::{self, compare_steady},
};

const ENTRIES: u32 = 8;
/// Completions not taken from the completion queue.
const COMPLETED: u32 = 5;
/// Entries written to the submission queue and not submitted.
const PENDING: u32 = 3;
/// Entries with an invalid index, which the kernel drops.
const INVALID: u32 = 2;

pub fn measure(report: &mut Report) -> Result<()> {
    let ring = match Ring::new()? {
        Ok(ring) => ring,
        Err(why) => {
            report.skip(&why, |_| true);
            return Ok(());
        }
    };
    let is_of = |part: &str| {
        let fd = format!("fd {}", ring.fd.as_raw_fd());
        let part = part.to_owned();
        move |name: &str| name.contains(&fd) && name.contains(&part)
    };
    let (samples, dropped) = sampling::during(Duration::from_millis(1000), || {
        // The first sample with queues must come before the losses.
        std::thread::sleep(Duration::from_millis(400));
        for _ in 0..INVALID {
            ring.write(u32::MAX);
            ring.submit(1)?;
        }
        Ok(ring.at(ring.sq.dropped))
    })?;
    ensure!(
        dropped == INVALID,
        "the kernel dropped {dropped} entries, not {INVALID}"
    );
    report_losses(
        report,
        "sq losses",
        f64::from(dropped),
        &samples.queue("uring", is_of("sq")),
    );

    for entry in 0..COMPLETED {
        ring.write(entry);
    }
    ring.submit(COMPLETED)?;
    for entry in 0..PENDING {
        ring.write(entry);
    }
    let since_ns = unix_ns();
    let samples = sampling::steady(Duration::from_millis(500))?;
    // Read the ring the way the kernel does.
    let pending = ring.at(ring.sq.tail).wrapping_sub(ring.at(ring.sq.head));
    let completed = ring.at(ring.cq.tail).wrapping_sub(ring.at(ring.cq.head));
    ensure!(
        (pending, completed) == (PENDING, COMPLETED),
        "{pending} entries pending, {completed} completed"
    );
    for (part, depth, limit) in [
        ("sq", PENDING, ENTRIES),
        ("cq", COMPLETED, ring.completions),
    ] {
        let queue = samples.queue("uring", is_of(part));
        let (quantity, limited) = (format!("{part} depth"), format!("{part} limit"));
        let keys = [
            (quantity.as_str(), "depth", f64::from(depth)),
            (limited.as_str(), "limit", f64::from(limit)),
        ];
        compare_steady(report, &queue, since_ns, &keys);
    }
    Ok(())
}

/// `struct io_sqring_offsets` (include/uapi/linux/io_uring.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SubmissionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    overflow: u32,
    completions: u32,
    flags: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    thread_cpu: u32,
    thread_idle: u32,
    features: u32,
    workqueue: u32,
    reserved: [u32; 3],
    sq: SubmissionOffsets,
    cq: CompletionOffsets,
}

struct Ring {
    fd: OwnedFd,
    memory: *mut u8,
    sq: SubmissionOffsets,
    cq: CompletionOffsets,
    completions: u32,
}

impl Ring {
    /// The inner error is the reason why io_uring is not available here.
    fn new() -> Result<Result<Self, String>> {
        const IORING_FEAT_SINGLE_MMAP: u32 = 1;
        let mut params = Params::default();
        // SAFETY: io_uring_setup(2) reads and writes one io_uring_params; `params` has its size and layout.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut params) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSYS | libc::EPERM) => Ok(Err(format!("io_uring_setup: {error}"))),
                _ => Err(error).context("io_uring_setup"),
            };
        }
        // SAFETY: the kernel has just returned this descriptor; nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        ensure!(
            params.features & IORING_FEAT_SINGLE_MMAP != 0,
            "the kernel maps the rings separately (no IORING_FEAT_SINGLE_MMAP)"
        );
        let size = (params.sq.array + params.sq_entries * 4)
            .max(params.cq.completions + params.cq_entries * 16);
        // The entries themselves stay unmapped: they are zero, which is IORING_OP_NOP.
        // SAFETY: creates a new mapping at an address of the kernel's choice; it is never unmapped.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("map the rings");
        }
        Ok(Ok(Self {
            fd,
            memory: memory.cast(),
            sq: params.sq,
            cq: params.cq,
            completions: params.cq_entries,
        }))
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel supplied the offset of a word in the mapping, which lives as long as the process; the
        // kernel updates it atomically.
        unsafe { &*self.memory.add(offset as usize).cast::<AtomicU32>() }
    }

    fn at(&self, offset: u32) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Appends an entry, by its index, to the submission queue.
    fn write(&self, entry: u32) {
        let tail = self.at(self.sq.tail);
        let slot = tail & self.at(self.sq.mask);
        self.word(self.sq.array + slot * 4)
            .store(entry, Ordering::Relaxed);
        self.word(self.sq.tail)
            .store(tail.wrapping_add(1), Ordering::Release);
    }

    fn submit(&self, count: c_uint) -> Result<()> {
        // SAFETY: io_uring_enter(2) without a signal mask takes no pointers.
        let done: c_long = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd.as_raw_fd(),
                count,
                0,
                0,
                ptr::null::<u8>(),
                0_usize,
            )
        };
        // The kernel does not count a dropped entry as submitted.
        ensure!(done >= 0, "io_uring_enter: {}", io::Error::last_os_error());
        Ok(())
    }
}
