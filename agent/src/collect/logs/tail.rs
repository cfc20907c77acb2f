//! One log: the history of its size and, while its writer is focused, the lines written to it.
//!
//! A log is followed by its writer's descriptor, not by name: after a rename the writer still writes to the same file, until
//! it opens another.
#![forbid(unsafe_code)]

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt as _, time::Duration};

use super::{
    lines::Lines,
    open::{self, FileId, Log, Metadata},
};
use crate::{messages::Table, sample::TargetId, target::ProcessInfo};

/// Maximum number of bytes of a file read at once; if there are more, only the last ones are read.
pub(super) const MAX_READ: u64 = 64 * 1024;
/// How long sizes are kept, ns. When a target becomes focused, its logs are read from the oldest kept size on.
const HISTORY_NS: u64 = 10_000_000_000;
/// Maximum number of sizes kept.
const MAX_SIZES: usize = 64;
/// How long before its writer opens it a rotated log may have been created.
const MAX_ROTATION_TIME: Duration = Duration::from_secs(60);

/// The size of the file at one time.
#[derive(Clone, Copy, Debug)]
struct SizeAt {
    at_ns: u64,
    size: u64,
}

pub(super) struct Tail {
    pub(super) target: TargetId,
    pub(super) tgid: u32,
    pub(super) start_ns: u64,
    pub(super) path: String,
    pub(super) file: FileId,
    pid: u32,
    fd: u32,
    /// Oldest first, never falling, at least one.
    sizes: VecDeque<SizeAt>,
    /// Offset up to which it was read.
    read_to: u64,
    reader: Option<(File, Lines)>,
    /// Opening it failed; not tried again until the writer opens another file.
    is_unreadable: bool,
    /// Since when no known process has it open, CLOCK_MONOTONIC ns.
    pub(super) orphaned_ns: Option<u64>,
}

/// What polling its size found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogState {
    Same,
    /// The writer has opened another file in its place.
    Replaced,
    /// Its writer does not have it open any more.
    Orphaned,
}

/// Takes a known message: its name, the line, and the earliest and latest time at which it may have been written, ns.
pub(super) type Count<'a> = dyn FnMut(&str, &[u8], [u64; 2]) + 'a;

impl Tail {
    /// `since_ns`: when the process did not have it open yet. Without it, all bytes in the file count as old.
    pub(super) fn new(
        target: TargetId,
        process: &ProcessInfo,
        log: Log,
        since_ns: Option<u64>,
        now_ns: u64,
    ) -> Self {
        let mut tail = Self {
            target,
            tgid: process.tgid,
            start_ns: process.start_ns,
            pid: process.pid,
            fd: log.fd,
            path: log.path,
            file: log.metadata.file,
            sizes: VecDeque::new(),
            read_to: 0,
            reader: None,
            is_unreadable: false,
            orphaned_ns: None,
        };
        let since_ns = since_ns.filter(|since_ns| {
            let since = Duration::from_nanos(now_ns.saturating_sub(*since_ns));
            is_younger(&log.metadata, since)
        });
        tail.reset(since_ns, log.metadata.len, now_ns);
        tail
    }

    /// Starts over with a new file. `since_ns`: all its bytes were written after that.
    fn reset(&mut self, since_ns: Option<u64>, size: u64, now_ns: u64) {
        self.reader = None;
        self.is_unreadable = false;
        self.read_to = 0;
        self.sizes.clear();
        if let Some(at_ns) = since_ns {
            self.sizes.push_back(SizeAt { at_ns, size: 0 });
        }
        self.sizes.push_back(SizeAt {
            at_ns: now_ns,
            size,
        });
    }

    /// Follows the log by the descriptor of another process of the target.
    pub(super) fn adopt(&mut self, process: &ProcessInfo, fd: u32) {
        self.tgid = process.tgid;
        self.start_ns = process.start_ns;
        self.pid = process.pid;
        self.fd = fd;
        self.orphaned_ns = None;
    }

    /// Remembers the current size. If another file has replaced it, the rest of the old one is read first, given `read`.
    pub(super) fn poll_size(
        &mut self,
        now_ns: u64,
        read: Option<(&Table, &mut Count<'_>)>,
    ) -> LogState {
        let found = self
            .orphaned_ns
            .is_none()
            .then(|| open::metadata(self.pid, self.fd))
            .flatten();
        let Some(metadata) = found else {
            self.orphaned_ns.get_or_insert(now_ns);
            return LogState::Orphaned;
        };
        if metadata.file == self.file {
            self.add_size(now_ns, metadata.len);
            return LogState::Same;
        }
        if let Some((table, count)) = read {
            self.finish(now_ns, table, count);
        }
        let before_ns = self.sizes.back().map_or(now_ns, |entry| entry.at_ns);
        let elapsed = Duration::from_nanos(now_ns.saturating_sub(before_ns));
        let since_ns = is_younger(&metadata, elapsed + MAX_ROTATION_TIME).then_some(before_ns);
        self.file = metadata.file;
        if let Some(path) = open::path(self.pid, self.fd) {
            self.path = path;
        }
        self.reset(since_ns, metadata.len, now_ns);
        LogState::Replaced
    }

    fn add_size(&mut self, now_ns: u64, size: u64) {
        if let Some(last) = self.sizes.back().copied()
            && size < last.size
        {
            // Truncated: all bytes were written since.
            self.sizes.clear();
            self.sizes.push_back(SizeAt {
                at_ns: last.at_ns,
                size: 0,
            });
            self.read_to = 0;
            if let Some((_, lines)) = &mut self.reader {
                *lines = Lines::from(0, false);
            }
        }
        self.sizes.push_back(SizeAt {
            at_ns: now_ns,
            size,
        });
        let is_old = |entry: &SizeAt| entry.at_ns.saturating_add(HISTORY_NS) < now_ns;
        while self.sizes.len() > MAX_SIZES || self.sizes.get(1).is_some_and(is_old) {
            self.sizes.pop_front();
        }
    }

    /// Reads the new bytes; the first time, from the oldest kept size on. Returns how many bytes were skipped.
    pub(super) fn read(&mut self, table: &Table, count: &mut Count<'_>) -> io::Result<u64> {
        if self.reader.is_none() && !self.open()? {
            return Ok(0);
        }
        let Some((file, lines)) = &mut self.reader else {
            return Ok(0);
        };
        // Only up to the newest size, so that the time of every byte is known. A log without a writer does not grow.
        let newest = self.sizes.back().map_or(0, |entry| entry.size);
        let size = if self.orphaned_ns.is_some() {
            file.metadata()?.len()
        } else {
            newest
        };
        let from = lines.next();
        let unread = size.saturating_sub(from);
        let skipped = unread.saturating_sub(MAX_READ);
        if skipped > 0 {
            *lines = Lines::from(from + skipped, true);
        }
        let mut bytes = vec![0; unread.min(MAX_READ) as usize];
        let mut len = 0;
        while let Some(room) = bytes.get_mut(len..).filter(|room| !room.is_empty()) {
            match file.read_at(room, lines.next() + len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(len);
        let sizes = &self.sizes;
        lines.feed(&bytes, &mut |line, end| {
            if let Some(name) = table.find(line) {
                count(name, line, written(sizes, end));
            }
        });
        Ok(skipped)
    }

    /// Reads the rest of a file that nobody writes to any more.
    pub(super) fn finish(&mut self, now_ns: u64, table: &Table, count: &mut Count<'_>) {
        let size = self
            .reader
            .as_ref()
            .and_then(|(file, _)| Some(file.metadata().ok()?.len()));
        let Some(size) = size else { return };
        self.add_size(now_ns, size);
        if self.read(table, count).is_err() {
            return;
        }
        let sizes = &self.sizes;
        if let Some((_, lines)) = &mut self.reader {
            lines.end(&mut |line, end| {
                if let Some(name) = table.find(line) {
                    count(name, line, written(sizes, end));
                }
            });
        }
    }

    fn open(&mut self) -> io::Result<bool> {
        if self.is_unreadable || self.orphaned_ns.is_some() {
            return Ok(false);
        }
        let opened = open::open(self.pid, self.fd, self.file);
        self.is_unreadable = opened.is_err();
        let Some(file) = opened? else {
            return Ok(false);
        };
        let from = self.sizes.front().map_or(0, |entry| entry.size);
        let from = from.max(self.read_to);
        // From the byte before, which shows whether a line begins here.
        let lines = Lines::from(from.saturating_sub(1), from > 0);
        self.reader = Some((file, lines));
        Ok(true)
    }

    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.reader.is_none()
    }

    /// Closes the file: its writer is not focused any more.
    pub(super) fn close(&mut self) {
        if let Some((_, lines)) = self.reader.take() {
            self.read_to = self.read_to.max(lines.line());
        }
    }
}

/// The earliest and latest time at which the byte at an offset may have been written, ns.
fn written(sizes: &VecDeque<SizeAt>, offset: u64) -> [u64; 2] {
    let after = sizes.partition_point(|entry| entry.size <= offset);
    let at = |index: usize| sizes.get(index).map(|entry| entry.at_ns);
    let last = sizes.back().map_or(0, |entry| entry.at_ns);
    let not_after = at(after).unwrap_or(last);
    let not_before = after.checked_sub(1).and_then(at);
    // Nothing is known of bytes older than the oldest size.
    [not_before.unwrap_or(0), not_after]
}

/// Whether the file was created less than `than` ago. If the file system does not record that, a short file counts as new.
fn is_younger(metadata: &Metadata, than: Duration) -> bool {
    match metadata.created {
        // A creation time in the future means that the clock was set back.
        Some(created) => created.elapsed().is_ok_and(|age| age <= than),
        None => metadata.len <= MAX_READ,
    }
}
