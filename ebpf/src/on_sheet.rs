//! The sheet that quick walks write their records on: a map that the agent has in its own memory.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use tailback_ebpf::{MAX_QUICK_FDS, SHEET_BYTES, Sheet};

use crate::kernel::Sink;

/// What the quick walk of this moment writes, and what it keeps in mind.
#[btf_map]
pub static SHEET: Array<Sheet, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Writes on the sheet.
#[derive(Clone, Copy)]
pub struct OnSheet(pub *mut Sheet);

impl OnSheet {
    /// Room for a record, as good as written; `None` where there is none left.
    #[inline(always)]
    pub fn room<T: Copy>(self) -> Option<*mut T> {
        // SAFETY: the sheet is an array entry, which lives as long as its map; only one walk runs at a time.
        unsafe {
            let at = (*self.0).used;
            if at > SHEET_BYTES - size_of::<T>() as u32 {
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

impl Sink for OnSheet {
    #[inline(always)]
    fn write<T: Copy>(self, record: &T) {
        if let Some(to) = self.room::<T>() {
            // SAFETY: room for just this, at a multiple of 8 as all records are.
            unsafe { to.write(*record) };
        }
    }
}

/// Leaves a descriptor to the kernel's own walk.
#[inline(always)]
pub fn leave(sheet: *mut Sheet, fd: u32) {
    // SAFETY: as above; the index is within the array.
    unsafe {
        let word = (&raw mut (*sheet).is_left)
            .cast::<u64>()
            .add((fd / 64) as usize & (MAX_QUICK_FDS as usize / 64 - 1));
        *word |= 1 << (fd % 64);
        (*sheet).left += 1;
    }
}

/// Whether a quick walk has told of this descriptor of the process that the kernel's own walk is at.
#[inline(always)]
pub fn is_told(fd: u32) -> bool {
    let Some(sheet) = SHEET.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        if (*sheet).only_left == 0 || fd >= (*sheet).next_fd {
            return false;
        }
        let word = (&raw const (*sheet).is_left)
            .cast::<u64>()
            .add((fd / 64) as usize & (MAX_QUICK_FDS as usize / 64 - 1));
        *word >> (fd % 64) & 1 == 0
    }
}
