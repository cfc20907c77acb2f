//! Plans which scans each sample includes and when the next sample is due, within the CPU budget. A pure function of time
//! and cost.
//!
//! *Base samples* are taken at the configured interval (stretched to at most 500 ms if they alone cost too much; a longer
//! configured interval is kept), and each scans the listeners. The scans over all files and all threads join them as often
//! as the budget allows: if thousands of sockets or threads make a scan expensive, its interval is stretched. While a target
//! is focused, the rest of the budget goes into *focus samples* between the base samples.
//!
//! `allocation` splits the budget into intervals; this file keeps the due times.
#![forbid(unsafe_code)]

mod allocation;

use allocation::Allocation;

const MS: u64 = 1_000_000;

/// One of this many focus samples scans the focused sockets and the counters of their network namespaces. Every focus sample
/// includes the profile.
const FOCUS_SAMPLES_PER_SOCKET_SCAN: u32 = 4;

/// The sampling intervals and the CPU budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Time between base samples, ns.
    pub interval_ns: u64,
    /// Shortest time between two samples while a target is focused, ns.
    pub focus_interval_ns: u64,
    /// Share of one core that the agent may use.
    pub cpu_share: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            interval_ns: 100 * MS,
            focus_interval_ns: 10 * MS,
            cpu_share: 0.01,
        }
    }
}

/// One sample: when it is due, and which scans it includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplePlan {
    /// CLOCK_MONOTONIC, ns.
    pub due_ns: u64,
    /// All open files of all targets.
    pub files: bool,
    /// Listeners, and busy sockets in the focus scope; a scan over files includes them.
    pub focused_sockets: bool,
    /// CPU time and run delay of all threads.
    pub threads: bool,
    /// What the threads in the focus scope wait for.
    pub profile: bool,
    /// A base sample, not a focus sample.
    pub base: bool,
    /// Includes all background scans, due or not.
    pub complete: bool,
}

impl SamplePlan {
    /// A sample with all scans, due at once.
    pub fn complete() -> Self {
        Self {
            due_ns: 0,
            files: true,
            focused_sockets: true,
            threads: true,
            profile: true,
            base: true,
            complete: true,
        }
    }
}

/// What a sample cost, ns of CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SampleCost {
    /// All of it, pipeline and outputs included, without background scans.
    pub cpu_ns: u64,
    /// Of that, the scan over threads.
    pub threads_ns: u64,
    /// Of that, the profile.
    pub profile_ns: u64,
}

/// A scan whose interval the CPU budget may stretch, for the notice about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct StretchableScan {
    /// Prefix of the notice's code.
    pub(super) name: &'static str,
    pub(super) objects: &'static str,
    pub(super) is_stretched: bool,
    pub(super) cost_ns: u64,
    pub(super) interval_ns: u64,
    /// Share of one core that the agent may use.
    pub(super) budget: f64,
}

impl StretchableScan {
    pub(super) const COUNT: usize = 3;
}

/// Decides when to sample, and what.
#[derive(Debug)]
pub struct Schedule {
    allocation: Allocation,
    base_due_ns: u64,
    files_due_ns: u64,
    threads_due_ns: u64,
    profile_due_ns: u64,
    /// When the last sample was due, base or focus.
    last_ns: u64,
    /// When the last focus sample was due.
    last_focus_ns: u64,
    /// Focus samples so far, modulo 2^32.
    focus_samples: u32,
    focused: bool,
    late: u64,
}

impl Schedule {
    /// The first sample is due at once and includes all scans except the profile.
    pub fn new(budget: Budget, now_ns: u64) -> Self {
        Self {
            allocation: Allocation::new(budget),
            base_due_ns: now_ns,
            files_due_ns: now_ns,
            threads_due_ns: now_ns,
            profile_due_ns: now_ns,
            last_ns: now_ns,
            last_focus_ns: now_ns,
            focus_samples: 0,
            focused: false,
            late: 0,
        }
    }

    /// The next sample, which may already be due.
    pub fn next(&mut self, now_ns: u64) -> SamplePlan {
        let interval_ns = self.allocation.base_interval_ns();
        if now_ns > self.base_due_ns + interval_ns {
            // Missed samples are not taken later.
            self.late += 1;
            self.base_due_ns = now_ns;
        }
        self.next_focus_sample(now_ns)
            .unwrap_or_else(|| self.next_base_sample(now_ns, interval_ns))
    }

    /// A focus sample, if one is affordable before the next base sample.
    fn next_focus_sample(&mut self, now_ns: u64) -> Option<SamplePlan> {
        if !self.focused {
            return None;
        }
        let interval_ns = self
            .allocation
            .focus_interval_ns()
            .or_else(|| self.allocation.trial_ns(now_ns, self.last_focus_ns))?;
        let due_ns = (self.last_ns + interval_ns).max(now_ns);
        if due_ns + interval_ns / 2 >= self.base_due_ns {
            return None;
        }
        self.last_ns = due_ns;
        self.last_focus_ns = due_ns;
        self.focus_samples = self.focus_samples.wrapping_add(1);
        Some(SamplePlan {
            due_ns,
            files: false,
            focused_sockets: self
                .focus_samples
                .is_multiple_of(FOCUS_SAMPLES_PER_SOCKET_SCAN),
            threads: false,
            profile: true,
            base: false,
            complete: false,
        })
    }

    fn next_base_sample(&mut self, now_ns: u64, interval_ns: u64) -> SamplePlan {
        let due_ns = self.base_due_ns.max(now_ns);
        self.base_due_ns += interval_ns;
        self.last_ns = due_ns;
        // A scan that falls due within the next half interval is made now.
        let is_due = |scan_due_ns: u64| scan_due_ns <= due_ns + interval_ns / 2;
        let files = is_due(self.files_due_ns);
        if files {
            self.files_due_ns = due_ns + self.allocation.files_interval_ns();
        }
        let threads = is_due(self.threads_due_ns);
        if threads {
            self.threads_due_ns = due_ns + self.allocation.threads_interval_ns();
        }
        let profile = self.focused && is_due(self.profile_due_ns);
        if profile {
            self.profile_due_ns = due_ns + self.allocation.profile_interval_ns();
        }
        SamplePlan {
            due_ns,
            files,
            focused_sockets: true,
            threads,
            profile,
            base: true,
            complete: false,
        }
    }

    /// Accounts for what a sample cost. A scan that proved more expensive than expected is postponed.
    pub fn account(&mut self, plan: SamplePlan, cost: SampleCost) {
        self.allocation.learn(plan, cost);
        let postpone = |due_ns: &mut u64, interval_ns: u64| {
            *due_ns = (*due_ns).max(plan.due_ns + interval_ns);
        };
        if plan.files {
            postpone(&mut self.files_due_ns, self.allocation.files_interval_ns());
        }
        if plan.threads && plan.base {
            let interval_ns = self.allocation.threads_interval_ns();
            postpone(&mut self.threads_due_ns, interval_ns);
        }
        if plan.profile && plan.base {
            let interval_ns = self.allocation.profile_interval_ns();
            postpone(&mut self.profile_due_ns, interval_ns);
        }
    }

    /// Accounts for discovery and background scans: `cpu_ns` of CPU time in each `interval_ns`.
    pub fn discovered(&mut self, cpu_ns: u64, interval_ns: u64) {
        self.allocation.discovered(cpu_ns, interval_ns);
    }

    /// Adjusts the budget to the agent's total CPU time so far, ns, without the time spent serving clients.
    pub fn measured(&mut self, now_ns: u64, cpu_ns: u64) {
        self.allocation.measured(now_ns, cpu_ns);
    }

    /// Share of one core that is allocated now: more than the budget in the first seconds of an incident, less after the agent's
    /// measured CPU time exceeded what was allowed.
    pub fn cpu_share(&self) -> f64 {
        self.allocation.cpu_share()
    }

    /// Whether any target is focused, so that focus samples are taken between the base samples.
    pub fn set_focused(&mut self, focused: bool) {
        self.focused = focused;
        self.allocation.set_focused(focused);
    }

    /// Sets whether saved CPU time is spent, as in a new incident. That shortens the intervals; scans that are overdue
    /// by the shorter ones become due now.
    pub fn set_spending(&mut self, spends: bool, now_ns: u64) {
        if spends == self.allocation.spends() {
            return;
        }
        let before = self.allocation.intervals_ns();
        self.allocation.set_spending(spends);
        if !spends {
            return;
        }
        let due = [
            &mut self.base_due_ns,
            &mut self.files_due_ns,
            &mut self.threads_due_ns,
            &mut self.profile_due_ns,
        ];
        let intervals = before.into_iter().zip(self.allocation.intervals_ns());
        for (due_ns, (before_ns, interval_ns)) in due.into_iter().zip(intervals) {
            let last_ns = due_ns.saturating_sub(before_ns);
            *due_ns = (*due_ns).min((last_ns + interval_ns).max(now_ns));
        }
    }

    /// Makes the scans over files and threads due with the next base sample.
    pub fn scan_all_next(&mut self) {
        self.files_due_ns = 0;
        self.threads_due_ns = 0;
    }

    /// CPU time of a scan over files beyond what its sample costs anyway, ns.
    pub fn files_cost_ns(&self) -> u64 {
        self.allocation.files_cost_ns()
    }

    /// Time between scans over files, ns.
    pub fn files_interval_ns(&self) -> u64 {
        self.allocation.files_interval_ns()
    }

    /// How many base samples began more than a whole sampling interval late.
    pub fn late_samples(&self) -> u64 {
        self.late
    }

    /// Plans within another budget; the next sample is due at once, with all scans.
    pub fn set_budget(&mut self, budget: Budget, now_ns: u64) {
        self.allocation.set_budget(budget);
        self.base_due_ns = now_ns;
        self.files_due_ns = now_ns;
        self.threads_due_ns = now_ns;
        self.profile_due_ns = now_ns;
    }

    /// The budget.
    pub fn budget(&self) -> Budget {
        self.allocation.budget()
    }

    /// The scans that the budget may stretch.
    pub(super) fn stretchable_scans(&self) -> [StretchableScan; StretchableScan::COUNT] {
        // A notice reports how the agent runs for minutes, not for the first seconds of an incident.
        let allocation = self.allocation.without_savings();
        let scan = |name, objects, cost_ns, interval_ns| StretchableScan {
            name,
            objects,
            is_stretched: interval_ns > self.budget().interval_ns,
            cost_ns,
            interval_ns,
            budget: self.budget().cpu_share,
        };
        [
            scan(
                "files",
                "sockets and pipes",
                allocation.files_cost_ns(),
                allocation.files_interval_ns(),
            ),
            scan(
                "threads",
                "threads",
                allocation.threads_cost_ns(),
                allocation.threads_interval_ns(),
            ),
            scan(
                "samples",
                "listeners and focused sockets",
                allocation.base_cost_ns(),
                allocation.base_interval_ns(),
            ),
        ]
    }
}

#[cfg(test)]
mod tests;
