//! Exact waits of threads, which hooks measure in the tiers `auto` and `watch`, and what the hooks cost.

use serde::{Deserialize, Serialize};

use super::TargetId;

/// The state of the hooks, and the waits since the last report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HookReport {
    pub is_attached: bool,
    /// Why they are attached, or not.
    pub reason: String,
    pub hooks: Vec<HookCost>,
    /// CPU time of the hooks as a fraction of the machine's, in the last interval; 0 while they are not attached.
    pub share: f64,
    /// The same as expected from the switches of the machine, also while they are not attached.
    pub expected_share: f64,
    /// The share that they may take.
    pub budget: f64,
    /// Waits that were not measured since the agent's start, by reason.
    pub lost: Vec<HookLoss>,
    /// The time that `waits` cover, ns.
    pub interval_ns: u64,
    pub waits: Vec<ExactWait>,
}

/// The cost of one hook since the agent's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookCost {
    /// Its tracepoint.
    pub name: String,
    pub runs: u64,
    /// CPU time, ns: what the programs measure in one of 64 runs, and the kernel's cost of calling them.
    pub cpu_ns: u64,
}

/// Waits that were not measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookLoss {
    /// A short name from a closed list.
    pub reason: String,
    pub count: u64,
}

/// What a thread waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ExactWaitKind {
    /// A CPU, after a wake-up.
    #[default]
    Woken,
    /// A CPU, after it lost it while runnable.
    Preempted,
    /// Anything else, until the wake-up.
    Blocked,
    /// The same, where the kernel counts it as I/O.
    BlockedIo,
}

/// The waits of the threads of one process of one kind: for a CPU, or in one system call for one object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactWait {
    pub target: TargetId,
    pub tgid: u32,
    pub kind: ExactWaitKind,
    /// The number of the system call, if it blocks in one.
    pub call: Option<u16>,
    /// Its first argument, if that is a descriptor or the address of a futex.
    pub object: Option<u64>,
    /// What the descriptor refers to, if known.
    pub path: Option<String>,
    pub distribution: Distribution,
    pub worst: Option<WorstWait>,
}

/// Waits as a histogram whose values are off by 1.6% at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    pub count: u64,
    /// Exact, ns.
    pub total_ns: u64,
    /// The longest wait, exact, ns.
    pub max_ns: u64,
    /// Durations of waits, ns, ascending, each with the number of waits that took as long.
    pub waits: Vec<(u64, u64)>,
}

/// The longest wait of the interval, and who caused it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorstWait {
    pub wait_ns: u64,
    /// CLOCK_MONOTONIC at its end, ns.
    pub mono_ns: u64,
    /// The thread that waited.
    pub tid: u32,
    pub cpu: u32,
    /// Of a wait for a CPU: the thread that had that CPU until then; `None` if it was idle.
    pub culprit: Option<WaitParty>,
    /// How long during the wait, ns.
    pub culprit_ns: u64,
    /// The thread that was running where the wake-up took effect; `None` if none was.
    pub waker: Option<WaitParty>,
}

/// A thread that a wait depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitParty {
    pub tgid: u32,
    pub tid: u32,
    /// Its name with control characters escaped; empty if unknown.
    pub comm: String,
}

impl Distribution {
    /// Adds the waits of another one.
    pub fn add(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.total_ns = self.total_ns.saturating_add(other.total_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        for (wait_ns, count) in &other.waits {
            match self
                .waits
                .binary_search_by_key(wait_ns, |(known, _)| *known)
            {
                Ok(at) => self.waits[at].1 = self.waits[at].1.saturating_add(*count),
                Err(at) => self.waits.insert(at, (*wait_ns, *count)),
            }
        }
    }

    /// The mean wait, ns; `None` without waits.
    pub fn mean_ns(&self) -> Option<u64> {
        self.total_ns.checked_div(self.count)
    }

    /// The wait that this share of all waits does not exceed (nearest rank), ns.
    pub fn quantile_ns(&self, share: f64) -> Option<u64> {
        // A recording may contain any numbers.
        let counts = self.waits.iter().map(|(_, count)| *count);
        let all = counts.fold(0, u64::saturating_add);
        let rank = ((all as f64 * share).ceil() as u64).max(1);
        let mut seen: u64 = 0;
        let at_rank = self.waits.iter().find(|(_, count)| {
            seen = seen.saturating_add(*count);
            seen >= rank
        });
        at_rank.map(|(wait_ns, _)| (*wait_ns).min(self.max_ns.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distribution(waits: &[(u64, u64)]) -> Distribution {
        Distribution {
            count: waits.iter().map(|(_, count)| count).sum(),
            total_ns: waits.iter().map(|(wait_ns, count)| wait_ns * count).sum(),
            max_ns: waits.last().map_or(0, |(wait_ns, _)| *wait_ns),
            waits: waits.to_vec(),
        }
    }

    #[test]
    fn quantiles_are_those_of_the_nearest_rank() {
        let waits = distribution(&[(10, 98), (500, 1), (900, 1)]);
        assert_eq!(waits.quantile_ns(0.5), Some(10));
        assert_eq!(waits.quantile_ns(0.99), Some(500));
        assert_eq!(waits.quantile_ns(1.0), Some(900));
        assert_eq!(Distribution::default().quantile_ns(0.5), None);
        assert_eq!(Distribution::default().mean_ns(), None);
    }

    #[test]
    fn the_sum_of_two_distributions_is_that_of_all_their_waits() {
        let mut sum = distribution(&[(10, 1), (30, 2)]);
        sum.add(&distribution(&[(20, 5), (30, 1)]));
        assert_eq!(sum, distribution(&[(10, 1), (20, 5), (30, 3)]));
        assert_eq!(sum.mean_ns(), Some(200 / 9));
    }
}
