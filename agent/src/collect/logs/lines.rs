//! Splits the bytes of a file into lines, whatever the bytes are. Pure.
#![forbid(unsafe_code)]

use crate::messages::MAX_LINE;

/// An incomplete line, and the position in the file.
#[derive(Default)]
pub(super) struct Lines {
    /// The line that is incomplete so far, at most [`MAX_LINE`] bytes of it.
    partial: Vec<u8>,
    /// Offset of the next byte.
    next: u64,
    /// Offset at which the incomplete line begins.
    line: u64,
    /// The current line began before the first byte, so its rest is skipped.
    is_skipping: bool,
}

impl Lines {
    /// Begins at an offset. `mid_line`: a line may have begun before it; its rest is skipped.
    pub(super) fn from(offset: u64, mid_line: bool) -> Self {
        Self {
            partial: Vec::new(),
            next: offset,
            line: offset,
            is_skipping: mid_line,
        }
    }

    /// Offset of the next byte to feed.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Offset at which the incomplete line begins.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// Adds the bytes that follow. `each` gets every line that they complete, cut to [`MAX_LINE`], and the offset of its end.
    pub(super) fn feed(&mut self, mut bytes: &[u8], each: &mut impl FnMut(&[u8], u64)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            let offset = self.next + end as u64;
            if self.is_skipping {
                self.is_skipping = false;
            } else if self.partial.is_empty() {
                emit(line, offset, each);
            } else {
                self.keep(line);
                emit(&self.partial, offset, each);
            }
            self.partial.clear();
            self.next = offset + 1;
            self.line = self.next;
            bytes = rest.get(1..).unwrap_or_default();
        }
        if !self.is_skipping {
            self.keep(bytes);
        }
        self.next += bytes.len() as u64;
    }

    /// Nothing more will be written: the incomplete line is complete.
    pub(super) fn end(&mut self, each: &mut impl FnMut(&[u8], u64)) {
        if !self.partial.is_empty() {
            emit(&self.partial, self.next.saturating_sub(1), each);
        }
        *self = Self::from(self.next, false);
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_LINE.saturating_sub(self.partial.len());
        self.partial
            .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }
}

/// Passes on a line. NULs before it are cut off: a file that was truncated while its writer kept its offset begins with them.
/// A line with other NULs is not text.
fn emit(line: &[u8], offset: u64, each: &mut impl FnMut(&[u8], u64)) {
    let line = line.get(..MAX_LINE).unwrap_or(line);
    let begin = line.iter().position(|byte| *byte != 0);
    let Some(line) = begin.and_then(|begin| line.get(begin..)) else {
        return;
    };
    if !line.contains(&0) {
        each(line.trim_ascii_end(), offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &mut Lines, bytes: &[u8]) -> Vec<(String, u64)> {
        let mut out = Vec::new();
        lines.feed(bytes, &mut |line, offset| {
            out.push((String::from_utf8_lossy(line).into_owned(), offset));
        });
        out
    }

    #[test]
    fn a_line_is_passed_on_once_it_is_complete() {
        let mut lines = Lines::from(100, false);
        assert_eq!(read(&mut lines, b"one\r\ntw"), [("one".to_owned(), 104)]);
        assert_eq!((lines.line(), lines.next()), (105, 107));
        assert_eq!(read(&mut lines, b"o"), []);
        assert_eq!(read(&mut lines, b"\n\nx"), [("two".to_owned(), 108)]);
        let mut last = Vec::new();
        lines.end(&mut |line, _| last.extend_from_slice(line));
        assert_eq!(last, b"x");
    }

    #[test]
    fn a_line_that_began_before_is_skipped() {
        let mut lines = Lines::from(7, true);
        assert_eq!(read(&mut lines, b"rest of"), []);
        assert_eq!(
            read(&mut lines, b" it\nwhole\n"),
            [("whole".to_owned(), 23)]
        );
    }

    #[test]
    fn an_endless_line_takes_bounded_memory() {
        let mut lines = Lines::from(0, false);
        for _ in 0..1_000 {
            assert_eq!(read(&mut lines, &[b'a'; 65_536]), []);
        }
        assert!(lines.partial.capacity() <= 2 * MAX_LINE);
        let lines_read = read(&mut lines, b"\nnext\n");
        assert_eq!(lines_read.len(), 2);
        assert_eq!(lines_read[0].0.len(), MAX_LINE);
        assert_eq!(lines_read[1].0, "next");
    }

    #[test]
    fn nuls_before_a_line_are_cut_off_and_a_line_with_nuls_is_skipped() {
        let mut lines = Lines::from(0, false);
        let lines_read = read(&mut lines, b"\0\0\0queue full\nqueue\0full\n\0\0\n");
        assert_eq!(lines_read, [("queue full".to_owned(), 13)]);
    }

    #[test]
    fn lines_do_not_depend_on_how_the_bytes_are_split() {
        let mut state: u64 = 88_172_645_463_325_252;
        let mut next = move |bound: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % bound
        };
        for _ in 0..200 {
            let bytes: Vec<u8> = (0..next(12_000))
                .map(|_| match next(1_200) {
                    0 => b'\n',
                    1 => 0,
                    _ => (next(255) + 1) as u8,
                })
                .collect();
            let whole = read(&mut Lines::from(5, false), &bytes);
            let mut lines = Lines::from(5, false);
            let mut parts = Vec::new();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let (part, after) = rest.split_at(next(rest.len() as u64 + 1) as usize);
                parts.extend(read(&mut lines, part));
                rest = after;
            }
            assert_eq!(parts, whole);
            assert_eq!(lines.next(), 5 + bytes.len() as u64);
        }
    }
}
