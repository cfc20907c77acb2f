//! Splits the CPU budget among the scans: computes the interval of each from its cost.
//!
//! At the limits, base samples use half of the budget, and the scans over files and over threads a quarter each. The simulations
//! in `super::tests` check the total.
#![forbid(unsafe_code)]

use super::{Budget, MS, SampleCost, SamplePlan};
use crate::collect::cpu_budget::CpuBudget;

/// Weight of the newest cost in its mean.
const COST_WEIGHT: f64 = 0.2;
/// Weight of the newest measurement in the share of discovery.
const DISCOVERY_WEIGHT: f64 = 0.2;
/// Least part of the budget for the scan over files, however expensive the rest is, so that every queue is seen eventually.
const MIN_FILES_PART: f64 = 0.25;
/// Longest time between scans over files, ns.
const MAX_FILES_INTERVAL_NS: u64 = 30_000 * MS;
/// Largest part of the budget for base samples, without the scans over files and threads.
const MAX_BASE_PART: f64 = 0.5;
/// Longest time between base samples, ns, whatever they cost: a warning must not take more than a second.
const MAX_BASE_INTERVAL_NS: u64 = 500 * MS;
/// Least part of the budget for the scan over threads.
const MIN_THREADS_PART: f64 = 0.25;
/// Longest time between scans over threads, ns.
const MAX_THREADS_INTERVAL_NS: u64 = 5_000 * MS;
/// Part of the budget reserved for the profile and the focus samples while a target is focused. The scans over files and
/// threads are stretched if need be. Profiles in base samples stay within this part.
const FOCUS_PART: f64 = 0.3;
/// Longest time between profiles in base samples, ns.
const MAX_PROFILE_INTERVAL_NS: u64 = 2_000 * MS;
/// Part of the budget for trial focus samples, see [`Allocation::trial_ns`].
const TRIAL_PART: f64 = 0.05;
/// Shortest time between trials, ns.
const MIN_TRIAL_INTERVAL_NS: u64 = 500 * MS;
/// An interval this much longer than a whole number of base intervals is still rounded down.
const ROUNDING_TOLERANCE: f64 = 0.1;
/// Focus samples are taken only if this many of their intervals fit into a base interval.
const FOCUS_INTERVALS_PER_BASE: f64 = 1.5;

/// Exponentially weighted mean cost, ns of CPU time. The first cost is taken as it is.
#[derive(Clone, Copy, Debug, Default)]
struct MeanCost(f64);

impl MeanCost {
    fn add(&mut self, ns: u64) {
        let weight = if self.0 == 0.0 { 1.0 } else { COST_WEIGHT };
        self.0 += weight * (ns as f64 - self.0);
    }
}

/// The budget and the costs of all scans.
#[derive(Clone, Debug)]
pub(super) struct Allocation {
    budget: Budget,
    governor: CpuBudget,
    focused: bool,
    /// A base sample without a scan over files; scan over threads and profile excluded.
    light: MeanCost,
    /// A base sample with a scan over files; scan over threads and profile excluded.
    heavy: MeanCost,
    threads: MeanCost,
    profile: MeanCost,
    /// A focus sample, profile excluded.
    focus_sample: MeanCost,
    /// Share of a core that discovery and background scans use.
    discovery_share: f64,
}

impl Allocation {
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            governor: CpuBudget::default(),
            focused: false,
            light: MeanCost::default(),
            heavy: MeanCost::default(),
            threads: MeanCost::default(),
            profile: MeanCost::default(),
            focus_sample: MeanCost::default(),
            discovery_share: 0.0,
        }
    }

    /// Another budget, with the costs measured so far.
    pub(super) fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    pub(super) fn budget(&self) -> Budget {
        self.budget
    }

    /// Uses up the saved CPU time, as a long incident does.
    #[cfg(test)]
    pub(super) fn spend_savings(&mut self) {
        self.governor.spend_savings();
    }

    pub(super) fn set_focused(&mut self, focused: bool) {
        self.focused = focused;
    }

    pub(super) fn spends(&self) -> bool {
        self.governor.spends()
    }

    pub(super) fn set_spending(&mut self, spends: bool) {
        self.governor.set_spending(spends);
    }

    /// Time between base samples, and between scans over files, over threads, and profiles in them, ns.
    pub(super) fn intervals_ns(&self) -> [u64; 4] {
        [
            self.base_interval_ns(),
            self.files_interval_ns(),
            self.threads_interval_ns(),
            self.profile_interval_ns(),
        ]
    }

    /// The intervals apart from any incident.
    pub(super) fn without_savings(&self) -> Self {
        let mut usual = self.clone();
        usual.set_spending(false);
        usual
    }

    pub(super) fn learn(&mut self, plan: SamplePlan, cost: SampleCost) {
        let SampleCost {
            cpu_ns,
            threads_ns,
            profile_ns,
        } = cost;
        if plan.threads {
            self.threads.add(threads_ns);
        }
        if plan.profile && profile_ns > 0 {
            self.profile.add(profile_ns);
        }
        let rest_ns = cpu_ns.saturating_sub(threads_ns + profile_ns);
        if plan.files {
            self.heavy.add(rest_ns);
            // A sample without files costs no more than one with them. If all include files, the mean of `light` is stale.
            self.light.0 = self.light.0.min(self.heavy.0);
        } else if plan.base {
            self.light.add(rest_ns);
        } else {
            self.focus_sample.add(rest_ns);
        }
    }

    pub(super) fn discovered(&mut self, cpu_ns: u64, interval_ns: u64) {
        let share = cpu_ns as f64 / interval_ns as f64;
        self.discovery_share += DISCOVERY_WEIGHT * (share - self.discovery_share);
    }

    pub(super) fn measured(&mut self, now_ns: u64, cpu_ns: u64) {
        self.governor.measure(now_ns, cpu_ns, self.budget.cpu_share);
    }

    /// Share of one core that is allocated now.
    pub(super) fn cpu_share(&self) -> f64 {
        self.plain_share() * self.governor.multiple(self.budget.cpu_share)
    }

    /// The same without saved CPU time. Saved CPU time keeps up the rate of the base samples and of the scans and profiles in
    /// them. It buys no additional focus samples.
    fn plain_share(&self) -> f64 {
        self.budget.cpu_share * self.governor.part()
    }

    /// CPU time of a scan over files beyond what its sample costs anyway, ns.
    pub(super) fn files_cost_ns(&self) -> u64 {
        (self.heavy.0 - self.light.0).max(0.0) as u64
    }

    /// CPU time of a scan over threads, ns.
    pub(super) fn threads_cost_ns(&self) -> u64 {
        self.threads.0 as u64
    }

    /// CPU time of a base sample without the scans over files and threads, ns.
    pub(super) fn base_cost_ns(&self) -> u64 {
        self.light.0 as u64
    }

    /// Time between base samples, ns: as configured, unless what every sample includes (hundreds of listeners, the queues of
    /// all targets) costs too much by itself.
    pub(super) fn base_interval_ns(&self) -> u64 {
        self.affordable_ns(
            self.base_cost_ns(),
            self.cpu_share() * MAX_BASE_PART,
            MAX_BASE_INTERVAL_NS,
        )
    }

    /// Time between scans over files, ns.
    pub(super) fn files_interval_ns(&self) -> u64 {
        let left = self.cpu_share() - self.base_share() - self.discovery_share - self.focus_share();
        let share = left.max(self.cpu_share() * MIN_FILES_PART);
        self.affordable_ns(self.files_cost_ns(), share, MAX_FILES_INTERVAL_NS)
    }

    /// Time between scans over threads, ns.
    pub(super) fn threads_interval_ns(&self) -> u64 {
        let light = self.light.0 / self.base_interval_ns() as f64;
        let left = self.cpu_share() * (1.0 - MIN_FILES_PART)
            - light
            - self.discovery_share
            - self.focus_share();
        let share = left.max(self.cpu_share() * MIN_THREADS_PART);
        self.affordable_ns(self.threads_cost_ns(), share, MAX_THREADS_INTERVAL_NS)
    }

    /// Time between profiles in base samples while a target is focused, ns.
    pub(super) fn profile_interval_ns(&self) -> u64 {
        let share = self.cpu_share() * FOCUS_PART;
        self.affordable_ns(self.profile.0 as u64, share, MAX_PROFILE_INTERVAL_NS)
    }

    /// Time between focus samples, ns; `None` if the budget leaves no room for any.
    pub(super) fn focus_interval_ns(&self) -> Option<u64> {
        let files = self.files_cost_ns() as f64 / self.files_interval_ns() as f64;
        let profile = self.profile.0 / self.profile_interval_ns() as f64;
        let used = self.base_share() + files + profile + self.discovery_share;
        let wanted = (self.plain_share() - used).max(self.plain_share() * FOCUS_PART);
        let left = wanted.min(self.cpu_share() - used);
        // Before the first focus sample, the cost of a base sample without files is an upper bound.
        let rest = if self.focus_sample.0 > 0.0 {
            self.focus_sample.0
        } else {
            self.light.0
        };
        let cost = rest + self.profile.0;
        let affordable = if left > 0.0 {
            cost / left
        } else {
            f64::INFINITY
        };
        let interval = affordable.max(self.budget.focus_interval_ns as f64);
        let fits = interval * FOCUS_INTERVALS_PER_BASE <= self.base_interval_ns() as f64;
        fits.then_some(interval as u64)
    }

    /// If focus samples seem too expensive, one is tried now and then: only a trial shows whether they are cheap. They may be,
    /// because soon after another sample the kernel's objects are still in the CPU caches. `last_ns`: when the last focus
    /// sample was due. Returns the time after the last sample at which the trial is due.
    pub(super) fn trial_ns(&self, now_ns: u64, last_ns: u64) -> Option<u64> {
        let cost = self.light.0 + self.profile.0;
        let affordable = cost / (self.plain_share() * TRIAL_PART);
        let interval_ns = affordable.max(MIN_TRIAL_INTERVAL_NS as f64) as u64;
        let is_due = now_ns >= last_ns.saturating_add(interval_ns);
        is_due.then_some(self.budget.focus_interval_ns)
    }

    /// Share of a core that is kept for focus samples and profiles.
    fn focus_share(&self) -> f64 {
        if self.focused {
            self.cpu_share() * FOCUS_PART
        } else {
            0.0
        }
    }

    /// Share of a core that base samples use without the scans over files.
    fn base_share(&self) -> f64 {
        self.light.0 / self.base_interval_ns() as f64
            + self.threads.0 / self.threads_interval_ns() as f64
    }

    /// The shortest interval at which a scan of this cost uses about `share` of a core: a whole number of configured sampling
    /// intervals (see [`ROUNDING_TOLERANCE`]), at most `max_ns` unless one of them is longer.
    fn affordable_ns(&self, cost_ns: u64, share: f64, max_ns: u64) -> u64 {
        let interval_ns = self.budget.interval_ns;
        let affordable = cost_ns as f64 / share;
        let intervals = affordable / interval_ns as f64 - ROUNDING_TOLERANCE;
        let intervals = intervals.ceil().max(1.0);
        ((intervals * interval_ns as f64) as u64).min(max_ns.max(interval_ns))
    }
}
