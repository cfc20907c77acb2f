//! The processes of a control group.
#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

/// Pids in a cgroup and below. A relative path is resolved in every mounted hierarchy.
pub(super) fn pids_in_cgroup(path: &Path) -> HashSet<u32> {
    let mut pids = HashSet::new();
    for directory in cgroup_directories(path) {
        collect_pids(&directory, 0, &mut pids);
    }
    pids
}

/// The directories that a cgroup path may refer to.
fn cgroup_directories(path: &Path) -> Vec<PathBuf> {
    const MOUNT: &str = "/sys/fs/cgroup";
    if path.starts_with(MOUNT) {
        return vec![path.to_owned()];
    }
    let relative = path.strip_prefix("/").unwrap_or(path);
    let mut roots = vec![PathBuf::from(MOUNT)];
    // cgroup v1: each subdirectory is one hierarchy.
    if !Path::new(MOUNT).join("cgroup.controllers").exists()
        && let Ok(entries) = fs::read_dir(MOUNT)
    {
        roots.extend(entries.flatten().map(|entry| entry.path()));
    }
    roots
        .into_iter()
        .map(|root| root.join(relative))
        .filter(|directory| directory.is_dir())
        .collect()
}

fn collect_pids(directory: &Path, depth: u32, pids: &mut HashSet<u32>) {
    const MAX_DEPTH: u32 = 16;
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    if depth < MAX_DEPTH
        && let Ok(entries) = fs::read_dir(directory)
    {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                collect_pids(&entry.path(), depth + 1, pids);
            }
        }
    }
}
