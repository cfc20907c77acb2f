//! Cuts what a file holds into lines, whatever its bytes are. Pure.
#![forbid(unsafe_code)]

use crate::messages::MAX_LINE;

/// A line that has begun, and where in the file we are.
#[derive(Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end has not come, at most [`MAX_LINE`] of it.
    begun: Vec<u8>,
    /// Offset of the next byte.
    next: u64,
    /// Offset at which that line begins.
    line: u64,
    /// We began within a line, whose rest is nothing to go by.
    within: bool,
}

impl Lines {
    /// From this offset on; `within`: a line may have begun before it.
    pub(super) fn from(offset: u64, within: bool) -> Self {
        Self {
            begun: Vec::new(),
            next: offset,
            line: offset,
            within,
        }
    }

    /// Where to read on.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Where the line begins that is not complete.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// The bytes that follow: `each` gets every line that they complete, bounded, and the offset of its end.
    pub(super) fn feed(&mut self, mut bytes: &[u8], each: &mut impl FnMut(&[u8], u64)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            let offset = self.next + end as u64;
            if self.within {
                self.within = false;
            } else if self.begun.is_empty() {
                tell(line, offset, each);
            } else {
                self.keep(line);
                tell(&self.begun, offset, each);
            }
            self.begun.clear();
            self.next = offset + 1;
            self.line = self.next;
            bytes = rest.get(1..).unwrap_or_default();
        }
        if !self.within {
            self.keep(bytes);
        }
        self.next += bytes.len() as u64;
    }

    /// The file ends for good: so does its last line.
    pub(super) fn end(&mut self, each: &mut impl FnMut(&[u8], u64)) {
        if !self.begun.is_empty() {
            tell(&self.begun, self.next.saturating_sub(1), each);
        }
        *self = Self::from(self.next, false);
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_LINE.saturating_sub(self.begun.len());
        self.begun
            .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }
}

/// A file that was truncated under a writer that keeps its place begins with zeros; a line that holds zeros is no text.
fn tell(line: &[u8], offset: u64, each: &mut impl FnMut(&[u8], u64)) {
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
    fn a_line_counts_once_it_is_complete() {
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
    fn what_began_before_is_left_out() {
        let mut lines = Lines::from(7, true);
        assert_eq!(read(&mut lines, b"rest of"), []);
        assert_eq!(
            read(&mut lines, b" it\nwhole\n"),
            [("whole".to_owned(), 23)]
        );
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut lines = Lines::from(0, false);
        for _ in 0..1_000 {
            assert_eq!(read(&mut lines, &[b'a'; 65_536]), []);
        }
        assert!(lines.begun.capacity() <= 2 * MAX_LINE);
        let told = read(&mut lines, b"\nnext\n");
        assert_eq!(told.len(), 2);
        assert_eq!(told[0].0.len(), MAX_LINE);
        assert_eq!(told[1].0, "next");
    }

    #[test]
    fn zeros_before_a_line_are_no_part_of_it_and_within_it_it_is_no_text() {
        let mut lines = Lines::from(0, false);
        let told = read(&mut lines, b"\0\0\0queue full\nqueue\0full\n\0\0\n");
        assert_eq!(told, [("queue full".to_owned(), 13)]);
    }

    /// However the bytes are cut, the lines are the same.
    #[test]
    fn cuts_make_no_difference() {
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
