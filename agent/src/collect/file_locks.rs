//! The locks on files of the whole machine, as /proc/locks lists them. Pure.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

/// Maximum number of lines read; the rest is ignored and counted.
pub(super) const MAX_LINES: usize = 100_000;

/// A file: major and minor number of its file system's device, and its inode.
pub(super) type FileId = (u32, u32, u64);

/// A lock that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeldLock {
    /// The process that took it, by its number in the agent's /proc; it may have ended and passed the lock on. `None`: a lock of
    /// an open file description, which records no process.
    pub(super) pid: Option<u32>,
    /// Nobody else can hold any lock on that part of the file.
    pub(super) exclusive: bool,
}

/// The locks on files.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FileLocks {
    held: BTreeMap<FileId, Vec<HeldLock>>,
    /// For each process that waits: the locks that block it, each with its file.
    waiting: BTreeMap<u32, Vec<(FileId, HeldLock)>>,
    /// Lines beyond [`MAX_LINES`].
    pub(super) left_out: usize,
}

impl FileLocks {
    /// Parses /proc/locks. What is not understood is ignored.
    pub(super) fn parse(text: &str) -> Self {
        let mut locks = Self::default();
        let mut last: Option<(&str, FileId, HeldLock)> = None;
        for (index, line) in text.lines().enumerate() {
            if index >= MAX_LINES {
                locks.left_out += 1;
                continue;
            }
            let Some(line) = Line::parse(line) else {
                continue;
            };
            match last {
                // The waiters for a lock follow it and have its number.
                Some((number, file, lock)) if line.waits && line.number == number => {
                    if let Some(pid) = line.lock.pid {
                        locks.waiting.entry(pid).or_default().push((file, lock));
                    }
                }
                _ if line.waits => {}
                _ => {
                    locks.held.entry(line.file).or_default().push(line.lock);
                    last = Some((line.number, line.file, line.lock));
                }
            }
        }
        locks
    }

    /// The locks that block this process, each with its file.
    pub(super) fn blocking(&self, pid: u32) -> &[(FileId, HeldLock)] {
        self.waiting.get(&pid).map_or(&[], Vec::as_slice)
    }

    /// The locks held on a file.
    pub(super) fn on(&self, file: FileId) -> &[HeldLock] {
        self.held.get(&file).map_or(&[], Vec::as_slice)
    }

    /// Files with an exclusive lock.
    pub(super) fn exclusive(&self) -> BTreeSet<FileId> {
        let exclusive = self
            .held
            .iter()
            .filter(|(_, locks)| locks.iter().any(|lock| lock.exclusive));
        exclusive.map(|(file, _)| *file).collect()
    }
}

struct Line<'a> {
    /// Number of the lock, which its waiters share.
    number: &'a str,
    waits: bool,
    file: FileId,
    lock: HeldLock,
}

impl<'a> Line<'a> {
    /// `1: POSIX  ADVISORY  WRITE 4711 fe:00:9977926 0 EOF`; a waiter has `->` after the number.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let number = words.next()?.strip_suffix(':')?;
        let mut kind = words.next()?;
        let waits = kind == "->";
        if waits {
            kind = words.next()?;
        }
        if !matches!(kind, "POSIX" | "FLOCK" | "OFDLCK") {
            return None;
        }
        let _mandatory = words.next()?;
        let exclusive = words.next()? == "WRITE";
        let pid: i64 = words.next()?.parse().ok()?;
        Some(Self {
            number,
            waits,
            file: file_id(words.next()?)?,
            lock: HeldLock {
                pid: u32::try_from(pid).ok().filter(|pid| *pid > 0),
                exclusive,
            },
        })
    }
}

fn file_id(text: &str) -> Option<FileId> {
    let mut parts = text.split(':');
    let device = |part: Option<&str>| u32::from_str_radix(part?, 16).ok();
    let id = (
        device(parts.next())?,
        device(parts.next())?,
        parts.next()?.parse().ok()?,
    );
    parts.next().is_none().then_some(id)
}

/// Whether one of these lines of /proc/PID/fdinfo/FD shows that the open file description holds a lock on this file.
pub(super) fn holds_a_lock(fdinfo: &str, file: FileId) -> bool {
    let lines = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    let locks = lines.filter_map(|line| Line::parse(line.trim_start()));
    locks
        .filter(|line| !line.waits)
        .any(|line| line.file == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = (0xfe, 0, 9_977_926);

    fn by(pid: u32) -> HeldLock {
        HeldLock {
            pid: Some(pid),
            exclusive: true,
        }
    }

    #[test]
    fn waiters_belong_to_the_lock_above_them() {
        let text = "1: POSIX  ADVISORY  READ  77 fe:00:5 128 128\n\
                    2: FLOCK  ADVISORY  WRITE 100 fe:00:9977926 0 EOF\n\
                    2: -> FLOCK  ADVISORY  WRITE 101 fe:00:9977926 0 EOF\n\
                    2:  -> FLOCK  ADVISORY  READ 102 fe:00:9977926 0 EOF\n\
                    3: OFDLCK ADVISORY  WRITE -1 00:1f:8 0 0\n\
                    3: -> OFDLCK ADVISORY  WRITE -1 00:1f:8 0 0\n\
                    4: LEASE  ACTIVE    READ  5 fe:00:6 0 EOF\n";
        let locks = FileLocks::parse(text);
        assert_eq!(locks.blocking(101), [(FILE, by(100))]);
        assert_eq!(locks.blocking(102), [(FILE, by(100))]);
        assert_eq!(locks.blocking(100), []);
        assert_eq!(locks.on(FILE), [by(100)]);
        let description = HeldLock {
            pid: None,
            exclusive: true,
        };
        assert_eq!(locks.on((0, 0x1f, 8)), [description]);
        let exclusive: Vec<FileId> = locks.exclusive().into_iter().collect();
        assert_eq!(exclusive, [(0, 0x1f, 8), FILE]);
    }

    #[test]
    fn lines_that_are_not_locks_are_ignored() {
        for line in [
            "",
            "1:",
            "1: ->",
            "-> FLOCK ADVISORY WRITE 1 fe:00:1 0 EOF",
            "1: -> FLOCK ADVISORY WRITE 1 fe:00:1 0 EOF",
            "1: FLOCK ADVISORY WRITE",
            "1: FLOCK ADVISORY WRITE x fe:00:1 0 EOF",
            "1: FLOCK ADVISORY WRITE 99999999999999999999 fe:00:1 0 EOF",
            "1: FLOCK ADVISORY WRITE 1 <none>:0 0 EOF",
            "1: FLOCK ADVISORY WRITE 1 fe:00:1:2 0 EOF",
            "1: FLOCK ADVISORY WRITE 1 fg:00:1 0 EOF",
            "\u{0}\u{1b}[2J: FLOCK",
        ] {
            assert_eq!(FileLocks::parse(line), FileLocks::default(), "{line:?}");
        }
    }

    #[test]
    fn lines_are_bounded_and_the_rest_is_counted() {
        let line = "1: -> FLOCK ADVISORY WRITE 7 fe:00:1 0 EOF\n";
        let first = "1: FLOCK ADVISORY WRITE 6 fe:00:1 0 EOF\n";
        let text = first.to_owned() + &line.repeat(MAX_LINES + 4);
        let locks = FileLocks::parse(&text);
        assert_eq!(locks.left_out, 5);
        assert_eq!(locks.blocking(7).len(), MAX_LINES - 1);
    }

    #[test]
    fn an_open_file_shows_the_locks_that_it_holds() {
        let info = "pos:\t0\nflags:\t0100002\n\
                    lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:9977926 0 EOF\n";
        assert!(holds_a_lock(info, FILE));
        assert!(!holds_a_lock(info, (0xfe, 0, 1)));
        assert!(!holds_a_lock("pos:\t0\n", FILE));
        let waits = "lock:\t1: -> OFDLCK ADVISORY  WRITE -1 fe:00:9977926 0 EOF\n";
        assert!(!holds_a_lock(waits, FILE));
    }
}
