//! Control groups of a sample, by their path. A node has hundreds of services, each with a group.

use crate::{
    hash::{HashMap, HashSet},
    sample::{Cgroup, HiddenFact, Sample},
};

/// The control groups by path.
pub(super) fn by_path(sample: &Sample) -> HashMap<&str, &Cgroup> {
    let groups = sample.cgroups.iter();
    groups.map(|group| (group.path.as_str(), group)).collect()
}

/// The paths of the control groups of which the agent cannot see this fact.
pub(super) fn hiding(sample: &Sample, fact: HiddenFact) -> HashSet<&str> {
    let hidden = sample.hidden.iter().filter(|hidden| hidden.fact == fact);
    hidden.map(|hidden| hidden.cgroup.as_str()).collect()
}
