//! The pages of all services, each in a directory of its own.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::CStr,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
};

use super::{
    directory::{Directory, LOCK, read_own_file},
    encode::{Published, encode, encode_none},
    files::{Files, OwnFiles, StateFile, enter},
    learned::Learned,
    names::{Claims, PODS, Trust, split_mark},
    page::{self, PageFile, check_own_file},
    pressure::Pressure,
};
use crate::{collect::boot_ns, sample::Notice};

/// Delay before creating a page is retried after a failure, ns.
const RETRY_NS: u64 = 10_000_000_000;
/// How long the page of an exited service is kept, ns: a restarted service reuses it, with its readers still attached.
const RETENTION_NS: u64 = 60_000_000_000;
/// Longest sampling delay that extends the time to live, ns. The CPU budget stretches the interval to 500 ms at most; a
/// longer one is an interruption.
const MAX_DELAY_NS: u64 = 1_000_000_000;
/// The agent's own page, which is renewed with every sample. No service's name ends in `.page`.
pub const HEARTBEAT: &CStr = c"agent.page";
/// Shortest time to live of the agent's own page, ns. A shorter one would restart an agent that a busy machine holds up.
const MIN_HEARTBEAT_TTL_NS: u64 = 10_000_000_000;
/// Its time to live is at least this many sampling intervals.
const HEARTBEAT_INTERVALS: u64 = 3;
/// Time between two checks whether the directory is in its place, ns.
const PLACE_INTERVAL_NS: u64 = 1_000_000_000;
/// Maximum number of directories of a former agent that are taken over or removed, here and in `pods`.
const MAX_FORMER_PAGES: usize = 65_536;
/// Longest time between two writes of the owners of names, ns: the file says when each service was last seen.
const CLAIMS_INTERVAL_NS: u64 = 60_000_000_000;
/// Shortest time between two writes, ns: services may start and exit with every sample.
const MIN_CLAIMS_INTERVAL_NS: u64 = 1_000_000_000;
/// How often the lock is tried: a small part of the time to live, within which an agent takes over from another.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// Longest text in the lock file, bytes: `process PID`.
const MAX_HOLDER_BYTES: u64 = 32;

/// The directory of all pages.
pub struct Pages {
    directory: Directory,
    /// Creates and removes what is below.
    files: Box<dyn Files>,
    ttl_ns: u64,
    max_pages: usize,
    by_name: BTreeMap<String, Slot>,
    /// The agent's own page.
    heartbeat: PageFile,
    heartbeat_ttl_ns: u64,
    /// Who owns which name, and as it was last saved.
    claims: Claims,
    saved_claims: Claims,
    claims_saved_ns: u64,
    /// Pages that could not be created, by name.
    failed: BTreeMap<String, Failed>,
    /// Directories without a page, oldest first.
    empty: VecDeque<String>,
    over_limit: usize,
    reported_limit: bool,
    reported_unsaved: bool,
    reported_replaced: bool,
    /// When the place of the directory is checked again.
    place_due_ns: u64,
    reported_shared: bool,
    /// Services whose page does not have their plain name.
    renamed: usize,
    notices: Vec<Notice>,
    /// Locked while this value lives.
    _lock: OwnedFd,
}

/// Counts of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    pub written: usize,
    /// Pages that could not be created.
    pub failed: usize,
    /// Services without a page, because there are too many.
    pub over_limit: usize,
    /// Services whose page does not have their plain name.
    pub renamed: usize,
}

struct Slot {
    page: PageFile,
    seen_ns: u64,
    is_open: bool,
}

struct Failed {
    why: String,
    retry_ns: u64,
}

impl Pages {
    /// Creates the directory if it is missing, and locks it: only one agent may publish in a directory. Waits this long for
    /// another one to end.
    pub fn open(path: &Path, ttl_ns: u64, max_pages: usize, wait: Duration) -> Result<Self> {
        let directory = Directory::open(path)?;
        let lock = lock(&directory, wait)?;
        let own = directory.fd.try_clone();
        let files = OwnFiles(own.context("cannot use the directory of pages")?);
        let heartbeat = PageFile::open_as(directory.fd.as_fd(), HEARTBEAT)
            .with_context(|| format!("cannot publish in {}", directory.path.display()))?;
        let mut pages = Self {
            heartbeat,
            heartbeat_ttl_ns: MIN_HEARTBEAT_TTL_NS,
            claims: Claims::default(),
            saved_claims: Claims::default(),
            claims_saved_ns: 0,
            directory,
            files: Box::new(files),
            ttl_ns,
            max_pages,
            by_name: BTreeMap::new(),
            failed: BTreeMap::new(),
            empty: VecDeque::new(),
            over_limit: 0,
            reported_limit: false,
            reported_unsaved: false,
            reported_replaced: false,
            place_due_ns: 0,
            reported_shared: false,
            renamed: 0,
            notices: Vec::new(),
            _lock: lock,
        };
        pages.load_claims();
        pages.take_over();
        if pages.directory.is_below_shared() {
            let text = format!(
                "pages are in {}, because other users may write to {} or own it: mount the volume read-only into containers that only read",
                pages.directory.path.display(),
                path.display()
            );
            pages.notify("directory_shared", text);
        }
        Ok(pages)
    }

    /// From now on, `files` creates and removes what is below the directory.
    pub fn set_files(&mut self, files: Box<dyn Files>) {
        self.files = files;
    }

    /// Renews the agent's own page, which says that it samples every `interval_ns`.
    pub fn beat(&mut self, interval_ns: u64) {
        self.heartbeat_ttl_ns = MIN_HEARTBEAT_TTL_NS.max(HEARTBEAT_INTERVALS * interval_ns);
        let published = Published {
            at_ns: boot_ns(),
            ttl_ns: self.heartbeat_ttl_ns,
        };
        let wake = self.heartbeat.wake_for(0);
        self.heartbeat.write(&encode_none(published, wake));
    }

    /// Another time to live and number of pages, from the next publication on.
    pub fn set_limits(&mut self, ttl_ns: u64, max_pages: usize) {
        self.ttl_ns = ttl_ns;
        self.reported_limit &= max_pages == self.max_pages;
        self.max_pages = max_pages;
    }

    /// The directory in use.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The path of a service's page.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path.join(name).join("page")
    }

    pub fn counts(&self) -> PageCounts {
        let is_of_service = |name: &str| !name.contains('/');
        let open = self
            .by_name
            .iter()
            .filter(|(name, slot)| slot.is_open && is_of_service(name))
            .count();
        let failed = self.failed.keys().filter(|name| is_of_service(name));
        PageCounts {
            written: open,
            failed: failed.count(),
            over_limit: self.over_limit,
            renamed: self.renamed,
        }
    }

    /// The timestamp and time to live of the next publication, `interval_ns` after the previous one. A late sample extends the
    /// time to live, so that it does not look like a dead agent.
    pub fn now(&self, interval_ns: u64) -> Published {
        Published {
            at_ns: boot_ns(),
            ttl_ns: self.ttl_ns.max(interval_ns.min(MAX_DELAY_NS) * 3),
        }
    }

    /// Publishes one page per service and returns the names of their directories, in the same order.
    pub fn publish(&mut self, pressures: &[Pressure], published: Published) -> Vec<String> {
        let targets = pressures.iter().map(|pressure| &*pressure.target);
        let names = self.claims.names(targets, published.at_ns);
        let names: Vec<String> = pressures
            .iter()
            .map(|pressure| names.get(&pressure.target.id).cloned().unwrap_or_default())
            .collect();
        self.over_limit = names.len().saturating_sub(self.max_pages);
        if self.over_limit > 0 && !self.reported_limit {
            self.reported_limit = true;
            self.notify(
                "too_many_pages",
                format!(
                    "{} services have no page: max_pages = {} is reached",
                    self.over_limit, self.max_pages
                ),
            );
        }
        // The most trusted services, then those that were found first: nobody loses a page to a stranger's processes.
        let mut order: Vec<usize> = (0..pressures.len()).collect();
        order.sort_by_key(|index| Trust::of(&pressures[*index].target));
        order.truncate(self.max_pages);
        self.notify_shared(&names);
        self.check_place(published.at_ns);
        // Once more under the name that the container's pod knows: of several services, the oldest that listens.
        let mut pods: BTreeMap<String, usize> = BTreeMap::new();
        for index in order {
            let pressure = &pressures[index];
            self.write(&names[index], pressure, published);
            let key = |index: usize| {
                let target = &pressures[index].target;
                (!target.workload.listens, target.start_ns, target.pid)
            };
            if let Some(pod) = &pressure.target.workload.pod {
                let first = pods.entry(pod.file_name()).or_insert(index);
                if key(index) < key(*first) {
                    *first = index;
                }
            }
        }
        for (pod, index) in pods {
            self.write(&format!("{PODS}/{pod}"), &pressures[index], published);
        }
        self.claims.limit(2 * self.max_pages);
        self.save_claims(published.at_ns);
        self.close_gone(published);
        names
    }

    fn write(&mut self, name: &str, pressure: &Pressure, published: Published) {
        if let Some(slot) = self.slot(name, published.at_ns) {
            let wake = slot.page.wake_for(pressure.level as u32);
            slot.page.write(&encode(pressure, published, wake));
            slot.seen_ns = published.at_ns;
            slot.is_open = true;
        }
    }

    /// Reports once if another user has put another directory in the place of this one: readers may find false pages there.
    fn check_place(&mut self, now_ns: u64) {
        if self.reported_replaced || now_ns < self.place_due_ns {
            return;
        }
        self.place_due_ns = now_ns + PLACE_INTERVAL_NS;
        if !self.directory.is_in_place() {
            self.reported_replaced = true;
            let text = format!(
                "another user has moved or replaced {}: readers do not find the agent's pages; mount the directory read-only into other \
                 containers, and restart the agent",
                self.directory.path.display()
            );
            self.notify("directory_replaced", text);
        }
    }

    /// The owners of names that a former agent knew.
    fn load_claims(&mut self) {
        let file = StateFile::Owners;
        let (name, _) = file.names();
        match read_own_file(self.directory.fd.as_fd(), name, file.max_bytes()) {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                // Of another version, or damaged: it is written anew.
                self.claims = serde_json::from_slice(&bytes).unwrap_or_default();
            }
            Err(error) => self.notify(
                "owners_unreadable",
                format!("starting without the owners of names that a former agent knew: {error:#}"),
            ),
        }
    }

    /// Leaves them for a later agent. Reports the first failure.
    fn save_claims(&mut self, now_ns: u64) {
        let age_ns = now_ns.saturating_sub(self.claims_saved_ns);
        let is_saved = || self.claims.has_same_owners(&self.saved_claims);
        if age_ns < MIN_CLAIMS_INTERVAL_NS || age_ns < CLAIMS_INTERVAL_NS && is_saved() {
            return;
        }
        self.claims_saved_ns = now_ns;
        self.saved_claims.clone_from(&self.claims);
        let saved = serde_json::to_vec(&self.claims)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| self.files.save(StateFile::Owners, &bytes));
        if let Err(error) = saved
            && !self.reported_unsaved
        {
            self.reported_unsaved = true;
            let text = format!(
                "an agent that replaces this one will not know who owns which name: {error:#}"
            );
            self.notify("owners_unwritable", text);
        }
    }

    /// What a former agent left in this directory.
    pub fn load_learned(&mut self) -> Learned {
        Learned::load(self.directory.fd.as_fd()).unwrap_or_else(|error| {
            self.notify(
                "learned_unreadable",
                format!("starting without what a former agent learned: {error:#}"),
            );
            Learned::default()
        })
    }

    /// Leaves this for a later agent. Reports the first failure.
    pub fn save_learned(&mut self, learned: &Learned) {
        let saved = learned
            .contents()
            .and_then(|contents| self.files.save(StateFile::Learned, &contents));
        if let Err(error) = saved
            && !self.reported_unsaved
        {
            self.reported_unsaved = true;
            self.notify(
                "learned_unwritable",
                format!(
                    "an agent that replaces this one will start without what it learned: {error:#}"
                ),
            );
        }
    }

    /// Takes the notices since the last call.
    pub fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Publishes "no pressure" on all pages, before the agent ends.
    pub fn finish(&mut self) {
        let published = Published {
            at_ns: boot_ns(),
            ttl_ns: self.ttl_ns,
        };
        if !self.claims.has_same_owners(&self.saved_claims) {
            self.claims_saved_ns = 0;
            self.save_claims(published.at_ns);
        }
        for slot in self.by_name.values_mut() {
            let wake = slot.page.wake_for(0);
            slot.page.write(&encode_none(published, wake));
        }
        // No longer alive, from now on.
        let ended = Published {
            at_ns: 0,
            ttl_ns: 0,
        };
        let wake = self.heartbeat.wake_for(0);
        self.heartbeat.write(&encode_none(ended, wake));
    }

    fn slot(&mut self, name: &str, now_ns: u64) -> Option<&mut Slot> {
        if !self.by_name.contains_key(name) {
            if self
                .failed
                .get(name)
                .is_some_and(|failed| now_ns < failed.retry_ns)
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

    fn make(&mut self, name: &str) -> Result<PageFile> {
        let page = PageFile::map(&self.files.open_page(name)?, page::NAME)?;
        self.empty.retain(|empty| empty != name);
        Ok(page)
    }

    /// At the limit, removes the page of the service that exited first.
    fn make_room(&mut self) {
        // A service may have two.
        while self.by_name.len() >= 2 * self.max_pages {
            let closed = self.by_name.iter().filter(|(_, slot)| !slot.is_open);
            let Some((name, _)) = closed.min_by_key(|(_, slot)| slot.seen_ns) else {
                return;
            };
            let name = name.clone();
            self.remove(&name);
        }
    }

    /// Removes a page but keeps its directory: a container may have that mounted, and would not see a new one of the same
    /// name.
    fn remove(&mut self, name: &str) {
        self.by_name.remove(name);
        // Fails if the directory is gone.
        let _ = self.files.remove_page(name);
        self.empty.push_back(name.to_owned());
        while self.empty.len() > 2 * self.max_pages
            && let Some(name) = self.empty.pop_front()
        {
            // Fails if the directory contains foreign files; then it stays.
            let _ = self.files.remove_directory(&name);
        }
    }

    /// Counts services that do not have their plain name, and reports the first.
    fn notify_shared(&mut self, names: &[String]) {
        let shared = || {
            let names = names.iter();
            names.filter_map(|name| Some((name, split_mark(name)?.0)))
        };
        self.renamed = shared().count();
        let Some((name, shared)) = shared().next() else {
            return;
        };
        if self.reported_shared {
            return;
        }
        self.reported_shared = true;
        let (plain, own) = (self.path(shared), self.path(name));
        self.notify(
            "shared_name",
            format!(
                "duplicate service name {shared}: published as {} and {}; set `service_name` in a [[target]] (reported once; \
                 `tailback_pages_renamed` counts them)",
                plain.display(),
                own.display()
            ),
        );
    }

    fn fail(&mut self, name: &str, why: &str, now_ns: u64) {
        let retry_ns = now_ns + RETRY_NS;
        let before = self.failed.insert(
            name.to_owned(),
            Failed {
                why: why.to_owned(),
                retry_ns,
            },
        );
        if before.is_none_or(|before| before.why != why) {
            let path = self.path(name);
            self.notify("no_page", format!("no page at {}: {why}", path.display()));
        }
    }

    fn notify(&mut self, code: &str, text: String) {
        self.notices.push(Notice {
            code: code.to_owned(),
            text,
        });
    }

    /// Publishes "no pressure" for exited services, and removes their pages after [`RETENTION_NS`].
    fn close_gone(&mut self, published: Published) {
        let now_ns = published.at_ns;
        self.failed
            .retain(|_, failed| now_ns < failed.retry_ns + RETRY_NS);
        let mut old = Vec::new();
        for (name, slot) in &mut self.by_name {
            if slot.seen_ns < now_ns && slot.is_open {
                let wake = slot.page.wake_for(0);
                slot.page.write(&encode_none(published, wake));
                slot.is_open = false;
            }
            if now_ns.saturating_sub(slot.seen_ns) > RETENTION_NS {
                old.push(name.clone());
            }
        }
        for name in old {
            self.remove(&name);
        }
    }

    /// The names of the directories in this one.
    fn directories_in(&self, name: &str) -> Vec<String> {
        let root = self.directory.fd.as_fd();
        let entries = enter(root, name).and_then(|it| Ok(fs::Dir::new(it)?));
        let Ok(entries) = entries else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter(|entry| entry.file_type() == FileType::Directory)
            .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned))
            .filter(|name| !name.starts_with('.'))
            .take(MAX_FORMER_PAGES)
            .collect()
    }

    /// Takes over the pages of a previous agent: those of running services continue, the others are removed in time.
    fn take_over(&mut self) {
        let now_ns = boot_ns();
        let mut names = self.directories_in(".");
        names.retain(|name| name != PODS);
        let of_pods = self.directories_in(PODS).into_iter();
        names.extend(of_pods.map(|name| format!("{PODS}/{name}")));
        for name in names {
            let root = self.directory.fd.as_fd();
            let has_page = enter(root, &name).is_ok_and(|directory| {
                fs::statat(&directory, page::NAME, AtFlags::SYMLINK_NOFOLLOW).is_ok()
            });
            if !has_page || self.by_name.len() >= 2 * self.max_pages {
                self.remove(&name);
            } else if let Ok(page) = self.make(&name) {
                self.by_name.insert(
                    name,
                    Slot {
                        page,
                        seen_ns: now_ns,
                        is_open: false,
                    },
                );
            }
        }
    }
}

fn lock(directory: &Directory, wait: Duration) -> Result<OwnedFd> {
    let path = &directory.path;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = fs::openat(&directory.fd, LOCK, flags, Mode::from_raw_mode(0o644))
        .with_context(|| format!("cannot open {}/{LOCK}", path.display()))?;
    check_own_file(&lock, LOCK).with_context(|| format!("cannot publish in {}", path.display()))?;
    let began = Instant::now();
    let mut locked = fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
    while locked == Err(Errno::WOULDBLOCK) && began.elapsed() < wait {
        thread::sleep(LOCK_RETRY_INTERVAL);
        locked = fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
    }
    match locked {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            let _ = std::fs::File::from(lock)
                .take(MAX_HOLDER_BYTES)
                .read_to_string(&mut holder);
            bail!(
                "another agent ({}) already publishes there: stop it, or set another `directory` in [signal]",
                holder.trim()
            );
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot lock {}/{LOCK}", path.display()));
        }
    }
    // The pid is for the error message of the next agent. If it cannot be written, the lock still works.
    let _ = fs::ftruncate(&lock, 0);
    let mut file = std::fs::File::from(lock);
    let _ = write!(file, "process {}", std::process::id());
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn a_page_is_only_written_below_directories_of_the_agents_user() {
        let temp = TempDir::new("pages").unwrap();
        let mut pages = Pages::open(temp.path(), 1_000_000_000, 1, Duration::ZERO).unwrap();
        let victim = TempDir::new("victim").unwrap();
        let pods = temp.path().join(PODS);
        symlink(victim.path(), &pods).unwrap();
        assert!(pages.slot("pods/c", 1).is_none());
        assert_eq!(std::fs::read_dir(victim.path()).unwrap().count(), 0);
        let none = PageCounts::default();
        assert_eq!(pages.counts(), none, "pages of pods are not counted");
        std::fs::remove_file(&pods).unwrap();
        std::fs::create_dir(&pods).unwrap();
        std::fs::set_permissions(&pods, std::fs::Permissions::from_mode(0o777)).unwrap();
        let later = 2 + RETRY_NS;
        assert!(pages.slot("pods/c", later).is_none());
        std::fs::set_permissions(&pods, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(pages.slot("pods/c", later + RETRY_NS).is_some());
    }

    #[test]
    fn directories_of_exited_services_are_kept_up_to_a_limit() {
        let path = std::env::temp_dir().join(format!("tailback-pages-{}", std::process::id()));
        let mut pages = Pages::open(&path, 1_000_000_000, 1, Duration::ZERO).unwrap();
        for name in ["a", "b", "pods/c"] {
            assert!(pages.slot(name, 1).is_some());
            pages.remove(name);
            let directory = path.join(name);
            assert!(directory.is_dir() && !directory.join("page").exists());
        }
        assert!(!path.join("a").exists(), "two at most");
        // A container that has the directory mounted sees the page of the restarted service.
        let mounted = std::fs::File::open(path.join("b")).unwrap();
        assert!(pages.slot("b", 2).is_some());
        assert!(fs::statat(&mounted, page::NAME, AtFlags::empty()).is_ok());
        assert_eq!(pages.empty, ["pods/c"]);
        assert!(pages.slot("pods/c", 2).is_some() && pages.empty.is_empty());
        drop(pages);
        let pages = Pages::open(&path, 1_000_000_000, 1, Duration::ZERO).unwrap();
        let taken_over: Vec<&str> = pages.by_name.keys().map(String::as_str).collect();
        assert_eq!(taken_over, ["b", "pods/c"]);
        drop(pages);
        // More than there may be, as many agents would leave them.
        for name in 0..9 {
            std::fs::create_dir(path.join(format!("pods/{name}"))).unwrap();
            std::fs::write(path.join(format!("pods/{name}/page")), "").unwrap();
        }
        let pages = Pages::open(&path, 1_000_000_000, 1, Duration::ZERO).unwrap();
        assert_eq!(pages.by_name.len(), 2);
        let left = |name: &str| std::fs::read_dir(path.join(name)).unwrap().count();
        assert!(left("pods") <= 4, "{}", left("pods"));
        drop(pages);
        std::fs::remove_dir_all(&path).unwrap();
    }
}
