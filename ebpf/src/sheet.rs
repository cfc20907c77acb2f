//! What quick walks write their records on.

/// Bytes of records that a sheet holds.
pub const SHEET_BYTES: u32 = 1 << 20;
/// Descriptors that a quick walk looks at; those beyond are left to the kernel's own walk.
pub const MAX_QUICK_FDS: u32 = 1 << 16;
/// Descriptors that are looked at together.
pub const BATCH: usize = 16;

/// The one entry of the map `SHEET`, which the agent has in its own memory.
#[repr(C)]
pub struct Sheet {
    /// Bytes written; set back by the agent.
    pub used: u32,
    /// 1: there was no room for a record. Set back by the agent.
    pub is_full: u32,
    /// 1: the walk came to its end.
    pub is_whole: u32,
    /// The first descriptor that is not told of: where the next quick walk over the same files begins.
    pub next_fd: u32,
    /// Descriptors below it that are left to the kernel's own walk.
    pub left: u32,
    /// 1: the kernel's own walk tells of what is left, and no other.
    pub only_left: u32,
    /// Which are left, a bit for each.
    pub is_left: [u64; MAX_QUICK_FDS as usize / 64],
    /// Of the batch, a bit for each: listening TCP sockets, and what is no TCP socket.
    pub listeners: u32,
    pub others: u32,
    /// Of the files that are looked at together: the `struct file`, the `struct socket` and the `struct sock` of each.
    pub files: [u64; BATCH],
    pub sockets: [u64; BATCH],
    pub sks: [u64; BATCH],
    pub bytes: [u8; SHEET_BYTES as usize],
}
