//! Walks that visit a process once, and not each of its files and threads.
//!
//! What they tell is what the kernel's own walk would tell. What they cannot tell they leave, and the kernel's own walk
//! tells of that alone.

use std::io;

use super::{
    glance::{Record, run},
    iter::Link,
    output_buffer::Shared,
    records::decode,
};

/// The walks over one process. Each is given the kernel's own, for what it leaves. Where the process is gone it ends with `ESRCH`.
pub(super) struct Quick {
    pub files: Link,
    pub threads: Link,
}

impl Quick {
    /// All files of the process.
    pub(super) fn walk_files(
        &self,
        all: &Link,
        sheet: &mut Shared,
        buffer: &mut [u8],
        visit: &mut dyn FnMut(Record<'_>),
    ) -> io::Result<()> {
        sheet.begin();
        loop {
            let begun_at = sheet.get().next_fd;
            sheet.clear();
            run(&self.files, buffer, visit)?;
            if sheet.get().is_full == 1 {
                break;
            }
            decode(sheet.records(), visit)?;
            if sheet.get().is_whole == 1 || sheet.get().next_fd == begun_at {
                break;
            }
        }
        let is_whole = sheet.get().is_whole == 1;
        if is_whole && sheet.get().left == 0 {
            return Ok(());
        }
        sheet.get().only_left = 1;
        let told = run(all, buffer, visit);
        sheet.get().only_left = 0;
        told
    }

    /// All threads of the process.
    pub(super) fn walk_threads(
        &self,
        all: &Link,
        sheet: &mut Shared,
        buffer: &mut [u8],
        visit: &mut dyn FnMut(Record<'_>),
    ) -> io::Result<()> {
        sheet.clear();
        run(&self.threads, buffer, visit)?;
        if sheet.get().is_whole == 1 {
            return decode(sheet.records(), visit);
        }
        // More threads than the sheet has room for.
        run(all, buffer, visit)
    }
}
