//! Memory of control groups that have a limit, otherwise of the machine, and the time that threads stall for it.
//!
//! How full a group is says little: one full of page cache is healthy, and so is one whose heap is sized to fill it. What
//! counts is the time that its tasks stall for memory (pressure stall information, PSI). Without PSI, a group counts as
//! short of memory if it is full of unreclaimable memory and keeps hitting its limit.

use crate::hash::HashMap;
use std::collections::VecDeque;

use super::{
    Kind, QueueId, Reading, STALL_SHARE, Sink, Source, Targets, groups, starvation::stall_share,
};
use crate::sample::{Cgroup, HiddenFact, Machine, Sample, Stall};

/// Window over which the stall share is measured, ns. Occasional reclaim does no harm.
const STALL_WINDOW_NS: u64 = 5_000_000_000;
/// Maximum number of samples kept per group to cover the window; bounds the memory.
const MAX_SAMPLES: usize = 64;
/// Share of time in which some task stalls that counts as critical. With default thresholds, level warn is entered at 0.078.
const CRITICAL_STALL_SHARE: f64 = 0.10;
/// The fill that [`CRITICAL_STALL_SHARE`] maps to: the default score of level critical.
const CRITICAL_FILL: f64 = 0.9;
/// Available share of its memory below which the machine is short. Above it, stalls come from a group at its own limit.
const SHORT_MACHINE_AVAILABLE: f64 = 0.10;
/// Share of unreclaimable memory from which a group that hits its limit is short, where the kernel has no PSI.
const SHORT_GROUP_USED: f64 = 0.95;

#[derive(Default)]
pub(super) struct Memory {
    groups: HashMap<String, Known>,
    machine: Known,
}

/// State kept per group, and of the machine.
#[derive(Default)]
struct Known {
    /// Time and stall counters of the samples of the last window.
    stalls: VecDeque<(u64, Stall)>,
    seen_ns: Option<u64>,
    limit_hits: Option<u64>,
    oom_kills: Option<u64>,
    increase: Increase,
}

/// Changes since the previous sample.
#[derive(Clone, Copy, Default)]
struct Increase {
    elapsed_ns: Option<u64>,
    limit_hits: Option<u64>,
    oom_kills: Option<u64>,
    stall_share: Option<f64>,
}

impl Source for Memory {
    fn read(&mut self, sample: &Sample, targets: &Targets, sink: &mut Sink<'_>) {
        if !sample.scans.system {
            return;
        }
        let now_ns = sample.mono_ns;
        let groups = groups::by_path(sample);
        let hidden = groups::hiding(sample, HiddenFact::MemoryLimit);
        self.groups
            .retain(|path, _| groups.contains_key(path.as_str()));
        for group in &sample.cgroups {
            let known = self.groups.entry(group.path.clone()).or_default();
            known.observe(
                now_ns,
                group.memory_stall,
                group.limit_hits,
                group.oom_kills,
            );
        }
        if let Some(machine) = &sample.machine {
            let kills = Some(machine.oom_kills);
            self.machine
                .observe(now_ns, machine.memory_stall, None, kills);
        }
        for target in targets.all() {
            let path = target.cgroup.as_ref();
            let group = path.and_then(|path| groups.get(path.as_str()).copied());
            let increase = path.and_then(|path| self.groups.get(path));
            let increase = increase.map_or_else(Increase::default, |known| known.increase);
            if let Some((group, reading)) =
                group.and_then(|group| Some((group, limited(group, increase)?)))
            {
                let id = QueueId::Cgroup(group.path.as_str().into());
                sink.put(target.id, Kind::Memory, &id, reading);
            } else if path.is_some_and(|path| hidden.contains(path.as_str())) {
                // The machine's memory says nothing about a limit that is not seen.
            } else if let Some(machine) = &sample.machine {
                let reading = unlimited(machine, self.machine.increase, increase);
                sink.put(target.id, Kind::Memory, &QueueId::Machine, reading);
            }
        }
        sink.forget_unseen(Kind::Memory);
    }
}

impl Known {
    fn observe(
        &mut self,
        now_ns: u64,
        stall: Option<Stall>,
        limit_hits: Option<u64>,
        oom_kills: Option<u64>,
    ) {
        let grew = |before: Option<u64>, now: Option<u64>| Some(now?.saturating_sub(before?));
        self.increase = Increase {
            elapsed_ns: self.seen_ns.map(|before| now_ns.saturating_sub(before)),
            limit_hits: grew(self.limit_hits, limit_hits),
            oom_kills: grew(self.oom_kills, oom_kills),
            stall_share: self.stalled(now_ns, stall),
        };
        self.seen_ns = Some(now_ns);
        self.limit_hits = limit_hits;
        self.oom_kills = oom_kills;
    }

    /// Share of the window in which some task stalled. The divisor is the whole window even if fewer samples exist yet:
    /// a burst of reclaim just after the first sample decides nothing.
    fn stalled(&mut self, now_ns: u64, stall: Option<Stall>) -> Option<f64> {
        let Some(stall) = stall else {
            self.stalls.clear();
            return None;
        };
        let begin_ns = now_ns.saturating_sub(STALL_WINDOW_NS);
        // Keep one sample from before the window, as its start.
        while self.stalls.len() >= MAX_SAMPLES
            || self.stalls.get(1).is_some_and(|(ns, _)| *ns <= begin_ns)
        {
            self.stalls.pop_front();
        }
        let first = self.stalls.front().copied();
        self.stalls.push_back((now_ns, stall));
        let (since_ns, before) = first?;
        let elapsed_ns = now_ns.saturating_sub(since_ns).max(STALL_WINDOW_NS);
        stall_share(Some(before), Some(stall), Some(elapsed_ns))
    }
}

/// The reading of a group with a limit.
fn limited(group: &Cgroup, increase: Increase) -> Option<Reading> {
    let limit = group.memory_limit?;
    let depth = group.memory?.saturating_sub(group.reclaimable.unwrap_or(0));
    let used = depth as f64 / limit.max(1) as f64;
    let hits = increase.limit_hits.unwrap_or(0);
    let fill = match increase.stall_share {
        Some(share) => Some(as_fill(share)),
        // Where the page cache is not known, it may be all that fills the group.
        None => (hits > 0 && used >= SHORT_GROUP_USED && group.reclaimable.is_some())
            .then_some(used.min(0.99)),
    };
    let mut extra = vec![("used_share", used)];
    extra.extend(increase.stall_share.map(|share| (STALL_SHARE, share)));
    extra.extend(increase.limit_hits.map(|hits| ("limit_hits", hits as f64)));
    Some(Reading {
        depth,
        limit: Some(limit),
        fill,
        elapsed_ns: increase.elapsed_ns,
        losses: increase.oom_kills.unwrap_or(0),
        extra,
        ..Reading::default()
    })
}

/// The reading of the machine, for a target whose group has no limit. `group` holds that group's own stalls, if known.
fn unlimited(machine: &Machine, increase: Increase, group: Increase) -> Reading {
    let depth = machine.memory.saturating_sub(machine.memory_available);
    let is_short =
        (machine.memory_available as f64) < machine.memory as f64 * SHORT_MACHINE_AVAILABLE;
    let share = group.stall_share.or(increase.stall_share);
    let mut extra = Vec::new();
    extra.extend(share.map(|share| (STALL_SHARE, share)));
    // Kills of any process on the machine: whether this service lost one is unknown.
    extra.extend(
        increase
            .oom_kills
            .map(|kills| ("machine_oom_kills", kills as f64)),
    );
    Reading {
        depth,
        limit: Some(machine.memory),
        fill: share.filter(|_| is_short).map(as_fill),
        elapsed_ns: increase.elapsed_ns,
        losses: group.oom_kills.unwrap_or(0),
        extra,
        ..Reading::default()
    }
}

/// Maps the stall share to a fill. It stays below 1: only an OOM kill counts as full.
fn as_fill(stall_share: f64) -> f64 {
    (stall_share / CRITICAL_STALL_SHARE * CRITICAL_FILL).min(0.99)
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Model, Reading};
    use crate::sample::{Cgroup, Hidden, HiddenFact, Machine, Sample, Scans, Stall, Target};

    const SECOND: u64 = 1_000_000_000;
    const GIB: u64 = 1 << 30;

    /// The readings of these samples, one a second.
    fn course(samples: impl IntoIterator<Item = (Cgroup, Machine)>) -> Vec<(String, Reading)> {
        let mut model = Model::default();
        let mut out = Vec::new();
        for (second, (cgroup, machine)) in samples.into_iter().enumerate() {
            let target = Target {
                id: 1,
                tgids: vec![10],
                cgroup: Some("/svc".to_owned()),
                ..Target::default()
            };
            let readings = model.read(&Sample {
                mono_ns: (second as u64 + 1) * SECOND,
                targets: (second == 0).then(|| vec![target]),
                scans: Scans {
                    system: true,
                    ..Scans::default()
                },
                cgroups: vec![cgroup],
                machine: Some(machine),
                ..Sample::default()
            });
            out.extend(
                readings
                    .queues
                    .into_iter()
                    .filter(|(key, _)| key.kind == Kind::Memory)
                    .map(|(key, reading)| (key.name().to_owned(), reading)),
            );
        }
        out
    }

    #[test]
    fn the_machine_does_not_stand_for_a_limit_that_is_hidden() {
        let hidden = Hidden {
            cgroup: "/svc".to_owned(),
            fact: HiddenFact::MemoryLimit,
        };
        let target = Target {
            id: 1,
            tgids: vec![10],
            cgroup: Some("/svc".to_owned()),
            ..Target::default()
        };
        let mut sample = Sample {
            mono_ns: SECOND,
            targets: Some(vec![target]),
            machine: Some(Machine {
                memory: GIB,
                ..Machine::default()
            }),
            hidden: vec![hidden],
            ..Sample::default()
        };
        sample.scans.system = true;
        let has_memory = |sample: &Sample| {
            let readings = Model::default().read(sample);
            let mut queues = readings.queues.into_iter();
            queues.any(|(key, _)| key.kind == Kind::Memory)
        };
        assert!(!has_memory(&sample));
        sample.hidden.clear();
        assert!(has_memory(&sample));
    }

    fn stall(ns: u64) -> Option<Stall> {
        Some(Stall {
            some_ns: ns,
            full_ns: 0,
        })
    }

    fn group(second: u64, stalled_per_s: u64) -> Cgroup {
        Cgroup {
            path: "/svc".to_owned(),
            memory: Some(GIB * 19 / 20),
            reclaimable: Some(GIB / 10),
            memory_limit: Some(GIB),
            limit_hits: Some(second * 100),
            oom_kills: Some(0),
            memory_stall: stall(second * stalled_per_s),
            ..Cgroup::default()
        }
    }

    #[test]
    fn a_container_full_of_page_cache_is_not_saturated() {
        let readings =
            course((0..20).map(|second| (group(second, SECOND / 500), Machine::default())));
        for (name, memory) in readings {
            assert_eq!(name, "/svc");
            assert_eq!(memory.limit, Some(GIB));
            assert!(memory.fill.unwrap_or(0.0) < 0.1, "{memory:?}");
            assert_eq!(memory.losses, 0);
        }
    }

    #[test]
    fn a_thrashing_container_is_reported_after_some_seconds() {
        let readings =
            course((0..10).map(|second| (group(second, SECOND / 5), Machine::default())));
        let fills: Vec<f64> = readings
            .iter()
            .map(|(_, memory)| memory.fill.unwrap_or(0.0))
            .collect();
        assert!(fills[1] < 0.5, "{fills:?}");
        assert!(fills[8] >= 0.9, "{fills:?}");
    }

    #[test]
    fn without_psi_limit_hits_count_only_if_memory_is_unreclaimable() {
        let blind = |second: u64, reclaimable: u64| Cgroup {
            memory: Some(GIB),
            reclaimable: Some(reclaimable),
            memory_stall: None,
            ..group(second, 0)
        };
        let cache = course((0..3).map(|second| (blind(second, GIB / 2), Machine::default())));
        assert_eq!(cache[2].1.fill, None);
        let full = course((0..3).map(|second| (blind(second, GIB / 100), Machine::default())));
        assert!(full[2].1.fill > Some(0.9));
    }

    #[test]
    fn a_killed_process_is_a_loss() {
        let kills = |second: u64| Cgroup {
            oom_kills: Some(second / 2),
            ..group(second, 0)
        };
        let readings = course((0..4).map(|second| (kills(second), Machine::default())));
        let losses: Vec<u64> = readings.iter().map(|(_, memory)| memory.losses).collect();
        assert_eq!(losses, [0, 0, 1, 0]);
    }

    #[test]
    fn without_a_limit_the_machine_counts_if_it_is_short() {
        let machine = |second: u64, available: u64| Machine {
            memory: 16 * GIB,
            memory_available: available,
            memory_stall: stall(second * SECOND / 2),
            ..Machine::default()
        };
        let free = |second: u64| Cgroup {
            memory_limit: None,
            memory_stall: None,
            ..group(second, 0)
        };
        let neighbour = course((0..10).map(|second| (free(second), machine(second, 8 * GIB))));
        assert_eq!(neighbour[9].0, "machine");
        assert_eq!(neighbour[9].1.fill, None);
        let short = course((0..10).map(|second| (free(second), machine(second, GIB / 2))));
        assert!(short[9].1.fill > Some(0.9));
    }
}
