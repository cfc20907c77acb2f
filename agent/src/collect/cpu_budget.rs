//! Keeps all scans together within the CPU budget: a feedback controller on the CPU time that the agent actually used.
//! Pure.
//!
//! `schedule` splits the budget among the scans by their estimated costs. Estimates can add up to too much, and some costs
//! have no estimate. This controller scales down the allocated budget until the measured total fits.
//!
//! CPU time that the agent does not use is saved, up to a minute of the budget. While a target is focused, the saved time is
//! spent: where memory is slow (a busy host of virtual machines), a sample costs ten times as much, and a budget that is
//! always the same would leave two or three samples a second when every one counts.
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

/// The budget of this long may be saved, ns.
const MAX_SAVED_NS: f64 = 60e9;
/// Largest multiple of the budget that is allocated while a target is focused and all of that is saved. The multiple falls
/// with what is left: to half in ten seconds, to the budget itself in a minute.
const MAX_MULTIPLE: f64 = 5.0;
/// Largest share of a core that saved CPU time may add up to with the budget.
const MAX_SHARE: f64 = 0.05;

/// Adjusts the allocated part of the budget: multiplicative decrease, additive increase.
#[derive(Debug)]
pub(super) struct CpuBudget {
    part: f64,
    /// When the current window began, and the agent's CPU time until then, ns.
    window: Option<(u64, u64)>,
    /// The last measurement: when, and the agent's CPU time until then, ns.
    last: Option<(u64, u64)>,
    /// CPU time saved, as time of the budget, ns.
    saved_ns: f64,
    focused: bool,
}

impl Default for CpuBudget {
    fn default() -> Self {
        Self {
            part: 1.0,
            window: None,
            last: None,
            saved_ns: MAX_SAVED_NS,
            focused: false,
        }
    }
}

impl CpuBudget {
    /// Adds a measurement of the agent's total CPU time so far, ns. `budget`: the share of a core that it may use.
    pub(super) fn measure(&mut self, now_ns: u64, cpu_ns: u64, budget: f64) {
        let (last_ns, last_cpu_ns) = self
            .last
            .replace((now_ns, cpu_ns))
            .unwrap_or((now_ns, cpu_ns));
        let used_ns = cpu_ns.saturating_sub(last_cpu_ns) as f64 / budget;
        let saved_ns = self.saved_ns + now_ns.saturating_sub(last_ns) as f64 - used_ns;
        self.saved_ns = saved_ns.clamp(0.0, MAX_SAVED_NS);
        let (begun_ns, cpu_before_ns) = *self.window.get_or_insert((now_ns, cpu_ns));
        let elapsed_ns = now_ns.saturating_sub(begun_ns);
        if elapsed_ns < WINDOW_NS {
            return;
        }
        self.window = Some((now_ns, cpu_ns));
        let used = cpu_ns.saturating_sub(cpu_before_ns) as f64 / elapsed_ns as f64;
        let allowed = budget * self.multiple(budget);
        self.part = if used > allowed {
            (self.part * (allowed / used).max(MAX_DECREASE)).max(MIN_PART)
        } else {
            (self.part + INCREASE).min(1.0)
        };
    }

    /// While a target is focused, saved CPU time is spent.
    pub(super) fn set_focused(&mut self, focused: bool) {
        self.focused = focused;
    }

    #[cfg(test)]
    pub(super) fn spend_savings(&mut self) {
        self.saved_ns = 0.0;
    }

    /// The part of the budget that is allocated now without saved CPU time, [`MIN_PART`] to 1.
    pub(super) fn part(&self) -> f64 {
        self.part
    }

    /// How much more is allocated with saved CPU time, 1 to [`MAX_MULTIPLE`].
    pub(super) fn multiple(&self, budget: f64) -> f64 {
        if !self.focused {
            return 1.0;
        }
        let most = (MAX_SHARE / budget).clamp(1.0, MAX_MULTIPLE);
        1.0 + (most - 1.0) * self.saved_ns / MAX_SAVED_NS
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

    /// Seconds of an incident in which the agent uses all that it is allowed; returns the mean multiple of the budget.
    fn incident(budget: &mut CpuBudget, share: f64, seconds: u64) -> f64 {
        let (mut cpu_ns, mut sum) = (0.0, 0.0);
        budget.measure(0, 0, share);
        for second in 1..=seconds {
            let multiple = budget.multiple(share);
            cpu_ns += SECOND as f64 * share * multiple;
            sum += multiple;
            budget.measure(second * SECOND, cpu_ns as u64, share);
        }
        sum / seconds as f64
    }

    #[test]
    fn saved_cpu_time_is_spent_while_a_target_is_focused() {
        let mut budget = CpuBudget::default();
        assert_eq!(budget.multiple(0.01), 1.0);
        budget.set_focused(true);
        assert_eq!(budget.multiple(0.01), 5.0);
        let first = incident(&mut budget, 0.01, 10);
        assert!((3.5..4.5).contains(&first), "{first}");
        // In the long run, the mean is the budget and what was saved before.
        let mut budget = CpuBudget::default();
        budget.set_focused(true);
        let mean = incident(&mut budget, 0.01, 600);
        assert!((1.0..1.11).contains(&mean), "{mean}");
        assert!(budget.multiple(0.01) < 1.01);
    }

    #[test]
    fn cpu_time_is_saved_again_while_little_is_used() {
        let mut budget = CpuBudget::default();
        budget.set_focused(true);
        incident(&mut budget, 0.01, 600);
        budget.last = None;
        budget.measure(0, 0, 0.01);
        budget.measure(60 * SECOND, SECOND * 3 / 10, 0.01);
        assert_eq!(budget.multiple(0.01), 3.0);
    }

    #[test]
    fn no_budget_grows_beyond_a_twentieth_of_a_core() {
        let mut budget = CpuBudget::default();
        budget.set_focused(true);
        for (share, multiple) in [(0.001, 5.0), (0.02, 2.5), (0.05, 1.0), (0.5, 1.0)] {
            assert_eq!(budget.multiple(share), multiple);
        }
    }
}
