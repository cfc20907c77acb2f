//! How long to wait before the same request is sent again. Pure: chance comes from outside.

use std::time::Duration;

use super::config::Retry;

/// Doubles with each failure in a row.
pub struct Backoff {
    retry: Retry,
    failures: u32,
}

impl Backoff {
    pub fn new(retry: Retry) -> Self {
        Self { retry, failures: 0 }
    }

    /// The collector answered.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// After one more failure, where the collector asked for `asked` at least; `chance` from 0 to 1 spreads agents
    /// that failed together: over the upper half of the wait, or the tenth after the time that was asked for.
    pub fn next(&mut self, asked: Option<Duration>, chance: f64) -> Duration {
        let doubled = self.retry.first.saturating_mul(1 << self.failures.min(20));
        let wait = doubled.min(self.retry.longest);
        self.failures = self.failures.saturating_add(1);
        let chance = chance.clamp(0.0, 1.0);
        let own = wait.mul_f64(0.5 + 0.5 * chance);
        match asked {
            Some(asked) => asked
                .min(self.retry.longest_asked)
                .mul_f64(1.0 + 0.1 * chance)
                .max(own),
            None => own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff() -> Backoff {
        Backoff::new(Retry {
            first: Duration::from_millis(500),
            longest: Duration::from_secs(30),
            longest_asked: Duration::from_secs(300),
        })
    }

    fn seconds(wait: Duration) -> f64 {
        wait.as_secs_f64()
    }

    #[test]
    fn the_wait_doubles_up_to_its_bound_and_starts_anew_after_an_answer() {
        let mut backoff = backoff();
        let waits: Vec<_> = (0..9).map(|_| seconds(backoff.next(None, 1.0))).collect();
        assert_eq!(waits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
        backoff.reset();
        assert_eq!(seconds(backoff.next(None, 1.0)), 0.5);
    }

    #[test]
    fn chance_spreads_it_over_the_upper_half() {
        assert_eq!(seconds(backoff().next(None, 0.0)), 0.25);
        assert_eq!(seconds(backoff().next(None, 0.5)), 0.375);
    }

    #[test]
    fn it_is_never_shorter_than_what_the_collector_asks_for_within_reason() {
        for chance in [0.0, 0.3, 1.0] {
            let wait = backoff().next(Some(Duration::from_secs(7)), chance);
            assert!((7.0..=7.7).contains(&seconds(wait)), "{wait:?}");
        }
        let forever = backoff().next(Some(Duration::MAX), 0.0);
        assert_eq!(seconds(forever), 300.0);
    }

    #[test]
    fn a_collector_that_asks_for_no_wait_is_not_hammered() {
        assert_eq!(seconds(backoff().next(Some(Duration::ZERO), 0.0)), 0.25);
    }

    #[test]
    fn any_number_of_failures_is_fine() {
        let mut backoff = backoff();
        backoff.failures = u32::MAX;
        assert_eq!(seconds(backoff.next(None, 1.0)), 30.0);
    }
}
