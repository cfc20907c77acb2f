//! Which services may be drained: full ones, but never all instances of a group at once. Pure.

use std::collections::BTreeSet;

use crate::config::signal::Group;

/// The level `full`, as the page encodes it.
const FULL: u32 = 3;

/// The groups, and the services that are drained now.
#[derive(Debug)]
pub struct DrainPolicy {
    groups: Vec<Group>,
    drained: BTreeSet<String>,
}

impl DrainPolicy {
    pub fn new(groups: Vec<Group>) -> Self {
        Self {
            groups,
            drained: BTreeSet::new(),
        }
    }

    /// Whether this service is drained, or reported as not ready, now. `level` returns the level of a running service, else
    /// `None`. A service outside of all groups is never drained: no other instance is known to take its work.
    pub fn is_drained(&mut self, name: &str, level: impl Fn(&str) -> Option<u32>) -> bool {
        let Some(group) = self
            .groups
            .iter()
            .find(|group| group.targets.iter().any(|target| target == name))
        else {
            return false;
        };
        let running: Vec<(&String, u32)> = group
            .targets
            .iter()
            .filter_map(|target| Some((target, level(target)?)))
            .collect();
        // Only running services count towards `min_ready`.
        let max_drained = running.len().saturating_sub(group.min_ready);
        let full: Vec<&String> = running
            .iter()
            .filter(|(_, level)| *level >= FULL)
            .map(|(target, _)| *target)
            .collect();
        // A drained service stays drained while it is full: alternating would only move the load around.
        let (mut drained, waiting): (Vec<&String>, Vec<&String>) = full
            .into_iter()
            .partition(|target| self.drained.contains(*target));
        drained.extend(waiting);
        drained.truncate(max_drained);
        for target in &group.targets {
            self.drained.remove(target);
        }
        self.drained.extend(drained.into_iter().cloned());
        self.drained.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(min_ready: usize) -> DrainPolicy {
        let targets = ["a", "b", "c"].map(str::to_owned).to_vec();
        DrainPolicy::new(vec![Group { targets, min_ready }])
    }

    fn drained(policy: &mut DrainPolicy, full: &[&str]) -> String {
        let level = |name: &str| Some(if full.contains(&name) { FULL } else { 2 });
        ["a", "b", "c", "other"]
            .iter()
            .filter(|name| policy.is_drained(name, level))
            .copied()
            .collect()
    }

    #[test]
    fn at_least_min_ready_instances_stay_in_service_however_full_they_are() {
        assert_eq!(drained(&mut policy(1), &["a", "b", "c"]), "ab");
        assert_eq!(drained(&mut policy(2), &["a", "b", "c"]), "a");
        assert_eq!(drained(&mut policy(3), &["a", "b", "c"]), "");
        assert_eq!(drained(&mut policy(0), &["a", "b", "c"]), "abc");
        assert_eq!(drained(&mut policy(1), &["other"]), "", "not in a group");
        assert_eq!(drained(&mut policy(1), &[]), "", "critical is not full");
    }

    #[test]
    fn a_drained_service_stays_drained_until_it_is_no_longer_full() {
        let mut policy = policy(2);
        assert_eq!(drained(&mut policy, &["c"]), "c");
        assert_eq!(drained(&mut policy, &["a", "c"]), "c");
        assert_eq!(drained(&mut policy, &["a"]), "a");
        assert_eq!(drained(&mut policy, &[]), "");
    }

    #[test]
    fn only_running_services_count_towards_min_ready() {
        let mut policy = policy(1);
        let level = |name: &str| (name == "a").then_some(FULL);
        assert!(!policy.is_drained("a", level), "the only running one");
        let level = |name: &str| (name != "c").then_some(FULL);
        assert!(policy.is_drained("a", level));
        assert!(!policy.is_drained("b", level));
    }
}
