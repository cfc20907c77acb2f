//! The directory name of each service. Pure.

use std::collections::BTreeMap;

use crate::sample::{Target, TargetId};

/// The directory of the pages that are named after Kubernetes containers.
pub const PODS: &str = "pods";

/// Longest directory name, in bytes.
const MAX_BYTES: usize = 64;

/// A directory name per service. If names collide, the oldest service keeps the plain name; the others get `@PID` appended,
/// where `@` occurs in no plain name.
pub fn names<'a>(targets: impl Iterator<Item = &'a Target>) -> BTreeMap<TargetId, String> {
    let mut by_name: BTreeMap<String, Vec<&Target>> = BTreeMap::new();
    for target in targets {
        by_name.entry(plain(&target.name)).or_default().push(target);
    }
    let mut names = BTreeMap::new();
    for (name, mut same) in by_name {
        same.sort_unstable_by_key(|target| (target.start_ns, target.pid));
        let mut same = same.into_iter();
        if let Some(oldest) = same.next() {
            names.insert(oldest.id, name.clone());
        }
        names.extend(same.map(|target| (target.id, format!("{name}@{}", target.pid))));
    }
    names
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

/// The directory of a service, given its name or the name of its directory (with `@PID` if names collide).
pub fn directory_of(name: &str) -> String {
    match name.rsplit_once('@') {
        Some((name, pid)) if pid.parse::<u32>().is_ok() => format!("{}@{pid}", plain(name)),
        _ => plain(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(id: TargetId, name: &str, pid: u32, start_ns: u64) -> Target {
        Target {
            id,
            name: name.to_owned(),
            pid,
            start_ns,
            ..Target::default()
        }
    }

    #[test]
    fn the_oldest_service_keeps_a_shared_name() {
        let shops = [
            target(1, "shop", 30, 9),
            target(2, "shop", 20, 5),
            target(3, "cart", 40, 1),
        ];
        let names = names(shops.iter());
        assert_eq!(names[&1], "shop@30");
        assert_eq!(names[&2], "shop");
        assert_eq!(names[&3], "cart");
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
                !name.starts_with('.') && !name.contains(['/', '@']),
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
