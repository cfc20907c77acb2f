//! Performance data made by hand, valid and not.

use super::*;

const NAMES: [&str; 7] = [
    "sun.os.hrt.frequency",
    "sun.rt.safepoints",
    "sun.rt.safepointTime",
    "sun.gc.collector.0.invocations",
    "sun.gc.collector.0.time",
    "sun.gc.collector.0.lastEntryTime",
    "sun.gc.collector.0.lastExitTime",
];

/// An entry in little-endian order, as HotSpot lays it out: the name behind the fixed part, padding, the value.
fn entry(name: &str, value: i64) -> Vec<u8> {
    let value_at = (ENTRY_LEN + name.len() + 1).next_multiple_of(8);
    let mut bytes = Vec::new();
    for field in [value_at + 8, ENTRY_LEN, 0] {
        bytes.extend((field as u32).to_le_bytes());
    }
    bytes.extend([LONG, 0, 3, 2]);
    bytes.extend((value_at as u32).to_le_bytes());
    bytes.extend(name.bytes());
    bytes.resize(value_at, 0);
    bytes.extend(value.to_le_bytes());
    bytes
}

fn file(entries: &[Vec<u8>]) -> Vec<u8> {
    let content = entries.concat();
    let used = (HEADER_LEN + content.len()) as u32;
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 2, 0, 1]);
    bytes.extend(used.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend((HEADER_LEN as u32).to_le_bytes());
    bytes.extend((entries.len() as u32).to_le_bytes());
    bytes.extend(content);
    // The rest of the page.
    bytes.resize(bytes.len().next_multiple_of(4_096), 0);
    bytes
}

/// A clock of 1 MHz; three collections of 2.5 s, and one since 9 s.
pub(in crate::collect::jvm_counters) fn valid() -> Vec<u8> {
    let values = [1_000_000, 5, 3_000_000, 4, 2_500_000, 9_000_000, 8_000_000];
    let entries = NAMES.iter().zip(values);
    let entries: Vec<Vec<u8>> = entries.map(|(name, value)| entry(name, value)).collect();
    file(&entries)
}

/// The offset of the entry of this name.
fn entry_at(bytes: &[u8], name: &str) -> usize {
    let mut windows = bytes.windows(name.len());
    windows.position(|it| it == name.as_bytes()).unwrap() - ENTRY_LEN
}

#[test]
fn counters_are_read_in_the_units_of_their_clock() {
    let expected = JvmCounters {
        tgid: 7,
        collector_ns: 2_500_000_000,
        collections: 4,
        is_collecting: true,
        safepoint_ns: 3_000_000_000,
        safepoints: 5,
    };
    assert_eq!(parse(7, &valid()), Ok(expected));
}

#[test]
fn all_collectors_count_together_and_other_entries_are_ignored() {
    let mut entries = vec![entry("sun.os.hrt.frequency", 1_000_000_000)];
    entries.extend(["sun.rt.safepoints", "sun.rt.safepointTime"].map(|name| entry(name, 1)));
    for collector in 0..2 {
        let values = [
            ("invocations", 3),
            ("time", 40),
            ("lastEntryTime", 5),
            ("lastExitTime", 5),
        ];
        entries.extend(values.map(|(counter, value)| {
            entry(&format!("sun.gc.collector.{collector}.{counter}"), value)
        }));
    }
    entries.extend(
        [
            "sun.gc.collector.0.name",
            "sun.gc.collector.x.time",
            "sun.gc.collector.",
            "sun.gc.collector.9.time",
            "",
        ]
        .map(|name| entry(name, -1)),
    );
    let counters = parse(7, &file(&entries)).unwrap();
    assert_eq!((counters.collections, counters.collector_ns), (6, 80));
    assert!(!counters.is_collecting);
}

#[test]
fn truncated_data_is_out_of_bounds_wherever_it_ends() {
    let whole = valid();
    let used = u32::from_le_bytes(whole[8..12].try_into().unwrap()) as usize;
    for len in 0..used {
        let expected = match len {
            0..HEADER_LEN => Unusable::Foreign,
            _ => Unusable::OutOfBounds,
        };
        assert_eq!(parse(7, &whole[..len]), Err(expected), "{len}");
        // The header admits that less is in use.
        let mut cut = whole.clone();
        cut[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        assert_eq!(parse(7, &cut), Err(Unusable::OutOfBounds), "{len}");
    }
    assert!(parse(7, &whole[..used]).is_ok());
}

#[test]
fn a_length_or_an_offset_out_of_bounds_is_an_error() {
    let at = entry_at(&valid(), "sun.rt.safepoints");
    for (field, value) in [
        // The length of the entry: none, less than its fixed part, negative, beyond the end.
        (0, 0),
        (0, ENTRY_LEN as i32 - 1),
        (0, -1),
        (0, i32::MAX),
        // The offset of its name.
        (4, -1),
        (4, i32::MAX),
        // The offset of its value.
        (16, -8),
        (16, 1_000_000),
    ] {
        let mut bytes = valid();
        bytes[at + field..at + field + 4].copy_from_slice(&value.to_le_bytes());
        assert_eq!(
            parse(7, &bytes),
            Err(Unusable::OutOfBounds),
            "{field}: {value}"
        );
    }
}

#[test]
fn a_name_without_an_end_is_not_read_beyond_its_entry() {
    let mut bytes = valid();
    let at = entry_at(&bytes, "sun.rt.safepoints");
    let len = entry("sun.rt.safepoints", 0).len();
    bytes[at + ENTRY_LEN..at + len].fill(b'x');
    assert_eq!(parse(7, &bytes), Err(Unusable::OutOfBounds));
}

#[test]
fn more_entries_than_there_is_room_for_are_not_searched() {
    for entries in [8, 1_000, 1_000_000_000, -1] {
        let mut bytes = valid();
        bytes[28..32].copy_from_slice(&i32::to_le_bytes(entries));
        assert_eq!(parse(7, &bytes), Err(Unusable::OutOfBounds), "{entries}");
    }
}

#[test]
fn the_header_is_checked() {
    for (at, byte, expected) in [
        (0, 0xcb, Unusable::Foreign),
        (4, 2, Unusable::Foreign),
        (5, 1, Unusable::Version(1, 0)),
        (6, 1, Unusable::Version(2, 1)),
        (7, 0, Unusable::Starting),
        // The offset of the first entry: within the header.
        (24, 8, Unusable::OutOfBounds),
    ] {
        let mut bytes = valid();
        bytes[at] = byte;
        assert_eq!(parse(7, &bytes), Err(expected), "{at}");
    }
    assert_eq!(parse(7, b""), Err(Unusable::Foreign));
}

#[test]
fn impossible_and_missing_counters_are_named() {
    let with = |name: &str, value: i64| {
        let entries = NAMES.map(|it| entry(it, if it == name { value } else { 1 }));
        parse(7, &file(&entries))
    };
    assert_eq!(with("sun.os.hrt.frequency", 0), Err(Unusable::Impossible));
    assert_eq!(with("sun.rt.safepoints", -1), Err(Unusable::Impossible));
    // The largest time by the slowest clock.
    let counters = with("sun.gc.collector.0.time", i64::MAX).unwrap();
    assert_eq!(counters.collector_ns, u64::MAX);
    for missing in NAMES {
        let kept = NAMES.iter().filter(|name| **name != missing);
        let entries: Vec<Vec<u8>> = kept.map(|name| entry(name, 1)).collect();
        assert_eq!(
            parse(7, &file(&entries)),
            Err(Unusable::Missing),
            "{missing}"
        );
    }
    // The Epsilon collector has no counters.
    let entries = NAMES.map(|name| entry(name, 1));
    assert_eq!(parse(7, &file(&entries[..3])), Err(Unusable::Missing));
}
