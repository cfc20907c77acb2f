//! Batched scans: one visit per process instead of one per file or thread.
//!
//! They report exactly what the kernel's own iterators would. Descriptors that cannot be handled by reading memory alone are
//! deferred: the kernel's own iterator then reports just those.

use std::io;

use super::{
    iter::Link,
    output_buffer::SharedBuffer,
    records::decode,
    scanner::{Record, run},
};

/// The batched iterators of one process. Both fail with `ESRCH` once the process is gone.
pub(super) struct BatchedScan {
    pub files: Link,
    pub threads: Link,
}

impl BatchedScan {
    /// Reports all open files of the process. `kernel_iter` handles the deferred descriptors.
    pub(super) fn scan_files(
        &self,
        kernel_iter: &Link,
        output: &mut SharedBuffer,
        buffer: &mut [u8],
        visit: &mut dyn FnMut(Record<'_>),
    ) -> io::Result<()> {
        output.start_process();
        loop {
            let start_fd = output.get().next_fd;
            output.clear();
            run(&self.files, buffer, visit)?;
            if output.get().is_full == 1 {
                break;
            }
            decode(output.records(), visit)?;
            if output.get().is_complete == 1 || output.get().next_fd == start_fd {
                break;
            }
        }
        let is_complete = output.get().is_complete == 1;
        if is_complete && output.get().deferred == 0 {
            return Ok(());
        }
        output.get().only_deferred = 1;
        let result = run(kernel_iter, buffer, visit);
        output.get().only_deferred = 0;
        result
    }

    /// Reports all threads of the process. `kernel_iter` takes over if there are too many for the output buffer.
    pub(super) fn scan_threads(
        &self,
        kernel_iter: &Link,
        output: &mut SharedBuffer,
        buffer: &mut [u8],
        visit: &mut dyn FnMut(Record<'_>),
    ) -> io::Result<()> {
        output.clear();
        run(&self.threads, buffer, visit)?;
        if output.get().is_complete == 1 {
            return decode(output.records(), visit);
        }
        run(kernel_iter, buffer, visit)
    }
}
