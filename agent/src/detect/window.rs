//! A sliding minimum: the value that held throughout a window of time.

use std::collections::VecDeque;

/// A sliding minimum, as CoDel keeps of sojourn times (RFC 8289).
#[derive(Debug, Default)]
pub(super) struct Minimum {
    /// Candidates for the minimum: times (ns) and values both rise from front to back.
    rising: VecDeque<(u64, f64)>,
    /// The first value since the last 0.
    first_ns: Option<u64>,
}

impl Minimum {
    /// Adds a value. Returns the minimum over the last `span_ns`; 0 if the values do not reach back that far.
    pub(super) fn add(&mut self, now_ns: u64, value: f64, span_ns: u64) -> f64 {
        if value <= 0.0 {
            // The queue is empty: there is no standing delay, and earlier values no longer matter.
            self.rising.clear();
            self.first_ns = None;
            return 0.0;
        }
        let first_ns = *self.first_ns.get_or_insert(now_ns);
        while self.rising.back().is_some_and(|(_, last)| *last >= value) {
            self.rising.pop_back();
        }
        self.rising.push_back((now_ns, value));
        let begin = now_ns.saturating_sub(span_ns);
        // At the beginning of the window the last earlier value was still in force.
        while self.rising.len() > 1 && self.rising[0].0 < begin {
            self.rising.pop_front();
        }
        if now_ns.saturating_sub(first_ns) < span_ns {
            return 0.0;
        }
        self.rising.front().map_or(0.0, |(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::Minimum;

    #[test]
    fn the_minimum_is_zero_until_the_window_is_filled() {
        let mut minimum = Minimum::default();
        assert_eq!(minimum.add(0, 5.0, 100), 0.0);
        assert_eq!(minimum.add(50, 9.0, 100), 0.0);
        assert_eq!(minimum.add(100, 7.0, 100), 5.0);
        assert_eq!(minimum.add(160, 8.0, 100), 7.0);
    }

    #[test]
    fn the_minimum_is_zero_after_the_queue_was_empty() {
        let mut minimum = Minimum::default();
        minimum.add(0, 5.0, 100);
        minimum.add(60, 0.0, 100);
        assert_eq!(minimum.add(120, 9.0, 100), 0.0);
        assert_eq!(minimum.add(220, 9.0, 100), 9.0);
    }
}
