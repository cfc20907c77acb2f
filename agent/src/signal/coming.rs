//! How work comes to a queue, evenly or by chance, and how long it is therefore to wait at most where there is too much. Pure.
//!
//! Who has answered takes the next piece that has not waited for too long. Where work comes evenly there is one, however short
//! that may be; where it comes by chance, or in bursts, there is none now and then though too much comes on the mean, and who
//! could work is idle. That is rare where several come within the time that work may wait: the more, the more unevenly they
//! come.

use std::time::Duration;

/// What comes is counted in parts of so long at least.
const PART_NS: u64 = 90_000_000;
/// Before so many were compared nothing is known. Then the mean is over so many, fading.
const ENOUGH: u32 = 5;
const MEMORY: u32 = 30;
/// Of the delay that is fine, work may have waited so much: whoever is not turned away has waited nearly as long, and is to be
/// answered in time still.
const OF_TARGET: f64 = 0.75;
/// Of work that comes by chance, so much is to come within the time that it may have waited.
const COME_WITHIN: f64 = 4.5;
/// But that is never longer than the work takes, times this: answers are to be in time, too.
const OF_SERVICE: f64 = 1.5;
/// A tick of the kernel's clock, by which readers know how long it was: less is not told apart.
const CLOCK_TICK_NS: u64 = 4_000_000;

/// What is known of how work comes.
#[derive(Debug, Default)]
pub(super) struct Coming {
    now: Option<Begun>,
    before: Option<Part>,
    /// Per second, and the index of dispersion of the counts: 0 where it comes evenly, 1 by chance alone.
    per_s: f64,
    uneven: f64,
    compared: u32,
}

/// Where a part begins, and whether all looks since then knew what came.
#[derive(Debug)]
struct Begun {
    at_ns: u64,
    arrivals: u64,
    is_counted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    arrived: f64,
    seconds: f64,
}

impl Coming {
    /// Takes in a look: how much came up to now, and whether that is known since the look before.
    pub(super) fn take_in(&mut self, at_ns: u64, arrivals: u64, is_counted: bool) {
        let Some(begun) = &mut self.now else {
            self.begin(at_ns, arrivals);
            return;
        };
        begun.is_counted &= is_counted;
        let passed_ns = at_ns.saturating_sub(begun.at_ns);
        if passed_ns < PART_NS {
            return;
        }
        let part = begun.is_counted.then(|| Part {
            arrived: arrivals.saturating_sub(begun.arrivals) as f64,
            seconds: Duration::from_nanos(passed_ns).as_secs_f64(),
        });
        if let (Some(part), Some(before)) = (part, self.before) {
            self.compare(before, part);
        }
        self.before = part;
        self.begin(at_ns, arrivals);
    }

    fn begin(&mut self, at_ns: u64, arrivals: u64) {
        self.now = Some(Begun {
            at_ns,
            arrivals,
            is_counted: true,
        });
    }

    /// Two parts that follow each other: a load that changes is not taken for chance for long.
    fn compare(&mut self, a: Part, b: Part) {
        let per_s = (a.arrived + b.arrived) / (a.seconds + b.seconds);
        self.compared = (self.compared + 1).min(MEMORY);
        let weight = 1.0 / f64::from(self.compared);
        self.per_s += weight.max(0.2) * (per_s - self.per_s);
        if per_s > 0.0 {
            // What the two rates differ by, of what chance makes them differ by.
            let differ = a.arrived / a.seconds - b.arrived / b.seconds;
            let by_chance = per_s * (1.0 / a.seconds + 1.0 / b.seconds);
            self.uneven += weight * (differ * differ / by_chance - self.uneven);
        }
    }

    /// How long work may have waited when it is taken, ns, where there is too much: three quarters of the delay that is fine, or
    /// more where it comes unevenly and it is known for how long one who works is at it.
    pub(super) fn max_wait_ns(&self, target_ns: u64, service_ns: Option<u64>) -> u64 {
        let mut most_ns = OF_TARGET * target_ns as f64;
        let is_known = self.compared >= ENOUGH && self.per_s > 0.0;
        if let Some(service_ns) = service_ns.filter(|_| is_known) {
            let enough_ns = 1e9 * COME_WITHIN * self.uneven / self.per_s;
            most_ns = most_ns.max(enough_ns.min(OF_SERVICE * service_ns as f64));
        }
        (most_ns as u64).max(CLOCK_TICK_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK_NS: u64 = 100_000_000;
    const TARGET_NS: u64 = 20_000_000;
    const SERVICE_NS: u64 = 40_000_000;

    /// After so many ticks at which so much came.
    fn after(ticks: u64, came: impl Fn(u64) -> u64) -> Coming {
        let mut coming = Coming::default();
        let mut arrivals = 0;
        for tick in 0..ticks {
            coming.take_in(tick * TICK_NS, arrivals, true);
            arrivals += came(tick);
        }
        coming
    }

    fn max_wait_ms(coming: &Coming) -> u64 {
        coming.max_wait_ns(TARGET_NS, Some(SERVICE_NS)) / 1_000_000
    }

    #[test]
    fn work_that_comes_evenly_waits_no_longer_than_is_fine() {
        for per_tick in [3, 15, 400] {
            // Now and then the tick is on the other side of one.
            let coming = after(100, |tick| per_tick + tick % 7 / 6);
            assert_eq!(max_wait_ms(&coming), 15, "{per_tick}");
        }
    }

    #[test]
    fn work_that_comes_in_bursts_waits_until_there_is_enough_and_not_for_much_longer_than_it_takes()
    {
        // Differences of 5 and 6 are those that chance makes between parts of 15.
        let by_chance = after(1000, |tick| [9, 14, 19, 14][(tick % 4) as usize]);
        let most = max_wait_ms(&by_chance);
        assert!((28..34).contains(&most), "{most} ms at 140 a second");
        let in_bursts = after(1000, |tick| if tick % 10 == 0 { 20 } else { 0 });
        assert_eq!(max_wait_ms(&in_bursts), 60);
        assert_eq!(in_bursts.max_wait_ns(TARGET_NS, None), 15_000_000);
    }

    #[test]
    fn a_load_that_steps_up_is_not_taken_for_chance() {
        let coming = after(100, |tick| if tick < 50 { 5 } else { 15 });
        assert_eq!(max_wait_ms(&coming), 15);
    }

    #[test]
    fn what_was_not_counted_tells_nothing() {
        let mut coming = after(20, |_| 15);
        for tick in 20..100 {
            coming.take_in(tick * TICK_NS, 300 + tick % 3 * 100, false);
        }
        assert_eq!(max_wait_ms(&coming), 15);
        assert_eq!(max_wait_ms(&Coming::default()), 15);
        assert_eq!(
            Coming::default().max_wait_ns(1_000_000, None),
            CLOCK_TICK_NS
        );
    }
}
