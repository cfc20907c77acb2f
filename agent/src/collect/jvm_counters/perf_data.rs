//! Parses the performance data of a HotSpot JVM: version 2.0 of the layout, since JDK 5 (OpenJDK: perfMemory.hpp,
//! perfData.hpp). Pure.
//!
//! A header of 32 bytes names the byte order, the offset of the first entry, and the number of entries. An entry has its length,
//! the offset of its name, its type, and the offset of its value; the next entry follows it. The process can write any bytes,
//! at any time: each offset is checked, and entries do not overlap, so parsing is at most one pass over the bytes.
#![forbid(unsafe_code)]

use std::fmt;

use crate::sample::JvmCounters;

/// The first bytes, whatever the byte order.
const MAGIC: [u8; 4] = [0xca, 0xfe, 0xc0, 0xc0];
/// Length of the header, bytes (`PerfDataPrologue`).
const HEADER_LEN: usize = 32;
/// Length of the fixed part of an entry, bytes (`PerfDataEntry`).
const ENTRY_LEN: usize = 20;
/// The type of a counter: a Java long.
const LONG: u8 = b'J';
/// Maximum number of collectors. HotSpot's have two or three counters each.
const MAX_COLLECTORS: usize = 8;

/// Why there are no counters in these bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unusable {
    /// Not performance data.
    Foreign,
    /// Another version of the layout.
    Version(u8, u8),
    /// The JVM is still starting.
    Starting,
    /// A length or an offset is out of bounds, or zero.
    OutOfBounds,
    /// A counter is negative, or its clock does not advance.
    Impossible,
    /// This JVM does not count its collections.
    Missing,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => write!(f, "it is not performance data of a JVM"),
            Self::Version(major, minor) => {
                write!(
                    f,
                    "its layout has version {major}.{minor}, only 2.0 is known"
                )
            }
            Self::Starting => write!(f, "the JVM is still starting"),
            Self::OutOfBounds => write!(f, "an entry is out of its bounds"),
            Self::Impossible => write!(f, "a counter has an impossible value"),
            Self::Missing => write!(f, "it has no counters of collections"),
        }
    }
}

/// The counters of the process `tgid` in its performance data.
pub fn parse(tgid: u32, bytes: &[u8]) -> Result<JvmCounters, Unusable> {
    let data = PerfData::of(bytes)?;
    let mut found = Found::default();
    data.each_long(|name, value| found.add(name, value))?;
    found.counters(tgid)
}

/// The part of the bytes that is in use.
#[derive(Clone, Copy)]
struct PerfData<'a> {
    bytes: &'a [u8],
    is_little_endian: bool,
}

impl<'a> PerfData<'a> {
    /// Checks the header.
    fn of(bytes: &'a [u8]) -> Result<Self, Unusable> {
        let header = bytes.get(..HEADER_LEN).ok_or(Unusable::Foreign)?;
        let (magic, rest) = header.split_at(MAGIC.len());
        let [byte_order, major, minor, accessible, ..] = *rest else {
            return Err(Unusable::Foreign);
        };
        if magic != MAGIC || byte_order > 1 {
            return Err(Unusable::Foreign);
        }
        if (major, minor) != (2, 0) {
            return Err(Unusable::Version(major, minor));
        }
        if accessible == 0 {
            return Err(Unusable::Starting);
        }
        let all = Self {
            bytes,
            is_little_endian: byte_order == 1,
        };
        let used = all.int(8).ok_or(Unusable::OutOfBounds)?;
        Ok(Self {
            bytes: bytes.get(..used).ok_or(Unusable::OutOfBounds)?,
            ..all
        })
    }

    /// Passes the name and the value of each counter to `visit`.
    fn each_long(
        self,
        mut visit: impl FnMut(&[u8], i64) -> Result<(), Unusable>,
    ) -> Result<(), Unusable> {
        let (Some(mut at), Some(entries)) = (self.int(24), self.int(28)) else {
            return Err(Unusable::OutOfBounds);
        };
        if at < HEADER_LEN || entries > self.bytes.len() / ENTRY_LEN {
            return Err(Unusable::OutOfBounds);
        }
        for _ in 0..entries {
            let entry = self.entry(at).ok_or(Unusable::OutOfBounds)?;
            let name = entry.name().ok_or(Unusable::OutOfBounds)?;
            if entry.is_long().ok_or(Unusable::OutOfBounds)? {
                visit(name, entry.value().ok_or(Unusable::OutOfBounds)?)?;
            }
            at += entry.bytes.len();
        }
        Ok(())
    }

    /// The entry at this offset, with all that belongs to it.
    fn entry(self, at: usize) -> Option<Self> {
        let len = self.int(at).filter(|len| *len >= ENTRY_LEN)?;
        Some(Self {
            bytes: self.bytes.get(at..at.checked_add(len)?)?,
            ..self
        })
    }

    /// The name of an entry, which ends with a NUL.
    fn name(self) -> Option<&'a [u8]> {
        let from_name = self.bytes.get(self.int(4)?..)?;
        let len = from_name.iter().position(|byte| *byte == 0)?;
        from_name.get(..len)
    }

    /// Whether an entry is one number, and not an array of them or a text.
    fn is_long(self) -> Option<bool> {
        Some(self.int(8)? == 0 && *self.bytes.get(12)? == LONG)
    }

    fn value(self) -> Option<i64> {
        let at = self.int(16)?;
        let bytes = self.bytes.get(at..at.checked_add(8)?)?.try_into().ok()?;
        Some(if self.is_little_endian {
            i64::from_le_bytes(bytes)
        } else {
            i64::from_be_bytes(bytes)
        })
    }

    /// A Java int that is a length, an offset or a count: `None` if it is negative.
    fn int(self, at: usize) -> Option<usize> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        let value = if self.is_little_endian {
            i32::from_le_bytes(bytes)
        } else {
            i32::from_be_bytes(bytes)
        };
        usize::try_from(value).ok()
    }
}

/// The counters found up to now.
#[derive(Default)]
struct Found {
    /// Ticks per second of the clock that the times are counted by.
    frequency: Option<u64>,
    safepoint_ticks: Option<u64>,
    safepoints: Option<u64>,
    collectors: [Collector; MAX_COLLECTORS],
}

#[derive(Clone, Copy, Default)]
struct Collector {
    ticks: Option<u64>,
    invocations: Option<u64>,
    /// When the last collection began and ended, in ticks.
    entered: Option<u64>,
    left: Option<u64>,
}

impl Found {
    fn add(&mut self, name: &[u8], value: i64) -> Result<(), Unusable> {
        let counter = match name {
            b"sun.os.hrt.frequency" => &mut self.frequency,
            b"sun.rt.safepointTime" => &mut self.safepoint_ticks,
            b"sun.rt.safepoints" => &mut self.safepoints,
            _ => match self.of_collector(name) {
                Some(counter) => counter,
                None => return Ok(()),
            },
        };
        *counter = Some(u64::try_from(value).map_err(|_| Unusable::Impossible)?);
        Ok(())
    }

    /// `sun.gc.collector.0.time`
    fn of_collector(&mut self, name: &[u8]) -> Option<&mut Option<u64>> {
        let [digit, b'.', counter @ ..] = name.strip_prefix(b"sun.gc.collector.")? else {
            return None;
        };
        let index = usize::from(digit.checked_sub(b'0')?);
        let collector = self.collectors.get_mut(index)?;
        match counter {
            b"time" => Some(&mut collector.ticks),
            b"invocations" => Some(&mut collector.invocations),
            b"lastEntryTime" => Some(&mut collector.entered),
            b"lastExitTime" => Some(&mut collector.left),
            _ => None,
        }
    }

    fn counters(&self, tgid: u32) -> Result<JvmCounters, Unusable> {
        let (Some(frequency), Some(safepoint_ticks), Some(safepoints)) =
            (self.frequency, self.safepoint_ticks, self.safepoints)
        else {
            return Err(Unusable::Missing);
        };
        if frequency == 0 {
            return Err(Unusable::Impossible);
        }
        let mut collector_ticks = None;
        let mut collections = 0_u64;
        let mut is_collecting = false;
        for collector in &self.collectors {
            match *collector {
                Collector {
                    ticks: None,
                    invocations: None,
                    entered: None,
                    left: None,
                } => {}
                Collector {
                    ticks: Some(ticks),
                    invocations: Some(invocations),
                    entered: Some(entered),
                    left: Some(left),
                } => {
                    let sum = collector_ticks.unwrap_or(0_u64).saturating_add(ticks);
                    collector_ticks = Some(sum);
                    collections = collections.saturating_add(invocations);
                    is_collecting |= entered > left;
                }
                _ => return Err(Unusable::Missing),
            }
        }
        let collector_ticks = collector_ticks.ok_or(Unusable::Missing)?;
        Ok(JvmCounters {
            tgid,
            collector_ns: ns(collector_ticks, frequency),
            collections,
            is_collecting,
            safepoint_ns: ns(safepoint_ticks, frequency),
            safepoints,
        })
    }
}

fn ns(ticks: u64, frequency: u64) -> u64 {
    let ns = u128::from(ticks) * 1_000_000_000 / u128::from(frequency);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests;
