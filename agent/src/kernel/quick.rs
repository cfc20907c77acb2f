//! Walks that visit a process once, and not each of its files and threads.
//!
//! What they tell is what the kernel's own walk would tell. What they cannot tell they leave, and the kernel's own walk
//! tells of that alone.

use std::io;

use super::{
    glance::{Record, run},
    iter::Link,
    records::decode,
    sheet::Shared,
};

/// The walks over one process, and the kernel's own for what these leave.
pub(super) struct Quick {
    pub files: Link,
    pub all_files: Link,
    pub threads: Link,
    pub all_threads: Link,
}

/// All files of the process.
pub(super) fn files(
    process: &Quick,
    sheet: &mut Shared,
    buffer: &mut [u8],
    visit: &mut dyn FnMut(Record<'_>),
) -> io::Result<()> {
    sheet.begin();
    loop {
        let begun_at = sheet.get().next_fd;
        sheet.clear();
        if !is_there(run(&process.files, buffer, visit))? {
            return Ok(());
        }
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
    let told = run(&process.all_files, buffer, visit);
    sheet.get().only_left = 0;
    is_there(told).map(drop)
}

/// All threads of the process.
pub(super) fn threads(
    process: &Quick,
    sheet: &mut Shared,
    buffer: &mut [u8],
    visit: &mut dyn FnMut(Record<'_>),
) -> io::Result<()> {
    sheet.clear();
    if !is_there(run(&process.threads, buffer, visit))? {
        return Ok(());
    }
    if sheet.get().is_whole == 1 {
        return decode(sheet.records(), visit);
    }
    // More threads than the sheet has room for.
    is_there(run(&process.all_threads, buffer, visit)).map(drop)
}

/// `false` where the process is gone.
fn is_there(walked: io::Result<()>) -> io::Result<bool> {
    match walked {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}
