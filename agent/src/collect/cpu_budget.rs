//! Keeps all scans together within the CPU budget: a feedback controller on the CPU time that the agent actually used.
//! Pure.
//!
//! `schedule` splits the budget among the scans by their estimated costs. Estimates can add up to too much, and some costs
//! have no estimate. This controller scales down the allocated budget until the measured total fits.
#![forbid(unsafe_code)]

/// Time over which CPU use is measured before the part is adjusted, ns.
const WINDOW_NS: u64 = 2_000_000_000;
/// Smallest part of the budget that is allocated, however expensive the scans are, so that every queue is seen
/// eventually.
const MIN_PART: f64 = 0.25;
/// Strongest decrease in one window, as a factor.
const MAX_DECREASE: f64 = 0.7;
/// Increase in one window while CPU use is within the budget.
const INCREASE: f64 = 0.05;

/// Adjusts the allocated part of the budget: multiplicative decrease, additive increase.
#[derive(Debug)]
pub(super) struct CpuBudget {
    part: f64,
    /// When the current window began, and the agent's CPU time until then, ns.
    window: Option<(u64, u64)>,
}

impl Default for CpuBudget {
    fn default() -> Self {
        Self {
            part: 1.0,
            window: None,
        }
    }
}

impl CpuBudget {
    /// Adds a measurement of the agent's total CPU time so far, ns. `budget`: the share of a core that it may use.
    pub(super) fn measure(&mut self, now_ns: u64, cpu_ns: u64, budget: f64) {
        let (begun_ns, cpu_before_ns) = *self.window.get_or_insert((now_ns, cpu_ns));
        let elapsed_ns = now_ns.saturating_sub(begun_ns);
        if elapsed_ns < WINDOW_NS {
            return;
        }
        self.window = Some((now_ns, cpu_ns));
        let used = cpu_ns.saturating_sub(cpu_before_ns) as f64 / elapsed_ns as f64;
        self.part = if used > budget {
            (self.part * (budget / used).max(MAX_DECREASE)).max(MIN_PART)
        } else {
            (self.part + INCREASE).min(1.0)
        };
    }

    /// The part of the budget that is allocated now, [`MIN_PART`] to 1.
    pub(super) fn part(&self) -> f64 {
        self.part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_part_falls_while_cpu_use_is_above_the_budget_and_recovers_after() {
        let mut budget = CpuBudget::default();
        budget.measure(0, 0, 0.01);
        budget.measure(2 * SECOND, SECOND / 50, 0.01);
        assert_eq!(budget.part(), 1.0);
        // 20% above the budget.
        let mut cpu_ns = SECOND / 50 + SECOND * 24 / 1000;
        budget.measure(4 * SECOND, cpu_ns, 0.01);
        assert!((0.83..0.84).contains(&budget.part()), "{}", budget.part());
        for window in 3..20 {
            cpu_ns += SECOND;
            budget.measure(window * 2 * SECOND, cpu_ns, 0.01);
        }
        assert_eq!(budget.part(), MIN_PART);
        for window in 20..40 {
            budget.measure(window * 2 * SECOND, cpu_ns, 0.01);
        }
        assert_eq!(budget.part(), 1.0);
    }
}
