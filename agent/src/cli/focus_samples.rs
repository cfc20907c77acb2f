//! `tailback run --focus-all`, for the benchmarks only: prints how many focus samples the agent has taken.
//!
//! A recording would cost CPU time of the very budget that is measured. The agent's own report counts all samples, not
//! only those with a thread profile.
#![forbid(unsafe_code)]

use std::io::{self, Write as _};

use serde_json::json;

use super::{Failure, exit_code::Outcome};
use crate::sample::Sample;

/// Least time between two lines. Chosen so that printing costs nothing measurable, and a window of 1 s holds several.
const PRINT_INTERVAL_NS: u64 = 200_000_000;

/// Counts the focus samples so far: those with a thread profile.
#[derive(Default)]
pub(super) struct FocusSamples {
    samples: u64,
    due_ns: u64,
}

/// What one line reports.
#[derive(Debug, PartialEq, Eq)]
struct Progress {
    /// When the last counted sample was taken.
    mono_ns: u64,
    samples: u64,
    /// Threads in that sample.
    threads: usize,
}

impl FocusSamples {
    /// Counts a sample; prints a line when one is due.
    pub(super) fn add(&mut self, sample: &Sample) -> Outcome<()> {
        let Some(progress) = self.count(sample) else {
            return Ok(());
        };
        let Progress {
            mono_ns,
            samples,
            threads,
        } = progress;
        let line = json!({"type": "focus_samples", "mono_ns": mono_ns, "samples": samples, "threads": threads});
        writeln!(io::stdout(), "{line}").map_err(Failure::stdout)
    }

    /// A line is due only at a focus sample, never between two: the rate between any two lines is exact.
    fn count(&mut self, sample: &Sample) -> Option<Progress> {
        if !sample.scans.profile {
            return None;
        }
        self.samples += 1;
        if sample.mono_ns < self.due_ns {
            return None;
        }
        self.due_ns = sample.mono_ns + PRINT_INTERVAL_NS;
        Some(Progress {
            mono_ns: sample.mono_ns,
            samples: self.samples,
            threads: sample.profile.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Scans;

    const MS: u64 = 1_000_000;

    fn sample(at_ms: u64, profile: bool) -> Sample {
        Sample {
            mono_ns: at_ms * MS,
            scans: Scans {
                profile,
                ..Scans::default()
            },
            ..Sample::default()
        }
    }

    #[test]
    fn only_samples_with_a_profile_are_counted() {
        let mut counter = FocusSamples::default();
        let lines: Vec<(u64, u64)> = (1..=100)
            .filter_map(|number| counter.count(&sample(10 * number, number % 2 == 0)))
            .map(|progress| (progress.mono_ns / MS, progress.samples))
            .collect();
        assert_eq!(lines, [(20, 1), (220, 11), (420, 21), (620, 31), (820, 41)]);
    }

    #[test]
    fn without_focus_samples_nothing_is_printed() {
        let mut counter = FocusSamples::default();
        assert!((1..100).all(|number| counter.count(&sample(100 * number, false)).is_none()));
    }
}
