//! Attributes the run-queue wait of a target to its own other threads, to other processes, to its CPU quota, or to the
//! hypervisor. The wait itself looks the same in all four cases.
//!
//! The kernel provides the time throttled by a quota and the machine's steal time. The rest of the wait is divided between
//! the target's own threads and foreign processes, in proportion to the CPU time that they used. Each share covers the
//! period between two scans of control groups, or of CPU users, and holds until the next scan.

use crate::hash::HashMap;
use std::collections::BTreeMap;

use super::{Reading, Targets, groups};
use crate::{
    sample::{Cgroup, CpuUser, HiddenFact, Machine, Sample, Stall, Target, TargetId},
    text::harmless,
};

/// Minimum wait within a period that is attributed, ns: the shares of a shorter one would be noise.
const MIN_WAIT_NS: u64 = 1_000_000;
/// Minimum share of foreign processes for the busiest of them to be named.
const MIN_NAMED_SHARE: f64 = 0.05;
/// Age from which shares are no longer reported, ns.
const STALE_NS: u64 = 10_000_000_000;
/// A control group is named instead of its busiest process if it used at least this many times as much CPU.
const MIN_GROUP_TO_PROCESS_RATIO: u64 = 2;

#[derive(Default)]
pub(super) struct Starvation {
    targets: BTreeMap<TargetId, Known>,
    cgroups: HashMap<String, Counters>,
    machine: Option<Machine>,
    system_ns: Option<u64>,
    cpu_users_ns: Option<u64>,
}

/// CPU time and run-queue wait of the threads of a target within a period, ns.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ThreadTime {
    pub(super) delay_ns: u64,
    pub(super) cpu_ns: u64,
}

/// Counters of one control group at the previous scan.
struct Counters {
    throttled_ns: Option<u64>,
    cpu_stall: Option<Stall>,
}

/// State kept per target.
#[derive(Default)]
struct Known {
    since_system: ThreadTime,
    since_cpu_users: ThreadTime,
    /// CPUs that its control group may use, infinite without a quota; `None` before the first scan of control groups, or if the
    /// quota is hidden.
    quota_cpus: Option<f64>,
    system: Option<(u64, System)>,
    others: Option<(u64, Others)>,
}

/// What control groups and the machine show.
#[derive(Clone, Copy, Default)]
struct System {
    /// Shares of the wait. `None` if the wait is too short, or the counters are missing.
    quota: Option<f64>,
    steal: Option<f64>,
    throttled_ns: Option<u64>,
    /// Share of time in which some task of the group stalled for a CPU (PSI).
    stall: Option<f64>,
}

/// What the CPU users show: the other processes of the machine.
#[derive(Default)]
struct Others {
    /// The target's share of the CPU time that it and foreign processes used. `None` if it did not wait.
    own: Option<f64>,
    busiest: Option<String>,
}

impl Starvation {
    /// Adds the wait and the CPU time of the target's threads since the previous sample.
    pub(super) fn grew(&mut self, target: TargetId, time: ThreadTime) {
        let known = self.targets.entry(target).or_default();
        known.since_system.add(time);
        known.since_cpu_users.add(time);
    }

    /// Reads control groups, machine and CPU users. Call it after [`Starvation::grew`].
    pub(super) fn read(&mut self, sample: &Sample, targets: &Targets) {
        self.targets.retain(|id, _| targets.get(*id).is_some());
        if sample.scans.system {
            self.read_system(sample, targets);
        }
        if sample.scans.cpu_users {
            self.read_cpu_users(sample, targets);
        }
    }

    fn read_system(&mut self, sample: &Sample, targets: &Targets) {
        let now_ns = sample.mono_ns;
        let elapsed_ns = self
            .system_ns
            .map(|before| now_ns.saturating_sub(before))
            .filter(|elapsed| *elapsed > 0);
        let steal = self
            .machine
            .zip(sample.machine)
            .and_then(|(before, now)| stolen(&before, &now));
        let machine_stall = stall_share(
            self.machine.and_then(|machine| machine.cpu_stall),
            sample.machine.and_then(|machine| machine.cpu_stall),
            elapsed_ns,
        );
        let groups = groups::by_path(sample);
        let hidden = groups::hiding(sample, HiddenFact::CpuQuota);
        for (id, known) in &mut self.targets {
            let Some(target) = targets.get(*id) else {
                continue;
            };
            let path = target.cgroup.as_ref();
            let now = path.and_then(|path| groups.get(path.as_str()).copied());
            let before = path.and_then(|path| self.cgroups.get(path));
            let quota = now.and_then(|group| group.quota_millicpus);
            let quota_cpus = quota.map(|millicpus| millicpus as f64 / 1000.0);
            let is_hidden = path.is_some_and(|path| hidden.contains(path.as_str()));
            known.quota_cpus = (!is_hidden).then_some(quota_cpus.unwrap_or(f64::INFINITY));
            let time = std::mem::take(&mut known.since_system);
            let Some(elapsed_ns) = elapsed_ns else {
                continue;
            };
            let throttled_ns = throttled(before, now).filter(|_| !is_hidden);
            let quota = throttled_ns.and_then(|ns| quota_share(ns, time, target.cpus, elapsed_ns));
            let system = System {
                quota,
                steal: steal.filter(|_| time.delay_ns >= MIN_WAIT_NS),
                throttled_ns,
                stall: stall_share(
                    before.and_then(|group| group.cpu_stall),
                    now.and_then(|group| group.cpu_stall),
                    Some(elapsed_ns),
                )
                .or(machine_stall),
            };
            known.system = Some((now_ns, system));
        }
        self.system_ns = Some(now_ns);
        self.machine = sample.machine;
        self.cgroups = sample
            .cgroups
            .iter()
            .map(|group| (group.path.clone(), Counters::of(group)))
            .collect();
    }

    fn read_cpu_users(&mut self, sample: &Sample, targets: &Targets) {
        let now_ns = sample.mono_ns;
        let elapsed_ns = self
            .cpu_users_ns
            .map(|before| now_ns.saturating_sub(before))
            .filter(|elapsed| *elapsed > 0);
        self.cpu_users_ns = Some(now_ns);
        for (id, known) in &mut self.targets {
            let time = std::mem::take(&mut known.since_cpu_users);
            let (Some(elapsed_ns), Some(target)) = (elapsed_ns, targets.get(*id)) else {
                continue;
            };
            let foreign: Vec<&CpuUser> = sample
                .cpu_users
                .iter()
                .filter(|cpu_user| targets.of(cpu_user.tgid) != Some(*id))
                .collect();
            let others: f64 = foreign.iter().map(|other| other.cpu_ns as f64).sum();
            let all = time.cpu_ns as f64 + others;
            let waits = time.delay_ns >= MIN_WAIT_NS && all > 0.0;
            known.others = Some((
                now_ns,
                Others {
                    own: waits.then(|| time.cpu_ns as f64 / all),
                    busiest: busiest(&foreign, target, elapsed_ns),
                },
            ));
        }
    }

    /// The number of CPUs that a target may use, of those that it is allowed on; `None` before its quota is known.
    pub(super) fn usable_cpus(&self, target: TargetId, allowed: u32) -> Option<f64> {
        let quota_cpus = self.targets.get(&target)?.quota_cpus?;
        Some(quota_cpus.min(f64::from(allowed)))
    }

    /// Adds the shares to the reading of the target's run queue.
    pub(super) fn report(&self, target: TargetId, now_ns: u64, reading: &mut Reading) {
        let Some(known) = self.targets.get(&target) else {
            return;
        };
        let fresh = |ns: &u64| now_ns.saturating_sub(*ns) < STALE_NS;
        let system = known.system.as_ref().filter(|(ns, _)| fresh(ns));
        let system = system.map(|(_, system)| *system).unwrap_or_default();
        let others = known.others.as_ref().filter(|(ns, _)| fresh(ns));
        let quota = system.quota.unwrap_or(0.0);
        let steal = system.steal.map(|steal| steal * (1.0 - quota));
        let rest = (1.0 - quota - steal.unwrap_or(0.0)).max(0.0);
        let own = others.and_then(|(_, others)| others.own);
        let foreign = own.map(|own| rest * (1.0 - own));
        let measures = [
            ("own_share", own.map(|own| rest * own)),
            ("foreign_share", foreign),
            ("quota_share", system.quota),
            ("steal_share", steal),
            ("throttled_ns", system.throttled_ns.map(|ns| ns as f64)),
            (
                "quota_cpus",
                known.quota_cpus.filter(|cpus| cpus.is_finite()),
            ),
            ("cpu_stall_share", system.stall),
        ];
        for (key, value) in measures {
            reading.extra.extend(value.map(|value| (key, value)));
        }
        if foreign.is_some_and(|share| share >= MIN_NAMED_SHARE) {
            reading.worst = others.and_then(|(_, others)| others.busiest.clone());
        }
    }
}

impl ThreadTime {
    fn add(&mut self, more: Self) {
        self.delay_ns = self.delay_ns.saturating_add(more.delay_ns);
        self.cpu_ns = self.cpu_ns.saturating_add(more.cpu_ns);
    }
}

impl Counters {
    fn of(group: &Cgroup) -> Self {
        Self {
            throttled_ns: group.throttled_ns,
            cpu_stall: group.cpu_stall,
        }
    }
}

/// Time that the group was throttled since the previous scan, summed over its CPUs, ns; 0 without a quota.
fn throttled(before: Option<&Counters>, now: Option<&Cgroup>) -> Option<u64> {
    let now = now?;
    if now.quota_millicpus.is_none() {
        return Some(0);
    }
    Some(now.throttled_ns?.saturating_sub(before?.throttled_ns?))
}

/// Share of the wait caused by the quota. While a CPU's queue is throttled, all threads on it wait: the kernel counts
/// throttled time once per CPU, and wait once per thread.
fn quota_share(throttled_ns: u64, time: ThreadTime, cpus: u32, elapsed_ns: u64) -> Option<f64> {
    if time.delay_ns < MIN_WAIT_NS {
        return None;
    }
    let wanted = (time.delay_ns as f64 + time.cpu_ns as f64) / elapsed_ns as f64;
    let threads_per_cpu = (wanted / f64::from(cpus.max(1))).max(1.0);
    Some((throttled_ns as f64 * threads_per_cpu / time.delay_ns as f64).min(1.0))
}

/// Steal time as a share of the machine's busy and stolen CPU time.
fn stolen(before: &Machine, now: &Machine) -> Option<f64> {
    let steal = now.steal_ns.saturating_sub(before.steal_ns) as f64;
    let busy = now.busy_ns.saturating_sub(before.busy_ns) as f64;
    (steal + busy > 0.0).then(|| steal / (steal + busy))
}

/// Share of time in which some task stalled (PSI "some").
pub(super) fn stall_share(
    before: Option<Stall>,
    now: Option<Stall>,
    elapsed_ns: Option<u64>,
) -> Option<f64> {
    let stalled_ns = now?.some_ns.saturating_sub(before?.some_ns);
    let elapsed_ns = elapsed_ns.filter(|elapsed| *elapsed > 0)?;
    Some((stalled_ns as f64 / elapsed_ns as f64).min(1.0))
}

/// The foreign process that used the most CPU, or a control group if that used much more.
fn busiest(foreign: &[&CpuUser], target: &Target, elapsed_ns: u64) -> Option<String> {
    let most = foreign
        .iter()
        .filter(|cpu_user| cpu_user.cpu_ns > 0)
        .max_by_key(|cpu_user| (cpu_user.cpu_ns, cpu_user.tgid))?;
    let mut groups: BTreeMap<&str, u64> = BTreeMap::new();
    for cpu_user in foreign {
        if let Some(path) = cpu_user.cgroup.as_deref()
            && path != "/"
            && target.cgroup.as_deref() != Some(path)
        {
            let sum = groups.entry(path).or_default();
            *sum = sum.saturating_add(cpu_user.cpu_ns);
        }
    }
    let group = groups
        .into_iter()
        .max_by_key(|(_, cpu_ns)| *cpu_ns)
        .filter(|(_, cpu_ns)| *cpu_ns >= most.cpu_ns.saturating_mul(MIN_GROUP_TO_PROCESS_RATIO));
    let cpus = |cpu_ns: u64| cpu_ns as f64 / elapsed_ns as f64;
    Some(match group {
        Some((path, cpu_ns)) => format!(
            "control group {} used {:.2} CPUs",
            harmless(path),
            cpus(cpu_ns)
        ),
        // A process that has ended has no name.
        None if most.name.is_empty() => {
            format!("process {} used {:.2} CPUs", most.tgid, cpus(most.cpu_ns))
        }
        None => format!(
            "{} ({}) used {:.2} CPUs",
            harmless(&most.name),
            most.tgid,
            cpus(most.cpu_ns)
        ),
    })
}

#[cfg(test)]
mod tests;
