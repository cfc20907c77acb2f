//! Who had the CPU while threads of a target waited for it: its own other threads, other processes, its quota, or the
//! hypervisor. The wait alone looks the same in all four cases.
//!
//! The time throttled by a quota is known, and so is the machine's share of stolen time; what is left of the wait is
//! divided between the target's own threads and foreign processes in proportion to the CPU time that they used. All of
//! it is over the time between two looks at control groups or at neighbours, and holds until the next.

use std::collections::{BTreeMap, HashMap};

use super::{Reading, Targets};
use crate::{
    sample::{Cgroup, Machine, Neighbour, Sample, Stall, Target, TargetId},
    text::harmless,
};

/// A wait below that, in the time between two looks, is not worth dividing.
const STANDING_DELAY_NS: u64 = 1_000_000;
/// A share below that names nobody.
const NOTABLE: f64 = 0.05;
/// Facts older than that are not told any more.
const STALE_NS: u64 = 10_000_000_000;
/// A control group is named in place of its busiest process when it used so many times as much.
const GROUP_FACTOR: u64 = 2;

#[derive(Default)]
pub(super) struct Starvation {
    targets: BTreeMap<TargetId, Known>,
    cgroups: HashMap<String, Counters>,
    machine: Option<Machine>,
    system_ns: Option<u64>,
    neighbours_ns: Option<u64>,
}

/// What the threads of a target used and waited, ns.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Grown {
    pub(super) delay_ns: u64,
    pub(super) cpu_ns: u64,
}

/// What is remembered of one control group.
struct Counters {
    throttled_ns: Option<u64>,
    cpu_stall: Option<Stall>,
}

/// What is known of one target.
#[derive(Default)]
struct Known {
    since_system: Grown,
    since_neighbours: Grown,
    system: Option<(u64, System)>,
    others: Option<(u64, Others)>,
}

/// From control groups and the machine.
#[derive(Clone, Copy, Default)]
struct System {
    /// Shares of the wait; `None` where the wait is too short, or the facts are missing.
    quota: Option<f64>,
    steal: Option<f64>,
    throttled_ns: Option<u64>,
    quota_cpus: Option<f64>,
    /// Share of the time in which some task of the group stalled for a CPU.
    stall: Option<f64>,
}

/// From the neighbours.
#[derive(Default)]
struct Others {
    /// Of what the target and foreign processes used together, the target's; `None` where it did not wait.
    own: Option<f64>,
    busiest: Option<String>,
}

impl Starvation {
    /// The target's threads have waited and used so much more.
    pub(super) fn grew(&mut self, target: TargetId, grown: Grown) {
        let known = self.targets.entry(target).or_default();
        known.since_system.add(grown);
        known.since_neighbours.add(grown);
    }

    /// Takes in what the sample says of control groups, machine and neighbours; after [`Starvation::grew`].
    pub(super) fn read(&mut self, sample: &Sample, targets: &Targets) {
        self.targets.retain(|id, _| targets.get(*id).is_some());
        if sample.walks.system {
            self.read_system(sample, targets);
        }
        if sample.walks.neighbours {
            self.read_neighbours(sample, targets);
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
        for (id, known) in &mut self.targets {
            let Some(target) = targets.get(*id) else {
                continue;
            };
            let path = target.cgroup.as_ref();
            let now = path.and_then(|path| sample.cgroups.iter().find(|group| group.path == *path));
            let before = path.and_then(|path| self.cgroups.get(path));
            let grown = std::mem::take(&mut known.since_system);
            let Some(elapsed_ns) = elapsed_ns else {
                continue;
            };
            let throttled_ns = throttled(before, now);
            let quota = throttled_ns.and_then(|ns| quota_share(ns, grown, target.cpus, elapsed_ns));
            let system = System {
                quota,
                steal: steal.filter(|_| grown.delay_ns >= STANDING_DELAY_NS),
                throttled_ns,
                quota_cpus: now
                    .and_then(|group| group.quota_millicpus)
                    .map(|millicpus| millicpus as f64 / 1000.0),
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

    fn read_neighbours(&mut self, sample: &Sample, targets: &Targets) {
        let now_ns = sample.mono_ns;
        let elapsed_ns = self
            .neighbours_ns
            .map(|before| now_ns.saturating_sub(before))
            .filter(|elapsed| *elapsed > 0);
        self.neighbours_ns = Some(now_ns);
        for (id, known) in &mut self.targets {
            let grown = std::mem::take(&mut known.since_neighbours);
            let (Some(elapsed_ns), Some(target)) = (elapsed_ns, targets.get(*id)) else {
                continue;
            };
            let foreign: Vec<&Neighbour> = sample
                .neighbours
                .iter()
                .filter(|neighbour| targets.of(neighbour.tgid) != Some(*id))
                .collect();
            let others: f64 = foreign.iter().map(|other| other.cpu_ns as f64).sum();
            let all = grown.cpu_ns as f64 + others;
            let waits = grown.delay_ns >= STANDING_DELAY_NS && all > 0.0;
            known.others = Some((
                now_ns,
                Others {
                    own: waits.then(|| grown.cpu_ns as f64 / all),
                    busiest: busiest(&foreign, target, elapsed_ns),
                },
            ));
        }
    }

    /// Adds what is known to the reading of the target's run queue.
    pub(super) fn tell(&self, target: TargetId, now_ns: u64, reading: &mut Reading) {
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
        let told = [
            ("own_share", own.map(|own| rest * own)),
            ("foreign_share", foreign),
            ("quota_share", system.quota),
            ("steal_share", steal),
            ("throttled_ns", system.throttled_ns.map(|ns| ns as f64)),
            ("quota_cpus", system.quota_cpus),
            ("cpu_stall_share", system.stall),
        ];
        for (key, value) in told {
            reading.extra.extend(value.map(|value| (key, value)));
        }
        if foreign.is_some_and(|share| share >= NOTABLE) {
            reading.worst = others.and_then(|(_, others)| others.busiest.clone());
        }
    }
}

impl Grown {
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

/// Time that the group was throttled since the last look, all its CPUs together; none without a quota.
fn throttled(before: Option<&Counters>, now: Option<&Cgroup>) -> Option<u64> {
    let now = now?;
    if now.quota_millicpus.is_none() {
        return Some(0);
    }
    Some(now.throttled_ns?.saturating_sub(before?.throttled_ns?))
}

/// Share of the wait that the quota made. While a CPU's queue is throttled all threads on it wait: the kernel counts the
/// time once per CPU, the wait once per thread.
fn quota_share(throttled_ns: u64, grown: Grown, cpus: u32, elapsed_ns: u64) -> Option<f64> {
    if grown.delay_ns < STANDING_DELAY_NS {
        return None;
    }
    let wanted = (grown.delay_ns as f64 + grown.cpu_ns as f64) / elapsed_ns as f64;
    let threads_per_cpu = (wanted / f64::from(cpus.max(1))).max(1.0);
    Some((throttled_ns as f64 * threads_per_cpu / grown.delay_ns as f64).min(1.0))
}

/// Share of the machine's CPU time that the hypervisor took.
fn stolen(before: &Machine, now: &Machine) -> Option<f64> {
    let steal = now.steal_ns.saturating_sub(before.steal_ns) as f64;
    let busy = now.busy_ns.saturating_sub(before.busy_ns) as f64;
    (steal + busy > 0.0).then(|| steal / (steal + busy))
}

/// Share of the time in which some tasks stalled.
pub(super) fn stall_share(
    before: Option<Stall>,
    now: Option<Stall>,
    elapsed_ns: Option<u64>,
) -> Option<f64> {
    let stalled_ns = now?.some_ns.saturating_sub(before?.some_ns);
    let elapsed_ns = elapsed_ns.filter(|elapsed| *elapsed > 0)?;
    Some((stalled_ns as f64 / elapsed_ns as f64).min(1.0))
}

/// The process that used most, or its control group where that used much more.
fn busiest(foreign: &[&Neighbour], target: &Target, elapsed_ns: u64) -> Option<String> {
    let most = foreign
        .iter()
        .filter(|neighbour| neighbour.cpu_ns > 0)
        .max_by_key(|neighbour| (neighbour.cpu_ns, neighbour.tgid))?;
    let mut groups: BTreeMap<&str, u64> = BTreeMap::new();
    for neighbour in foreign {
        if let Some(path) = neighbour.cgroup.as_deref()
            && path != "/"
            && target.cgroup.as_deref() != Some(path)
        {
            let sum = groups.entry(path).or_default();
            *sum = sum.saturating_add(neighbour.cpu_ns);
        }
    }
    let group = groups
        .into_iter()
        .max_by_key(|(_, cpu_ns)| *cpu_ns)
        .filter(|(_, cpu_ns)| *cpu_ns >= most.cpu_ns.saturating_mul(GROUP_FACTOR));
    let cpus = |cpu_ns: u64| cpu_ns as f64 / elapsed_ns as f64;
    Some(match group {
        Some((path, cpu_ns)) => format!(
            "control group {} used {:.2} CPUs",
            harmless(path),
            cpus(cpu_ns)
        ),
        // One that has ended has no name any more.
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
