//! What the kernel's own structures say of a process's control groups. Pure.
//!
//! They are the same wherever the agent runs, while files may be out of its reach.

use tailback_ebpf::{
    CONTROLLER_CPU, CONTROLLER_IO, CONTROLLER_MEMORY, CONTROLLER_NONE, CgroupRecord,
    MAX_CGROUP_LEVELS,
};

use super::{Quota, UNLIMITED, sum};
use crate::sample::{Cgroup, Stall};

/// Value of a quota that means "no quota": `RUNTIME_INF`, kernel/sched/sched.h.
const NO_QUOTA: u64 = u64::MAX;

/// A controller, or the unified hierarchy itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Controller {
    Cpu,
    Memory,
    Io,
    /// The unified hierarchy, which has the pressure files.
    Unified,
}

impl Controller {
    fn of(number: u32) -> Option<Self> {
        match number {
            CONTROLLER_CPU => Some(Self::Cpu),
            CONTROLLER_MEMORY => Some(Self::Memory),
            CONTROLLER_IO => Some(Self::Io),
            CONTROLLER_NONE => Some(Self::Unified),
            _ => None,
        }
    }

    /// Its name among the mount options of cgroup v1, and in /proc/PID/cgroup.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "blkio",
            Self::Unified => "",
        }
    }
}

/// A group of a process, or a parent of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Level {
    /// Inode number of its directory.
    pub(super) id: u64,
    /// The hierarchy; 0 is the unified one.
    pub(super) hierarchy: u32,
    /// Name of its directory. `None`: too long, or not UTF-8.
    pub(super) name: Option<String>,
    values: Option<[u64; 7]>,
}

/// The groups of one process in all hierarchies, its own first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KernelGroups {
    cpu: Vec<Level>,
    memory: Vec<Level>,
    io: Vec<Level>,
    unified: Vec<Level>,
}

impl KernelGroups {
    /// Adds the next level of one of the chains.
    pub(super) fn add(&mut self, record: &CgroupRecord) {
        let Some(controller) = Controller::of(record.controller) else {
            return;
        };
        let chain = self.chain_mut(controller);
        // Levels arrive in order; an id of 0 means that the group went away meanwhile.
        if record.level as usize != chain.len() || record.id == 0 {
            return;
        }
        let len = record.name.iter().position(|byte| *byte == 0);
        let name = len.filter(|len| len + 1 < record.name.len());
        let name = name.and_then(|len| str::from_utf8(record.name.get(..len)?).ok());
        chain.push(Level {
            id: record.id,
            hierarchy: record.hierarchy,
            name: name.map(str::to_owned),
            values: (record.has_values == 1).then_some(record.values),
        });
    }

    fn chain_mut(&mut self, controller: Controller) -> &mut Vec<Level> {
        match controller {
            Controller::Cpu => &mut self.cpu,
            Controller::Memory => &mut self.memory,
            Controller::Io => &mut self.io,
            Controller::Unified => &mut self.unified,
        }
    }

    pub(super) fn chain(&self, controller: Controller) -> &[Level] {
        match controller {
            Controller::Cpu => &self.cpu,
            Controller::Memory => &self.memory,
            Controller::Io => &self.io,
            Controller::Unified => &self.unified,
        }
    }

    /// Whether the process was seen at all: every process has a group in the unified hierarchy.
    pub(super) fn is_known(&self) -> bool {
        !self.unified.is_empty()
    }

    /// Whether the process can have limits of this controller. The kernel may be built without it, and the root of the unified
    /// hierarchy has none.
    pub(super) fn may_limit(&self, controller: Controller) -> bool {
        match self.chain(controller) {
            [] => false,
            [only] => only.hierarchy != 0,
            _ => true,
        }
    }

    /// Whether the memory controller counts for the process's own group, and not for a parent or the root of the unified
    /// hierarchy, where it counts other services as well.
    fn counts_own_memory(&self) -> bool {
        match (self.memory.as_slice(), self.unified.first()) {
            ([first, _, ..], Some(own)) if first.hierarchy == 0 => first.id == own.id,
            ([first, ..], _) => first.hierarchy != 0,
            ([], _) => false,
        }
    }

    /// Adds the lowest quota, and the throttled periods and time summed over all quotas.
    /// `false`: the kernel's structures do not have it.
    pub(super) fn read_cpu(&self, group: &mut Cgroup) -> bool {
        let Some(levels) = values(&self.cpu) else {
            return false;
        };
        let mut tightest: Option<Quota> = None;
        let (mut periods, mut throttled) = (None, None);
        for [quota_ns, period_ns, nr_throttled, throttled_ns, ..] in levels {
            if quota_ns == NO_QUOTA {
                continue;
            }
            // Nanoseconds: only the ratio matters.
            let quota = Quota {
                quota_us: quota_ns,
                period_us: period_ns,
            };
            if tightest.is_none_or(|before| quota.millicpus() < before.millicpus()) {
                tightest = Some(quota);
            }
            periods = sum(periods, Some(nr_throttled));
            throttled = sum(throttled, Some(throttled_ns));
        }
        group.quota_millicpus = tightest.map(Quota::millicpus);
        group.throttled_periods = periods;
        group.throttled_ns = throttled;
        true
    }

    /// Adds the lowest memory limit, the use at its level, how often it was hit, and the OOM kills of the process's own group.
    /// `false`: the kernel's structures do not have it. `page`: bytes.
    pub(super) fn read_memory(&self, group: &mut Cgroup, page: u64) -> bool {
        let Some(levels) = values(&self.memory) else {
            return false;
        };
        let is_unified = self.memory.first().is_some_and(|own| own.hierarchy == 0);
        let mut tightest: Option<(u64, u64, u64)> = None;
        let mut own = None;
        for [pages, max, high, failures, high_events, max_events, kills] in levels {
            let usage = pages.saturating_mul(page);
            let max_hits = if is_unified { max_events } else { failures };
            own = own.or(Some((usage, max_hits, kills)));
            for (limit, hits) in [(max, max_hits), (high, high_events)] {
                let limit = limit.saturating_mul(page);
                if limit < UNLIMITED && tightest.is_none_or(|(before, ..)| limit < before) {
                    tightest = Some((limit, usage, hits));
                }
            }
        }
        let own = own.filter(|_| self.counts_own_memory());
        group.memory_limit = tightest.map(|(limit, ..)| limit);
        group.memory = tightest.map(|(_, usage, _)| usage);
        group.memory = group.memory.or(own.map(|(usage, ..)| usage));
        group.limit_hits = tightest.map(|(.., hits)| hits);
        group.limit_hits = group.limit_hits.or(own.map(|(_, hits, _)| hits));
        group.oom_kills = own.map(|(.., kills)| kills);
        true
    }

    /// The level with the lowest memory limit, counted from the process's own.
    pub(super) fn memory_level(&self, page: u64) -> Option<usize> {
        let levels = values(&self.memory)?;
        let limits = levels.map(|[_, max, high, ..]| max.min(high).saturating_mul(page));
        let limits = limits.enumerate().filter(|(_, limit)| *limit < UNLIMITED);
        limits
            .min_by_key(|(_, limit)| *limit)
            .map(|(level, _)| level)
    }

    /// Time that tasks of the process's own group stalled: for a CPU, for memory, for I/O. `None`: the kernel does not count
    /// it. Before 6.1 the counters are there even then, and 0 in every group.
    pub(super) fn stalls(&self) -> Option<[Stall; 3]> {
        let mut all = self.unified.iter().filter_map(|level| level.values);
        if all.all(|values| values == [0; 7]) {
            return None;
        }
        let [io, io_full, memory, memory_full, cpu, cpu_full, _] = self.unified.first()?.values?;
        let stall = |some_ns, full_ns| Stall { some_ns, full_ns };
        Some([
            stall(cpu, cpu_full),
            stall(memory, memory_full),
            stall(io, io_full),
        ])
    }
}

/// Whether these are all levels of a chain: of a longer one, the outer levels are missing.
pub(super) fn is_whole(levels: &[Level]) -> bool {
    !levels.is_empty() && levels.len() < MAX_CGROUP_LEVELS as usize
}

/// The values of each level; `None` unless all levels are there and have them.
fn values(levels: &[Level]) -> Option<impl Iterator<Item = [u64; 7]>> {
    let complete = is_whole(levels) && levels.iter().all(|level| level.values.is_some());
    complete.then(|| levels.iter().filter_map(|level| level.values))
}

#[cfg(test)]
pub(super) mod tests {
    use tailback_ebpf::{CGROUP_NAME, Header, KIND_CGROUP};

    use super::*;

    const PAGE: u64 = 4096;
    /// `PAGE_COUNTER_MAX`, include/linux/page_counter.h.
    const NO_LIMIT: u64 = i64::MAX as u64 / PAGE;

    pub(in crate::collect::system) fn record(
        controller: u32,
        (level, id, name): (u32, u64, &str),
        values: Option<[u64; 7]>,
    ) -> CgroupRecord {
        let mut record = CgroupRecord {
            header: Header {
                kind: KIND_CGROUP,
                len: size_of::<CgroupRecord>() as u16,
                tgid: 7,
            },
            id,
            controller,
            level,
            hierarchy: 0,
            has_values: u32::from(values.is_some()),
            values: values.unwrap_or_default(),
            name: [0; CGROUP_NAME],
        };
        record.name[..name.len()].copy_from_slice(name.as_bytes());
        record
    }

    pub(in crate::collect::system) fn groups(records: &[CgroupRecord]) -> KernelGroups {
        let mut groups = KernelGroups::default();
        for record in records {
            groups.add(record);
        }
        groups
    }

    #[test]
    fn the_lowest_quota_of_a_group_and_its_parents_applies() {
        let cpu = |level, values| record(CONTROLLER_CPU, (level, 9, "a"), Some(values));
        let found = groups(&[
            cpu(0, [NO_QUOTA, 100_000_000, 0, 0, 0, 0, 0]),
            cpu(1, [50_000_000, 100_000_000, 3, 700, 0, 0, 0]),
            cpu(2, [300_000_000, 100_000_000, 1, 10, 0, 0, 0]),
        ]);
        let mut group = Cgroup::default();
        assert!(found.read_cpu(&mut group));
        assert_eq!(group.quota_millicpus, Some(500));
        assert_eq!(
            (group.throttled_periods, group.throttled_ns),
            (Some(4), Some(710))
        );
        let mut free = Cgroup::default();
        assert!(groups(&[cpu(0, [NO_QUOTA, 1, 0, 0, 0, 0, 0])]).read_cpu(&mut free));
        assert_eq!((free.quota_millicpus, free.throttled_ns), (None, None));
    }

    #[test]
    fn memory_is_that_of_the_level_with_the_lowest_limit() {
        let memory = |level, values| record(CONTROLLER_MEMORY, (level, 9, "a"), Some(values));
        let mut records = [
            record(CONTROLLER_NONE, (0, 9, "a"), None),
            memory(0, [10, NO_LIMIT, NO_LIMIT, 1, 2, 3, 4]),
            memory(1, [90, 100, NO_LIMIT, 5, 6, 7, 8]),
            memory(2, [95, 200, 150, 0, 0, 0, 0]),
        ];
        let found = groups(&records);
        let mut group = Cgroup::default();
        assert!(found.read_memory(&mut group, PAGE));
        assert_eq!(group.memory_limit, Some(100 * PAGE));
        assert_eq!(group.memory, Some(90 * PAGE));
        // Kills are those of the process's own group.
        assert_eq!((group.limit_hits, group.oom_kills), (Some(7), Some(4)));
        assert_eq!(found.memory_level(PAGE), Some(1));
        // cgroup v1 has a counter of its own for the hits (`failcnt`).
        for record in &mut records {
            record.hierarchy = 4;
        }
        assert!(groups(&records).read_memory(&mut group, PAGE));
        assert_eq!(group.limit_hits, Some(5));
        let free = groups(&[memory(0, [10, NO_LIMIT, NO_LIMIT, 0, 0, 0, 0])]);
        let mut group = Cgroup::default();
        assert!(free.read_memory(&mut group, PAGE));
        assert_eq!((group.memory_limit, free.memory_level(PAGE)), (None, None));
    }

    #[test]
    fn what_a_parent_counts_is_not_what_happens_to_the_service() {
        let memory = |level, id| {
            record(
                CONTROLLER_MEMORY,
                (level, id, "a"),
                Some([10, NO_LIMIT, NO_LIMIT, 0, 0, 3, 4]),
            )
        };
        let own = record(CONTROLLER_NONE, (0, 9, "a"), None);
        let kills = |records: &[CgroupRecord]| {
            let mut group = Cgroup::default();
            assert!(groups(records).read_memory(&mut group, PAGE));
            (group.oom_kills, group.memory)
        };
        let counted = (Some(4), Some(10 * PAGE));
        assert_eq!(kills(&[own, memory(0, 9), memory(1, 1)]), counted);
        // The nearest parent with the controller, and the root.
        assert_eq!(kills(&[own, memory(0, 5), memory(1, 1)]), (None, None));
        assert_eq!(kills(&[own, memory(0, 1)]), (None, None));
    }

    #[test]
    fn only_the_root_of_the_unified_hierarchy_has_no_limits() {
        let mut root = record(CONTROLLER_IO, (0, 1, ""), None);
        assert!(!groups(&[root]).may_limit(Controller::Io));
        root.hierarchy = 3;
        assert!(groups(&[root]).may_limit(Controller::Io));
        assert!(!groups(&[root]).may_limit(Controller::Memory));
    }

    #[test]
    fn counters_that_are_0_in_every_group_are_not_counted_at_all() {
        let none = |level, values| record(CONTROLLER_NONE, (level, 9, "a"), values);
        let zero = Some([0; 7]);
        assert_eq!(groups(&[none(0, zero), none(1, zero)]).stalls(), None);
        let busy = Some([1, 2, 3, 4, 5, 6, 0]);
        let stalls = groups(&[none(0, zero), none(1, busy)]).stalls();
        assert_eq!(stalls, Some([Stall::default(); 3]));
        let stall = |some_ns, full_ns| Stall { some_ns, full_ns };
        let stalls = groups(&[none(0, busy), none(1, zero)]).stalls();
        assert_eq!(stalls, Some([stall(5, 6), stall(3, 4), stall(1, 2)]));
    }

    #[test]
    fn what_the_kernel_does_not_have_is_not_read_as_no_limit() {
        let mut group = Cgroup::default();
        let found = groups(&[record(CONTROLLER_CPU, (0, 9, "a"), None)]);
        assert!(!found.read_cpu(&mut group) && !found.read_memory(&mut group, PAGE));
        assert!(found.stalls().is_none() && !found.is_known());
        assert!(!KernelGroups::default().read_cpu(&mut group));
    }

    #[test]
    fn a_gap_ends_a_chain_and_a_long_name_is_unknown() {
        let long = "n".repeat(CGROUP_NAME - 1);
        let found = groups(&[
            record(CONTROLLER_IO, (0, 5, &long), None),
            record(CONTROLLER_IO, (1, 0, "gone"), None),
            record(CONTROLLER_IO, (2, 1, ""), None),
            record(99, (0, 1, "unknown"), None),
        ]);
        let chain = found.chain(Controller::Io);
        assert_eq!((chain.len(), &chain[0].name), (1, &None));
    }
}
