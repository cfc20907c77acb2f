//! The memory that processes share, as /proc/PID/maps shows it.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::{file_locks::FileId, paths::maps};

/// Longest text read from /proc/PID/maps, bytes: 50,000 lines of usual length.
const MAX_MAPS_BYTES: u64 = 8 << 20;

/// A place in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: FileId,
    pub(super) offset: u64,
}

/// A part of a process's memory that is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    from: u64,
    to: u64,
    file: FileId,
    offset: u64,
}

/// The shared memory of the processes of one search, by pid.
#[derive(Default)]
pub(super) struct Maps {
    shared: HashMap<u32, Vec<Mapping>>,
}

impl Maps {
    fn of(&mut self, pid: u32) -> &[Mapping] {
        self.shared.entry(pid).or_insert_with(|| {
            let text = maps(pid, MAX_MAPS_BYTES);
            text.lines().filter_map(mapping).collect()
        })
    }

    /// What an address of a process refers to. `None`: its memory there is not shared.
    pub(super) fn place(&mut self, pid: u32, address: u64) -> Option<Place> {
        let is_there = |it: &&Mapping| it.from <= address && address < it.to;
        let mapping = self.of(pid).iter().find(is_there)?;
        Some(Place {
            file: mapping.file,
            offset: mapping.offset.saturating_add(address - mapping.from),
        })
    }

    /// Whether a process maps this place.
    pub(super) fn has(&mut self, pid: u32, place: Place) -> bool {
        self.of(pid).iter().any(|it| {
            let len = it.to.saturating_sub(it.from);
            it.file == place.file
                && it.offset <= place.offset
                && place.offset < it.offset.saturating_add(len)
        })
    }
}

/// A line of /proc/PID/maps, if it is of shared memory.
fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    words.next()?.strip_suffix('s')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = |text: &str| u32::from_str_radix(text, 16).ok();
    Some(Mapping {
        from: hex(from)?,
        to: hex(to)?,
        file: (device(major)?, device(minor)?, words.next()?.parse().ok()?),
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_memory_is_considered() {
        let shared = "7f00-8f00 rw-s 00001000 00:01 1042 /dev/zero (deleted)";
        let expected = Mapping {
            from: 0x7f00,
            to: 0x8f00,
            file: (0, 1, 1042),
            offset: 0x1000,
        };
        assert_eq!(mapping(shared), Some(expected));
        for line in [
            "7f00-8f00 rw-p 00001000 00:01 1042 /lib/x",
            "7f00 rw-s 00001000 00:01 1042",
            "7f00-8f00 rw-s 00001000 00:01",
            "x-8f00 rw-s 00001000 00:01 1042",
            "",
        ] {
            assert_eq!(mapping(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_place_is_the_same_at_another_address() {
        let mut maps = Maps::default();
        let parse = |text: &str| text.lines().filter_map(mapping).collect::<Vec<_>>();
        maps.shared
            .insert(1, parse("7f00-8f00 rw-s 00001000 00:01 1042 /x"));
        maps.shared
            .insert(2, parse("1000-9000 rw-s 00000000 00:01 1042 /x"));
        maps.shared
            .insert(3, parse("7f00-8f00 rw-s 00001000 00:01 77 /y"));
        let place = maps.place(1, 0x7f10).unwrap();
        assert_eq!(place.offset, 0x1010);
        assert!(maps.has(2, place));
        assert!(!maps.has(3, place));
        assert_eq!(maps.place(1, 0x8f00), None);
    }
}
