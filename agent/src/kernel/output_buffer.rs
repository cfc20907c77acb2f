//! The sheet of the quick walks: what they write stands in memory that the agent shares with the programs.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::NonNull,
};

use tailback_ebpf::{SHEET_BYTES, Sheet};

/// The map `SHEET`, in our own memory.
pub(super) struct Shared {
    sheet: NonNull<Sheet>,
    /// Bytes that were read from it.
    told: u64,
}

// SAFETY: the memory is nobody's in particular, and is reached through `&mut self` alone.
unsafe impl Send for Shared {}

impl Shared {
    /// Maps it; its value begins at the map's first page.
    pub(super) fn new(map: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Sheet>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let sheet = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { sheet, told: 0 })
    }

    /// The sheet, while no walk runs: programs write on it only while the agent reads from an iterator.
    pub(super) fn get(&mut self) -> &mut Sheet {
        // SAFETY: the mapping lives as long as we do, any bytes are a `Sheet`, and whoever holds this cannot at the same
        // time run a walk, for which the whole of `Glance` is borrowed.
        unsafe { self.sheet.as_mut() }
    }

    /// A clean sheet, for another process.
    pub(super) fn begin(&mut self) {
        let sheet = self.get();
        sheet.next_fd = 0;
        sheet.only_left = 0;
        if sheet.left > 0 {
            sheet.left = 0;
            sheet.is_left.fill(0);
        }
        self.clear();
    }

    /// Room for more of the same process.
    pub(super) fn clear(&mut self) {
        let sheet = self.get();
        sheet.used = 0;
        sheet.is_full = 0;
        sheet.is_whole = 0;
    }

    /// What was written on it.
    pub(super) fn records(&mut self) -> &[u8] {
        let used = self.get().used.min(SHEET_BYTES) as usize;
        self.told += used as u64;
        &self.get().bytes[..used]
    }

    pub(super) fn told(&self) -> u64 {
        self.told
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size; nothing borrows from it any more.
        unsafe { libc::munmap(self.sheet.as_ptr().cast(), size_of::<Sheet>()) };
    }
}
