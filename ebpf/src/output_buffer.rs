//! The buffer that batched scans write their records to, shared by mmap.

/// Capacity of [`OutputBuffer::bytes`]: about 8,000 connections or 21,000 threads before the agent has to drain it.
pub const OUTPUT_BYTES: u32 = 1 << 20;
/// File descriptors that a batched scan covers; higher ones are deferred to the kernel's own iterator. Bounds the
/// bitmap [`OutputBuffer::deferred_fds`].
pub const MAX_BATCHED_FDS: u32 = 1 << 16;
/// File descriptors processed together, so that their cache misses overlap.
pub const BATCH_FDS: usize = 16;

/// The single entry of the map `OUTPUT`, which the agent maps into its own memory.
#[repr(C)]
pub struct OutputBuffer {
    /// Bytes written; reset by the agent.
    pub used: u32,
    /// 1: a record did not fit. Reset by the agent.
    pub is_full: u32,
    /// 1: the scan reached its end.
    pub is_complete: u32,
    /// The first descriptor not yet reported: where the next batched scan of the same file table resumes.
    pub next_fd: u32,
    /// Number of descriptors below `next_fd` that are deferred to the kernel's own iterator.
    pub deferred: u32,
    /// 1: the kernel's own iterator reports only the deferred descriptors.
    pub only_deferred: u32,
    /// Bitmap of the deferred descriptors.
    pub deferred_fds: [u64; MAX_BATCHED_FDS as usize / 64],
    /// Bitmaps over the current batch: listening TCP sockets, and everything that is not a TCP socket.
    pub listeners: u32,
    pub others: u32,
    /// For each descriptor of the current batch, the addresses of its `struct file`, `struct socket` and `struct sock`.
    pub files: [u64; BATCH_FDS],
    pub sockets: [u64; BATCH_FDS],
    pub sks: [u64; BATCH_FDS],
    pub bytes: [u8; OUTPUT_BYTES as usize],
}
