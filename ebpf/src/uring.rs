//! io_uring: the submission and completion rings that a process shares with the kernel.
//!
//! The context is behind a `void *` in the file, so all of it takes probe reads.

use tailback_ebpf::{Header, KIND_RING, RingRecord};

use crate::{
    kernel::{Sink, emit, load, probe},
    task_file::Handle,
};

#[inline(always)]
pub fn emit_ring(out: impl Sink, handle: Handle, file: *const u8) {
    let context = load!(file, file_private_data, u64);
    let rings = probe!(context as *const u8, ring_rings, *const u8);
    if rings.is_null() {
        return;
    }
    let record = RingRecord {
        header: Header {
            kind: KIND_RING,
            len: size_of::<RingRecord>() as u16,
            tgid: handle.tgid,
        },
        id: context,
        fd: handle.fd,
        sq_head: probe!(rings, rings_sq_head, u32),
        sq_tail: probe!(rings, rings_sq_tail, u32),
        sq_entries: probe!(rings, rings_sq_entries, u32),
        cq_head: probe!(rings, rings_cq_head, u32),
        cq_tail: probe!(rings, rings_cq_tail, u32),
        cq_entries: probe!(rings, rings_cq_entries, u32),
        sq_dropped: probe!(rings, rings_sq_dropped, u32),
        cq_overflow: probe!(rings, rings_cq_overflow, u32),
        reserved: [0; 3],
    };
    emit(out, &record);
}
