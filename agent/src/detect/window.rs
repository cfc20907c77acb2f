//! The smallest value over a sliding stretch of time: what stood there all along.

use std::collections::VecDeque;

/// A sliding minimum (as CoDel takes of its sojourn times).
#[derive(Debug, Default)]
pub(super) struct Minimum {
    /// Candidates: times and values both rise from front to back.
    rising: VecDeque<(u64, f64)>,
    first_ns: Option<u64>,
}

impl Minimum {
    /// Adds a value and answers the minimum over the last `span_ns`, or 0 where the values do not reach so far back.
    pub(super) fn add(&mut self, now_ns: u64, value: f64, span_ns: u64) -> f64 {
        if value <= 0.0 {
            // Empty: nothing stands. What came before does not matter any more.
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
        // The value in force at the beginning of the window is the last one from before it.
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
    fn nothing_stands_before_the_window_is_filled() {
        let mut minimum = Minimum::default();
        assert_eq!(minimum.add(0, 5.0, 100), 0.0);
        assert_eq!(minimum.add(50, 9.0, 100), 0.0);
        assert_eq!(minimum.add(100, 7.0, 100), 5.0);
        assert_eq!(minimum.add(160, 8.0, 100), 7.0);
    }

    #[test]
    fn a_queue_that_empties_once_does_not_stand() {
        let mut minimum = Minimum::default();
        minimum.add(0, 5.0, 100);
        minimum.add(60, 0.0, 100);
        assert_eq!(minimum.add(120, 9.0, 100), 0.0);
        assert_eq!(minimum.add(220, 9.0, 100), 9.0);
    }
}
