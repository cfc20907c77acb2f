//! Attaches and detaches the hooks of the tiers `auto` and `watch`, and reads what they have measured.

mod convert;

use std::collections::{BTreeSet, HashMap};

use tailback_ebpf::{HOOK_SWITCH, HOOK_WAKEUP, HookStats};

use super::{
    MS,
    paths::read_text,
    processes::Processes,
    tier::{Action, Situation, Tier, TierControl},
};
use crate::{
    kernel::{hooks::Hooks, scanner::Watched},
    sample::{HookCost, HookLoss, HookReport, TargetId},
};

/// Time between two decisions and readings, ns: the budget is never exceeded for longer than a second.
const INTERVAL_NS: u64 = 1_000 * MS;
/// The same until the number of switches is known, on which the price depends.
const FIRST_INTERVAL_NS: u64 = 250 * MS;
/// The kernel's cost of calling a program at a tracepoint, ns, which the program cannot measure. An empty one costs 50 to 95 ns on
/// Linux 6.18.
const DISPATCH_NS: u64 = 50;
/// Largest part of /proc/stat that is read, bytes: `ctxt` follows a line per CPU and that of interrupts.
const MAX_STAT_BYTES: u64 = 1 << 20;

pub(super) struct ExactWaits {
    tier: Tier,
    control: TierControl,
    due_ns: u64,
    /// Time and context switches of the machine at the last decision.
    switches: Option<(u64, u64)>,
    switches_per_s: Option<f64>,
    /// Online CPUs.
    cpus: u32,
    /// Counters at the last decision, and the CPU time in all, ns.
    before: HookStats,
    cpu_ns: [u64; 2],
    share: f64,
    measured: Vec<Watched>,
    /// The targets of the measured processes, also of those that have exited since the last reading.
    owners: HashMap<u32, TargetId>,
    /// Processes that are not measured because there are too many: now, and in all.
    left_out: usize,
    all_left_out: u64,
    lost: [u64; 3],
    read_ns: u64,
}

impl ExactWaits {
    pub(super) fn new(tier: Tier, budget: f64) -> Self {
        Self {
            tier,
            control: TierControl::new(tier, budget),
            due_ns: 0,
            switches: None,
            switches_per_s: None,
            cpus: 1,
            before: HookStats::default(),
            cpu_ns: [0; 2],
            share: 0.0,
            measured: Vec::new(),
            owners: HashMap::new(),
            left_out: 0,
            all_left_out: 0,
            lost: [0; 3],
            read_ns: 0,
        }
    }

    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        self.tier.has_hooks() && now_ns >= self.due_ns
    }

    /// Decides whether the hooks are attached, and reports their waits since the last call. `scope`: whether a process is to be
    /// measured in the tier `auto`. If something fails, they are detached, and sampling goes on without them.
    pub(super) fn poll(
        &mut self,
        now_ns: u64,
        hooks: Result<&mut Hooks, &str>,
        processes: &Processes,
        is_suspicious: bool,
        scope: impl Fn(u32) -> bool,
    ) -> HookReport {
        self.count_switches(now_ns);
        self.due_ns = now_ns
            + match self.switches_per_s {
                Some(_) => INTERVAL_NS,
                None => FIRST_INTERVAL_NS,
            };
        let hooks = match hooks {
            Ok(hooks) => hooks,
            Err(reason) => {
                return HookReport {
                    reason: format!("they are not available: {reason}"),
                    ..self.empty_report()
                };
            }
        };
        match self.try_poll(now_ns, hooks, processes, is_suspicious, scope) {
            Ok(report) => report,
            Err(error) => {
                // The links are gone in any case; the maps are what failed.
                let _ = hooks.detach();
                self.forget_measured();
                self.control.failed(now_ns, format!("{error:#}"));
                self.reported(self.empty_report())
            }
        }
    }

    fn try_poll(
        &mut self,
        now_ns: u64,
        hooks: &mut Hooks,
        processes: &Processes,
        is_suspicious: bool,
        scope: impl Fn(u32) -> bool,
    ) -> anyhow::Result<HookReport> {
        let mut report = self.empty_report();
        if hooks.is_attached() {
            self.account(hooks.stats()?, now_ns);
            report.interval_ns = now_ns.saturating_sub(self.read_ns);
            self.read_ns = now_ns;
            report.waits = convert::waits(hooks.read()?, processes, &self.owners);
        }
        let action = self.control.decide(Situation {
            now_ns,
            is_suspicious,
            switches_per_s: self.switches_per_s,
            share: hooks.is_attached().then_some(self.share),
            cpus: self.cpus,
        });
        let tier = self.tier;
        let select = |measured: &[Watched]| {
            let bindings = processes.bindings();
            wanted(tier, is_suspicious, measured, bindings, scope)
        };
        match action {
            Some(Action::Attach) => {
                self.read_ns = now_ns;
                self.before = hooks.stats()?;
                // First: as soon as they are attached, they measure.
                let wanted = select(&self.measured);
                self.measure(hooks, processes, wanted, now_ns)?;
                if let Err(error) = hooks.attach() {
                    hooks.detach()?;
                    self.forget_measured();
                    let reason = format!("the kernel refused to attach them: {error}");
                    self.control.failed(now_ns, reason);
                }
            }
            Some(Action::Detach) => {
                hooks.detach()?;
                self.forget_measured();
            }
            None if hooks.is_attached() => {
                let wanted = select(&self.measured);
                self.measure(hooks, processes, wanted, now_ns)?;
            }
            None => {}
        }
        report.is_attached = hooks.is_attached();
        Ok(self.reported(report))
    }

    /// Measures exactly these processes.
    fn measure(
        &mut self,
        hooks: &mut Hooks,
        processes: &Processes,
        wanted: Vec<Watched>,
        now_ns: u64,
    ) -> anyhow::Result<()> {
        if wanted != self.measured {
            let left_out = hooks.measure(&wanted, now_ns)?;
            self.all_left_out += left_out.saturating_sub(self.left_out) as u64;
            self.left_out = left_out;
            self.owners = owners(processes, &wanted);
            self.measured = wanted;
        }
        Ok(())
    }

    fn forget_measured(&mut self) {
        self.measured.clear();
        self.left_out = 0;
    }

    fn empty_report(&self) -> HookReport {
        HookReport {
            budget: self.control.budget(),
            ..HookReport::default()
        }
    }

    /// Adds up what the hooks cost since the last call.
    fn account(&mut self, now: HookStats, now_ns: u64) {
        let mut cost_ns = 0;
        for hook in [HOOK_SWITCH, HOOK_WAKEUP] {
            let new_ns = cost_of(&self.before, &now, hook);
            self.cpu_ns[hook] += new_ns;
            cost_ns += new_ns;
        }
        let machine_ns = now_ns.saturating_sub(self.read_ns).max(1) * u64::from(self.cpus);
        self.share = cost_ns as f64 / machine_ns as f64;
        self.lost = [now.lost_threads, now.lost_waits, now.unmatched];
        self.before = now;
    }

    fn reported(&self, mut report: HookReport) -> HookReport {
        report.reason = self.control.reason().to_owned();
        if report.is_attached && report.interval_ns > 0 {
            report.share = self.share;
        }
        let switches_per_s = self.switches_per_s.unwrap_or(0.0);
        report.expected_share = TierControl::expected_share(switches_per_s, self.cpus);
        let names = ["sched_switch", "sched_wakeup"];
        report.hooks = [HOOK_SWITCH, HOOK_WAKEUP]
            .into_iter()
            .zip(names)
            .map(|(hook, name)| HookCost {
                name: name.to_owned(),
                runs: self.before.runs[hook],
                cpu_ns: self.cpu_ns[hook],
            })
            .collect();
        let [threads, waits, unmatched] = self.lost;
        let reasons = [
            ("too_many_processes", self.all_left_out),
            ("map_busy", threads),
            ("too_many_objects", waits),
            ("begin_not_seen", unmatched),
        ];
        report.lost = reasons
            .into_iter()
            .map(|(reason, count)| HookLoss {
                reason: reason.to_owned(),
                count,
            })
            .collect();
        report
    }

    fn count_switches(&mut self, now_ns: u64) {
        let stat = read_text("/proc/stat", MAX_STAT_BYTES);
        let Some(switches) = context_switches(&stat) else {
            return;
        };
        self.cpus = cpus(&stat);
        if let Some((then_ns, before)) = self.switches {
            let seconds = now_ns.saturating_sub(then_ns).max(1) as f64 / 1e9;
            self.switches_per_s = Some(switches.saturating_sub(before) as f64 / seconds);
        }
        self.switches = Some((now_ns, switches));
    }
}

/// The processes to measure: all, or in the tier `auto` those in scope. While no queue is suspicious, there is no scope, and the
/// hooks are kept for a while: so are the processes that they measure.
fn wanted(
    tier: Tier,
    is_suspicious: bool,
    measured: &[Watched],
    mut bindings: Vec<Watched>,
    scope: impl Fn(u32) -> bool,
) -> Vec<Watched> {
    let measured: BTreeSet<&Watched> = measured.iter().collect();
    bindings.retain(|process| {
        let is_kept = !is_suspicious && measured.contains(process);
        tier == Tier::Watch || is_kept || scope(process.tgid)
    });
    bindings
}

/// CPU time of a hook between two readings, ns: its runs at the mean time of those that were measured.
fn cost_of(before: &HookStats, now: &HookStats, hook: usize) -> u64 {
    let runs = now.runs[hook].saturating_sub(before.runs[hook]);
    let timed = now.timed_runs[hook].saturating_sub(before.timed_runs[hook]);
    let timed_ns = now.timed_ns[hook].saturating_sub(before.timed_ns[hook]);
    // Too few runs to have measured one: the mean of all.
    let mean_ns = timed_ns
        .checked_div(timed)
        .or_else(|| now.timed_ns[hook].checked_div(now.timed_runs[hook]));
    runs.saturating_mul(mean_ns.unwrap_or(0) + DISPATCH_NS)
}

/// The targets that these processes belong to.
fn owners(processes: &Processes, measured: &[Watched]) -> HashMap<u32, TargetId> {
    let targets = processes.targets().iter();
    let all: HashMap<u32, TargetId> = targets
        .flat_map(|target| target.tgids.iter().map(|tgid| (*tgid, target.id)))
        .collect();
    let owners = measured
        .iter()
        .filter_map(|process| Some((process.tgid, *all.get(&process.tgid)?)));
    owners.collect()
}

/// Context switches of the machine since its start.
fn context_switches(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("ctxt "))?;
    line.trim().parse().ok()
}

/// Online CPUs of the machine, whatever the agent may use of them.
fn cpus(stat: &str) -> u32 {
    let is_cpu = |line: &&str| {
        let number = line
            .strip_prefix("cpu")
            .and_then(|rest| rest.chars().next());
        number.is_some_and(|digit| digit.is_ascii_digit())
    };
    (stat.lines().filter(is_cpu).count() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_hook_is_its_runs_at_the_mean_time_of_the_measured_ones() {
        let mut now = HookStats::default();
        assert_eq!(cost_of(&now, &now, HOOK_SWITCH), 0);
        now.runs[HOOK_SWITCH] = 640;
        now.timed_runs[HOOK_SWITCH] = 10;
        now.timed_ns[HOOK_SWITCH] = 1_000;
        let cost_ns = cost_of(&HookStats::default(), &now, HOOK_SWITCH);
        assert_eq!(cost_ns, 640 * (100 + DISPATCH_NS));
        // None of three further runs was measured.
        let before = now;
        now.runs[HOOK_SWITCH] += 3;
        assert_eq!(cost_of(&before, &now, HOOK_SWITCH), 3 * (100 + DISPATCH_NS));
    }

    #[test]
    fn measured_processes_stay_measured_while_the_hooks_are_held() {
        let process = |tgid| Watched {
            tgid,
            pid: tgid,
            start_ns: 1,
        };
        let all = [1, 2, 3].map(process);
        let tgids = |tier, is_suspicious, measured: &[Watched], scope: &[u32]| {
            let is_in_scope = |tgid| scope.contains(&tgid);
            let wanted = wanted(tier, is_suspicious, measured, all.to_vec(), is_in_scope);
            let tgids: Vec<u32> = wanted.iter().map(|process| process.tgid).collect();
            tgids
        };
        assert_eq!(tgids(Tier::Watch, false, &[], &[]), [1, 2, 3]);
        assert_eq!(tgids(Tier::Auto, true, &[], &[2]), [2]);
        assert_eq!(tgids(Tier::Auto, false, &[process(2)], &[]), [2]);
        // Another service is affected now.
        assert_eq!(tgids(Tier::Auto, true, &[process(2)], &[3]), [3]);
        // Another process has this tgid now.
        let former = Watched {
            start_ns: 0,
            ..process(2)
        };
        assert!(tgids(Tier::Auto, false, &[former], &[]).is_empty());
    }

    #[test]
    fn context_switches_are_found_behind_the_cpus_and_interrupts() {
        let stat = "cpu  1 2\ncpu0 1 2\nintr 5 0 0\nctxt 8077\nbtime 1\n";
        assert_eq!(context_switches(stat), Some(8077));
        assert_eq!(context_switches("cpu 1\n"), None);
        assert_eq!(cpus(stat), 1);
        assert_eq!(cpus("cpu  3 2\ncpu0 1 1\ncpu3 2 1\nctxt 1\n"), 2);
    }
}
