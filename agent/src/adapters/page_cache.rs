//! The pages of the directory, read as any service reads its own.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tailback_page::{Page, Pressure};

use crate::signal::names::directory_of;

/// Pages that are kept mapped at once.
const MOST: usize = 4_096;
/// The times of a directory are those of a coarse clock: changes within less than this may have the same.
const SETTLED: Duration = Duration::from_secs(1);

pub struct PageCache {
    pub directory: PathBuf,
    pages: Mutex<BTreeMap<String, Arc<Page>>>,
    listed: Mutex<Listed>,
}

/// What the directory held.
#[derive(Default)]
struct Listed {
    /// In order.
    names: Arc<[String]>,
    /// When a name was added or removed last; `None`: another one may have been since.
    changed: Option<SystemTime>,
}

impl PageCache {
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            pages: Mutex::default(),
            listed: Mutex::default(),
        }
    }

    /// The page of a service by its name, or by that of its directory; whether or not it is there yet.
    pub fn page(&self, name: &str) -> Arc<Page> {
        let name = directory_of(name);
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = pages.get(&name) {
            return Arc::clone(page);
        }
        let page = Arc::new(Page::open(self.directory.join(&name).join("page")));
        if pages.len() < MOST && page.pressure().alive {
            pages.insert(name, Arc::clone(&page));
        }
        page
    }

    /// No pressure where nobody publishes any.
    pub fn pressure(&self, name: &str) -> Pressure {
        self.page(name).pressure()
    }

    /// Every service of such a name whose page an agent renews now.
    pub fn alive(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<(String, Pressure)> {
        let names = self.names();
        let pressures = names.iter().filter(|name| is_wanted(name)).map(|name| {
            let pressure = self.pressure(name);
            (name.clone(), pressure)
        });
        pressures.filter(|(_, pressure)| pressure.alive).collect()
    }

    /// The directory says when names came or went: it is listed when they did, however many ask how often.
    fn names(&self) -> Arc<[String]> {
        let changed = fs::metadata(&self.directory).and_then(|directory| directory.modified());
        let changed = changed.ok();
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed.is_none() || listed.changed != changed {
            listed.names = self.list();
            listed.changed =
                changed.filter(|changed| changed.elapsed().is_ok_and(|age| age > SETTLED));
            self.forget_all_but(&listed.names);
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
        names.truncate(MOST);
        names.into()
    }

    fn forget_all_but(&self, names: &[String]) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|name, _| names.binary_search(name).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn the_directory_is_listed_when_names_came_or_went_and_not_otherwise() {
        let temp = TempDir::new("book").unwrap();
        let at = |name: &str| temp.path().join(name);
        let book = PageCache::new(temp.path().to_owned());
        for name in ["b", "a"] {
            fs::create_dir(at(name)).unwrap();
            assert!(
                book.names().iter().any(|there| there == name),
                "at the same time as the one before"
            );
        }
        fs::write(at("no service"), "").unwrap();
        let is_changed_at = |time| fs::File::open(temp.path()).unwrap().set_modified(time);
        let then = SystemTime::now() - 2 * SETTLED;
        is_changed_at(then).unwrap();
        assert_eq!(*book.names(), ["a", "b"]);
        fs::create_dir(at("c")).unwrap();
        is_changed_at(then).unwrap();
        assert_eq!(*book.names(), ["a", "b"], "not listed");
        fs::remove_dir(at("a")).unwrap();
        assert_eq!(*book.names(), ["b", "c"]);
    }
}
