//! The pages of the directory, read as any service reads its own.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tailback_page::{Page, Pressure};

use crate::signal::names::directory_of;

/// Pages that are kept mapped at once.
const MOST: usize = 4_096;

pub struct Book {
    pub directory: PathBuf,
    pages: Mutex<BTreeMap<String, Arc<Page>>>,
}

impl Book {
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            pages: Mutex::default(),
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

    /// Every service whose page an agent renews now.
    pub fn alive(&self) -> Vec<(String, Pressure)> {
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
        self.forget_all_but(&names);
        let pressures = names.into_iter().map(|name| {
            let pressure = self.pressure(&name);
            (name, pressure)
        });
        pressures.filter(|(_, pressure)| pressure.alive).collect()
    }

    fn forget_all_but(&self, names: &[String]) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|name, _| names.binary_search(name).is_ok());
    }
}
