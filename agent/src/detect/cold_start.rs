//! What a queue that is judged against what is usual tells by itself, before anything is usual: whether it has grown ever
//! since it was first seen, and whether its work waits behind a pool of connections that is used up.
//!
//! A look that begins in the middle of an incident sees nothing else. What stands still at whatever depth says nothing: a
//! service that is slow by design looks like that.

use crate::queue::Reading;

/// A part of the course, ns.
const PART_NS: u64 = 500_000_000;
/// Parts that are kept; what began later than they are long can be told by what is usual.
const PARTS: usize = 60;
/// Parts without which a growth is chance.
const ENOUGH: usize = 8;
/// A growth is beyond chance where it is so many times the deviation of what came and went at random.
const BEYOND_CHANCE: f64 = 3.0;
/// Each quarter of the course has at least this part of the growth that would be its own: a burst has it all in one.
const STEADY: f64 = 0.4;
/// What is answered now took so many times as long as what was answered before. Where work that comes is more than before
/// and takes as long as ever, the queue grows as well, and stops.
const SLOWER: f64 = 1.1;
/// Ages that have grown by so much over half of the course, in a queue that keeps growing, are not fine, and those that
/// have doubled are long: the target that makes it so, in ages at the beginning.
const GROWN: f64 = 0.75;
/// Where so many times as many requests are in flight as a used up pool has connections, what comes now waits for as many
/// turns, and that is long; with fewer it is not, however long the last of a jam have waited.
const BEHIND_POOL: f64 = 4.0;
/// Behind a pool that is used up, longer than so many times as long as a request keeps its connection is long.
const POOLED: f64 = 2.0;
/// A wait below that is not long, ns.
const LEAST_NS: u64 = 250_000_000;

/// The course of a queue since it was first seen.
#[derive(Default)]
pub(super) struct ColdStart {
    parts: Vec<Part>,
    now: Part,
    next_ns: Option<u64>,
    /// How it was at the beginning, once it is clear that the queue has grown ever since.
    grown_from: Option<Beginning>,
    last: Option<Waiting>,
}

/// What waits, at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub depth: u64,
    /// Half of what waits is at least as old, ns.
    pub median_age_ns: u64,
    pub oldest_age_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Beginning {
    depth: f64,
    median_age_ns: f64,
}

/// How long the work waits, and how long would be fine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Measure {
    pub(super) delay_ns: u64,
    pub(super) target_delay_ns: u64,
}

/// Sums over a part of the course.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    looks: u32,
    depth: f64,
    age_ns: f64,
    ns: u64,
    arrivals: u64,
    departures: u64,
    /// Answers of which it is known how long they took, and their sum, ns.
    answers: f64,
    answers_ns: f64,
}

impl ColdStart {
    /// Takes in a reading; answers whether it is clear by it that the queue has grown ever since it was first seen.
    /// `may_grow`: else that is not asked, for the queue is judged by what is usual
    /// already.
    pub(super) fn read(&mut self, now_ns: u64, reading: &Reading, may_grow: bool) -> bool {
        self.last = waiting(reading);
        if self.parts.len() >= PARTS {
            return false;
        }
        let next_ns = *self.next_ns.get_or_insert(now_ns.saturating_add(PART_NS));
        let ended = now_ns >= next_ns && self.now.looks > 0;
        if ended {
            self.next_ns = Some(now_ns.saturating_add(PART_NS));
            self.parts.push(std::mem::take(&mut self.now));
        }
        self.now.add(reading, self.last);
        if !ended || !may_grow || self.grown_from.is_some() {
            return false;
        }
        self.grown_from = grown_from(&self.parts);
        self.grown_from.is_some()
    }

    /// How long the work waits, where the course or the pool decides whether that is long. `pool`: the connections of one
    /// that is used up, behind which some of the work waits.
    pub(super) fn measure(&self, pool: Option<u64>) -> Option<Measure> {
        let Waiting {
            depth,
            median_age_ns: delay_ns,
            ..
        } = self.last?;
        let depth = depth as f64;
        let by_growth = self
            .grown_from
            .filter(|from| depth > from.depth)
            .map(|from| from.median_age_ns * GROWN);
        let by_pool = pool
            .filter(|connections| depth > *connections as f64 * BEHIND_POOL)
            .and_then(|connections| self.keeps_ns(connections))
            .map(|keeps_ns| keeps_ns * POOLED);
        let target_delay_ns = match (by_growth, by_pool) {
            (Some(growth), Some(pool)) => growth.min(pool),
            (growth, pool) => growth.or(pool)?,
        };
        Some(Measure {
            delay_ns,
            target_delay_ns: (target_delay_ns as u64).max(LEAST_NS),
        })
    }

    /// What waits, as of the last look.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.last
    }

    /// How long a request keeps a connection of a pool that is in use to the last one, by Little's law, ns.
    fn keeps_ns(&self, connections: u64) -> Option<f64> {
        let all = self.parts.iter().chain([&self.now]);
        let (ns, departures) = all.fold((0_u64, 0_u64), |(ns, departures), part| {
            (
                ns.saturating_add(part.ns),
                departures.saturating_add(part.departures),
            )
        });
        (departures > 0).then(|| connections as f64 * ns as f64 / departures as f64)
    }
}

/// The ages of what waits, where each is known.
fn waiting(reading: &Reading) -> Option<Waiting> {
    let ages = &reading.ages_ns;
    // Of many, the oldest alone are told.
    let middle = usize::try_from(reading.depth / 2).unwrap_or(usize::MAX);
    Some(Waiting {
        depth: reading.depth,
        median_age_ns: *ages.get(middle.min(ages.len().saturating_sub(1)))?,
        oldest_age_ns: *ages.first()?,
    })
}

/// How a course began in which more came than went all along, beyond chance, and in which all took longer and longer.
fn grown_from(parts: &[Part]) -> Option<Beginning> {
    if parts.len() < ENOUGH {
        return None;
    }
    let quarter = parts.len() / 4;
    // What does not divide by four is left out at the beginning.
    let parts = parts.get(parts.len() - 4 * quarter..)?;
    let quarters: Vec<Part> = parts.chunks(quarter).map(Part::sum).collect();
    let [first, second, third, last] = quarters.as_slice() else {
        return None;
    };
    let grown = last.mean_depth() - first.mean_depth();
    let steps = quarters.windows(2);
    let steady = steps
        .map(|pair| pair[1].mean_depth() - pair[0].mean_depth())
        .all(|step| step > 0.0 && step >= STEADY * grown / 3.0);
    let all = Part::sum(parts);
    let at_random = ((all.arrivals.saturating_add(all.departures)) as f64).sqrt();
    let ages_grow = last.mean_age_ns() > first.mean_age_ns();
    let before = Part::sum(&[*first, *second]).mean_answer_ns();
    let now = Part::sum(&[*third, *last]).mean_answer_ns();
    let slower = match before.zip(now) {
        Some((before, now)) => now > before * SLOWER,
        // Nothing is answered, or was.
        None => true,
    };
    (steady && grown > BEYOND_CHANCE * at_random && grown >= 2.0 && ages_grow && slower).then(
        || Beginning {
            depth: first.mean_depth(),
            median_age_ns: first.mean_age_ns(),
        },
    )
}

impl Part {
    fn add(&mut self, reading: &Reading, waiting: Option<Waiting>) {
        self.looks += 1;
        self.depth += reading.depth as f64;
        self.age_ns += waiting.map_or(0.0, |waiting| waiting.median_age_ns as f64);
        self.ns = self.ns.saturating_add(reading.elapsed_ns.unwrap_or(0));
        self.arrivals = self.arrivals.saturating_add(reading.arrivals.unwrap_or(0));
        let departures = reading.departures.unwrap_or(0);
        self.departures = self.departures.saturating_add(departures);
        if let Some(answer_ns) = reading.extra("answer_ns") {
            self.answers += departures as f64;
            self.answers_ns += departures as f64 * answer_ns;
        }
    }

    fn sum(parts: &[Self]) -> Self {
        parts.iter().fold(Self::default(), |sum, part| Self {
            looks: sum.looks.saturating_add(part.looks),
            depth: sum.depth + part.depth,
            age_ns: sum.age_ns + part.age_ns,
            ns: sum.ns.saturating_add(part.ns),
            arrivals: sum.arrivals.saturating_add(part.arrivals),
            departures: sum.departures.saturating_add(part.departures),
            answers: sum.answers + part.answers,
            answers_ns: sum.answers_ns + part.answers_ns,
        })
    }

    fn mean_depth(&self) -> f64 {
        self.depth / f64::from(self.looks.max(1))
    }

    fn mean_age_ns(&self) -> f64 {
        self.age_ns / f64::from(self.looks.max(1))
    }

    fn mean_answer_ns(&self) -> Option<f64> {
        (self.answers > 0.0).then(|| self.answers_ns / self.answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 100_000_000;

    fn reading(depth: u64, age_ms: u64, (arrivals, departures): (u64, u64)) -> Reading {
        Reading {
            depth,
            arrivals: Some(arrivals),
            departures: Some(departures),
            elapsed_ns: Some(TICK),
            ages_ns: vec![age_ms * 1_000_000; usize::try_from(depth).unwrap()],
            ..Reading::default()
        }
    }

    fn answered_in(answer_ms: u64, reading: Reading) -> Reading {
        Reading {
            extra: vec![("answer_ns", answer_ms as f64 * 1e6)],
            ..reading
        }
    }

    /// Ten seconds of it.
    fn after(mut at: impl FnMut(u64) -> Reading) -> ColdStart {
        let mut course = ColdStart::default();
        for tick in 0..100 {
            course.read(tick * TICK, &at(tick), true);
        }
        course
    }

    #[test]
    fn more_comes_than_goes_and_all_takes_longer_and_longer() {
        let jam = |tick| {
            let reading = reading(100 + tick, 5_000 + 50 * tick, (2, 1));
            answered_in(9_000 + 60 * tick, reading)
        };
        let measure = after(jam).measure(None).unwrap();
        assert_eq!(measure.delay_ns, 9_950_000_000);
        assert!(
            measure.delay_ns > measure.target_delay_ns * 14 / 10,
            "{measure:?}"
        );
    }

    #[test]
    fn what_stands_still_says_nothing_however_long_it_waits() {
        let slow = |tick| reading(60 + tick % 3, 12_000 + 10 * (tick % 7), (2, 2));
        let course = after(slow);
        assert_eq!(course.measure(None), None);
        assert_eq!(course.waiting().unwrap().depth, 60);
    }

    #[test]
    fn a_burst_is_no_growth() {
        let burst = |tick| match tick {
            0..50 => reading(10, 300, (1, 1)),
            50 => reading(90, 300, (80, 0)),
            _ => reading(90, 300 + 50 * (tick - 50), (1, 1)),
        };
        assert_eq!(after(burst).measure(None), None);
    }

    #[test]
    fn more_work_that_takes_as_long_as_ever_is_no_jam() {
        let more = |tick| answered_in(2_000, reading(20 + tick, 900 + tick, (3, 2)));
        assert_eq!(after(more).measure(None), None);
    }

    #[test]
    fn a_growth_that_may_be_chance_is_none() {
        let chance = |tick| reading(100 + tick / 10, 5_000 + 5 * tick, (50, 50));
        assert_eq!(after(chance).measure(None), None);
    }

    #[test]
    fn behind_a_pool_a_wait_is_measured_by_how_long_a_connection_is_kept() {
        // 10 a second over 4 connections: 0.4 s each.
        let course = after(|_| reading(40, 2_000, (1, 1)));
        let measure = course.measure(Some(4)).unwrap();
        assert_eq!(measure.delay_ns, 2_000_000_000);
        assert_eq!(measure.target_delay_ns, 800_000_000);
        assert_eq!(course.measure(Some(10)), None);
        assert_eq!(after(|_| reading(40, 2_000, (1, 0))).measure(Some(4)), None);
    }
}
