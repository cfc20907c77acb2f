//! A count over time, as who makes it knows it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::Result;
use tailback_tests::lines::unix_ns;

/// (ns since 1970, count) in order of time.
#[derive(Default)]
pub struct Course(Vec<(u64, f64)>);

impl Course {
    /// The count is this from now on.
    pub fn note(&mut self, count: f64) {
        self.note_at(unix_ns(), count);
    }

    pub fn note_at(&mut self, at_ns: u64, count: f64) {
        self.0.push((at_ns, count));
    }

    /// The count at a moment: what was last noted.
    pub fn at(&self, at_ns: u64) -> f64 {
        let after = self.0.partition_point(|(time, _)| *time <= at_ns);
        let known = after.checked_sub(1).and_then(|last| self.0.get(last));
        known.map_or(0.0, |(_, count)| *count)
    }

    /// What is between two notes lies on a line: for a count that grows steadily and is looked at now and then.
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

    pub fn range_ns(&self) -> (u64, u64) {
        let time = |entry: Option<&(u64, f64)>| entry.map_or(0, |(time, _)| *time);
        (time(self.0.first()), time(self.0.last()))
    }

    pub fn per_second(&self, from_ns: u64, to_ns: u64) -> f64 {
        let seconds = to_ns.saturating_sub(from_ns) as f64 / 1e9;
        (self.at(to_ns) - self.at(from_ns)) / seconds.max(1e-9)
    }
}

/// Notes several counts all the time while `work` is done, by a thread of this process.
pub fn meanwhile<T, const N: usize>(
    apart: Duration,
    mut count: impl FnMut() -> Result<[f64; N]> + Send,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, [Course; N])> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let counting = scope.spawn(|| {
            let mut courses: [Course; N] = std::array::from_fn(|_| Course::default());
            loop {
                let is_last = done.load(Ordering::Relaxed);
                // Counted between the two: half-way is nearest.
                let before_ns = unix_ns();
                let counts = count()?;
                let at_ns = before_ns + (unix_ns() - before_ns) / 2;
                for (course, count) in courses.iter_mut().zip(counts) {
                    course.note_at(at_ns, count);
                }
                if is_last {
                    return Ok(courses);
                }
                thread::sleep(apart);
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
    fn a_count_holds_until_the_next() {
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
