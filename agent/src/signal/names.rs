//! The directory name of each service, and who owns it. Pure.
//!
//! Of several services with one name, the most trusted has the plain name: one that is named by the configuration, by Kubernetes, by a
//! container runtime or by systemd, then one that runs as root, as a system user, and last any other, because there anybody can take
//! any name. A name stays with its owner (a container, a unit or a user) while the service restarts: no other owner gets it unless it
//! is trusted more.

use std::{cmp::Reverse, collections::BTreeMap};

use serde::{Deserialize, Serialize};

use crate::sample::{NamedBy, Owner, Target, TargetId};

/// The directory of the pages that are named after Kubernetes containers.
pub const PODS: &str = "pods";

/// Between a name and a PID: another instance of the service that has the plain name, or a service of another user.
const INSTANCE: char = '@';
const STRANGER: char = '~';
/// Longest directory name, bytes. With a PID it is shorter than the longest file name, 255. Names of containers in Kubernetes have up
/// to 200 bytes if the pod's name fits in a host name.
const MAX_BYTES: usize = 200;
/// Lowest id of a person's user, /etc/login.defs.
const FIRST_PERSON: u32 = 1_000;
/// How long a name is kept for its owner after its service has exited, ns: a rollback or a repair may take that long.
const CLAIM_NS: u64 = 3_600_000_000_000;

/// How far the name of a service is trusted; a lower value is trusted more. Compares the giver of the name, then the
/// owner of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Trust(u8, u8);

/// The first number for services that named themselves, and the second one for programs of a container or unit: only a part of
/// their name is their own choice.
const ITSELF: u8 = 4;
const PART: u8 = 2;

impl Trust {
    pub fn of(target: &Target) -> Self {
        let workload = &target.workload;
        let by_owner = match &workload.owner {
            Owner::User(0) => 0,
            Owner::User(..FIRST_PERSON) | Owner::Unit(_) => 1,
            // Inside a container, processes have any user id.
            Owner::User(_) | Owner::Container(_) => PART + 1,
        };
        match workload.named_by {
            NamedBy::Pod | NamedBy::Container | NamedBy::Unit if workload.is_part => {
                Self(ITSELF, PART)
            }
            NamedBy::Configuration => Self(0, by_owner),
            NamedBy::Pod => Self(1, 0),
            NamedBy::Container => Self(2, 0),
            NamedBy::Unit => Self(3, 0),
            NamedBy::Itself => Self(ITSELF, by_owner),
        }
    }

    /// The whole name was given by the configuration, an orchestrator, a runtime or systemd.
    fn is_given(self) -> bool {
        self.0 < ITSELF
    }
}

/// The owner of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    owner: Owner,
    trust: Trust,
    /// When the service was last seen, CLOCK_BOOTTIME, ns.
    seen_ns: u64,
    /// The service. It may change its user: most daemons start as root.
    #[serde(skip)]
    target: TargetId,
}

impl Claim {
    /// Whether this is another instance of the service that has the name.
    fn has_instance(&self, target: &Target) -> bool {
        match (&self.owner, &target.workload.owner) {
            (Owner::Container(a), Owner::Container(b)) if a != b => {
                self.trust.is_given() && Trust::of(target).is_given()
            }
            (owner, own) => owner == own,
        }
    }
}

/// The owners of names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims(BTreeMap<String, Claim>);

impl Claims {
    /// Returns a directory name per service: the plain name for the owner of that name, else the name with a mark and
    /// the PID. `@PID`: another instance of the same owner, or of another container that was given the same name.
    /// `~PID`: any other service. Neither mark occurs in plain names. Of several services of one owner, the oldest that
    /// listens has the plain name.
    pub fn names<'a>(
        &mut self,
        targets: impl Iterator<Item = &'a Target>,
        now_ns: u64,
    ) -> BTreeMap<TargetId, String> {
        self.0
            .retain(|_, claim| now_ns.saturating_sub(claim.seen_ns) <= CLAIM_NS);
        let mut by_name: BTreeMap<String, Vec<&Target>> = BTreeMap::new();
        for target in targets {
            by_name.entry(plain(&target.name)).or_default().push(target);
        }
        let mut names = BTreeMap::new();
        for (name, same) in by_name {
            let holder = self.holder(&name, &same).map(|target| target.id);
            for target in same.iter().filter(|target| Some(target.id) == holder) {
                self.claim(&name, target, now_ns);
                names.insert(target.id, name.clone());
            }
            let claim = self.0.get(&name);
            for target in same.iter().filter(|target| Some(target.id) != holder) {
                let is_instance = claim.is_some_and(|claim| claim.has_instance(target));
                let mark = if is_instance { INSTANCE } else { STRANGER };
                names.insert(target.id, format!("{name}{mark}{}", target.pid));
            }
        }
        names
    }

    /// The service that has the plain name, if any: it may be kept for an owner whose service restarts.
    fn holder<'a>(&self, name: &str, same: &[&'a Target]) -> Option<&'a Target> {
        let best = same.iter().map(|target| Trust::of(target)).min()?;
        let claim = self.0.get(name).filter(|claim| claim.trust <= best);
        let may_hold = |target: &&&Target| match claim {
            Some(claim) => target.workload.owner == claim.owner || target.id == claim.target,
            None => Trust::of(target) == best,
        };
        let holders = same.iter().filter(may_hold);
        holders
            .min_by_key(|target| (!target.workload.listens, target.start_ns, target.pid))
            .copied()
    }

    fn claim(&mut self, name: &str, target: &Target, now_ns: u64) {
        let owner = &target.workload.owner;
        let former = self.0.get(name).filter(|claim| claim.owner == *owner);
        let trust = Trust::of(target);
        let claim = Claim {
            owner: owner.clone(),
            trust: former.map_or(trust, |former| former.trust.min(trust)),
            seen_ns: now_ns,
            target: target.id,
        };
        self.0.insert(name.to_owned(), claim);
    }

    /// Keeps at most `max` claims. Drops those of the owners that have the most: no owner takes the room of others.
    pub fn limit(&mut self, max: usize) {
        while self.0.len() > max {
            let mut by_owner: BTreeMap<&Owner, usize> = BTreeMap::new();
            for claim in self.0.values() {
                *by_owner.entry(&claim.owner).or_default() += 1;
            }
            let most = by_owner.iter().max_by_key(|(_, count)| **count);
            let Some((owner, count)) = most.map(|(owner, count)| ((*owner).clone(), *count)) else {
                return;
            };
            let second = by_owner
                .iter()
                .filter(|(other, _)| **other != &owner)
                .map(|(_, count)| *count)
                .max();
            // Down to as many as the next owner has, but at least one.
            let spare = count.saturating_sub(second.unwrap_or(0)).max(1);
            let drop = spare.min(self.0.len() - max);
            let mut order: Vec<(Reverse<Trust>, u64, String)> = self
                .0
                .iter()
                .filter(|(_, claim)| claim.owner == owner)
                .map(|(name, claim)| (Reverse(claim.trust), claim.seen_ns, name.clone()))
                .collect();
            order.sort_unstable();
            for (_, _, name) in order.into_iter().take(drop) {
                self.0.remove(&name);
            }
        }
    }

    /// Whether these are the same owners, whenever they were seen.
    pub fn has_same_owners(&self, other: &Self) -> bool {
        let pairs = || self.0.iter().zip(&other.0);
        self.0.len() == other.0.len()
            && pairs().all(|((name, claim), (other_name, other_claim))| {
                name == other_name && claim.owner == other_claim.owner
            })
    }
}

/// Turns a service name into a valid path component: other characters than letters, digits, `-`, `_` and `.` become `_`.
pub fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let plain: String = name
        .chars()
        .take(MAX_BYTES)
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect();
    // Neither hidden, nor empty, nor one of our own files.
    let is_ours = [".lock", ".sock", ".page"]
        .iter()
        .any(|end| plain.ends_with(end));
    if plain == PODS {
        return format!("_{plain}");
    }
    if plain.is_empty() || plain.starts_with('.') || is_ours {
        let kept: String = plain
            .chars()
            .skip(usize::from(plain.starts_with('.')))
            .collect();
        return format!("_{kept}")
            .replace(".lock", "_lock")
            .replace(".sock", "_sock")
            .replace(".page", "_page");
    }
    plain
}

/// The directory of a service, given its name or the name of its directory (with its PID if names collide).
pub fn directory_of(name: &str) -> String {
    match split_mark(name) {
        Some((before, mark, pid)) => format!("{}{mark}{pid}", plain(before)),
        None => plain(name),
    }
}

/// The plain name, the mark and the PID of a directory name with a mark.
pub fn split_mark(name: &str) -> Option<(&str, char, u32)> {
    let (at, mark) = name.rmatch_indices([INSTANCE, STRANGER]).next()?;
    let pid = name[at + 1..].parse().ok()?;
    Some((&name[..at], mark.chars().next()?, pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Workload;

    fn target(id: TargetId, name: &str, pid: u32, start_ns: u64) -> Target {
        Target {
            id,
            name: name.to_owned(),
            pid,
            start_ns,
            ..Target::default()
        }
    }

    const SECOND: u64 = 1_000_000_000;

    fn of_user(uid: u32, target: Target) -> Target {
        owned(Owner::User(uid), NamedBy::Itself, target)
    }

    fn owned(owner: Owner, named_by: NamedBy, target: Target) -> Target {
        let workload = Workload {
            owner,
            named_by,
            ..Workload::default()
        };
        Target { workload, ..target }
    }

    #[test]
    fn the_oldest_service_of_an_owner_keeps_a_shared_name() {
        let shops = [
            target(1, "shop", 30, 9),
            target(2, "shop", 20, 5),
            target(3, "cart", 40, 1),
        ];
        let names = Claims::default().names(shops.iter(), SECOND);
        assert_eq!(names[&1], "shop@30");
        assert_eq!(names[&2], "shop");
        assert_eq!(names[&3], "cart");
    }

    #[test]
    fn an_older_process_of_another_user_does_not_mask_a_service() {
        let stranger = of_user(1000, target(1, "shop", 20, 1));
        let shop = of_user(33, target(2, "shop", 30, 9));
        let mut claims = Claims::default();
        let alone = claims.names([&stranger].into_iter(), SECOND);
        assert_eq!(alone[&1], "shop");
        let names = claims.names([&stranger, &shop].into_iter(), 2 * SECOND);
        assert_eq!((&*names[&1], &*names[&2]), ("shop~20", "shop"));
    }

    #[test]
    fn a_stranger_does_not_get_the_name_while_the_service_restarts() {
        let shop = of_user(1001, target(1, "shop", 30, 9));
        let stranger = of_user(1000, target(2, "shop", 20, 1));
        let mut claims = Claims::default();
        claims.names([&shop].into_iter(), SECOND);
        let names = claims.names([&shop, &stranger].into_iter(), 2 * SECOND);
        assert_eq!((&*names[&1], &*names[&2]), ("shop", "shop~20"));
        // The service has exited.
        let names = claims.names([&stranger].into_iter(), 60 * SECOND);
        assert_eq!(names[&2], "shop~20");
        // A later agent knows the owners.
        let text = serde_json::to_string(&claims).unwrap();
        let mut claims: Claims = serde_json::from_str(&text).unwrap();
        let again = of_user(1001, target(3, "shop", 50, 70 * SECOND));
        let names = claims.names([&stranger, &again].into_iter(), 80 * SECOND);
        assert_eq!((&*names[&2], &*names[&3]), ("shop~20", "shop"));
        // It is not kept for ever.
        let later = 80 * SECOND + CLAIM_NS + 1;
        let names = claims.names([&stranger].into_iter(), later);
        assert_eq!(names[&2], "shop");
    }

    #[test]
    fn a_service_that_gives_up_its_privileges_keeps_its_name() {
        let mut claims = Claims::default();
        claims.names([&target(1, "shop", 30, 9)].into_iter(), SECOND);
        let shop = of_user(112, target(1, "shop", 30, 9));
        let stranger = of_user(33, target(2, "shop", 20, 1));
        for now in 2..4 {
            let names = claims.names([&shop, &stranger].into_iter(), now * SECOND);
            assert_eq!((&*names[&1], &*names[&2]), ("shop", "shop~20"));
        }
        // Its user is the owner from now on.
        let again = of_user(112, target(3, "shop", 40, 99));
        let names = claims.names([&again, &stranger].into_iter(), 4 * SECOND);
        assert_eq!((&*names[&3], &*names[&2]), ("shop", "shop~20"));
    }

    #[test]
    fn names_from_orchestrator_unit_and_configuration_outrank_those_of_processes() {
        let root = of_user(0, target(1, "web", 10, 1));
        let unit = Owner::Unit("web.service".to_owned());
        let unit = owned(unit, NamedBy::Unit, target(2, "web", 20, 2));
        let container = Owner::Container("web".to_owned());
        let container = owned(container, NamedBy::Container, target(3, "web", 30, 3));
        let pod = Owner::Container("a_b_web".to_owned());
        let pod = owned(pod, NamedBy::Pod, target(4, "web", 40, 4));
        let configured = owned(
            Owner::User(1000),
            NamedBy::Configuration,
            target(5, "web", 50, 5),
        );
        // In a container, any process can be root and call itself anything.
        let inside = owned(
            Owner::Container("x".to_owned()),
            NamedBy::Itself,
            target(6, "web", 60, 0),
        );
        let order = [&inside, &root, &unit, &container, &pod, &configured];
        let mut claims = Claims::default();
        for known in 1..=order.len() {
            let names = claims.names(order[..known].iter().copied(), SECOND);
            let holder = names.iter().find(|(_, name)| *name == "web");
            assert_eq!(holder.map(|(id, _)| *id), Some(order[known - 1].id));
        }
    }

    #[test]
    fn services_of_other_users_are_no_instances_of_a_service() {
        let container = |id: TargetId, name: &str| {
            let owner = Owner::Container(name.to_owned());
            owned(owner, NamedBy::Configuration, target(id, "shop", id, 1))
        };
        let services = [
            container(1, "a"),
            container(2, "b"),
            of_user(1000, target(3, "shop", 3, 0)),
            // In a container, any process can call itself anything.
            owned(
                Owner::Container("c".to_owned()),
                NamedBy::Itself,
                target(4, "shop", 4, 0),
            ),
        ];
        let names = Claims::default().names(services.iter(), SECOND);
        let names: Vec<&str> = names.values().map(String::as_str).collect();
        assert_eq!(names, ["shop", "shop@2", "shop~3", "shop~4"]);
        for name in names {
            assert_eq!(directory_of(name), name);
        }
        assert_eq!(directory_of("a~b@7"), "a_b@7");
        assert_eq!(directory_of("a~b"), "a_b");
    }

    #[test]
    fn a_program_of_a_container_does_not_get_the_name_of_another_container() {
        let part = |id, start_ns| {
            let owner = Owner::Container("shop".to_owned());
            let mut part = owned(
                owner,
                NamedBy::Container,
                target(id, "shop:web_1", id, start_ns),
            );
            part.workload.is_part = true;
            part
        };
        let owner = Owner::Container("shop_web_1".to_owned());
        let whole = owned(
            owner,
            NamedBy::Container,
            target(2, "shop_web_1", 2, SECOND),
        );
        let root = of_user(0, target(3, "shop_web_1", 3, 2 * SECOND));
        let person = of_user(1000, target(4, "shop_web_1", 4, 0));
        let mut claims = Claims::default();
        let part = part(1, 0);
        for (services, holder) in [
            (vec![&part, &person], 1),
            (vec![&part, &person, &root], 3),
            (vec![&part, &person, &root, &whole], 2),
        ] {
            let names = claims.names(services.into_iter(), SECOND);
            let found = names.iter().find(|(_, name)| *name == "shop_web_1");
            assert_eq!(found.map(|(id, _)| *id), Some(holder));
        }
    }

    #[test]
    fn an_owner_with_many_claims_takes_no_room_of_others() {
        let mut claims = Claims::default();
        let many: Vec<Target> = (0..50)
            .map(|id| of_user(1000, target(id, &format!("storm-{id}"), id, 1)))
            .collect();
        // An older claim of another person, whose name is trusted no more.
        let shop = of_user(1001, target(99, "shop", 99, 1));
        claims.names([&shop].into_iter(), SECOND);
        claims.names(many.iter(), 2 * SECOND);
        claims.limit(3);
        assert_eq!(claims.0.len(), 3);
        assert!(claims.0.contains_key("shop"));
        // Among owners of one claim each, the least trusted go.
        claims.limit(1);
        assert_eq!(claims.0.len(), 1);
    }

    #[test]
    fn a_hostile_name_stays_inside_the_directory() {
        for hostile in [
            "../../etc",
            "/",
            ".",
            "..",
            "",
            "a\0b",
            "a\nb",
            "ü/..",
            "agent.sock",
            "adapters.lock",
            "agent.page",
            "pods",
            &"x".repeat(300),
        ] {
            let name = plain(hostile);
            assert!(!name.is_empty() && name.len() <= MAX_BYTES, "{name}");
            assert!(
                !name.starts_with('.') && !name.contains(['/', '@', '~']),
                "{name}"
            );
            assert!(
                !name.ends_with(".sock") && !name.ends_with(".lock") && !name.ends_with(".page"),
                "{name}"
            );
            assert_ne!(name, PODS);
            assert!(name.is_ascii() && !name.contains(['\0', '\n']), "{name}");
        }
    }
}
