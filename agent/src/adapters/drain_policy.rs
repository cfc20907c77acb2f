//! Who may be taken out of service: never all instances at once. Pure.

use std::collections::BTreeSet;

use crate::config::signal::Group;

const FULL: u32 = 3;

/// Those who are taken out of service, as last decided.
#[derive(Debug)]
pub struct DrainPolicy {
    groups: Vec<Group>,
    out: BTreeSet<String>,
}

impl DrainPolicy {
    pub fn new(groups: Vec<Group>) -> Self {
        Self {
            groups,
            out: BTreeSet::new(),
        }
    }

    /// Whether this service is to be drained, or called unready, now. `level` tells the level of each service that is there.
    /// One that no group names is not: whether another one could do its work is not known here.
    pub fn is_out(&mut self, name: &str, level: impl Fn(&str) -> Option<u32>) -> bool {
        let Some(group) = self
            .groups
            .iter()
            .find(|group| group.targets.iter().any(|target| target == name))
        else {
            return false;
        };
        let there: Vec<(&String, u32)> = group
            .targets
            .iter()
            .filter_map(|target| Some((target, level(target)?)))
            .collect();
        // One that is not there does no work: it is none of those that stay.
        let most = there.len().saturating_sub(group.min_ready);
        let full: Vec<&String> = there
            .iter()
            .filter(|(_, level)| *level >= FULL)
            .map(|(target, _)| *target)
            .collect();
        // Those that are out stay so while they are full: to take turns would send the load round in circles.
        let (mut out, waiting): (Vec<&String>, Vec<&String>) = full
            .into_iter()
            .partition(|target| self.out.contains(*target));
        out.extend(waiting);
        out.truncate(most);
        for target in &group.targets {
            self.out.remove(target);
        }
        self.out.extend(out.into_iter().cloned());
        self.out.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(min_ready: usize) -> DrainPolicy {
        let targets = ["a", "b", "c"].map(str::to_owned).to_vec();
        DrainPolicy::new(vec![Group { targets, min_ready }])
    }

    fn out(floor: &mut DrainPolicy, full: &[&str]) -> String {
        let level = |name: &str| Some(if full.contains(&name) { FULL } else { 2 });
        ["a", "b", "c", "other"]
            .iter()
            .filter(|name| floor.is_out(name, level))
            .copied()
            .collect()
    }

    #[test]
    fn a_floor_of_instances_stays_in_service_however_full_all_are() {
        assert_eq!(out(&mut floor(1), &["a", "b", "c"]), "ab");
        assert_eq!(out(&mut floor(2), &["a", "b", "c"]), "a");
        assert_eq!(out(&mut floor(3), &["a", "b", "c"]), "");
        assert_eq!(out(&mut floor(0), &["a", "b", "c"]), "abc");
        assert_eq!(out(&mut floor(1), &["other"]), "", "of no group");
        assert_eq!(out(&mut floor(1), &[]), "", "critical is not full");
    }

    #[test]
    fn those_who_are_out_stay_out_until_they_are_no_longer_full() {
        let mut floor = floor(2);
        assert_eq!(out(&mut floor, &["c"]), "c");
        assert_eq!(out(&mut floor, &["a", "c"]), "c");
        assert_eq!(out(&mut floor, &["a"]), "a");
        assert_eq!(out(&mut floor, &[]), "");
    }

    #[test]
    fn one_that_is_not_there_is_none_of_those_that_stay() {
        let mut floor = floor(1);
        let level = |name: &str| (name == "a").then_some(FULL);
        assert!(!floor.is_out("a", level), "the last one");
        let level = |name: &str| (name != "c").then_some(FULL);
        assert!(floor.is_out("a", level));
        assert!(!floor.is_out("b", level));
    }
}
