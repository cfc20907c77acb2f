//! A count over time, recorded by the workload itself.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use tailback_tests::lines::unix_ns;

/// Pairs of (ns since 1970, count), in time order.
#[derive(Default)]
pub struct Course(Vec<(u64, f64)>);

impl Course {
    /// Records that the count changes to this now.
    pub fn note(&mut self, count: f64) {
        self.note_at(unix_ns(), count);
    }

    pub fn note_at(&mut self, at_ns: u64, count: f64) {
        self.0.push((at_ns, count));
    }

    /// The count at `at_ns`: the last recorded one, 0 before the first.
    pub fn at(&self, at_ns: u64) -> f64 {
        let after = self.0.partition_point(|(time, _)| *time <= at_ns);
        let known = after.checked_sub(1).and_then(|last| self.0.get(last));
        known.map_or(0.0, |(_, count)| *count)
    }

    /// The count at `at_ns`, interpolated linearly: for a count that grows steadily and is sampled.
    pub fn between(&self, at_ns: u64) -> f64 {
        let after = self.0.partition_point(|(time, _)| *time <= at_ns);
        let before = after.checked_sub(1).and_then(|last| self.0.get(last));
        match (before, self.0.get(after)) {
            (Some((from, a)), Some((to, b))) => {
                a + (b - a) * (at_ns - from) as f64 / (to - from).max(1) as f64
            }
            (Some((_, count)), None) | (None, Some((_, count))) => *count,
            (None, None) => 0.0,
        }
    }

    /// Times of the first and the last entry, ns since 1970.
    pub fn range_ns(&self) -> (u64, u64) {
        let time = |entry: Option<&(u64, f64)>| entry.map_or(0, |(time, _)| *time);
        (time(self.0.first()), time(self.0.last()))
    }

    /// Mean rate between two moments.
    pub fn per_second(&self, from_ns: u64, to_ns: u64) -> f64 {
        let seconds = to_ns.saturating_sub(from_ns) as f64 / 1e9;
        (self.at(to_ns) - self.at(from_ns)) / seconds.max(1e-9)
    }
}

/// Samples several counts every `interval` on another thread while `work` runs.
pub fn meanwhile<T, const N: usize>(
    interval: Duration,
    mut count: impl FnMut() -> Result<[f64; N]> + Send,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, [Course; N])> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let counting = scope.spawn(|| {
            let mut courses: [Course; N] = std::array::from_fn(|_| Course::default());
            loop {
                let is_last = done.load(Ordering::Relaxed);
                // Read at an unknown moment between the two: the midpoint halves the error.
                let before_ns = unix_ns();
                let counts = count()?;
                let at_ns = before_ns + (unix_ns() - before_ns) / 2;
                for (course, count) in courses.iter_mut().zip(counts) {
                    course.note_at(at_ns, count);
                }
                if is_last {
                    return Ok(courses);
                }
                thread::sleep(interval);
            }
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let courses: Result<[Course; N]> = match counting.join() {
            Ok(courses) => courses,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Ok((worked?, courses?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_holds_until_the_next_one() {
        let mut course = Course::default();
        course.note_at(100, 1.0);
        course.note_at(200, 3.0);
        assert_eq!(
            [50, 100, 150, 200, 900].map(|at| course.at(at)),
            [0.0, 1.0, 1.0, 3.0, 3.0]
        );
        assert_eq!([50, 150, 900].map(|at| course.between(at)), [1.0, 2.0, 3.0]);
        assert_eq!(course.range_ns(), (100, 200));
    }
}
