//! One log that is followed: what size it had when, and, while its writer is suspicious, what is written to it.
//!
//! It is followed by the descriptor of its writer, not by its name: a file that was renamed is still the one that is
//! written to, until the writer opens another.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    fs::{File, Metadata},
    io,
    os::unix::fs::FileExt as _,
    time::Duration,
};

use super::{
    lines::Lines,
    open::{self, Identity, Log},
};
use crate::{messages::Table, sample::TargetId, target::ProcessSeen};

/// Bytes of a file that are read at a look: of more, the last ones.
pub(super) const MAX_READ: u64 = 64 * 1024;
/// Sizes are remembered for so long: lines from before that are not of the moment.
const REMEMBERED_NS: u64 = 10_000_000_000;
const MAX_MARKS: usize = 64;
/// A new file may be made a while before its writer takes to it.
const ROTATION: Duration = Duration::from_secs(60);

/// What size the file had when.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at_ns: u64,
    size: u64,
}

pub(super) struct Tail {
    pub(super) target: TargetId,
    pub(super) tgid: u32,
    pub(super) start_ns: u64,
    pub(super) path: String,
    pub(super) identity: Identity,
    pid: u32,
    fd: u32,
    /// Oldest first, sizes never fall. At least one.
    marks: VecDeque<Mark>,
    /// Up to here it was read.
    read_to: u64,
    reader: Option<(File, Lines)>,
    /// It may not be read.
    refused: bool,
    /// Since when its writer has not had it open.
    pub(super) gone_ns: Option<u64>,
}

/// How a log is found at a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Same,
    /// The writer has opened another in its place.
    Another,
    Gone,
}

/// A known line: its name, the line, between which times it was written, ns.
pub(super) type Heard<'a> = dyn FnMut(&str, &[u8], [u64; 2]) + 'a;

impl Tail {
    /// `since_ns`: the process did not have it open then. Without it, what the file holds is from before.
    pub(super) fn new(
        target: TargetId,
        process: &ProcessSeen,
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
            identity: Identity::from(&log.metadata),
            marks: VecDeque::new(),
            read_to: 0,
            reader: None,
            refused: false,
            gone_ns: None,
        };
        let since_ns = since_ns.filter(|since_ns| {
            let since = Duration::from_nanos(now_ns.saturating_sub(*since_ns));
            is_younger(&log.metadata, since)
        });
        tail.begin(since_ns, log.metadata.len(), now_ns);
        tail
    }

    /// Of a file that is new to us; `since_ns`: all that it holds was written after that.
    fn begin(&mut self, since_ns: Option<u64>, size: u64, now_ns: u64) {
        self.reader = None;
        self.refused = false;
        self.read_to = 0;
        self.marks.clear();
        if let Some(at_ns) = since_ns {
            self.marks.push_back(Mark { at_ns, size: 0 });
        }
        self.marks.push_back(Mark {
            at_ns: now_ns,
            size,
        });
    }

    /// Another process of the target that writes to the same file, or the same one.
    pub(super) fn held_by(&mut self, process: &ProcessSeen, fd: u32) {
        self.tgid = process.tgid;
        self.start_ns = process.start_ns;
        self.pid = process.pid;
        self.fd = fd;
        self.gone_ns = None;
    }

    /// Remembers the size that it has now. What was written to a file that another has replaced is read first.
    pub(super) fn look(&mut self, now_ns: u64, read: Option<(&Table, &mut Heard<'_>)>) -> Found {
        let found = self
            .gone_ns
            .is_none()
            .then(|| open::metadata(self.pid, self.fd))
            .flatten();
        let Some(metadata) = found else {
            self.gone_ns.get_or_insert(now_ns);
            return Found::Gone;
        };
        if Identity::from(&metadata) == self.identity {
            self.mark(now_ns, metadata.len());
            return Found::Same;
        }
        if let Some((table, heard)) = read {
            self.finish(now_ns, table, heard);
        }
        let before_ns = self.marks.back().map_or(now_ns, |mark| mark.at_ns);
        let elapsed = Duration::from_nanos(now_ns.saturating_sub(before_ns));
        let since_ns = is_younger(&metadata, elapsed + ROTATION).then_some(before_ns);
        self.identity = Identity::from(&metadata);
        if let Some(path) = open::path(self.pid, self.fd) {
            self.path = path;
        }
        self.begin(since_ns, metadata.len(), now_ns);
        Found::Another
    }

    fn mark(&mut self, now_ns: u64, size: u64) {
        if let Some(last) = self.marks.back().copied()
            && size < last.size
        {
            // Truncated: all that it holds was written since.
            self.marks.clear();
            self.marks.push_back(Mark {
                at_ns: last.at_ns,
                size: 0,
            });
            self.read_to = 0;
            if let Some((_, lines)) = &mut self.reader {
                *lines = Lines::from(0, false);
            }
        }
        self.marks.push_back(Mark {
            at_ns: now_ns,
            size,
        });
        let is_old = |mark: &Mark| mark.at_ns.saturating_add(REMEMBERED_NS) < now_ns;
        while self.marks.len() > MAX_MARKS || self.marks.get(1).is_some_and(is_old) {
            self.marks.pop_front();
        }
    }

    /// Reads what was written since the last time, and first what was written shortly before the first time. Returns
    /// how many bytes were left out.
    pub(super) fn read(&mut self, table: &Table, heard: &mut Heard<'_>) -> io::Result<u64> {
        if self.reader.is_none() && !self.open()? {
            return Ok(0);
        }
        let Some((file, lines)) = &mut self.reader else {
            return Ok(0);
        };
        // No further than the marks say when it was written. A file that is gone has no further ones.
        let marked = self.marks.back().map_or(0, |mark| mark.size);
        let size = if self.gone_ns.is_some() {
            file.metadata()?.len()
        } else {
            marked
        };
        let from = lines.next();
        let unread = size.saturating_sub(from);
        let left_out = unread.saturating_sub(MAX_READ);
        if left_out > 0 {
            *lines = Lines::from(from + left_out, true);
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
        let marks = &self.marks;
        lines.feed(&bytes, &mut |line, end| {
            if let Some(name) = table.find(line) {
                heard(name, line, written(marks, end));
            }
        });
        Ok(left_out)
    }

    /// Reads the rest of a file to which nothing will be written any more.
    pub(super) fn finish(&mut self, now_ns: u64, table: &Table, heard: &mut Heard<'_>) {
        let size = self
            .reader
            .as_ref()
            .and_then(|(file, _)| Some(file.metadata().ok()?.len()));
        let Some(size) = size else { return };
        self.mark(now_ns, size);
        if self.read(table, heard).is_err() {
            return;
        }
        let marks = &self.marks;
        if let Some((_, lines)) = &mut self.reader {
            lines.end(&mut |line, end| {
                if let Some(name) = table.find(line) {
                    heard(name, line, written(marks, end));
                }
            });
        }
    }

    fn open(&mut self) -> io::Result<bool> {
        if self.refused || self.gone_ns.is_some() {
            return Ok(false);
        }
        let opened = open::open(self.pid, self.fd, self.identity);
        // It stays as it is until there is another.
        self.refused = opened.is_err();
        let Some(file) = opened? else {
            return Ok(false);
        };
        let from = self.marks.front().map_or(0, |mark| mark.size);
        let from = from.max(self.read_to);
        // With the byte before it, for that tells whether a line begins here.
        let lines = Lines::from(from.saturating_sub(1), from > 0);
        self.reader = Some((file, lines));
        Ok(true)
    }

    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.reader.is_none()
    }

    /// Its writer is not suspicious any more. The file is not held open longer than it is read.
    pub(super) fn close(&mut self) {
        if let Some((_, lines)) = self.reader.take() {
            self.read_to = self.read_to.max(lines.line());
        }
    }
}

/// Between which times the byte at an offset was written.
fn written(marks: &VecDeque<Mark>, offset: u64) -> [u64; 2] {
    let after = marks.partition_point(|mark| mark.size <= offset);
    let at = |index: usize| marks.get(index).map(|mark| mark.at_ns);
    let last = marks.back().map_or(0, |mark| mark.at_ns);
    let not_after = at(after).unwrap_or(last);
    let not_before = after.checked_sub(1).and_then(at);
    // Of what stood there before the oldest mark nothing is known.
    [not_before.unwrap_or(0), not_after]
}

/// Whether the file was made within so long. Where the file system does not say, one that is short is taken for new.
fn is_younger(metadata: &Metadata, than: Duration) -> bool {
    match metadata.created() {
        // A time to come is that of a clock that was set.
        Ok(created) => created.elapsed().is_ok_and(|age| age <= than),
        Err(_) => metadata.len() <= MAX_READ,
    }
}
