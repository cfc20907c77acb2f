//! Finds the targets among all processes of the machine. Run twice a second, it remembers what it has read from /proc and
//! keeps the ids of targets that are still there.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use super::{
    Selector, Spec,
    cgroup::pids_in_cgroup,
    containers::{ContainerName, Containers},
    facts::{Facts, Origin},
    group::Groups,
    node::{self, Candidate, LeftOut},
    place::Place,
};
use crate::{
    sample::{NamedBy, Owner, Target, TargetId, Workload},
    text::harmless,
};

/// Time after which the origin of a process is read again, ns: it may have been moved to another group, have changed its user, or
/// have ended.
const REFRESH_NS: u64 = 10_000_000_000;
/// Maximum number of processes that are read again in one scan.
const MAX_REFRESHED: usize = 16;

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
    /// Processes that [`Selector::All`] leaves out.
    pub left_out: LeftOut,
}

/// What is known about a process, until it calls exec or ends.
struct Known {
    pid: u32,
    start_ns: u64,
    exec_id: u64,
    origin: Origin,
    /// When `origin` was read, ns.
    read_ns: u64,
    /// Read when they are needed.
    facts: Option<Facts>,
}

impl Known {
    fn read(process: &ProcessInfo, now_ns: u64) -> Self {
        Self {
            pid: process.pid,
            start_ns: process.start_ns,
            exec_id: process.exec_id,
            origin: Origin::read(process.pid),
            read_ns: now_ns,
            facts: None,
        }
    }
}

/// What a target is called.
#[derive(Default)]
struct Name {
    /// In the configuration.
    configured: Option<String>,
    /// By container, pod or unit.
    of_place: Option<String>,
    named_by: NamedBy,
    is_part: bool,
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
    containers: Containers,
    /// CLOCK_BOOTTIME of this scan, ns.
    now_ns: u64,
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
            containers: Containers::new(),
            now_ns: 0,
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
    /// matches them. `now_ns`: CLOCK_BOOTTIME.
    pub fn scan(
        &mut self,
        now_ns: u64,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
        neighbours: &BTreeSet<u32>,
    ) -> Discovered {
        self.now_ns = now_ns;
        let alive: HashSet<u32> = processes.iter().map(|process| process.tgid).collect();
        self.known.retain(|tgid, _| alive.contains(tgid));
        self.refresh();

        let mut matched: BTreeMap<usize, Option<String>> = BTreeMap::new();
        let mut unmatched = Vec::new();
        let mut all = None;
        for index in 0..self.specs.len() {
            let Spec {
                selector,
                service_name,
                user,
            } = self.specs[index].clone();
            if let Selector::All { every_process } = selector {
                all = Some(all.unwrap_or(false) | every_process);
                continue;
            }
            let found = self.matching(&selector, user, processes, listeners);
            if found.is_empty() {
                unmatched.push(selector);
            }
            for process in found {
                let name = matched.entry(process).or_default();
                *name = name.take().or_else(|| service_name.clone());
            }
        }
        let mut services = Vec::new();
        let mut left_out = LeftOut::default();
        if let Some(every_process) = all {
            (services, left_out) = self.services(processes, listeners, &matched, every_process);
            if services.is_empty() && matched.is_empty() {
                unmatched.push(Selector::All { every_process });
            }
        }
        let of_services: BTreeSet<usize> = services
            .iter()
            .flat_map(|(members, _)| members.iter().copied())
            .collect();
        let is_neighbour = |index: &usize| {
            !matched.contains_key(index)
                && !of_services.contains(index)
                && neighbours.contains(&processes[*index].tgid)
        };
        let neighbours: Vec<(usize, Option<String>)> = (0..processes.len())
            .filter(is_neighbour)
            .map(|index| (index, None))
            .collect();
        let matched: Vec<(usize, Option<String>)> = matched.into_iter().collect();
        let listening: HashSet<u32> = listeners.iter().map(|listener| listener.tgid).collect();
        // Grouped separately: a selected target must not grow by neighbours.
        let mut targets = self.targets_of(processes, listeners, &matched, &listening);
        for (members, name) in services {
            let members: Vec<&ProcessInfo> =
                members.iter().map(|index| &processes[*index]).collect();
            targets.push(self.target(&members, name, &listening));
        }
        let mut neighbour_targets = self.targets_of(processes, listeners, &neighbours, &listening);
        for target in &mut neighbour_targets {
            target.is_neighbour = true;
        }
        targets.append(&mut neighbour_targets);
        self.give_ids(&mut targets);
        targets.sort_unstable_by_key(|target| target.id);
        let changed = targets != self.targets;
        self.targets.clone_from(&targets);
        let indices = matched.iter().chain(&neighbours).map(|(index, _)| index);
        Discovered {
            processes: indices
                .chain(&of_services)
                .map(|index| processes[*index].clone())
                .collect(),
            targets,
            changed,
            unmatched,
            left_out,
        }
    }

    /// The services of this node, without the processes that are `matched` by other selectors.
    fn services(
        &mut self,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
        matched: &BTreeMap<usize, Option<String>>,
        every_process: bool,
    ) -> (Vec<(Vec<usize>, Name)>, LeftOut) {
        let own = self.own_tgids(processes);
        let is_own = |process: &ProcessInfo| own.contains(&process.tgid);
        let listening: HashSet<u32> = listeners.iter().map(|listener| listener.tgid).collect();
        let settled = node::settled(processes, &listening, self.now_ns);
        let mut young = 0;
        let mut indices = Vec::new();
        for (index, process) in processes.iter().enumerate() {
            if process.kernel || is_own(process) || matched.contains_key(&index) {
                continue;
            }
            if settled[index] || every_process {
                indices.push(index);
            } else {
                young += 1;
            }
        }
        let mut names: HashMap<String, (Option<ContainerName>, bool)> = HashMap::new();
        for index in &indices {
            if let Place::Container { id, in_kubernetes } =
                self.origin(&processes[*index]).place.clone()
                && !names.contains_key(&id)
            {
                let name = self.containers.name(&id, self.now_ns).cloned();
                let is_sandbox = in_kubernetes && self.containers.is_sandbox(&id, self.now_ns);
                names.insert(id, (name, is_sandbox));
            }
        }
        let candidates: Vec<Candidate<'_>> = indices
            .iter()
            .map(|index| {
                let process = &processes[*index];
                let origin = &self.known[&process.tgid].origin;
                let container = match &origin.place {
                    Place::Container { id, .. } => names.get(id),
                    _ => None,
                };
                Candidate {
                    process,
                    origin,
                    container: container.and_then(|(name, _)| name.as_ref()),
                    is_sandbox: container.is_some_and(|(_, is_sandbox)| *is_sandbox),
                }
            })
            .collect();
        let (services, left_out) = node::services(&candidates, listeners, every_process);
        let services = services.into_iter().map(|service| {
            let members = service.members.iter().map(|at| indices[*at]).collect();
            let name = Name {
                configured: None,
                of_place: service.name,
                named_by: service.named_by,
                is_part: service.is_part,
            };
            (members, name)
        });
        (services.collect(), LeftOut { young, ..left_out })
    }

    /// Reads the origins of some processes again.
    fn refresh(&mut self) {
        let now_ns = self.now_ns;
        let mut due: Vec<&mut Known> = self
            .known
            .values_mut()
            .filter(|known| now_ns.saturating_sub(known.read_ns) >= REFRESH_NS)
            .collect();
        due.sort_unstable_by_key(|known| known.read_ns);
        for known in due.into_iter().take(MAX_REFRESHED) {
            known.read_ns = now_ns;
            let Some(origin) = Origin::try_read(known.pid) else {
                continue;
            };
            // Only exec changes the executable. Its file may have been replaced since.
            let exe = std::mem::take(&mut known.origin.exe);
            known.origin = Origin {
                exe: if exe.as_os_str().is_empty() {
                    origin.exe
                } else {
                    exe
                },
                ..origin
            };
        }
    }

    /// The agent, its helper process, and the adapter process, which that one starts. Others may be children of the agent, too, if it
    /// is the first process of its pid namespace.
    fn own_tgids(&self, processes: &[ProcessInfo]) -> HashSet<u32> {
        /// Name of a program that was started as /proc/self/exe.
        const OWN_PROGRAM: &str = "exe";
        let mut own = HashSet::new();
        let Some(agent) = processes.iter().find(|it| it.pid == self.own_pid) else {
            return own;
        };
        own.insert(agent.tgid);
        for _ in ["helper process", "adapter process"] {
            let is_child = |it: &&ProcessInfo| {
                own.contains(&it.parent) && (it.comm == agent.comm || it.comm == OWN_PROGRAM)
            };
            let children: Vec<u32> = processes
                .iter()
                .filter(is_child)
                .map(|it| it.tgid)
                .collect();
            own.extend(children);
        }
        own
    }

    /// Indices of the processes that a selector matches.
    fn matching(
        &mut self,
        selector: &Selector,
        user: Option<u32>,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
    ) -> BTreeSet<usize> {
        let own = self.own_tgids(processes);
        let candidates = (0..processes.len()).filter(|index| {
            let process = &processes[*index];
            !process.kernel && !own.contains(&process.tgid)
        });
        let candidates: Vec<usize> = candidates.collect();
        let is_eligible = |this: &mut Self, index: &usize| {
            let origin = this.origin(&processes[*index]);
            !origin.is_zombie && user.is_none_or(|user| origin.uid == user)
        };
        let mut found: BTreeSet<usize> = match selector {
            Selector::All { .. } => return candidates.into_iter().collect(),
            Selector::Cgroup(path) => {
                let pids = pids_in_cgroup(path);
                return candidates
                    .into_iter()
                    .filter(|index| pids.contains(&processes[*index].pid))
                    .filter(|index| is_eligible(self, index))
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
                    let exe = self.origin(process).exe.to_string_lossy().into_owned();
                    let base = exe.rsplit('/').next().unwrap_or_default();
                    glob.matches(&process.comm) || glob.matches(&exe) || glob.matches(base)
                })
                .collect(),
        };
        found.retain(|index| is_eligible(self, index));
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
        let exe = self.origin(a).exe.clone();
        !exe.as_os_str().is_empty() && self.origin(b).exe == exe
    }

    fn known(&mut self, process: &ProcessInfo) -> &mut Known {
        let now_ns = self.now_ns;
        let read = || Known::read(process, now_ns);
        let known = self.known.entry(process.tgid).or_insert_with(read);
        if (known.start_ns, known.exec_id) != (process.start_ns, process.exec_id) {
            *known = read();
        }
        known
    }

    fn origin(&mut self, process: &ProcessInfo) -> &Origin {
        &self.known(process).origin
    }

    fn facts(&mut self, process: &ProcessInfo) -> &Facts {
        let known = self.known(process);
        // Incomplete facts are read again; slow processes do not delay that for long (`process_file`).
        let facts = known.facts.take().filter(|facts| !facts.is_incomplete);
        let read = || Facts::read(process.pid, &process.comm, &known.origin.exe);
        let facts = facts.unwrap_or_else(read);
        known.facts.insert(facts)
    }

    /// Groups matched processes into targets: forked from each other and the same program, or sharing a listener.
    fn targets_of(
        &mut self,
        processes: &[ProcessInfo],
        listeners: &[ListenerInfo],
        matched: &[(usize, Option<String>)],
        listening: &HashSet<u32>,
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
                let configured = members.iter().find_map(|at| matched[*at].1.clone());
                let members: Vec<&ProcessInfo> = members
                    .iter()
                    .map(|at| &processes[matched[*at].0])
                    .collect();
                let name = Name {
                    configured,
                    ..Name::default()
                };
                self.target(&members, name, listening)
            })
            .collect()
    }

    fn target(&mut self, members: &[&ProcessInfo], name: Name, listening: &HashSet<u32>) -> Target {
        let mut tgids: Vec<u32> = members.iter().map(|process| process.tgid).collect();
        tgids.sort_unstable();
        let first = members
            .iter()
            .min_by_key(|process| (process.start_ns, process.tgid));
        let Some(first) = first else {
            return Target::default();
        };
        let facts = self.facts(first).clone();
        let origin = self.origin(first).clone();
        let container = match &origin.place {
            Place::Container { id, .. } => self.containers.name(id, self.now_ns).cloned(),
            _ => None,
        };
        let owner = match (&origin.place, &container) {
            (_, Some(ContainerName::Pod(pod))) => Owner::Container(pod.file_name()),
            (_, Some(ContainerName::Plain(name))) => Owner::Container(name.clone()),
            (Place::Container { id, .. }, None) => Owner::Container(id.clone()),
            (Place::Guest(guest), _) => Owner::Container(guest.clone()),
            (Place::Unit(unit), _) => Owner::Unit(unit.clone()),
            _ => Owner::User(origin.uid),
        };
        let named_by = match (&name.configured, &name.of_place) {
            (Some(_), _) => NamedBy::Configuration,
            (None, Some(_)) => name.named_by,
            (None, None) => NamedBy::Itself,
        };
        let is_declared = facts.is_declared && named_by != NamedBy::Configuration;
        let is_part = name.is_part;
        let given = name.configured.or(name.of_place);
        let given = given.map(|given| harmless(&given));
        let workload = Workload {
            owner,
            named_by,
            pod: match container {
                Some(ContainerName::Pod(pod)) => Some(pod),
                _ => None,
            },
            declared_name: given
                .as_ref()
                .filter(|_| is_declared)
                .map(|_| facts.service.clone()),
            is_part,
            listens: tgids.iter().any(|tgid| listening.contains(tgid)),
        };
        let base = origin
            .exe
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        Target {
            id: 0,
            name: given.unwrap_or(facts.service),
            pid: first.pid,
            start_ns: first.start_ns,
            exe: harmless(&base.unwrap_or_else(|| first.comm.clone())),
            comm: harmless(&first.comm),
            container: origin.container,
            cgroup: origin.cgroup,
            attributes: facts.attributes,
            cpus: origin.cpus,
            tgids,
            is_neighbour: false,
            workload,
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
