//! Finds the targets among all processes of the machine. Run twice a second, it remembers what it has read from /proc and
//! keeps the ids of targets that are still there.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use super::{Selector, Spec, cgroup::pids_in_cgroup, facts::Facts, group::Groups};
use crate::{
    sample::{Target, TargetId},
    text::harmless,
};

/// A process, from the scan of the process table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its number in the initial pid namespace.
    pub tgid: u32,
    /// Its number in the agent's /proc.
    pub pid: u32,
    /// The parent's `tgid`.
    pub parent: u32,
    /// CLOCK_BOOTTIME at which it started, ns.
    pub start_ns: u64,
    /// Changes with every exec (`task_struct.self_exec_id`).
    pub exec_id: u64,
    /// A kernel thread.
    pub kernel: bool,
    /// As the process set it: it may hold any characters.
    pub comm: String,
}

/// A listening TCP socket, from the scan over holders: once for each process that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerInfo {
    pub tgid: u32,
    pub cookie: u64,
    pub netns: u32,
    pub address: SocketAddr,
}

/// The result of one scan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Discovered {
    /// All targets, ordered by id.
    pub targets: Vec<Target>,
    /// The processes of all targets, neighbours included.
    pub processes: Vec<ProcessInfo>,
    /// `targets` differ from the previous scan.
    pub changed: bool,
    /// Selectors that match no process.
    pub unmatched: Vec<Selector>,
}

/// The facts about a process, valid until it calls exec or ends.
struct Known {
    start_ns: u64,
    exec_id: u64,
    facts: Facts,
}

/// Finds targets and gives them lasting ids.
pub struct Discovery {
    specs: Vec<Spec>,
    own_pid: u32,
    /// By tgid.
    known: HashMap<u32, Known>,
    /// Start time of the first process seen with each selected pid: a later process that reuses the pid is not
    /// selected.
    selected_pids: HashMap<u32, u64>,
    next_id: TargetId,
    /// The targets of the previous scan.
    targets: Vec<Target>,
}

impl Discovery {
    /// `specs`: what to watch. `own_pid`: the agent's, which is never a target.
    pub fn new(specs: Vec<Spec>, own_pid: u32) -> Self {
        Self {
            specs,
            own_pid,
            known: HashMap::new(),
            selected_pids: HashMap::new(),
            next_id: 1,
            targets: Vec::new(),
        }
    }

    /// Watches what these select, from the next scan on. Targets that are still selected keep their ids.
    pub fn set_specs(&mut self, specs: Vec<Spec>) {
        let is_selected = |pid: &u32| {
            let selector = Selector::Pid(*pid);
            specs.iter().any(|spec| spec.selector == selector)
        };
        self.selected_pids.retain(|pid, _| is_selected(pid));
        self.specs = specs;
    }

    /// Finds the targets among all processes and listeners of the machine. `neighbours`: tgids to watch although no selector
    /// matches them.
    pub fn scan(
        &mut self,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
        neighbours: &BTreeSet<u32>,
    ) -> Discovered {
        let alive: HashSet<u32> = processes.iter().map(|process| process.tgid).collect();
        self.known.retain(|tgid, _| alive.contains(tgid));

        let mut matched: BTreeMap<usize, Option<String>> = BTreeMap::new();
        let mut unmatched = Vec::new();
        for index in 0..self.specs.len() {
            let Spec {
                selector,
                service_name,
            } = self.specs[index].clone();
            let found = self.matching(&selector, processes, listeners);
            if found.is_empty() {
                unmatched.push(selector);
            }
            for process in found {
                let name = matched.entry(process).or_default();
                *name = name.take().or_else(|| service_name.clone());
            }
        }
        let is_neighbour = |index: &usize| {
            !matched.contains_key(index) && neighbours.contains(&processes[*index].tgid)
        };
        let neighbours: Vec<(usize, Option<String>)> = (0..processes.len())
            .filter(is_neighbour)
            .map(|index| (index, None))
            .collect();
        let matched: Vec<(usize, Option<String>)> = matched.into_iter().collect();
        // Grouped separately: a selected target must not grow by neighbours.
        let mut targets = self.targets_of(processes, listeners, &matched);
        let mut neighbour_targets = self.targets_of(processes, listeners, &neighbours);
        for target in &mut neighbour_targets {
            target.is_neighbour = true;
        }
        targets.append(&mut neighbour_targets);
        self.give_ids(&mut targets);
        targets.sort_unstable_by_key(|target| target.id);
        let changed = targets != self.targets;
        self.targets.clone_from(&targets);
        Discovered {
            processes: matched
                .iter()
                .chain(&neighbours)
                .map(|(index, _)| processes[*index].clone())
                .collect(),
            targets,
            changed,
            unmatched,
        }
    }

    /// Indices of the processes that a selector matches.
    fn matching(
        &mut self,
        selector: &Selector,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
    ) -> BTreeSet<usize> {
        let candidates = (0..processes.len()).filter(|index| {
            let process = &processes[*index];
            !process.kernel && process.pid != self.own_pid
        });
        let candidates: Vec<usize> = candidates.collect();
        let mut found: BTreeSet<usize> = match selector {
            Selector::All => return candidates.into_iter().collect(),
            Selector::Cgroup(path) => {
                let pids = pids_in_cgroup(path);
                return candidates
                    .into_iter()
                    .filter(|index| pids.contains(&processes[*index].pid))
                    .collect();
            }
            Selector::Pid(pid) => {
                let found = candidates
                    .iter()
                    .copied()
                    .filter(|index| processes[*index].pid == *pid);
                let selected_pids = &mut self.selected_pids;
                found
                    .filter(|index| {
                        let start_ns = processes[*index].start_ns;
                        *selected_pids.entry(*pid).or_insert(start_ns) == start_ns
                    })
                    .collect()
            }
            Selector::Port(port) => {
                let owners: HashSet<u32> = listeners
                    .iter()
                    .filter(|listener| listener.address.port() == *port)
                    .map(|listener| listener.tgid)
                    .collect();
                candidates
                    .iter()
                    .copied()
                    .filter(|index| owners.contains(&processes[*index].tgid))
                    .collect()
            }
            Selector::Name(glob) => candidates
                .iter()
                .copied()
                .filter(|index| {
                    let process = &processes[*index];
                    let exe = self.facts(process).exe.to_string_lossy().into_owned();
                    let base = exe.rsplit('/').next().unwrap_or_default();
                    glob.matches(&process.comm) || glob.matches(&exe) || glob.matches(base)
                })
                .collect(),
        };
        // Add the workers that the matched processes forked, and their workers. Processes are in no particular order of
        // descent, so repeat until nothing is added.
        loop {
            let tgids: HashMap<u32, usize> = found
                .iter()
                .map(|index| (processes[*index].tgid, *index))
                .collect();
            let mut added = false;
            for index in &candidates {
                if found.contains(index) {
                    continue;
                }
                if let Some(parent) = tgids.get(&processes[*index].parent)
                    && self.is_same_program(&processes[*parent], &processes[*index])
                {
                    added |= found.insert(*index);
                }
            }
            if !added {
                return found;
            }
        }
    }

    /// Whether two processes run the same executable.
    pub(crate) fn is_same_program(&mut self, a: &ProcessInfo, b: &ProcessInfo) -> bool {
        let exe = self.facts(a).exe.clone();
        !exe.as_os_str().is_empty() && self.facts(b).exe == exe
    }

    fn facts(&mut self, process: &ProcessInfo) -> &Facts {
        // Incomplete facts are read again; slow processes do not delay that for long (`process_file`).
        let is_current = |known: &Known| {
            known.start_ns == process.start_ns
                && known.exec_id == process.exec_id
                && !known.facts.is_incomplete
        };
        if !self.known.get(&process.tgid).is_some_and(is_current) {
            let known = Known {
                start_ns: process.start_ns,
                exec_id: process.exec_id,
                facts: Facts::read(process.pid, &process.comm),
            };
            self.known.insert(process.tgid, known);
        }
        &self.known[&process.tgid].facts
    }

    /// Groups matched processes into targets: forked from each other and the same program, or sharing a listener.
    fn targets_of(
        &mut self,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
        matched: &[(usize, Option<String>)],
    ) -> Vec<Target> {
        let by_tgid: HashMap<u32, usize> = matched
            .iter()
            .enumerate()
            .map(|(at, (index, _))| (processes[*index].tgid, at))
            .collect();
        let mut groups = Groups::new(matched.len());
        for (at, (index, _)) in matched.iter().enumerate() {
            if let Some(parent) = by_tgid.get(&processes[*index].parent)
                && self.is_same_program(&processes[matched[*parent].0], &processes[*index])
            {
                groups.join(at, *parent);
            }
        }
        let held = |listener: &ListenerInfo| by_tgid.get(&listener.tgid).copied();
        groups.join_by(
            listeners
                .iter()
                .filter_map(|listener| Some((listener.cookie, held(listener)?))),
        );
        groups.join_by(
            listeners
                .iter()
                .filter_map(|listener| Some(((listener.netns, listener.address), held(listener)?))),
        );
        let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for at in 0..matched.len() {
            members.entry(groups.find(at)).or_default().push(at);
        }
        members
            .into_values()
            .map(|members| {
                let service_name = members.iter().find_map(|at| matched[*at].1.clone());
                let members: Vec<&ProcessInfo> = members
                    .iter()
                    .map(|at| &processes[matched[*at].0])
                    .collect();
                self.target(&members, service_name)
            })
            .collect()
    }

    fn target(&mut self, members: &[&ProcessInfo], service_name: Option<String>) -> Target {
        let mut tgids: Vec<u32> = members.iter().map(|process| process.tgid).collect();
        tgids.sort_unstable();
        let first = members
            .iter()
            .min_by_key(|process| (process.start_ns, process.tgid));
        let Some(first) = first else {
            return Target::default();
        };
        let facts = self.facts(first).clone();
        let base = facts
            .exe
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        Target {
            id: 0,
            name: service_name.map_or(facts.service, |service_name| harmless(&service_name)),
            pid: first.pid,
            start_ns: first.start_ns,
            exe: harmless(&base.unwrap_or_else(|| first.comm.clone())),
            comm: harmless(&first.comm),
            container: facts.container,
            cgroup: facts.cgroup,
            attributes: facts.attributes,
            cpus: facts.cpus,
            tgids,
            is_neighbour: false,
        }
    }

    /// A target keeps its id while it has a process in common with the previous scan.
    fn give_ids(&mut self, targets: &mut [Target]) {
        let mut taken = HashSet::new();
        for target in targets.iter_mut() {
            let before = self.targets.iter().find(|before| {
                before.start_ns == target.start_ns && before.pid == target.pid
                    || before
                        .tgids
                        .iter()
                        .any(|tgid| target.tgids.binary_search(tgid).is_ok())
            });
            target.id = match before {
                Some(before) if taken.insert(before.id) => before.id,
                _ => {
                    self.next_id += 1;
                    self.next_id - 1
                }
            };
        }
    }
}

#[cfg(test)]
mod tests;
