//! What `tailback run --focus-all` tells for the benchmarks: how many closer looks it has made. Not for users.
//!
//! Not from a recording, which costs time of the very budget that is measured, and not from the agent's report, whose ticks
//! need not be closer looks.
#![forbid(unsafe_code)]

use std::io::{self, Write as _};

use serde_json::json;

use super::{Failure, exit_code::Outcome};
use crate::sample::Sample;

/// Between two lines: seldom enough to cost nothing, often enough for windows of a second.
const EVERY_NS: u64 = 200_000_000;

/// All closer looks so far.
#[derive(Default)]
pub(super) struct Looks {
    looks: u64,
    due_ns: u64,
}

/// One line.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    /// Of the last look that counts.
    mono_ns: u64,
    looks: u64,
    /// Threads that it saw.
    threads: usize,
}

impl Looks {
    /// Counts a sample, and tells it on standard output when it is time to.
    pub(super) fn tell(&mut self, sample: &Sample) -> Outcome<()> {
        let Some(told) = self.count(sample) else {
            return Ok(());
        };
        let Told {
            mono_ns,
            looks,
            threads,
        } = told;
        let line = json!({"type": "looks", "mono_ns": mono_ns, "looks": looks, "threads": threads});
        writeln!(io::stdout(), "{line}").map_err(Failure::stdout)
    }

    /// A line stands at a look, never between two: so the rate between any two lines is exact.
    fn count(&mut self, sample: &Sample) -> Option<Told> {
        if !sample.walks.profile {
            return None;
        }
        self.looks += 1;
        if sample.mono_ns < self.due_ns {
            return None;
        }
        self.due_ns = sample.mono_ns + EVERY_NS;
        Some(Told {
            mono_ns: sample.mono_ns,
            looks: self.looks,
            threads: sample.profile.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Walks;

    const MS: u64 = 1_000_000;

    fn sample(at_ms: u64, profile: bool) -> Sample {
        Sample {
            mono_ns: at_ms * MS,
            walks: Walks {
                profile,
                ..Walks::default()
            },
            ..Sample::default()
        }
    }

    #[test]
    fn closer_looks_are_counted_and_other_ticks_are_not() {
        let mut looks = Looks::default();
        let told: Vec<(u64, u64)> = (1..=100)
            .filter_map(|number| looks.count(&sample(10 * number, number % 2 == 0)))
            .map(|told| (told.mono_ns / MS, told.looks))
            .collect();
        assert_eq!(told, [(20, 1), (220, 11), (420, 21), (620, 31), (820, 41)]);
    }

    #[test]
    fn without_a_closer_look_nothing_is_told() {
        let mut looks = Looks::default();
        assert!((1..100).all(|number| looks.count(&sample(100 * number, false)).is_none()));
    }
}
