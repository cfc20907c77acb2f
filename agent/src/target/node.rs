//! Which processes of a node are its services, and what they are called. Pure.
//!
//! All processes of a container or of a systemd unit are one service. If several programs listen there, each is a service, and the
//! processes that do not listen are another. Elsewhere, processes that serve together are one service.
#![forbid(unsafe_code)]

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
};

use super::{
    containers::ContainerName,
    discovery::{ListenerInfo, ProcessInfo},
    facts::Origin,
    group::Groups,
    place::{Place, RUNTIME_UNITS, unit_name},
};
use crate::{
    sample::{NamedBy, Pod},
    text::bounded,
};

/// Age at which a process that does not listen counts as a service, ns. A process that exits earlier is a command of a service or
/// of a user, not a service.
const MIN_AGE_NS: u64 = 5_000_000_000;
/// Maximum number of services; a node runs 110 pods by default, and up to 500 if that limit is raised.
pub const MAX_SERVICES: usize = 1_000;
/// Maximum number of programs of one container or unit that are services of their own: more than a container has in practice, and few
/// enough that none takes the room of others.
const MAX_PROGRAMS: usize = 8;
/// Digits of a container id in a name, as `docker ps` and `podman ps` show it.
const SHORT_ID: usize = 12;
/// Longest name of a program within a container's or unit's name, bytes.
const MAX_PROGRAM_NAME: usize = 32;
/// PID of the first process. Orphans become its children.
const INIT: u32 = 1;
/// The lowest user id of an ordinary user: `UID_MIN` in /etc/login.defs.
pub(super) const FIRST_PERSON: u32 = 1_000;

/// Units of the machine itself, besides those of container runtimes. Only the administrator can give a unit its name.
const SYSTEM_UNITS: &[&str] = &["dbus", "dbus-broker", "kubelet", "polkit"];
/// The same, by the beginnings of their names.
const SYSTEM_UNIT_PREFIXES: &[&str] = &["getty@", "serial-getty@", "systemd-", "user-runtime-dir@"];
/// Namespace and container of the programs that set up networks and volumes of pods. Only administrators of the cluster create pods
/// in these namespaces.
const SYSTEM_CONTAINERS: &[(&str, &str)] = &[
    ("calico-system", "calico-node"),
    ("kube-flannel", "kube-flannel"),
    ("kube-system", "aws-node"),
    ("kube-system", "azure-cns"),
    ("kube-system", "calico-node"),
    ("kube-system", "cilium-agent"),
    ("kube-system", "kindnet-cni"),
    ("kube-system", "kube-flannel"),
    ("kube-system", "kube-proxy"),
    ("kube-system", "liveness-probe"),
    ("kube-system", "node-driver-registrar"),
    ("kube-system", "weave"),
];

/// A process of the node.
pub(super) struct Candidate<'a> {
    pub(super) process: &'a ProcessInfo,
    pub(super) origin: &'a Origin,
    /// Of its container.
    pub(super) container: Option<&'a ContainerName>,
    /// Its container is the sandbox of a pod.
    pub(super) is_sandbox: bool,
}

/// A service of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    /// Indices of the candidates.
    pub(super) members: Vec<usize>,
    /// The name, unless it is the processes' own.
    pub(super) name: Option<String>,
    pub(super) named_by: NamedBy,
    /// One of several programs of a container or unit. Anybody can choose the program's name, which is part of `name`.
    pub(super) is_part: bool,
}

/// Processes that are no services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Too young.
    pub young: usize,
    /// Of the machine, of container runtimes and of Kubernetes.
    pub system: usize,
    /// Services beyond the limit.
    pub services: usize,
}

/// Which processes are settled: those that listen, those that have lived for [`MIN_AGE_NS`], and the workers that these forked.
pub(super) fn settled(
    processes: &[ProcessInfo],
    listening: &HashSet<u32>,
    now_ns: u64,
) -> Vec<bool> {
    let by_tgid: HashMap<u32, usize> = processes
        .iter()
        .enumerate()
        .map(|(index, process)| (process.tgid, index))
        .collect();
    let mut settled: Vec<bool> = processes
        .iter()
        .map(|process| {
            listening.contains(&process.tgid)
                || now_ns.saturating_sub(process.start_ns) >= MIN_AGE_NS
        })
        .collect();
    // Parents before their children.
    let mut order: Vec<usize> = (0..processes.len())
        .filter(|index| !settled[*index])
        .collect();
    order.sort_unstable_by_key(|index| processes[*index].start_ns);
    for index in order {
        let process = &processes[index];
        let Some(parent) = by_tgid.get(&process.parent) else {
            continue;
        };
        // Forked, and no exec since. An orphan's exec id says nothing about its new parent.
        let forked = &processes[*parent];
        settled[index] = settled[*parent]
            && forked.tgid != INIT
            && (forked.exec_id, &forked.comm) == (process.exec_id, &process.comm);
    }
    settled
}

/// The services that these processes make up. `every_process`: also those of the machine and of Kubernetes.
pub(super) fn services(
    candidates: &[Candidate<'_>],
    listeners: &[ListenerInfo],
    every_process: bool,
) -> (Vec<Service>, LeftOut) {
    let by_tgid: HashMap<u32, usize> = candidates
        .iter()
        .enumerate()
        .map(|(at, candidate)| (candidate.process.tgid, at))
        .collect();
    let held = |listener: &ListenerInfo| by_tgid.get(&listener.tgid).copied();
    let listening: HashSet<usize> = listeners.iter().filter_map(held).collect();
    let mut left_out = LeftOut::default();
    let mut chosen: Vec<bool> = candidates
        .iter()
        .map(|candidate| !candidate.origin.is_zombie)
        .collect();
    if !every_process {
        for at in system_processes(candidates, &by_tgid, &listening) {
            left_out.system += usize::from(std::mem::take(&mut chosen[at]));
        }
    }

    let place = |at: usize| &candidates[at].origin.place;
    let exe = |at: usize| candidates[at].origin.exe.as_path();
    let mut groups = Groups::new(candidates.len());
    for (at, candidate) in candidates.iter().enumerate() {
        if let Some(parent) = by_tgid.get(&candidate.process.parent)
            && place(*parent) == place(at)
            && exe(*parent) == exe(at)
            && !exe(at).as_os_str().is_empty()
        {
            groups.join(at, *parent);
        }
    }
    // A socket that systemd has opened is held by it, too: not in the same place.
    let sockets = listeners
        .iter()
        .filter_map(|it| Some((it, held(it)?)))
        .filter(|(_, at)| chosen[*at]);
    groups.join_by(sockets.clone().map(|(it, at)| ((place(at), it.cookie), at)));
    groups.join_by(sockets.map(|(it, at)| ((place(at), it.netns, it.address), at)));

    let mut places: BTreeMap<&Place, Vec<usize>> = BTreeMap::new();
    for at in (0..candidates.len()).filter(|at| chosen[*at]) {
        places.entry(place(at)).or_default().push(at);
    }
    let mut services = Vec::new();
    for (place, members) in places {
        let mut parts: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for at in members {
            parts.entry(groups.find(at)).or_default().push(at);
        }
        if !place.is_one_service() {
            services.extend(parts.into_values().map(|members| Service {
                members,
                ..Service::default()
            }));
            continue;
        }
        // By the program that listens; `None` for what does not listen.
        let mut programs: BTreeMap<Option<&Path>, Vec<usize>> = BTreeMap::new();
        for part in parts.into_values() {
            let program = part.iter().find(|at| listening.contains(at));
            let program = program.map(|at| exe(*at));
            programs.entry(program).or_default().extend(part);
        }
        let mut started: Vec<(u64, &Path)> = programs
            .iter()
            .filter_map(|(program, members)| {
                let starts = members.iter().map(|at| candidates[*at].process.start_ns);
                Some((starts.min()?, (*program)?))
            })
            .collect();
        started.sort_unstable();
        for (_, program) in started.iter().skip(MAX_PROGRAMS) {
            let members = programs.remove(&Some(program)).unwrap_or_default();
            programs.entry(None).or_default().extend(members);
        }
        if started.len() <= 1 {
            let members = programs.into_values().flatten().collect();
            programs = BTreeMap::from([(None, members)]);
        }
        for (program, members) in programs {
            let (name, named_by) = name_of(place, candidates[members[0]].container);
            services.push(Service {
                name: name.map(|name| match program {
                    Some(program) => format!("{name}:{}", program_name(program)),
                    None => name,
                }),
                members,
                named_by,
                is_part: program.is_some(),
            });
        }
    }
    for service in &mut services {
        service.members.sort_unstable();
    }
    if services.len() > MAX_SERVICES {
        left_out.services = services.len() - MAX_SERVICES;
        // Users can start any number of processes, so theirs come last.
        services.sort_by_cached_key(|service| {
            let members = || service.members.iter();
            let is_persons = service.named_by == NamedBy::Itself
                && members().any(|at| candidates[*at].origin.uid >= FIRST_PERSON);
            let listens = members().any(|at| listening.contains(at));
            let start_ns = members().map(|at| candidates[*at].process.start_ns).min();
            (is_persons, service.is_part, Reverse(listens), start_ns)
        });
        services.truncate(MAX_SERVICES);
    }
    (services, left_out)
}

impl Place {
    /// All of its processes are one service.
    fn is_one_service(&self) -> bool {
        match self {
            Self::Elsewhere | Self::Runtime | Self::Guest(_) => false,
            Self::UserUnit(_) | Self::Unit(_) | Self::UserContainer(_) | Self::Container { .. } => {
                true
            }
        }
    }
}

/// The processes of the machine, of container runtimes, and of Kubernetes.
fn system_processes(
    candidates: &[Candidate<'_>],
    by_tgid: &HashMap<u32, usize>,
    listening: &HashSet<usize>,
) -> BTreeSet<usize> {
    // Containers in which nothing listens, with the number of their processes.
    let mut silent: HashMap<&Place, Option<usize>> = HashMap::new();
    for (at, candidate) in candidates.iter().enumerate() {
        let count = silent.entry(&candidate.origin.place).or_insert(Some(0));
        *count = count.map(|count| count + 1);
        if listening.contains(&at) {
            *count = None;
        }
    }
    let mut found = BTreeSet::new();
    for (at, candidate) in candidates.iter().enumerate() {
        let origin = candidate.origin;
        let is_system = match &origin.place {
            Place::Runtime => true,
            Place::Unit(unit) => {
                let name = unit_name(unit);
                let has_prefix = |prefix: &&str| name.starts_with(*prefix);
                RUNTIME_UNITS.contains(&name)
                    || SYSTEM_UNITS.contains(&name)
                    || SYSTEM_UNIT_PREFIXES.iter().any(has_prefix)
            }
            Place::Container { in_kubernetes, .. } => match candidate.container {
                Some(ContainerName::Pod(pod)) => is_system_pod(pod),
                Some(ContainerName::Plain(_)) => false,
                None => {
                    let count = silent.get(&origin.place).copied().flatten();
                    // Where the kubelet's links are out of sight, only the program is known. A workload that takes this name
                    // hides nothing but itself.
                    let is_pause =
                        || *in_kubernetes && count == Some(1) && origin.exe.ends_with("pause");
                    candidate.is_sandbox && count.is_some() || is_pause()
                }
            },
            _ => false,
        };
        if is_system {
            found.insert(at);
        }
        // The parent of a container's first process is the runtime's: containerd-shim, conmon.
        let is_container =
            |place: &Place| matches!(place, Place::Container { .. } | Place::UserContainer(_));
        if is_container(&origin.place)
            && let Some(parent) = by_tgid.get(&candidate.process.parent)
            && candidates[*parent].process.tgid != INIT
            && !is_container(&candidates[*parent].origin.place)
            && !listening.contains(parent)
        {
            found.insert(*parent);
        }
    }
    found
}

fn is_system_pod(pod: &Pod) -> bool {
    SYSTEM_CONTAINERS.contains(&(&*pod.namespace, &*pod.container))
}

/// The name of the service of a place. `None`: what the service calls itself.
fn name_of(place: &Place, container: Option<&ContainerName>) -> (Option<String>, NamedBy) {
    match place {
        Place::Container { id, .. } => match container {
            Some(ContainerName::Pod(pod)) => (Some(pod.service_name()), NamedBy::Pod),
            Some(ContainerName::Plain(name)) => (Some(name.clone()), NamedBy::Container),
            None => (
                Some(id.chars().take(SHORT_ID).collect()),
                NamedBy::Container,
            ),
        },
        Place::Unit(unit) => (Some(unit_name(unit).to_owned()), NamedBy::Unit),
        // The user chose this name.
        Place::UserUnit(unit) => (Some(unit_name(unit).to_owned()), NamedBy::Itself),
        Place::UserContainer(_) | Place::Elsewhere | Place::Runtime | Place::Guest(_) => {
            (None, NamedBy::Itself)
        }
    }
}

/// The name of a program, within the name of its container or unit.
fn program_name(exe: &Path) -> String {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let plain: String = name
        .chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect();
    bounded(&plain, MAX_PROGRAM_NAME)
}

#[cfg(test)]
mod tests;
