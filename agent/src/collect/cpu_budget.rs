//! What keeps all looks together within the budget, however the parts that they were given add up. Pure.
#![forbid(unsafe_code)]

/// What keeps the whole within the budget, however its parts add up: the part of it that is given out.
#[derive(Debug)]
pub(super) struct CpuBudget {
    part: f64,
    /// When the present stretch began, and all CPU time until then.
    since: Option<(u64, u64)>,
}

impl Default for CpuBudget {
    fn default() -> Self {
        Self {
            part: 1.0,
            since: None,
        }
    }
}

impl CpuBudget {
    /// What a stretch cost is known when it is over.
    const STRETCH_NS: u64 = 2_000_000_000;
    /// However dear the looks are, so much of the budget is given out; in one stretch, so much of the rest is taken back or
    /// given out again.
    const LEAST: f64 = 0.25;
    const DOWN: f64 = 0.7;
    const UP: f64 = 0.05;

    /// All CPU time until now, ns, and the share of a core that it may take.
    pub(super) fn measure(&mut self, now_ns: u64, cpu_ns: u64, budget: f64) {
        let (since_ns, before_ns) = *self.since.get_or_insert((now_ns, cpu_ns));
        let elapsed_ns = now_ns.saturating_sub(since_ns);
        if elapsed_ns < Self::STRETCH_NS {
            return;
        }
        self.since = Some((now_ns, cpu_ns));
        let share = cpu_ns.saturating_sub(before_ns) as f64 / elapsed_ns as f64;
        self.part = if share > budget {
            (self.part * (budget / share).max(Self::DOWN)).max(Self::LEAST)
        } else {
            (self.part + Self::UP).min(1.0)
        };
    }

    /// The part of the budget that is given out now.
    pub(super) fn part(&self) -> f64 {
        self.part
    }
}

#[cfg(test)]
mod tests {
    use super::CpuBudget;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn less_is_given_out_while_more_is_taken_and_never_nothing() {
        let mut thrift = CpuBudget::default();
        thrift.measure(0, 0, 0.01);
        thrift.measure(2 * SECOND, SECOND / 50, 0.01);
        assert_eq!(thrift.part(), 1.0);
        // A fifth more than it may.
        let mut cpu_ns = SECOND / 50 + SECOND * 24 / 1000;
        thrift.measure(4 * SECOND, cpu_ns, 0.01);
        assert!((0.83..0.84).contains(&thrift.part()), "{}", thrift.part());
        for stretch in 3..20 {
            cpu_ns += SECOND;
            thrift.measure(stretch * 2 * SECOND, cpu_ns, 0.01);
        }
        assert_eq!(thrift.part(), 0.25);
        for stretch in 20..40 {
            thrift.measure(stretch * 2 * SECOND, cpu_ns, 0.01);
        }
        assert_eq!(thrift.part(), 1.0);
    }
}
