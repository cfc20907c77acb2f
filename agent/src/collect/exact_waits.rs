//! Attaches and detaches the hooks of the watch tier, and reads what they have measured.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tailback_ebpf::{
    ANY_OBJECT, HOOK_SWITCH, HOOK_WAKEUP, HookStats, NOT_IN_CALL, WAIT_BLOCKED_IO, WAIT_PREEMPTED,
    WAIT_WOKEN, WorstWait as WorstRecord, bucket_middle_ns, bucket_of,
};

use super::{
    MS,
    paths::{self, read_text},
    processes::Processes,
    tier::{Action, Situation, Tier, TierControl},
};
use crate::{
    kernel::{
        hooks::{Hooks, NewWaits},
        scanner::Watched,
    },
    sample::{
        Distribution, ExactWait, ExactWaitKind, HookCost, HookLoss, HookReport, TargetId,
        WaitParty, WorstWait,
    },
    text::harmless,
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
/// Descriptors whose file is looked up per interval: those with the longest waits.
const MAX_LOOKUPS: usize = 32;

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
            report.waits = waits(hooks.read()?, processes, &self.owners);
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

/// The waits that were measured, with what their descriptors refer to.
fn waits(
    new: Vec<NewWaits>,
    processes: &Processes,
    owners: &HashMap<u32, TargetId>,
) -> Vec<ExactWait> {
    let mut waits: Vec<ExactWait> = new
        .into_iter()
        .filter_map(|new| {
            let target = *owners.get(&new.key.tgid)?;
            Some(exact_wait(target, &new))
        })
        .collect();
    waits.sort_by_key(|wait| std::cmp::Reverse(wait.distribution.total_ns));
    let mut known: BTreeMap<(u32, u64), Option<String>> = BTreeMap::new();
    let files = waits.iter_mut().filter(|wait| is_of_file(wait));
    for wait in files.take(MAX_LOOKUPS) {
        let (tgid, fd) = (wait.tgid, wait.object.unwrap_or(0));
        let path = known.entry((tgid, fd)).or_insert_with(|| {
            let pid = processes.watched_pid(tgid)?;
            paths::link(pid, fd as u32)
        });
        wait.path.clone_from(path);
    }
    waits
}

fn is_of_file(wait: &ExactWait) -> bool {
    let is_futex = wait.call.map(libc::c_long::from) == Some(libc::SYS_futex);
    wait.object.is_some() && !is_futex
}

fn exact_wait(target: TargetId, new: &NewWaits) -> ExactWait {
    let key = new.key;
    let worst_ns = new.worst.map_or(0, |worst| worst.wait_ns);
    // A wait that ended just as the interval did has no exemplar.
    let longer = new.buckets.last().map(|(bucket, _)| *bucket);
    let longer = longer.filter(|bucket| *bucket > bucket_of(worst_ns));
    let max_ns = longer.map_or(worst_ns, bucket_middle_ns);
    let wait = |(bucket, count): &(u32, u32)| (bucket_middle_ns(*bucket), u64::from(*count));
    let is_futex = libc::c_long::from(key.call) == libc::SYS_futex;
    ExactWait {
        target,
        tgid: key.tgid,
        kind: match key.kind {
            WAIT_WOKEN => ExactWaitKind::Woken,
            WAIT_PREEMPTED => ExactWaitKind::Preempted,
            WAIT_BLOCKED_IO => ExactWaitKind::BlockedIo,
            _ => ExactWaitKind::Blocked,
        },
        call: (key.call != NOT_IN_CALL).then_some(key.call),
        object: (has_object(key.call) && key.object != ANY_OBJECT).then_some(if is_futex {
            key.object
        } else {
            // The kernel takes an int and ignores the upper half.
            key.object & u64::from(u32::MAX)
        }),
        path: None,
        distribution: Distribution {
            count: new.count,
            total_ns: new.total_ns,
            max_ns,
            waits: new.buckets.iter().map(wait).collect(),
        },
        worst: new.worst.as_ref().map(worst_wait),
    }
}

/// Whether the hooks keep the first argument of a call.
fn has_object(call: u16) -> bool {
    call != NOT_IN_CALL && Hooks::keeps_object(call)
}

fn worst_wait(worst: &WorstRecord) -> WorstWait {
    let party = |tgid: u32, tid: u32, comm: &[u8; 16]| {
        // The idle task has no process.
        (tid != 0).then(|| WaitParty {
            tgid,
            tid,
            comm: name_of(comm),
        })
    };
    WorstWait {
        wait_ns: worst.wait_ns,
        mono_ns: worst.at_ns,
        tid: worst.tid,
        cpu: worst.cpu,
        culprit: party(worst.culprit_tgid, worst.culprit_tid, &worst.culprit_comm),
        culprit_ns: worst.culprit_ns,
        waker: party(worst.waker_tgid, worst.waker_tid, &worst.waker_comm),
    }
}

fn name_of(comm: &[u8; 16]) -> String {
    let end = comm.iter().position(|byte| *byte == 0);
    harmless(&String::from_utf8_lossy(&comm[..end.unwrap_or(comm.len())]))
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
    use tailback_ebpf::WaitKey;

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

    #[test]
    fn a_record_becomes_a_wait_with_its_file_and_the_thread_that_ended_it() {
        let worst = WorstRecord {
            wait_ns: 5_000_000,
            tid: 12,
            waker_tgid: 20,
            waker_tid: 21,
            waker_comm: *b"back\x1b[up\0\0\0\0\0\0\0\0",
            ..bytemuck::Zeroable::zeroed()
        };
        let new = NewWaits {
            key: WaitKey {
                object: 0xffff_0000_0000_0007,
                tgid: 10,
                kind: WAIT_BLOCKED_IO,
                call: libc::SYS_read as u16,
            },
            count: 2,
            total_ns: 6_000_000,
            buckets: vec![(bucket_of(1_000_000), 1), (bucket_of(5_000_000), 1)],
            worst: Some(worst),
        };
        let wait = exact_wait(3, &new);
        assert_eq!((wait.target, wait.tgid, wait.object), (3, 10, Some(7)));
        assert_eq!(wait.kind, ExactWaitKind::BlockedIo);
        assert_eq!(wait.distribution.max_ns, 5_000_000);
        assert_eq!(wait.distribution.mean_ns(), Some(3_000_000));
        assert!(is_of_file(&wait));
        let worst = wait.worst.unwrap();
        assert_eq!(worst.culprit, None);
        let waker = worst.waker.unwrap();
        assert_eq!((waker.tgid, waker.tid), (20, 21));
        assert!(!waker.comm.contains('\x1b'), "{}", waker.comm);
        // Without an exemplar, the longest wait is that of the last bucket.
        let wait = exact_wait(3, &NewWaits { worst: None, ..new });
        let off_ns = wait.distribution.max_ns.abs_diff(5_000_000);
        assert!(off_ns < 5_000_000 / 50, "{wait:?}");
    }
}
