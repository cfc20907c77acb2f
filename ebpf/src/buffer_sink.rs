//! Writes the records of batched scans to the mmap-able map `OUTPUT`.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use tailback_ebpf::{MAX_BATCHED_FDS, OUTPUT_BYTES, OutputBuffer};

use crate::kernel::Sink;

/// Records of the batched scan in progress, and its working state.
#[btf_map]
pub static OUTPUT: Array<OutputBuffer, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// A [`Sink`] that appends to the output buffer.
#[derive(Clone, Copy)]
pub struct BufferSink(pub *mut OutputBuffer);

impl BufferSink {
    /// Reserves space for one record and counts it as written; `None` if the buffer is full.
    #[inline(always)]
    pub fn reserve<T: Copy>(self) -> Option<*mut T> {
        // SAFETY: the buffer is an array entry, which lives as long as its map; only one scan runs at a time.
        unsafe {
            let at = (*self.0).used;
            if at > OUTPUT_BYTES - size_of::<T>() as u32 {
                (*self.0).is_full = 1;
                return None;
            }
            (*self.0).used = at + size_of::<T>() as u32;
            Some(
                (&raw mut (*self.0).bytes)
                    .cast::<u8>()
                    .add(at as usize)
                    .cast(),
            )
        }
    }
}

impl Sink for BufferSink {
    #[inline(always)]
    fn write<T: Copy>(self, record: &T) {
        if let Some(to) = self.reserve::<T>() {
            // SAFETY: `reserve` returned space for one `T`, aligned to 8 like every record.
            unsafe { to.write(*record) };
        }
    }
}

/// Defers a descriptor to the kernel's own iterator.
#[inline(always)]
pub fn defer(output: *mut OutputBuffer, fd: u32) {
    // SAFETY: a live array entry; the index is masked to the bitmap.
    unsafe {
        let word = (&raw mut (*output).deferred_fds)
            .cast::<u64>()
            .add((fd / 64) as usize & (MAX_BATCHED_FDS as usize / 64 - 1));
        *word |= 1 << (fd % 64);
        (*output).deferred += 1;
    }
}

/// Whether a batched scan has already reported this descriptor of the process that the kernel's iterator is visiting.
#[inline(always)]
pub fn already_reported(fd: u32) -> bool {
    let Some(output) = OUTPUT.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as in `defer`.
    unsafe {
        if (*output).only_deferred == 0 || fd >= (*output).next_fd {
            return false;
        }
        let word = (&raw const (*output).deferred_fds)
            .cast::<u64>()
            .add((fd / 64) as usize & (MAX_BATCHED_FDS as usize / 64 - 1));
        *word >> (fd % 64) & 1 == 0
    }
}
