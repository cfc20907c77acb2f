//! Keeps all scans together within the CPU budget: a feedback controller on the CPU time that the agent actually used.
//! Pure.
//!
//! `schedule` splits the budget among the scans by their estimated costs. Estimates can add up to too much, and some costs
//! have no estimate. This controller scales down the allocated budget until the measured total fits.
//!
//! CPU time that the agent does not use is saved, up to a minute of the budget, and spent in the first seconds of an incident. A
//! sample costs ten times as much where memory is slow (a busy host of virtual machines), and an unchanging budget would leave
//! two or three samples a second when every one counts.
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

/// Most CPU time that may be saved, as the time in which the budget grants it, ns. A new agent has as much.
const MAX_SAVED_NS: f64 = 60e9;
/// Part of the budget that is put aside while nothing is saved and no incident has begun. Scans that take all that they are
/// given would never leave anything.
const SAVED_PART: f64 = 0.1;
/// Largest multiple of the budget that is allocated in an incident, with all of that saved. What exceeds the budget shrinks with
/// the savings: to half in ten seconds.
const MAX_MULTIPLE: f64 = 5.0;
/// Largest share of a core to which savings can raise the allocated share.
const MAX_SHARE: f64 = 0.05;

/// Adjusts the allocated part of the budget: multiplicative decrease, additive increase.
#[derive(Clone, Debug)]
pub(super) struct CpuBudget {
    part: f64,
    /// When the current window began, and the agent's CPU time until then, ns.
    window: Option<(u64, u64)>,
    /// CPU time that was allowed in the current window, ns.
    allowed_ns: f64,
    /// The last measurement: when, and the agent's CPU time until then, ns.
    last: Option<(u64, u64)>,
    /// Saved CPU time, expressed as the wall time in which the budget grants as much, ns. At its maximum at the start.
    saved_ns: f64,
    /// An incident has begun: what is saved is spent.
    spends: bool,
}

impl Default for CpuBudget {
    fn default() -> Self {
        Self {
            part: 1.0,
            window: None,
            allowed_ns: 0.0,
            last: None,
            saved_ns: MAX_SAVED_NS,
            spends: false,
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
        let passed_ns = now_ns.saturating_sub(last_ns) as f64;
        // Time spent serving clients is subtracted after the fact, so the total may fall.
        let used_ns = cpu_ns as f64 - last_cpu_ns as f64;
        self.allowed_ns += passed_ns * budget * self.multiple(budget);
        let saved_ns = self.saved_ns + passed_ns - used_ns / budget;
        self.saved_ns = saved_ns.clamp(0.0, MAX_SAVED_NS);
        let (begun_ns, cpu_before_ns) = *self.window.get_or_insert((now_ns, cpu_ns));
        let elapsed_ns = now_ns.saturating_sub(begun_ns);
        if elapsed_ns < WINDOW_NS {
            return;
        }
        self.window = Some((now_ns, cpu_ns));
        let allowed = std::mem::take(&mut self.allowed_ns);
        let used = cpu_ns.saturating_sub(cpu_before_ns) as f64;
        self.part = if used > allowed {
            (self.part * (allowed / used).max(MAX_DECREASE)).max(MIN_PART)
        } else {
            (self.part + INCREASE).min(1.0)
        };
    }

    pub(super) fn spends(&self) -> bool {
        self.spends
    }

    /// Whether an incident has begun, in which saved CPU time is spent.
    pub(super) fn set_spending(&mut self, spends: bool) {
        self.spends = spends;
    }

    #[cfg(test)]
    pub(super) fn spend_savings(&mut self) {
        self.saved_ns = 0.0;
    }

    /// The part of the budget that is allocated now without saved CPU time, [`MIN_PART`] to 1.
    pub(super) fn part(&self) -> f64 {
        self.part
    }

    /// How much of the budget is allocated, with savings or while they are made: 0.9 to [`MAX_MULTIPLE`].
    pub(super) fn multiple(&self, budget: f64) -> f64 {
        let saved = self.saved_ns / MAX_SAVED_NS;
        if self.spends {
            let most = (MAX_SHARE / budget).clamp(1.0, MAX_MULTIPLE);
            1.0 + (most - 1.0) * saved
        } else {
            1.0 - SAVED_PART * (1.0 - saved)
        }
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

    /// Seconds in which the agent uses all that it is allowed; returns the mean multiple of the budget.
    fn use_all(budget: &mut CpuBudget, share: f64, from: u64, seconds: u64) -> f64 {
        let (_, mut cpu_ns) = budget.last.unwrap_or_default();
        let mut sum = 0.0;
        budget.measure(from * SECOND, cpu_ns, share);
        for tenth in 1..=seconds * 10 {
            let multiple = budget.multiple(share);
            cpu_ns += (SECOND as f64 / 10.0 * share * multiple) as u64;
            sum += multiple;
            budget.measure(from * SECOND + tenth * SECOND / 10, cpu_ns, share);
            assert_eq!(budget.part(), 1.0, "{tenth}");
        }
        sum / (seconds * 10) as f64
    }

    #[test]
    fn saved_cpu_time_is_spent_in_an_incident() {
        let mut budget = CpuBudget::default();
        assert_eq!(budget.multiple(0.01), 1.0);
        budget.set_spending(true);
        assert_eq!(budget.multiple(0.01), 5.0);
        let first = use_all(&mut budget, 0.01, 0, 10);
        assert!((3.5..4.5).contains(&first), "{first}");
        let ten_minutes = use_all(&mut budget, 0.01, 10, 590);
        let mean = (first * 10.0 + ten_minutes * 590.0) / 600.0;
        assert!((1.0..1.11).contains(&mean), "{mean}");
        assert!(budget.multiple(0.01) < 1.01);
    }

    #[test]
    fn an_incident_that_ends_within_a_window_does_not_lower_the_part() {
        let mut budget = CpuBudget::default();
        budget.set_spending(true);
        use_all(&mut budget, 0.01, 0, 3);
        budget.set_spending(false);
        use_all(&mut budget, 0.01, 3, 20);
    }

    #[test]
    fn an_agent_that_uses_all_it_may_saves_for_the_next_incident() {
        let mut budget = CpuBudget::default();
        budget.spend_savings();
        let mean = use_all(&mut budget, 0.01, 0, 1_200);
        assert!((0.9..1.0).contains(&mean), "{mean}");
        budget.set_spending(true);
        assert!(budget.multiple(0.01) > 4.0, "{}", budget.multiple(0.01));
    }

    #[test]
    fn time_that_is_subtracted_later_is_saved() {
        let mut budget = CpuBudget::default();
        budget.spend_savings();
        budget.measure(0, 0, 0.01);
        budget.measure(SECOND, SECOND / 10, 0.01);
        budget.measure(2 * SECOND, SECOND / 1_000, 0.01);
        budget.set_spending(true);
        assert!(budget.multiple(0.01) > 1.5);
    }

    #[test]
    fn no_budget_grows_beyond_a_twentieth_of_a_core() {
        let mut budget = CpuBudget::default();
        budget.set_spending(true);
        for (share, multiple) in [(0.001, 5.0), (0.02, 2.5), (0.05, 1.0), (0.5, 1.0)] {
            assert_eq!(budget.multiple(share), multiple);
        }
    }
}
