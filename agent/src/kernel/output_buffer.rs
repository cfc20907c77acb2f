//! The output buffer of batched scans, in memory that the agent shares with the eBPF programs.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::NonNull,
};

use tailback_ebpf::{OUTPUT_BYTES, OutputBuffer};

/// The map `OUTPUT`, mapped into the agent's memory.
pub(super) struct SharedBuffer {
    output: NonNull<OutputBuffer>,
    /// Bytes of records read so far.
    bytes_read: u64,
}

// SAFETY: the mapping is not tied to a thread and is only reached through `&mut self`.
unsafe impl Send for SharedBuffer {}

impl SharedBuffer {
    /// Maps the array; its single value starts at the first page.
    pub(super) fn new(map: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<OutputBuffer>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let output = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self {
            output,
            bytes_read: 0,
        })
    }

    /// The buffer, between scans: programs write to it only while the agent reads from an iterator.
    pub(super) fn get(&mut self) -> &mut OutputBuffer {
        // SAFETY: the mapping lives as long as `self`, and every bit pattern is a valid `OutputBuffer`. A scan needs `&mut
        // Scanner`, so none can run while this borrow lives.
        unsafe { self.output.as_mut() }
    }

    /// Resets the buffer for another process.
    pub(super) fn start_process(&mut self) {
        let output = self.get();
        output.next_fd = 0;
        output.only_deferred = 0;
        if output.deferred > 0 {
            output.deferred = 0;
            output.deferred_fds.fill(0);
        }
        self.clear();
    }

    /// Discards the records, to continue with the same process.
    pub(super) fn clear(&mut self) {
        let output = self.get();
        output.used = 0;
        output.is_full = 0;
        output.is_complete = 0;
    }

    /// The records written since the last [`Self::clear`].
    pub(super) fn records(&mut self) -> &[u8] {
        let used = self.get().used.min(OUTPUT_BYTES) as usize;
        self.bytes_read += used as u64;
        &self.get().bytes[..used]
    }

    /// Bytes of records read since the buffer was created.
    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size; no borrow of it can outlive `self`.
        unsafe { libc::munmap(self.output.as_ptr().cast(), size_of::<OutputBuffer>()) };
    }
}
