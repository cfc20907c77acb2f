//! The pages of all services, each in its directory.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::Write as _,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
    process::geteuid,
};

use super::{
    encode::{Published, encode, encode_none},
    names::names,
    page::{self, PageFile},
    pressure::Pressure,
};
use crate::{collect::boot_ns, sample::Notice};

/// A directory of ours, and not one that a link leads to.
const ENTER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
const ENTERED_BY_ALL: Mode = Mode::from_raw_mode(0o755);
/// A page that could not be made is tried again after this long, ns.
const AGAIN_NS: u64 = 10_000_000_000;
/// The page of a service that is gone stays for so long, so that one that is started anew finds its readers, ns.
const KEEP_NS: u64 = 60_000_000_000;
/// The tick stretches to half a second within its budget; what is longer was an interruption, ns.
const SLOWEST_NS: u64 = 1_000_000_000;
/// Held by the agent that writes the pages; says its pid.
const LOCK: &str = "agent.lock";

/// The directory that is published in.
pub struct Pages {
    directory: OwnedFd,
    path: PathBuf,
    ttl_ns: u64,
    most: usize,
    by_name: BTreeMap<String, Slot>,
    /// What could not be published, by name: why, and when it is tried again.
    failed: BTreeMap<String, Failed>,
    /// Folders without a page, the oldest first.
    empty: VecDeque<String>,
    beyond_bound: usize,
    told_bound: bool,
    told_shared: BTreeSet<String>,
    notices: Vec<Notice>,
    /// Held as long as this value lives.
    _lock: OwnedFd,
}

struct Slot {
    page: PageFile,
    seen_ns: u64,
    is_open: bool,
}

struct Failed {
    why: String,
    again_ns: u64,
}

impl Pages {
    /// Makes the directory where it is missing. One agent publishes in one directory.
    pub fn open(path: &Path, ttl_ns: u64, most: usize) -> Result<Self> {
        let directory = own_directory(path)?;
        let lock = lock(&directory, path)?;
        let mut pages = Self {
            directory,
            path: path.to_owned(),
            ttl_ns,
            most,
            by_name: BTreeMap::new(),
            failed: BTreeMap::new(),
            empty: VecDeque::new(),
            beyond_bound: 0,
            told_bound: false,
            told_shared: BTreeSet::new(),
            notices: Vec::new(),
            _lock: lock,
        };
        pages.take_over();
        Ok(pages)
    }

    /// Where the page of a service is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name).join("page")
    }

    /// Pages that are written now, those that could not be, and those beyond the bound.
    pub fn counts(&self) -> (usize, usize, usize) {
        let open = self.by_name.values().filter(|slot| slot.is_open).count();
        (open, self.failed.len(), self.beyond_bound)
    }

    /// What is published now, so long after the last time, and for how long it holds: a tick that comes late must not look like
    /// an agent that is gone.
    pub fn now(&self, interval_ns: u64) -> Published {
        Published {
            at_ns: boot_ns(),
            ttl_ns: self.ttl_ns.max(interval_ns.min(SLOWEST_NS) * 3),
        }
    }

    /// Publishes one page for each pressure; answers their names, in the same order.
    pub fn publish(&mut self, pressures: &[Pressure], published: Published) -> Vec<String> {
        let names = names(pressures.iter().map(|pressure| &*pressure.target));
        let names: Vec<String> = pressures
            .iter()
            .map(|pressure| names.get(&pressure.target.id).cloned().unwrap_or_default())
            .collect();
        self.beyond_bound = names.len().saturating_sub(self.most);
        if self.beyond_bound > 0 && !self.told_bound {
            self.told_bound = true;
            self.tell(
                "too_many_pages",
                format!(
                    "{} services have no page: there are more than max_pages = {}",
                    self.beyond_bound, self.most
                ),
            );
        }
        for name in names.iter().take(self.most) {
            self.tell_shared(name);
        }
        for (pressure, name) in pressures.iter().zip(&names).take(self.most) {
            if let Some(slot) = self.slot(name, published.at_ns) {
                let wake = slot.page.wake_for(pressure.level as u32);
                slot.page.write(&encode(pressure, published, wake));
                slot.seen_ns = published.at_ns;
                slot.is_open = true;
            }
        }
        self.close_gone(published);
        names
    }

    /// What is to be said of the pages since the last time.
    pub fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// There is nothing to say any more: no pressure, from now on.
    pub fn finish(&mut self) {
        let published = Published {
            at_ns: boot_ns(),
            ttl_ns: self.ttl_ns,
        };
        for slot in self.by_name.values_mut() {
            let wake = slot.page.wake_for(0);
            slot.page.write(&encode_none(published, wake));
        }
    }

    fn slot(&mut self, name: &str, now_ns: u64) -> Option<&mut Slot> {
        if !self.by_name.contains_key(name) {
            if self
                .failed
                .get(name)
                .is_some_and(|failed| now_ns < failed.again_ns)
            {
                return None;
            }
            self.make_room();
            match self.make(name) {
                Ok(page) => {
                    self.failed.remove(name);
                    let slot = Slot {
                        page,
                        seen_ns: now_ns,
                        is_open: true,
                    };
                    self.by_name.insert(name.to_owned(), slot);
                }
                Err(error) => self.fail(name, &format!("{error:#}"), now_ns),
            }
        }
        self.by_name.get_mut(name)
    }

    fn enter(&self, name: &str) -> rustix::io::Result<OwnedFd> {
        fs::openat(&self.directory, name, ENTER, Mode::empty())
    }

    fn make(&mut self, name: &str) -> Result<PageFile> {
        match fs::mkdirat(&self.directory, name, ENTERED_BY_ALL) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("cannot make the directory"),
        }
        let directory = self.enter(name).context("cannot open the directory")?;
        check_owner(&directory)?;
        // Whatever the umask was.
        fs::fchmod(&directory, ENTERED_BY_ALL).context("cannot let others enter the directory")?;
        let page = PageFile::open(directory.as_fd())?;
        self.empty.retain(|empty| empty != name);
        Ok(page)
    }

    /// Of services that are gone, the one that is for longest gives up its page when there are too many.
    fn make_room(&mut self) {
        while self.by_name.len() >= self.most {
            let closed = self.by_name.iter().filter(|(_, slot)| !slot.is_open);
            let Some((name, _)) = closed.min_by_key(|(_, slot)| slot.seen_ns) else {
                return;
            };
            let name = name.clone();
            self.remove(&name);
        }
    }

    /// The page alone: a container may have the folder mounted, and would not see another one of its name.
    fn remove(&mut self, name: &str) {
        self.by_name.remove(name);
        if let Ok(directory) = self.enter(name) {
            page::remove(directory.as_fd());
        }
        self.empty.push_back(name.to_owned());
        while self.empty.len() > self.most
            && let Some(name) = self.empty.pop_front()
        {
            // One with a file of somebody else's in it stays.
            let _ = fs::unlinkat(&self.directory, name, AtFlags::REMOVEDIR);
        }
    }

    /// A service without a page of the name that it goes by, since an older one has it: said once.
    fn tell_shared(&mut self, name: &str) {
        let Some((shared, _)) = name.split_once('@') else {
            return;
        };
        if self.told_shared.len() < self.most && self.told_shared.insert(shared.to_owned()) {
            let (theirs, own) = (self.path(shared), self.path(name));
            self.tell(
                "shared_name",
                format!(
                    "several services are called {shared}: {} is of the oldest alone, and another one's is {}; tell them apart by `called` or OTEL_SERVICE_NAME",
                    theirs.display(),
                    own.display()
                ),
            );
        }
    }

    fn fail(&mut self, name: &str, why: &str, now_ns: u64) {
        let again_ns = now_ns + AGAIN_NS;
        let before = self.failed.insert(
            name.to_owned(),
            Failed {
                why: why.to_owned(),
                again_ns,
            },
        );
        if before.is_none_or(|before| before.why != why) {
            let path = self.path(name);
            self.tell("no_page", format!("no page at {}: {why}", path.display()));
        }
    }

    fn tell(&mut self, code: &str, text: String) {
        self.notices.push(Notice {
            code: code.to_owned(),
            text,
        });
    }

    /// The services of these pages are no longer there: no pressure, and after a while no page.
    fn close_gone(&mut self, published: Published) {
        let now_ns = published.at_ns;
        self.failed
            .retain(|_, failed| now_ns < failed.again_ns + AGAIN_NS);
        let mut old = Vec::new();
        for (name, slot) in &mut self.by_name {
            if slot.seen_ns < now_ns && slot.is_open {
                let wake = slot.page.wake_for(0);
                slot.page.write(&encode_none(published, wake));
                slot.is_open = false;
            }
            if now_ns.saturating_sub(slot.seen_ns) > KEEP_NS {
                old.push(name.clone());
            }
        }
        for name in old {
            self.remove(&name);
        }
    }

    /// Pages of the agent before us: gone on with where their services are still there, and else removed in time.
    fn take_over(&mut self) {
        let Ok(entries) = fs::Dir::read_from(&self.directory) else {
            return;
        };
        let now_ns = boot_ns();
        let names = entries
            .flatten()
            .filter(|entry| entry.file_type() == FileType::Directory);
        let names: Vec<String> = names
            .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
            .filter(|name| !name.starts_with('.'))
            .take(self.most)
            .collect();
        for name in names {
            let has_page = self.enter(&name).is_ok_and(|directory| {
                fs::statat(&directory, page::NAME, AtFlags::SYMLINK_NOFOLLOW).is_ok()
            });
            if has_page && let Ok(page) = self.make(&name) {
                self.by_name.insert(
                    name,
                    Slot {
                        page,
                        seen_ns: now_ns,
                        is_open: false,
                    },
                );
            } else if !has_page {
                self.empty.push_back(name);
            }
        }
    }
}

/// The directory, made where it is missing; refused where somebody else could put pages or sockets into it.
pub fn own_directory(path: &Path) -> Result<OwnedFd> {
    let made = std::fs::DirBuilder::new().recursive(true).create(path);
    made.with_context(|| format!("cannot make the directory {}", path.display()))?;
    let directory = fs::open(path, ENTER, Mode::empty())
        .with_context(|| format!("cannot open the directory {}", path.display()))?;
    check_owner(&directory)
        .with_context(|| format!("cannot use the directory {}", path.display()))?;
    Ok(directory)
}

fn check_owner(directory: &OwnedFd) -> Result<()> {
    let stat = fs::fstat(directory).context("cannot look at it")?;
    let own = geteuid().as_raw();
    if stat.st_uid != own {
        bail!(
            "it belongs to user {}, not to the agent's user {own}: remove it, or name another one (`directory` in [signal])",
            stat.st_uid
        );
    }
    if stat.st_mode & 0o022 != 0 {
        bail!("others may write to it, and so put other pages in our place: `chmod go-w` it");
    }
    Ok(())
}

fn lock(directory: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = fs::openat(directory, LOCK, flags, Mode::from_raw_mode(0o644))
        .with_context(|| format!("cannot open {}/{LOCK}", path.display()))?;
    match fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let holder = std::fs::read_to_string(path.join(LOCK)).unwrap_or_default();
            bail!(
                "another agent ({}) signals there already: stop it, or name another directory for this one (`directory` in [signal])",
                holder.trim()
            );
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot lock {}/{LOCK}", path.display()));
        }
    }
    // Who holds it is told to the next one that wants it; without room for that the lock is as good.
    let _ = fs::ftruncate(&lock, 0);
    let mut file = std::fs::File::from(lock);
    let _ = write!(file, "process {}", std::process::id());
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_service_that_is_gone_stays_and_so_many_of_them_do() {
        let path = std::env::temp_dir().join(format!("tailback-pages-{}", std::process::id()));
        let mut pages = Pages::open(&path, 1_000_000_000, 2).unwrap();
        for name in ["a", "b", "c"] {
            assert!(pages.slot(name, 1).is_some());
            pages.remove(name);
            let folder = path.join(name);
            assert!(folder.is_dir() && !folder.join("page").exists());
        }
        assert!(!path.join("a").exists(), "two at most");
        // Whoever has it mounted sees the page of the service that is started anew.
        let mounted = std::fs::File::open(path.join("b")).unwrap();
        assert!(pages.slot("b", 2).is_some());
        assert!(fs::statat(&mounted, page::NAME, AtFlags::empty()).is_ok());
        assert_eq!(pages.empty, ["c"]);
        drop(pages);
        std::fs::remove_dir_all(&path).unwrap();
    }
}
