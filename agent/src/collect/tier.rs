//! Decides whether the hooks are attached: by the tier, the state of the queues, and the cost of the hooks.
//!
//! The price of the hooks is estimated before they are attached, from the switches of the machine, and measured afterwards. They are
//! detached as soon as it exceeds the budget. Pure: the time and the measurements are arguments.
#![forbid(unsafe_code)]

use super::MS;

/// When hooks are attached to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// No hook is attached.
    #[default]
    Glance,
    /// Hooks are attached while a target is focused.
    Auto,
    /// Hooks are attached all the time.
    Watch,
}

impl Tier {
    pub const ALL: [Self; 3] = [Self::Glance, Self::Auto, Self::Watch];

    pub fn name(self) -> &'static str {
        match self {
            Self::Glance => "glance",
            Self::Auto => "auto",
            Self::Watch => "watch",
        }
    }

    /// The tier of this name. Not `FromStr`: the caller says what is wrong.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tier| tier.name() == name)
    }

    /// Whether hooks may be attached at all.
    pub fn has_hooks(self) -> bool {
        self != Self::Glance
    }
}

/// Share of the machine's CPU time that the hooks may take.
pub const DEFAULT_HOOK_BUDGET: f64 = 0.01;

/// Expected CPU time per context switch of the machine, ns: a switch and at most one wake-up, each 70 to 100 ns for threads that
/// are not measured, with the kernel's cost of calling a program (pipe ping-pong, Linux 6.18).
const EXPECTED_NS_PER_SWITCH: f64 = 200.0;
/// How long the hooks stay attached after the last queue has recovered, ns: an incident that comes and goes must not attach and
/// detach them each time.
const HOLD_NS: u64 = 10_000 * MS;
/// First and longest time until the hooks are tried again after they exceeded the budget, ns. It doubles each time.
const FIRST_RETRY_NS: u64 = 30_000 * MS;
/// See [`FIRST_RETRY_NS`].
const MAX_RETRY_NS: u64 = 600_000 * MS;
/// After this time within the budget, ns, the next retry is the first again.
const SETTLED_NS: u64 = 60_000 * MS;

/// What the decision depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    pub(super) now_ns: u64,
    /// A target is focused.
    pub(super) is_suspicious: bool,
    /// Context switches of the machine per second; `None` until they are known.
    pub(super) switches_per_s: Option<f64>,
    /// CPU time of the attached hooks as a fraction of the machine's since the last decision; `None` if none are attached.
    pub(super) share: Option<f64>,
    pub(super) cpus: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Attach,
    Detach,
}

/// Decides when hooks are attached and detached.
#[derive(Debug)]
pub(super) struct TierControl {
    tier: Tier,
    budget: f64,
    attached_ns: Option<u64>,
    /// When a queue was last not ok.
    suspicious_ns: Option<u64>,
    /// Not before this time again.
    retry_ns: u64,
    next_retry_ns: u64,
    reason: String,
}

impl TierControl {
    pub(super) fn new(tier: Tier, budget: f64) -> Self {
        Self {
            tier,
            budget,
            attached_ns: None,
            suspicious_ns: None,
            retry_ns: 0,
            next_retry_ns: FIRST_RETRY_NS,
            reason: "the first interval is not over yet".to_owned(),
        }
    }

    pub(super) fn budget(&self) -> f64 {
        self.budget
    }

    /// Why hooks are attached, or not.
    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    /// The share of the machine's CPU time that attached hooks are expected to take.
    pub(super) fn expected_share(switches_per_s: f64, cpus: u32) -> f64 {
        switches_per_s * EXPECTED_NS_PER_SWITCH / (1e9 * f64::from(cpus.max(1)))
    }

    pub(super) fn decide(&mut self, situation: Situation) -> Option<Action> {
        let now_ns = situation.now_ns;
        if situation.is_suspicious {
            self.suspicious_ns = Some(now_ns);
        }
        let is_held = self
            .suspicious_ns
            .is_some_and(|at_ns| now_ns < at_ns.saturating_add(HOLD_NS));
        let is_wanted = match self.tier {
            Tier::Glance => false,
            // Attached for a queue that is not ok now, kept for one that was.
            Tier::Auto if self.attached_ns.is_some() => is_held,
            Tier::Auto => situation.is_suspicious,
            Tier::Watch => true,
        };
        match self.attached_ns {
            Some(since_ns) => self.keep_or_detach(situation, is_wanted, since_ns),
            None => self.attach_or_wait(situation, is_wanted),
        }
    }

    fn keep_or_detach(
        &mut self,
        situation: Situation,
        is_wanted: bool,
        since_ns: u64,
    ) -> Option<Action> {
        let now_ns = situation.now_ns;
        if now_ns.saturating_sub(since_ns) >= SETTLED_NS {
            self.next_retry_ns = FIRST_RETRY_NS;
        }
        let share = situation.share.unwrap_or(0.0);
        if share > self.budget {
            self.retry_ns = now_ns.saturating_add(self.next_retry_ns);
            self.reason = format!(
                "they took {} of the machine's CPU time, more than the budget of {}; tried again after {} s",
                percent(share),
                percent(self.budget),
                self.next_retry_ns / (1_000 * MS),
            );
            self.next_retry_ns = (self.next_retry_ns * 2).min(MAX_RETRY_NS);
            self.attached_ns = None;
            return Some(Action::Detach);
        }
        if !is_wanted {
            self.reason = "all queues are ok".to_owned();
            self.attached_ns = None;
            return Some(Action::Detach);
        }
        None
    }

    fn attach_or_wait(&mut self, situation: Situation, is_wanted: bool) -> Option<Action> {
        if !is_wanted {
            if self.tier == Tier::Auto && situation.now_ns >= self.retry_ns {
                self.reason = "all queues are ok".to_owned();
            }
            return None;
        }
        // The reason that they were detached for still holds.
        if situation.now_ns < self.retry_ns {
            return None;
        }
        let switches_per_s = situation.switches_per_s?;
        let expected = Self::expected_share(switches_per_s, situation.cpus);
        if expected > self.budget {
            self.reason = format!(
                "{switches_per_s:.0} context switches a second: they would take about {} of the machine's CPU time, more than the \
                 budget of {}",
                percent(expected),
                percent(self.budget),
            );
            return None;
        }
        self.attached_ns = Some(situation.now_ns);
        self.reason = match self.tier {
            Tier::Watch => "requested".to_owned(),
            _ => "a queue is not ok".to_owned(),
        };
        Some(Action::Attach)
    }

    /// They could not be attached or read, for this reason: tried again later.
    pub(super) fn failed(&mut self, now_ns: u64, reason: String) {
        self.attached_ns = None;
        self.retry_ns = now_ns.saturating_add(self.next_retry_ns);
        self.next_retry_ns = (self.next_retry_ns * 2).min(MAX_RETRY_NS);
        self.reason = reason;
    }
}

fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000 * MS;

    /// A machine with 2 CPUs and this number of switches a second.
    fn at(seconds: u64, is_suspicious: bool, switches_per_s: f64, share: Option<f64>) -> Situation {
        Situation {
            now_ns: seconds * SECOND_NS,
            is_suspicious,
            switches_per_s: Some(switches_per_s),
            share,
            cpus: 2,
        }
    }

    #[test]
    fn the_glance_tier_never_attaches() {
        let mut control = TierControl::new(Tier::Glance, 1.0);
        assert_eq!(control.decide(at(1, true, 1.0, None)), None);
    }

    #[test]
    fn the_auto_tier_attaches_while_a_queue_is_not_ok_and_holds_on_for_a_while() {
        let mut control = TierControl::new(Tier::Auto, 0.01);
        assert_eq!(control.decide(at(1, false, 1_000.0, None)), None);
        assert_eq!(
            control.decide(at(2, true, 1_000.0, None)),
            Some(Action::Attach)
        );
        assert_eq!(control.decide(at(11, false, 1_000.0, Some(0.001))), None);
        let action = control.decide(at(12, false, 1_000.0, Some(0.001)));
        assert_eq!(action, Some(Action::Detach));
        assert_eq!(control.decide(at(13, false, 1_000.0, None)), None);
        assert_eq!(control.reason(), "all queues are ok");
        assert_eq!(
            control.decide(at(14, true, 1_000.0, None)),
            Some(Action::Attach)
        );
    }

    #[test]
    fn hooks_that_would_exceed_the_budget_are_not_attached() {
        let mut control = TierControl::new(Tier::Watch, 0.01);
        // 200 ns for each of 150,000 switches a second are 1.5% of two CPUs.
        assert_eq!(control.decide(at(1, false, 150_000.0, None)), None);
        assert!(
            control.reason().contains("150000 context switches"),
            "{}",
            control.reason()
        );
        let action = control.decide(at(2, false, 50_000.0, None));
        assert_eq!(action, Some(Action::Attach));
    }

    #[test]
    fn hooks_are_not_attached_before_the_price_is_known() {
        let mut control = TierControl::new(Tier::Watch, 0.01);
        let unknown = Situation {
            switches_per_s: None,
            ..at(1, true, 0.0, None)
        };
        assert_eq!(control.decide(unknown), None);
    }

    #[test]
    fn hooks_that_exceed_the_budget_are_detached_and_tried_again_later_and_later() {
        let mut control = TierControl::new(Tier::Watch, 0.01);
        let mut now = 1;
        for wait in [30, 60, 120] {
            assert_eq!(
                control.decide(at(now, true, 1.0, None)),
                Some(Action::Attach)
            );
            let action = control.decide(at(now + 1, true, 1.0, Some(0.011)));
            assert_eq!(action, Some(Action::Detach));
            assert_eq!(control.decide(at(now + wait, true, 1.0, None)), None);
            assert!(control.reason().contains("1.10%"), "{}", control.reason());
            now += wait + 1;
        }
        // After a minute within the budget the next wait is short again.
        assert_eq!(
            control.decide(at(now, true, 1.0, None)),
            Some(Action::Attach)
        );
        assert_eq!(control.decide(at(now + 61, true, 1.0, Some(0.001))), None);
        let action = control.decide(at(now + 62, true, 1.0, Some(0.02)));
        assert_eq!(action, Some(Action::Detach));
        assert_eq!(
            control.decide(at(now + 92, true, 1.0, None)),
            Some(Action::Attach)
        );
    }

    #[test]
    fn a_refused_attachment_is_tried_again_later() {
        let mut control = TierControl::new(Tier::Watch, 0.01);
        assert_eq!(
            control.decide(at(1, false, 1.0, None)),
            Some(Action::Attach)
        );
        control.failed(SECOND_NS, "EPERM".to_owned());
        assert_eq!(control.decide(at(2, false, 1.0, None)), None);
        assert!(control.reason().contains("EPERM"));
        assert_eq!(
            control.decide(at(31, false, 1.0, None)),
            Some(Action::Attach)
        );
    }
}
