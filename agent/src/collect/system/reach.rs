//! Finds the directories of control groups through any mount that the agent can reach: its own, that of the first process of its
//! pid namespace, and that of the target itself.
//!
//! The mounts of a target are its owner's choice. So a directory counts only if its file system is a control group's and its
//! inode number is the id that the kernel reports for the group. A path in another mount namespace may lead through a file
//! system that never answers: a search runs in a thread that is left behind if it does not end in time.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    thread,
    time::Duration,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, fstatfs, openat, statx};

use super::{
    kernel_groups::{Controller, Level},
    mounts::{CgroupDirs, points},
};
use crate::collect::paths::read_text;

/// `CGROUP_SUPER_MAGIC` and `CGROUP2_SUPER_MAGIC`, include/uapi/linux/magic.h.
const CGROUP_V1: i64 = 0x0027_e0eb;
const CGROUP_V2: i64 = 0x6367_7270;
/// Maximum bytes read of a process's mountinfo.
const MAX_MOUNTINFO: u64 = 256 * 1024;
/// A search takes well under a millisecond; beyond this the file system does not answer.
const SEARCH_TIMEOUT: Duration = Duration::from_millis(50);
/// Maximum number of searches that are left behind. At that number none is started.
const MAX_STUCK: usize = 4;
/// Maximum number of groups whose directories are kept.
const MAX_KNOWN: usize = 512;
/// Number of polls after which a failed search is repeated: every ten seconds with two polls a second.
const RETRY_POLLS: u64 = 20;

/// A group: its hierarchy and id.
type Key = (Controller, u64);

/// The directories found so far.
#[derive(Default)]
pub(super) struct Reach {
    known: HashMap<Key, Known>,
    /// Searches that did not end in time, by the process that they searched.
    stuck: Vec<(u32, Receiver<Option<Vec<OwnedFd>>>)>,
    poll: u64,
    /// A directory was closed: its descriptor number may be used again.
    closed: bool,
}

struct Known {
    /// The group's directory and those of its parents up to the mount point; `None`: not found.
    dirs: Option<Vec<OwnedFd>>,
    searched: u64,
    used: u64,
}

impl Reach {
    /// Begins a poll: forgets the groups that the previous one did not ask for. Returns whether descriptors were closed since.
    pub(super) fn begin_poll(&mut self) -> bool {
        let previous = self.poll;
        self.poll += 1;
        let before = self.known.len();
        self.known.retain(|_, known| known.used == previous);
        self.stuck
            .retain(|(_, search)| matches!(search.try_recv(), Err(TryRecvError::Empty)));
        std::mem::take(&mut self.closed) || self.known.len() < before
    }

    /// The directories of the group at the head of `chain`, as paths through descriptors that stay open until the next poll.
    pub(super) fn dirs(
        &mut self,
        pid: u32,
        controller: Controller,
        chain: &[Level],
    ) -> Option<CgroupDirs> {
        let own = chain.first()?;
        let key = (controller, own.id);
        let poll = self.poll;
        let retry = |known: &Known| {
            known.dirs.is_none() && poll.saturating_sub(known.searched) >= RETRY_POLLS
        };
        if self.known.get(&key).is_none_or(retry) {
            if self.known.len() >= MAX_KNOWN && !self.known.contains_key(&key) {
                return None;
            }
            let dirs = self.search_in_time(pid, controller, chain);
            let found = Known {
                dirs,
                searched: poll,
                used: poll,
            };
            self.closed |= self.known.insert(key, found).is_some();
        }
        let known = self.known.get_mut(&key)?;
        known.used = poll;
        let dirs = known.dirs.as_ref()?.iter();
        let dirs = dirs.map(|dir| PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())));
        Some(CgroupDirs {
            dirs: dirs.collect(),
            unified: own.hierarchy == 0,
        })
    }

    fn search_in_time(
        &mut self,
        pid: u32,
        controller: Controller,
        chain: &[Level],
    ) -> Option<Vec<OwnedFd>> {
        if self.stuck.len() >= MAX_STUCK || self.stuck.iter().any(|(stuck, _)| *stuck == pid) {
            return None;
        }
        let (found, search) = sync_channel(1);
        let chain = chain.to_vec();
        thread::Builder::new()
            .name("cgroup-search".to_owned())
            .spawn(move || {
                // An error means that nobody waits for the result any more.
                let _ = found.send(search_for(pid, controller, &chain));
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

/// Searches the agent's own mounts, then those of the first process, then those of the target.
fn search_for(pid: u32, controller: Controller, chain: &[Level]) -> Option<Vec<OwnedFd>> {
    let unified = chain.first()?.hierarchy == 0;
    let places = [
        ("/proc/self/mountinfo".to_owned(), PathBuf::from("/")),
        (
            "/proc/1/mountinfo".to_owned(),
            PathBuf::from("/proc/1/root"),
        ),
        (
            format!("/proc/{pid}/mountinfo"),
            PathBuf::from(format!("/proc/{pid}/root")),
        ),
    ];
    places.iter().find_map(|(mountinfo, root)| {
        let text = read_text(mountinfo, MAX_MOUNTINFO);
        points(&text, controller.name(), unified)
            .into_iter()
            .find_map(|point| {
                let below = point.strip_prefix("/").unwrap_or(&point);
                directories(&root.join(below), chain)
            })
    })
}

/// The directories below a mount point, verified: that of the first group of the chain, then its parents.
fn directories(point: &Path, chain: &[Level]) -> Option<Vec<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = openat(CWD, point, flags, Mode::empty()).ok()?;
    let id = id(&top)?;
    let level = chain.iter().position(|level| level.id == id)?;
    let mut dirs = vec![top];
    for level in chain.get(..level)?.iter().rev() {
        let name = level.name.as_deref()?;
        let dir = openat(dirs.last()?, name, flags, Mode::empty()).ok()?;
        if self::id(&dir) != Some(level.id) {
            return None;
        }
        dirs.push(dir);
    }
    dirs.reverse();
    Some(dirs)
}

/// The inode number of a directory, if its file system is one of control groups.
fn id(dir: &OwnedFd) -> Option<u64> {
    let magic = fstatfs(dir).ok()?.f_type;
    if ![CGROUP_V1, CGROUP_V2].contains(&magic) {
        return None;
    }
    let found = statx(
        dir.as_fd(),
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::INO,
    );
    found.ok().map(|found| found.stx_ino)
}
