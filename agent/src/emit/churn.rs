//! Bounds how much is printed about services that start and exit. Beyond the bound they are counted, and the counts are printed
//! once per interval. Pure.

use crate::event::Instant;

/// Length of an interval, ns.
const INTERVAL_NS: u64 = 10_000_000_000;
/// Maximum number of lines about services in each interval. The first list of services is printed whole.
pub(super) const MAX_LINES: usize = 20;

/// Limits the lines about services: a node with many short-lived ones would print too many.
#[derive(Debug, Default)]
pub(super) struct Churn {
    /// End of the current interval, ns.
    end_ns: Option<u64>,
    lines: usize,
    omitted: Omitted,
}

/// Services that nothing was printed about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Omitted {
    pub(super) started: usize,
    pub(super) exited: usize,
    pub(super) changed: usize,
}

impl Churn {
    /// Whether this is the first list of services.
    pub(super) fn is_first(&self) -> bool {
        self.end_ns.is_none()
    }

    /// Begins the next interval if it is time. Returns what was omitted in the last one.
    pub(super) fn begin(&mut self, at: Instant) -> Option<Omitted> {
        if self.end_ns.is_some_and(|end_ns| at.mono_ns < end_ns) {
            return None;
        }
        self.end_ns = Some(at.mono_ns.saturating_add(INTERVAL_NS));
        self.lines = 0;
        let omitted = std::mem::take(&mut self.omitted);
        (omitted != Omitted::default()).then_some(omitted)
    }

    /// Whether there is room for this many lines in this interval; if so, it is taken.
    pub(super) fn take(&mut self, lines: usize) -> bool {
        let is_allowed = self.lines + lines <= MAX_LINES;
        if is_allowed {
            self.lines += lines;
        }
        is_allowed
    }

    /// Counts what is not printed.
    pub(super) fn omit(&mut self, more: Omitted) {
        self.omitted.started += more.started;
        self.omitted.exited += more.exited;
        self.omitted.changed += more.changed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Instant {
        Instant {
            mono_ns: s * 1_000_000_000,
            unix_ns: 0,
        }
    }

    #[test]
    fn what_exceeds_the_bound_is_counted_and_reported_once_per_interval() {
        let mut churn = Churn::default();
        let one = Omitted {
            started: 1,
            ..Omitted::default()
        };
        let mut lines = 0;
        let mut summaries = Vec::new();
        for second in 0..30 {
            summaries.extend(churn.begin(at(second)));
            for _ in 0..50 {
                if churn.take(1) {
                    lines += 1;
                } else {
                    churn.omit(one);
                }
            }
        }
        summaries.extend(churn.begin(at(30)));
        assert_eq!(lines, 3 * MAX_LINES);
        let started: Vec<usize> = summaries.iter().map(|omitted| omitted.started).collect();
        assert_eq!(started, [480, 480, 480]);
    }
}
