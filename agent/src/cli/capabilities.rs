//! The capabilities of this process, and how to get a missing one.
#![forbid(unsafe_code)]

use rustix::{
    process::geteuid,
    thread::{CapabilitySet, CapabilitySets, capabilities, no_new_privs, set_capabilities},
};

use crate::target::namespaces::{self, is_initial};

/// A capability: its name as Kubernetes and podman write it, and its bit.
pub(super) type Capability = (&'static str, CapabilitySet);

/// Without these no eBPF program loads.
pub(super) const LOADING: [Capability; 2] = [
    ("BPF", CapabilitySet::BPF),
    ("PERFMON", CapabilitySet::PERFMON),
];
/// The agent needs all of these.
pub(super) const REQUIRED: [Capability; 3] = [
    ("BPF", CapabilitySet::BPF),
    ("PERFMON", CapabilitySet::PERFMON),
    ("SYS_PTRACE", CapabilitySet::SYS_PTRACE),
];
/// CAP_SYS_ADMIN implies the capabilities that were later split off from it.
const SPLIT_OFF: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON);

/// The effective capabilities of this process, and whether they count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) set: CapabilitySet,
    pub(super) is_root: bool,
    /// In the host's user namespace. In another one, capabilities do not count for eBPF, nor for the host's processes.
    pub(super) in_host_namespace: bool,
    /// `no_new_privs` is set: neither file capabilities nor set-user-id programs add privileges.
    pub(super) no_new_privileges: bool,
}

impl Held {
    /// Makes all permitted capabilities effective, and returns them. The binary's file capabilities lack the effective flag, so
    /// at first they are only permitted. With the flag, the kernel would not start the binary if one of them is not allowed.
    pub(super) fn raise() -> Self {
        let sets = capabilities(None).unwrap_or(CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        });
        let raised = CapabilitySets {
            effective: sets.permitted,
            ..sets
        };
        let is_raised = set_capabilities(None, raised).is_ok();
        Self {
            set: if is_raised {
                sets.permitted
            } else {
                sets.effective
            },
            is_root: geteuid().is_root(),
            // Without /proc this is not known; later steps report that it is missing.
            in_host_namespace: is_initial(namespaces::USER).unwrap_or(true),
            no_new_privileges: no_new_privs().unwrap_or(false),
        }
    }

    pub(super) fn has(&self, wanted: CapabilitySet) -> bool {
        let is_implied = SPLIT_OFF.contains(wanted) && self.set.contains(CapabilitySet::SYS_ADMIN);
        self.set.contains(wanted) || is_implied
    }

    /// The names of those that are not held.
    pub(super) fn missing(&self, wanted: &[Capability]) -> Vec<&'static str> {
        let missing = wanted.iter().filter(|(_, bit)| !self.has(*bit));
        missing.map(|(name, _)| *name).collect()
    }
}

#[cfg(test)]
impl Held {
    /// Those of a process of root, in the host's user namespace.
    pub(super) fn of_root(set: CapabilitySet) -> Self {
        Self {
            set,
            is_root: true,
            in_host_namespace: true,
            no_new_privileges: false,
        }
    }
}

/// The names as the kernel's documentation writes them.
pub(super) fn listed(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
    names.join(", ")
}

/// How to add capabilities in Kubernetes, podman and systemd.
pub(super) fn to_add(names: &[&str]) -> String {
    format!(
        "`securityContext: {{capabilities: {{add: [{}]}}}}`; podman: `--cap-add {}`; systemd: `CapabilityBoundingSet=` and, with a \
         `User=`, `AmbientCapabilities=` with {}",
        names.join(", "),
        names.join(","),
        listed(names).replace(',', "")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let all = SPLIT_OFF | CapabilitySet::SYS_PTRACE;
        assert!(Held::of_root(all).missing(&REQUIRED).is_empty());
        for (name, bit) in REQUIRED {
            assert_eq!(Held::of_root(all - bit).missing(&REQUIRED), [name]);
        }
    }

    #[test]
    fn sys_admin_implies_what_was_split_off_from_it() {
        let admin = Held::of_root(CapabilitySet::SYS_ADMIN);
        assert!(admin.missing(&LOADING).is_empty());
        assert_eq!(admin.missing(&REQUIRED), ["SYS_PTRACE"]);
    }

    #[test]
    fn a_remedy_is_given_for_each_kind_of_deployment() {
        let text = to_add(&["BPF", "PERFMON"]);
        for part in [
            "add: [BPF, PERFMON]",
            "--cap-add BPF,PERFMON",
            "with CAP_BPF CAP_PERFMON",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
