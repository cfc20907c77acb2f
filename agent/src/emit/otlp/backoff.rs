//! Exponential backoff with jitter between retries. Pure: the random number is an argument.

use std::time::Duration;

use super::config::Retry;

/// The wait before the next retry; it doubles with each consecutive failure.
pub struct Backoff {
    retry: Retry,
    failures: u32,
}

impl Backoff {
    pub fn new(retry: Retry) -> Self {
        Self { retry, failures: 0 }
    }

    /// Starts again from the shortest wait, after a response.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure. `requested` is the collector's `Retry-After`; `random`, from 0 to 1, is the
    /// jitter. It spreads out agents that failed together: over the upper half of our own wait, or over 10% beyond a
    /// requested one.
    pub fn next(&mut self, requested: Option<Duration>, random: f64) -> Duration {
        let doubled = self
            .retry
            .initial
            .saturating_mul(1 << self.failures.min(20));
        let wait = doubled.min(self.retry.max);
        self.failures = self.failures.saturating_add(1);
        let random = random.clamp(0.0, 1.0);
        let own = wait.mul_f64(0.5 + 0.5 * random);
        match requested {
            Some(requested) => requested
                .min(self.retry.max_requested)
                .mul_f64(1.0 + 0.1 * random)
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
            initial: Duration::from_millis(500),
            max: Duration::from_secs(30),
            max_requested: Duration::from_secs(300),
        })
    }

    fn seconds(wait: Duration) -> f64 {
        wait.as_secs_f64()
    }

    #[test]
    fn the_wait_doubles_up_to_its_maximum_and_resets_after_a_response() {
        let mut backoff = backoff();
        let waits: Vec<_> = (0..9).map(|_| seconds(backoff.next(None, 1.0))).collect();
        assert_eq!(waits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
        backoff.reset();
        assert_eq!(seconds(backoff.next(None, 1.0)), 0.5);
    }

    #[test]
    fn jitter_covers_the_upper_half_of_the_wait() {
        assert_eq!(seconds(backoff().next(None, 0.0)), 0.25);
        assert_eq!(seconds(backoff().next(None, 0.5)), 0.375);
    }

    #[test]
    fn the_wait_is_never_shorter_than_a_requested_one_up_to_its_maximum() {
        for random in [0.0, 0.3, 1.0] {
            let wait = backoff().next(Some(Duration::from_secs(7)), random);
            assert!((7.0..=7.7).contains(&seconds(wait)), "{wait:?}");
        }
        let forever = backoff().next(Some(Duration::MAX), 0.0);
        assert_eq!(seconds(forever), 300.0);
    }

    #[test]
    fn a_requested_wait_of_zero_does_not_shorten_the_backoff() {
        assert_eq!(seconds(backoff().next(Some(Duration::ZERO), 0.0)), 0.25);
    }

    #[test]
    fn the_failure_count_does_not_overflow() {
        let mut backoff = backoff();
        backoff.failures = u32::MAX;
        assert_eq!(seconds(backoff.next(None, 1.0)), 30.0);
    }
}
