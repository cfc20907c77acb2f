//! Where the cgroup hierarchies are mounted, and the directories of a process in them. Pure.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

/// Maximum number of levels read between a cgroup and the root.
const MAX_LEVELS: usize = 16;

/// The mounted hierarchies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mounts {
    /// cgroup v2.
    unified: Option<Mount>,
    /// cgroup v1, by controller.
    controllers: HashMap<String, Mount>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// The cgroup at the mount point.
    root: PathBuf,
    point: PathBuf,
}

/// A process's directory in one hierarchy, followed by its parents up to the mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CgroupDirs {
    pub(super) dirs: Vec<PathBuf>,
    pub(super) unified: bool,
}

/// Maximum number of mount points of one hierarchy that are tried.
const MAX_POINTS: usize = 8;

/// A mount point of a hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Point {
    pub(super) path: PathBuf,
    /// Major and minor number of the hierarchy's file system. No other file system has the same.
    pub(super) device: (u32, u32),
}

/// The mount points of a hierarchy in a mountinfo: of the unified one, or of the v1 hierarchy of a controller.
pub(super) fn points(text: &str, controller: &str, unified: bool) -> Vec<Point> {
    let lines = text.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let is_wanted = match after.next()? {
            "cgroup2" => unified,
            "cgroup" if !unified => {
                let options = after.nth(1)?;
                options.split(',').any(|option| option == controller)
            }
            _ => false,
        };
        let mut before = before.split(' ').skip(2);
        let (major, minor) = before.next()?.split_once(':')?;
        let point = Point {
            device: (major.parse().ok()?, minor.parse().ok()?),
            path: unescape(before.nth(1)?),
        };
        is_wanted.then_some(point)
    });
    lines.take(MAX_POINTS).collect()
}

impl Mounts {
    /// Parses /proc/self/mountinfo.
    pub(super) fn parse(text: &str) -> Self {
        let mut mounts = Self::default();
        for line in text.lines() {
            let Some((before, after)) = line.split_once(" - ") else {
                continue;
            };
            let mut before = before.split(' ').skip(3);
            let (Some(root), Some(point)) = (before.next(), before.next()) else {
                continue;
            };
            let mount = Mount {
                root: unescape(root),
                point: unescape(point),
            };
            let mut after = after.split(' ');
            match after.next() {
                Some("cgroup2") => {
                    mounts.unified.get_or_insert(mount);
                }
                Some("cgroup") => {
                    let options = after.nth(1).unwrap_or_default();
                    for controller in ["cpu", "cpuacct", "memory", "blkio"] {
                        if options.split(',').any(|option| option == controller) {
                            mounts
                                .controllers
                                .entry(controller.to_owned())
                                .or_insert_with(|| mount.clone());
                        }
                    }
                }
                _ => {}
            }
        }
        mounts
    }

    /// The directories of a controller for a process: in the v1 hierarchy that the controller is bound to, else in v2.
    /// `membership`: the process's /proc/PID/cgroup.
    pub(super) fn cgroup_dirs(&self, controller: &str, membership: &str) -> Option<CgroupDirs> {
        let Some(mount) = self.controllers.get(controller) else {
            return self.unified_dirs(membership);
        };
        let path = memberships(membership)
            .find(|(_, controllers, _)| controllers.split(',').any(|name| name == controller))?;
        mount.cgroup_dirs(path.2, false)
    }

    /// The directories in the v2 hierarchy.
    pub(super) fn unified_dirs(&self, membership: &str) -> Option<CgroupDirs> {
        let (_, _, path) = memberships(membership).find(|(hierarchy, ..)| *hierarchy == "0")?;
        self.unified.as_ref()?.cgroup_dirs(path, true)
    }
}

impl Mount {
    fn cgroup_dirs(&self, path: &str, unified: bool) -> Option<CgroupDirs> {
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        // A cgroup outside the agent's cgroup namespace has a path such as "/../other", which cannot be reached.
        let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        if !below.components().all(is_plain) {
            return None;
        }
        // Not `join`, which appends a slash if `below` is empty.
        let dir: PathBuf = self.point.components().chain(below.components()).collect();
        let mut dirs: Vec<PathBuf> = dir
            .ancestors()
            .take_while(|dir| dir.starts_with(&self.point))
            .map(Path::to_owned)
            .collect();
        // The outermost levels are cut off: quotas are set on pods and containers, the innermost ones.
        dirs.truncate(MAX_LEVELS);
        Some(CgroupDirs { dirs, unified })
    }
}

impl CgroupDirs {
    /// The process's own directory, without parents.
    pub(super) fn own(self) -> Option<PathBuf> {
        self.dirs.into_iter().next()
    }
}

/// Lines of /proc/PID/cgroup: hierarchy, controllers, path.
fn memberships(text: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        Some((fields.next()?, fields.next()?, fields.next()?))
    })
}

/// Decodes octal escapes: mountinfo writes a blank as `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match (code, after.get(3..)) {
            (Some(code), Some(after)) => {
                out.push(char::from(code));
                rest = after;
            }
            _ => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    PathBuf::from(out)
}
