//! For which share of a time JVMs collected garbage, by their own counters.
//!
//! A JVM adds the time of a collection when it ends. So the readings give bounds: a collection that is in progress at the last
//! reading may have begun right after the last reading that does not count it yet, and one that was in progress at the first may
//! have taken all of its time before.

use std::collections::VecDeque;

use crate::{
    hash::HashMap,
    sample::{JvmCounters, Sample},
};

/// Readings are kept for this time, ns: one and a half times the longest window that a verdict is made from.
const KEPT_NS: u64 = 30_000_000_000;
/// Maximum number of readings kept of one process: more than one per second.
const MAX_READINGS: usize = 64;
/// Maximum number of processes whose readings are kept. Further ones have none.
const MAX_PROCESSES: usize = 1_024;
/// The first reading may be older than the window by this, ns: two readings are a second apart.
const MAX_EARLIER_NS: u64 = 1_000_000_000;
/// Shortest time between the first and the last reading, ns.
const MIN_TIME_NS: u64 = 900_000_000;
/// Smallest part of the window that the readings have to cover.
const MIN_COVERED: f64 = 0.5;

/// The readings of each JVM.
#[derive(Default)]
pub(super) struct JvmReadings {
    by_process: HashMap<u32, VecDeque<Reading>>,
}

#[derive(Clone, Copy)]
struct Reading {
    /// CLOCK_MONOTONIC, ns.
    at_ns: u64,
    counters: JvmCounters,
}

/// Shares of a time, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Collecting {
    /// Bounds of the time in collections.
    pub(super) at_least: f64,
    pub(super) at_most: f64,
    /// Time in which all threads were stopped, for collections or anything else, without a stop that is still in progress.
    pub(super) stopped: f64,
}

impl JvmReadings {
    pub(super) fn read(&mut self, sample: &Sample) {
        let now_ns = sample.mono_ns;
        for counters in &sample.jvm_counters {
            let is_known = self.by_process.contains_key(&counters.tgid);
            if !is_known && self.by_process.len() >= MAX_PROCESSES {
                continue;
            }
            let readings = self.by_process.entry(counters.tgid).or_default();
            let last = readings.back();
            if last.is_some_and(|last| !last.precedes(now_ns, counters)) {
                readings.clear();
            }
            if readings.len() >= MAX_READINGS {
                readings.pop_front();
            }
            readings.push_back(Reading {
                at_ns: now_ns,
                counters: *counters,
            });
        }
        let is_kept = |reading: &Reading| now_ns.saturating_sub(reading.at_ns) <= KEPT_NS;
        self.by_process
            .retain(|_, readings| readings.back().is_some_and(is_kept));
    }

    /// How much a process collected in this time, CLOCK_MONOTONIC ns. `None`: it was not read, or for too short a time.
    pub(super) fn over(&self, tgid: u32, (from_ns, to_ns): (u64, u64)) -> Option<Collecting> {
        let readings = self.by_process.get(&tgid)?;
        let time = from_ns.saturating_sub(MAX_EARLIER_NS)..=to_ns;
        let readings = readings.iter();
        let readings: Vec<&Reading> = readings.filter(|it| time.contains(&it.at_ns)).collect();
        let (first, last) = (readings.first()?, readings.last()?);
        let time_ns = last.at_ns.saturating_sub(first.at_ns);
        let wanted_ns = to_ns.saturating_sub(from_ns) as f64 * MIN_COVERED;
        if time_ns < MIN_TIME_NS || (time_ns as f64) < wanted_ns {
            return None;
        }
        let since_first = |it: &Reading| {
            it.counters
                .collector_ns
                .saturating_sub(first.counters.collector_ns)
        };
        let complete_ns = since_first(last);
        let begun_before_ns = if first.counters.is_collecting {
            let ended = readings.iter().map(|it| since_first(it));
            ended.filter(|ns| *ns > 0).min().unwrap_or(0)
        } else {
            0
        };
        let in_progress_ns = if last.counters.is_collecting {
            let collections = last.counters.collections;
            let mut before = readings.iter().rev();
            let before = before.find(|it| it.counters.collections < collections);
            last.at_ns.saturating_sub(before.unwrap_or(first).at_ns)
        } else {
            0
        };
        let stopped_ns = last
            .counters
            .safepoint_ns
            .saturating_sub(first.counters.safepoint_ns);
        let share = |ns: u64| (ns as f64 / time_ns as f64).min(1.0);
        Some(Collecting {
            at_least: share(complete_ns.saturating_sub(begun_before_ns)),
            at_most: share(complete_ns.saturating_add(in_progress_ns)),
            stopped: share(stopped_ns),
        })
    }
}

impl Reading {
    /// Whether these are later counters of the same JVM: nothing runs backwards. Otherwise it is a new process, or no JVM.
    fn precedes(&self, now_ns: u64, later: &JvmCounters) -> bool {
        let before = &self.counters;
        self.at_ns < now_ns
            && before.collector_ns <= later.collector_ns
            && before.collections <= later.collections
            && before.safepoint_ns <= later.safepoint_ns
            && before.safepoints <= later.safepoints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1_000 * MS;

    /// Reads a second apart: complete time of collections, ms, collections begun, and whether one is in progress.
    fn readings(counters: &[(u64, u64, bool)]) -> JvmReadings {
        let mut readings = JvmReadings::default();
        for (second, (collector_ms, collections, is_collecting)) in (10..).zip(counters) {
            readings.read(&Sample {
                mono_ns: second * SECOND,
                jvm_counters: vec![JvmCounters {
                    tgid: 7,
                    collector_ns: collector_ms * MS,
                    collections: *collections,
                    is_collecting: *is_collecting,
                    safepoint_ns: collector_ms * MS,
                    safepoints: *collections,
                }],
                ..Sample::default()
            });
        }
        readings
    }

    /// The bounds over all readings.
    fn bounds(counters: &[(u64, u64, bool)]) -> Option<(f64, f64)> {
        let to_ns = (9 + counters.len() as u64) * SECOND;
        let found = readings(counters).over(7, (10 * SECOND, to_ns))?;
        Some((found.at_least, found.at_most))
    }

    #[test]
    fn complete_collections_are_exact() {
        let counters = [(100, 1, false), (600, 3, false), (1_100, 9, false)];
        assert_eq!(bounds(&counters), Some((0.5, 0.5)));
        assert_eq!(bounds(&[(100, 1, false); 3]), Some((0.0, 0.0)));
    }

    #[test]
    fn a_collection_in_progress_counts_from_the_last_reading_without_it_at_most() {
        let counters = [
            (0, 1, false),
            (200, 3, false),
            (200, 4, true),
            (200, 4, true),
            (200, 4, true),
        ];
        assert_eq!(bounds(&counters), Some((0.05, 0.8)));
        // One that has not ended since before the first reading.
        assert_eq!(bounds(&[(0, 1, true); 4]), Some((0.0, 1.0)));
    }

    #[test]
    fn a_collection_that_began_before_the_first_reading_may_have_ended_right_after_it() {
        let counters = [(0, 1, true), (9_000, 1, false), (9_000, 1, false)];
        assert_eq!(bounds(&counters), Some((0.0, 1.0)));
        let counters = [(0, 1, true), (300, 2, false), (800, 3, false)];
        assert_eq!(bounds(&counters), Some((0.25, 0.4)));
    }

    #[test]
    fn readings_of_too_short_a_time_say_nothing() {
        assert_eq!(bounds(&[(0, 0, false)]), None);
        assert_eq!(bounds(&[]), None);
        let readings = readings(&[(0, 0, false), (500, 1, false), (1_000, 2, false)]);
        assert!(readings.over(7, (8 * SECOND, 12 * SECOND)).is_some());
        assert!(readings.over(7, (7 * SECOND, 12 * SECOND)).is_none());
        assert!(readings.over(8, (10 * SECOND, 12 * SECOND)).is_none());
    }

    #[test]
    fn counters_that_run_backwards_begin_anew() {
        let counters = [
            (5_000, 9, false),
            (5_500, 10, false),
            (100, 1, false),
            (600, 2, false),
        ];
        // What is left covers too little.
        assert_eq!(bounds(&counters), None);
        let readings = readings(&counters);
        let found = readings.over(7, (12 * SECOND, 13 * SECOND)).unwrap();
        assert_eq!((found.at_least, found.at_most), (0.5, 0.5));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut readings = JvmReadings::default();
        let counters = |tgid| JvmCounters {
            tgid,
            collector_ns: 0,
            collections: 0,
            is_collecting: false,
            safepoint_ns: 0,
            safepoints: 0,
        };
        let mut read = |mono_ns, jvm_counters| {
            readings.read(&Sample {
                mono_ns,
                jvm_counters,
                ..Sample::default()
            });
            let all = readings.by_process.values().map(VecDeque::len);
            (readings.by_process.len(), all.sum::<usize>())
        };
        let many: Vec<JvmCounters> = (0..5_000).map(counters).collect();
        assert_eq!(read(1, many), (MAX_PROCESSES, MAX_PROCESSES));
        for at_ns in 2..1_000 {
            read(at_ns, vec![counters(7)]);
        }
        assert_eq!(read(1_000, Vec::new()).1, MAX_PROCESSES - 1 + MAX_READINGS);
        assert_eq!(read(2 * KEPT_NS, Vec::new()), (0, 0));
    }
}
