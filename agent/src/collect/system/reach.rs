//! Finds the directories of control groups through any mount that the agent can reach: its own mounts, those of the first process
//! of its pid namespace, and those of the target itself.
//!
//! The mounts of another container are its owner's choice. So a directory there counts only if it is on the file system of the
//! hierarchy and its inode number is the id that the kernel reports for the group, and a file in it is opened only if nothing is
//! mounted over it. A path in another container may lead through a file system that never answers: a search there runs in a
//! thread that is abandoned if it does not end in time.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxFlags, openat, statx},
    io::Errno,
};

use super::{
    MAX_GROUPS,
    kernel_groups::{Controller, Level},
    mounts::{CgroupDirs, Point, points},
};
use crate::collect::paths::mountinfo;

/// A search takes well under a millisecond; beyond this the file system does not answer.
const SEARCH_TIMEOUT: Duration = Duration::from_millis(50);
/// Maximum time of all searches of one poll: many slow ones must not hold up the agent. The others are made in later polls.
const MAX_SEARCHING: Duration = Duration::from_millis(500);
/// Maximum number of abandoned searches that have not ended. At that number no further search is started.
const MAX_STUCK: usize = 4;
/// Maximum number of groups whose directories are kept: those of [`MAX_GROUPS`] services in each of the four hierarchies.
const MAX_KNOWN: usize = 4 * MAX_GROUPS;
/// Maximum number of these groups found in the mounts of others: each takes one of the agent's usually 1,024 file descriptors.
const MAX_FOREIGN: usize = 384;
/// Number of polls after which a failed search is repeated: every ten seconds with two polls a second.
const RETRY_POLLS: u64 = 20;
/// The agent's open files, each as a link.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A group: its hierarchy and id.
type Key = (u32, u64);

/// The directories found so far.
#[derive(Default)]
pub(super) struct Reach {
    known: HashMap<Key, Known>,
    /// Searches that did not end in time, by the process that they searched.
    stuck: Vec<(u32, Receiver<Option<Foreign>>)>,
    /// The agent's own /proc/self/mountinfo, if this poll has read it.
    mountinfo: Option<String>,
    poll: u64,
    /// Time that this poll has spent on searches in the mounts of others.
    searching: Duration,
}

struct Known {
    found: Option<Found>,
    /// The poll from which on a failed search is repeated, and the one in which it was last used.
    retry: u64,
    used: u64,
}

/// The directories of a group and of its parents up to the mount point.
enum Found {
    /// In the agent's own mounts.
    Own(Vec<PathBuf>),
    /// In those of another container.
    Foreign(Foreign),
}

struct Foreign {
    /// The group's own directory.
    own: OwnedFd,
    /// Number of parents up to the mount point.
    parents: usize,
}

impl Reach {
    /// Begins a poll: forgets the groups that the previous one did not ask for. Returns whether any was forgotten: the number
    /// of its descriptor may be reused, so paths that contain it are stale.
    pub(super) fn begin_poll(&mut self) -> bool {
        let previous = self.poll;
        self.poll += 1;
        self.mountinfo = None;
        self.searching = Duration::ZERO;
        let before = self.known.len();
        self.known.retain(|_, known| known.used == previous);
        self.stuck
            .retain(|(_, search)| matches!(search.try_recv(), Err(TryRecvError::Empty)));
        self.known.len() < before
    }

    /// The directories of the group at the head of `chain`. They stay open until the next poll; [`open`] opens files in them.
    pub(super) fn dirs(
        &mut self,
        pid: u32,
        controller: Controller,
        chain: &[Level],
    ) -> Option<CgroupDirs> {
        let own = chain.first()?;
        let key = (own.hierarchy, own.id);
        let poll = self.poll;
        let is_due = |known: &Known| known.found.is_none() && poll >= known.retry;
        if self.known.get(&key).is_none_or(is_due) {
            if self.known.len() >= MAX_KNOWN && !self.known.contains_key(&key) {
                return None;
            }
            let mut found = self.in_own_mounts(controller, chain).map(Found::Own);
            if found.is_none() {
                if self.searching >= MAX_SEARCHING || self.foreign() >= MAX_FOREIGN {
                    return None;
                }
                let begin = Instant::now();
                found = self
                    .search_in_time(pid, controller, chain)
                    .map(Found::Foreign);
                self.searching += begin.elapsed();
            }
            // One that was only held up, as on a busy machine, has ended by the next poll. Once only: one that is always late would
            // hold up each poll.
            let is_late =
                self.stuck.iter().any(|(stuck, _)| *stuck == pid) && !self.known.contains_key(&key);
            let found = Known {
                found,
                retry: poll + if is_late { 1 } else { RETRY_POLLS },
                used: poll,
            };
            self.known.insert(key, found);
        }
        let known = self.known.get_mut(&key)?;
        known.used = poll;
        Some(CgroupDirs {
            dirs: known.found.as_ref()?.dirs(),
            unified: own.hierarchy == 0,
        })
    }

    /// Number of groups that are in the mounts of others.
    fn foreign(&self) -> usize {
        let found = self.known.values().map(|known| &known.found);
        found
            .filter(|found| matches!(found, Some(Found::Foreign(_))))
            .count()
    }

    /// The agent's own mounts always answer.
    fn in_own_mounts(&mut self, controller: Controller, chain: &[Level]) -> Option<Vec<PathBuf>> {
        let text = self.mountinfo.get_or_insert_with(|| mountinfo("self"));
        let unified = chain.first()?.hierarchy == 0;
        points(text, controller.name(), unified)
            .into_iter()
            .find_map(|point| {
                let (_, parents) = directory(&point.path, &point, chain)?;
                let below = chain.get(..parents)?.iter().rev();
                let mut dirs = vec![point.path];
                for level in below {
                    let dir = dirs.last()?.join(level.name.as_deref()?);
                    dirs.push(dir);
                }
                dirs.reverse();
                Some(dirs)
            })
    }

    fn search_in_time(
        &mut self,
        pid: u32,
        controller: Controller,
        chain: &[Level],
    ) -> Option<Foreign> {
        if self.stuck.len() >= MAX_STUCK || self.stuck.iter().any(|(stuck, _)| *stuck == pid) {
            return None;
        }
        let (found, search) = sync_channel(1);
        let chain = chain.to_vec();
        thread::Builder::new()
            .name("cgroup-search".to_owned())
            .spawn(move || {
                // An error means that nobody waits for the result any more.
                let _ = found.send(in_foreign_mounts(pid, controller, &chain));
            })
            .ok()?;
        match search.recv_timeout(SEARCH_TIMEOUT) {
            Ok(found) => found,
            Err(RecvTimeoutError::Timeout) => {
                self.stuck.push((pid, search));
                None
            }
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }
}

impl Found {
    fn dirs(&self) -> Vec<PathBuf> {
        match self {
            Self::Own(dirs) => dirs.clone(),
            Self::Foreign(Foreign { own, parents }) => {
                let own = Path::new(DESCRIPTORS).join(own.as_raw_fd().to_string());
                let parent = |dir: &PathBuf| Some(dir.join(".."));
                std::iter::successors(Some(own), parent)
                    .take(parents + 1)
                    .collect()
            }
        }
    }
}

/// Opens a file of a group. In another container, a file that is mounted over it is refused: it may be of any kind, and may never
/// answer.
///
/// # Errors
/// If there is no such file, or something else is in its place.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let Ok(below) = path.strip_prefix(DESCRIPTORS) else {
        return File::open(path);
    };
    let mut parts = below.components();
    let dir: PathBuf = parts.by_ref().take(1).collect();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(CWD, Path::new(DESCRIPTORS).join(dir), flags, Mode::empty())?;
    // Found first, and read only once it is known to be in the same mount. openat2(2) does both in one call, but a seccomp filter
    // cannot check its flags, so the running agent may not use it.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(&dir, parts.as_path(), flags, Mode::empty())?;
    let mount = |file: &OwnedFd| -> rustix::io::Result<u64> {
        let found = status(file, StatxFlags::MNT_ID)?;
        let is_known = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        is_known.then_some(found.stx_mnt_id).ok_or(Errno::NOSYS)
    };
    if mount(&found)? != mount(&dir)? {
        return Err(Errno::XDEV.into());
    }
    File::open(Path::new(DESCRIPTORS).join(found.as_raw_fd().to_string()))
}

/// Searches the mounts of the first process, then those of the target.
fn in_foreign_mounts(pid: u32, controller: Controller, chain: &[Level]) -> Option<Foreign> {
    let unified = chain.first()?.hierarchy == 0;
    [1, pid].into_iter().find_map(|pid| {
        let text = mountinfo(pid);
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        points(&text, controller.name(), unified)
            .iter()
            .find_map(|point| {
                let below = point.path.strip_prefix("/").unwrap_or(&point.path);
                let (own, parents) = directory(&root.join(below), point, chain)?;
                Some(Foreign { own, parents })
            })
    })
}

/// The directory of the first group of the chain below a mount point, and the number of its parents up to there; all verified.
/// `path`: where the agent finds the mount point.
fn directory(path: &Path, point: &Point, chain: &[Level]) -> Option<(OwnedFd, usize)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut dir = openat(CWD, path, flags, Mode::empty()).ok()?;
    let id = id(&dir, point.device)?;
    let parents = chain.iter().position(|level| level.id == id)?;
    for level in chain.get(..parents)?.iter().rev() {
        let name = level.name.as_deref()?;
        dir = openat(&dir, name, flags, Mode::empty()).ok()?;
        if self::id(&dir, point.device) != Some(level.id) {
            return None;
        }
    }
    Some((dir, parents))
}

/// The inode number of a directory, if it is on this device.
fn id(dir: &OwnedFd, device: (u32, u32)) -> Option<u64> {
    let found = status(dir, StatxFlags::INO).ok()?;
    ((found.stx_dev_major, found.stx_dev_minor) == device).then_some(found.stx_ino)
}

/// Without asking a server: it may be a network file system.
fn status(file: &OwnedFd, wanted: StatxFlags) -> rustix::io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(file.as_fd(), "", flags, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_of_a_mount_is_opened_through_a_descriptor() {
        let root = File::open("/").unwrap();
        let root = Path::new(DESCRIPTORS).join(root.as_raw_fd().to_string());
        // /proc is mounted over a directory of the root.
        assert_eq!(
            open(&root.join("proc/stat")).unwrap_err().raw_os_error(),
            Some(Errno::XDEV.raw_os_error())
        );
        let proc = File::open("/proc").unwrap();
        let proc = Path::new(DESCRIPTORS).join(proc.as_raw_fd().to_string());
        assert!(open(&proc.join("stat")).is_ok());
        let below = proc.join(std::process::id().to_string());
        assert!(open(&below.join("../stat")).is_ok());
        assert!(open(&proc.join("../etc/passwd")).is_err());
        // A link.
        assert!(open(&proc.join("mounts")).is_err());
        assert!(open(Path::new("/proc/mounts")).is_ok());
    }
}
