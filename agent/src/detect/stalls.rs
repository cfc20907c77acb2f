//! Recurring stalls: nothing is dequeued for a while, then the queue drains; this repeats.
//!
//! A standing delay does not notice them, because the queue is empty in between. A runtime that stops for garbage collections is
//! the usual case: each pause is short, but together they make the slowest requests slow.
//!
//! A pause counts as a stall only if the queue grew during it by at least ten items, and by more than the service has threads. Otherwise it may be a
//! burst of arrivals before the pause, or workers that happen to finish at the same time. Of an event loop, each long turn is a
//! stall if anything is ready meanwhile.

use std::collections::VecDeque;

use crate::queue::Reading;

/// Only stalls that began and ended within this time count, ns. A diagnosis observes for 10 s by default.
const SPAN_NS: u64 = 10_000_000_000;

/// Minimum number of stalls within [`SPAN_NS`] that count as recurring: two may be a coincidence.
const RECURRING: usize = 3;

/// Minimum number of items that arrive during a stall. If a service takes 10 items in that time on average, the probability that
/// it happens to take none is e⁻¹⁰ (Poisson).
const MIN_ARRIVED: u64 = 10;

/// A turn of an event loop is a stall from this duration on, ns.
const MIN_TURN_NS: u64 = 100_000_000;

/// Shortest time from the end of the first long turn to the last, ns, if they recur: three in a row are one piece of work.
const MIN_SPREAD_NS: u64 = 3_000_000_000;

/// Maximum number of stalls kept. The [`RECURRING`] longest decide, so beyond this the shortest is dropped.
const MAX_KEPT: usize = 16;

/// Stalls no longer recur if none has followed the last one within this many times the longest gap between two of them.
const OVERDUE_GAPS: u64 = 2;

/// The recent stalls of one queue.
#[derive(Debug, Default)]
pub(super) struct Stalls {
    /// When an item was last dequeued or the queue was last empty, ns, and the depth at that time.
    began: Option<(u64, u64)>,
    /// Duration of the current stall, ns, if it counts.
    current_ns: Option<u64>,
    /// Something was ready during the current turn of an event loop.
    had_ready: bool,
    /// End and duration of each stall, ns, the oldest first.
    ended: VecDeque<(u64, u64)>,
}

impl Stalls {
    /// Adds a reading. Returns how long each recurring stall lasted at least, ns; 0 if stalls do not recur.
    pub(super) fn add(&mut self, now_ns: u64, reading: &Reading) -> u64 {
        if reading.depth > 0 && reading.departures == Some(0) {
            let min_arrived = MIN_ARRIVED.max(u64::from(reading.servers) + 1);
            self.current_ns = self
                .began
                .filter(|(_, depth)| reading.depth.saturating_sub(*depth) >= min_arrived)
                .map(|(began_ns, _)| now_ns.saturating_sub(began_ns));
        } else {
            self.end(now_ns);
            let is_known = reading.departures.is_some();
            self.began = is_known.then_some((now_ns, reading.depth));
        }
        self.settle(now_ns)
    }

    /// Adds a reading of an event loop. Nothing that is ready is handled before a turn ends, so a long turn is a stall if anything
    /// is ready meanwhile. Returns as [`Self::add`], and 0 until the stalls spread over [`MIN_SPREAD_NS`].
    pub(super) fn add_turn(&mut self, now_ns: u64, reading: &Reading) -> u64 {
        let has_slept = reading.departures.is_none_or(|turns| turns > 0);
        if has_slept || reading.oldest_age_ns.is_none() {
            self.end(now_ns);
            self.had_ready = false;
        }
        if let Some(age_ns) = reading.oldest_age_ns {
            // Not known before Linux 5.17, nor if the list changes during the walk.
            self.had_ready |= reading.extra("ready").is_none_or(|ready| ready > 0.0);
            if age_ns >= MIN_TURN_NS && self.had_ready {
                self.current_ns = self.current_ns.max(Some(age_ns));
            }
        }
        let recurring_ns = self.settle(now_ns);
        let mut ends = self.ended.iter().map(|(ended_ns, _)| *ended_ns);
        let last_ns = ends.clone().chain(self.current_ns.map(|_| now_ns)).last();
        let spread_ns = ends
            .next()
            .zip(last_ns)
            .map_or(0, |(first, last)| last - first);
        if spread_ns >= MIN_SPREAD_NS {
            recurring_ns
        } else {
            0
        }
    }

    /// Forgets what is too long ago. Returns how long each recurring stall lasted at least, ns.
    fn settle(&mut self, now_ns: u64) -> u64 {
        while let Some((ended_ns, duration_ns)) = self.ended.front()
            && now_ns.saturating_sub(ended_ns.saturating_sub(*duration_ns)) > SPAN_NS
        {
            self.ended.pop_front();
        }
        if self.is_overdue(now_ns) {
            self.ended.clear();
        }
        self.recurring_ns()
    }

    fn end(&mut self, now_ns: u64) {
        let Some(duration_ns) = self.current_ns.take() else {
            return;
        };
        self.ended.push_back((now_ns, duration_ns));
        if self.ended.len() > MAX_KEPT {
            let shortest = (0..self.ended.len()).min_by_key(|index| self.ended[*index].1);
            self.ended.remove(shortest.unwrap_or(0));
        }
    }

    /// The next stall should have come long ago, so they no longer recur.
    fn is_overdue(&self, now_ns: u64) -> bool {
        let mut ends = self.ended.iter().map(|(ended_ns, _)| *ended_ns);
        let gaps = ends.clone().zip(ends.clone().skip(1));
        let longest_gap_ns = gaps.map(|(before, after)| after - before).max();
        let (Some(last_ns), Some(longest_gap_ns)) = (ends.next_back(), longest_gap_ns) else {
            return false;
        };
        self.current_ns.is_none() && now_ns - last_ns > OVERDUE_GAPS * longest_gap_ns
    }

    fn recurring_ns(&self) -> u64 {
        let ended = self.ended.iter().map(|(_, duration_ns)| *duration_ns);
        let mut durations: Vec<u64> = ended.chain(self.current_ns).collect();
        durations.sort_unstable_by(|a, b| b.cmp(a));
        durations.get(RECURRING - 1).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::Stalls;
    use crate::queue::Reading;

    const MS: u64 = 1_000_000;
    const TICK_NS: u64 = 100 * MS;

    fn reading(depth: u64, departures: u64) -> Reading {
        Reading {
            depth,
            departures: Some(departures),
            servers: 8,
            ..Reading::default()
        }
    }

    /// What recurs after each of these readings, one per tick, in ms.
    fn recurring_ms(readings: impl IntoIterator<Item = Reading>) -> Vec<u64> {
        let mut stalls = Stalls::default();
        readings
            .into_iter()
            .zip(1..)
            .map(|(reading, tick)| stalls.add(tick * TICK_NS, &reading) / MS)
            .collect()
    }

    /// After this reading nothing is taken for 800 ms, while some items arrive per 100 ms. Then the queue drains, and is empty for
    /// `rest` ticks.
    fn stall(first: Reading, per_tick: u64, rest: usize) -> Vec<Reading> {
        let depth = first.depth;
        let mut readings = vec![first];
        readings.extend((1..=8).map(|tick| reading(depth + tick * per_tick, 0)));
        readings.push(reading(5, depth + 9 * per_tick - 5));
        readings.extend(vec![reading(0, per_tick); rest]);
        readings
    }

    /// The longest recurring stall, in ms, of `of` turns of `ticks` × 100 ms each, with `rest` × 100 ms between two of
    /// them, while `ready` events wait in each.
    fn recurring_turns_ms(ticks: u64, rest: u64, of: u64, ready: f64) -> u64 {
        let mut stalls = Stalls::default();
        let reading = |tick: u64| {
            let place = tick % (ticks + rest);
            let in_turn = place < ticks && tick < of * (ticks + rest);
            Reading {
                depth: 8,
                oldest_age_ns: in_turn.then_some(place * TICK_NS),
                departures: Some(u64::from(place == 0)),
                // Only known during a turn.
                extra: Vec::from_iter(in_turn.then_some(("ready", ready))),
                ..Reading::default()
            }
        };
        let recurring = (0..400).map(|tick| stalls.add_turn((tick + 1) * TICK_NS, &reading(tick)));
        recurring.max().unwrap() / MS
    }

    #[test]
    fn long_turns_of_an_event_loop_recur_if_something_is_ready_meanwhile() {
        assert_eq!(recurring_turns_ms(7, 0, 50, 8.0), 600);
        assert_eq!(recurring_turns_ms(7, 13, 50, 1.0), 600);
        assert!(
            recurring_turns_ms(7, 43, 50, 8.0) < 200,
            "once in five seconds"
        );
        assert_eq!(recurring_turns_ms(7, 1, 3, 8.0), 0, "three in a row");
        assert_eq!(recurring_turns_ms(7, 13, 50, 0.0), 0, "nobody waits");
    }

    #[test]
    fn three_stalls_within_ten_seconds_recur() {
        let readings = (0..3).flat_map(|_| stall(reading(1, 9), 10, 10));
        let recurring = recurring_ms(readings);
        assert_eq!(recurring[..41], [0; 41]);
        assert_eq!(recurring.last(), Some(&800));
    }

    #[test]
    fn stalls_that_have_ceased_no_longer_recur() {
        let mut readings: Vec<_> = (0..3).flat_map(|_| stall(reading(1, 9), 10, 10)).collect();
        readings.extend(vec![reading(0, 10); 32]);
        let recurring = recurring_ms(readings);
        // One stall per 2 s, so the next one is overdue 4 s after the last one has ended.
        assert_eq!(recurring[88], 800);
        assert_eq!(recurring[90], 0);
    }

    #[test]
    fn stalls_that_are_far_apart_do_not_recur() {
        let readings = (0..4).flat_map(|_| stall(reading(1, 9), 10, 60));
        assert!(recurring_ms(readings).iter().all(|ms| *ms == 0));
    }

    #[test]
    fn a_burst_that_waits_for_busy_workers_is_no_stall() {
        // 30 requests arrive at once at eight workers that need 800 ms for each.
        let readings = (0..4).flat_map(|_| stall(reading(22, 8), 0, 10));
        assert!(recurring_ms(readings).iter().all(|ms| *ms == 0));
    }

    #[test]
    fn workers_that_finish_together_do_not_stall() {
        // Eight workers finish every 800 ms, all at the same time; one request arrives per 100 ms.
        let readings = (0..4).flat_map(|_| stall(reading(0, 1), 1, 0));
        assert!(recurring_ms(readings).iter().all(|ms| *ms == 0));
    }

    #[test]
    fn an_unknown_number_of_departures_is_no_stall() {
        let readings = (0..4).flat_map(|_| stall(reading(1, 9), 10, 10));
        let unknown = readings.map(|reading| Reading {
            departures: None,
            ..reading
        });
        assert!(recurring_ms(unknown).iter().all(|ms| *ms == 0));
    }
}
