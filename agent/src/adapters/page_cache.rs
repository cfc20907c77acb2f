//! The pages in the signal directory, read like any consumer reads them.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tailback_page::{Page, Pressure};

use crate::signal::{HEARTBEAT, names::directory_of};

/// Maximum number of pages kept mapped, and of names listed.
const MAX_PAGES: usize = 4_096;
/// Two changes of a directory within this time may have the same timestamp: file systems use a coarse clock.
const TIMESTAMP_GRANULARITY: Duration = Duration::from_secs(1);

/// Maps pages on first use.
pub struct PageCache {
    pub directory: PathBuf,
    pages: Mutex<BTreeMap<String, Arc<Page>>>,
    listed: Mutex<Listed>,
    heartbeat: Mutex<Option<Page>>,
}

/// The latest listing of the directory.
#[derive(Default)]
struct Listed {
    /// Sorted.
    names: Arc<[String]>,
    /// The directory's modification time then; `None`: too recent to rule out another change.
    changed: Option<SystemTime>,
}

impl PageCache {
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            pages: Mutex::default(),
            listed: Mutex::default(),
            heartbeat: Mutex::default(),
        }
    }

    /// The page of a service, by its name or that of its directory. It need not exist yet.
    pub fn page(&self, name: &str) -> Arc<Page> {
        let name = directory_of(name);
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = pages.get(&name) {
            return Arc::clone(page);
        }
        let page = Arc::new(Page::open(self.directory.join(&name).join("page")));
        if pages.len() < MAX_PAGES && page.pressure().alive {
            pages.insert(name, Arc::clone(&page));
        }
        page
    }

    /// Whether an agent has completed a sample lately: its own page has not expired.
    pub fn is_agent_alive(&self) -> bool {
        let mut heartbeat = self
            .heartbeat
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let page = heartbeat.get_or_insert_with(|| {
            let name = OsStr::from_bytes(HEARTBEAT.to_bytes());
            Page::open(self.directory.join(name))
        });
        page.pressure().alive
    }

    /// The pressure of a service; no pressure if nobody publishes it.
    pub fn pressure(&self, name: &str) -> Pressure {
        self.page(name).pressure()
    }

    /// Every service with a live page whose directory name matches.
    pub fn alive(&self, matches: impl Fn(&str) -> bool) -> Vec<(String, Pressure)> {
        let names = self.names();
        let pressures = names.iter().filter(|name| matches(name)).map(|name| {
            let pressure = self.pressure(name);
            (name.clone(), pressure)
        });
        pressures.filter(|(_, pressure)| pressure.alive).collect()
    }

    /// Every instance of a service with a live page.
    pub fn instances(&self, service: &str) -> Vec<(String, Pressure)> {
        let name = directory_of(service);
        self.alive(|directory| is_instance(directory, &name))
    }

    /// The names of the directory. It is listed only when its modification time changed.
    fn names(&self) -> Arc<[String]> {
        let changed = fs::metadata(&self.directory).and_then(|directory| directory.modified());
        let changed = changed.ok();
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed.is_none() || listed.changed != changed {
            listed.names = self.list();
            listed.changed = changed.filter(|changed| {
                changed
                    .elapsed()
                    .is_ok_and(|age| age > TIMESTAMP_GRANULARITY)
            });
            self.retain(&listed.names);
        }
        Arc::clone(&listed.names)
    }

    fn list(&self) -> Arc<[String]> {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<String> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        names.truncate(MAX_PAGES);
        names.into()
    }

    fn retain(&self, names: &[String]) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|name, _| names.binary_search(name).is_ok());
    }
}

/// Whether a directory is that of an instance of a service. If names collide, all but one have `@PID` appended. Services of other users
/// have `~PID`: they are no instances.
fn is_instance(directory: &str, name: &str) -> bool {
    match directory.strip_prefix(name) {
        Some("") => true,
        Some(rest) => rest
            .strip_prefix('@')
            .is_some_and(|pid| pid.parse::<u32>().is_ok()),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn the_directory_is_listed_only_when_its_entries_changed() {
        let temp = TempDir::new("pages").unwrap();
        let at = |name: &str| temp.path().join(name);
        let cache = PageCache::new(temp.path().to_owned());
        for name in ["b", "a"] {
            fs::create_dir(at(name)).unwrap();
            assert!(
                cache.names().iter().any(|there| there == name),
                "with the same timestamp as the previous change"
            );
        }
        fs::write(at("no service"), "").unwrap();
        let set_modified = |time| fs::File::open(temp.path()).unwrap().set_modified(time);
        let then = SystemTime::now() - 2 * TIMESTAMP_GRANULARITY;
        set_modified(then).unwrap();
        assert_eq!(*cache.names(), ["a", "b"]);
        fs::create_dir(at("c")).unwrap();
        set_modified(then).unwrap();
        assert_eq!(*cache.names(), ["a", "b"], "not listed");
        fs::remove_dir(at("a")).unwrap();
        assert_eq!(*cache.names(), ["b", "c"]);
    }

    #[test]
    fn instances_have_the_name_of_the_service_or_a_pid_appended() {
        assert!(is_instance("shop", "shop") && is_instance("shop@4711", "shop"));
        for other in ["shop-b", "shop@x", "shop~4711", "shopper", "sho", "my-shop"] {
            assert!(!is_instance(other, "shop"), "{other}");
        }
    }
}
