//! The processes that read a page.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::target::read_process_file;

/// Longest text read from /proc/PID/maps, bytes: 50,000 lines of usual length.
const MAX_MAPS_BYTES: u64 = 8 << 20;

/// How often the agent searches at most: a search reads a file of every process.
const SEARCH_INTERVAL: Duration = Duration::from_secs(30);

/// A process that maps a service's page.
pub struct Reader {
    pub pid: u32,
    pub name: String,
    /// The directory of the page.
    pub target: String,
}

/// The processes that map pages, as of the last search.
#[derive(Default)]
pub(super) struct ReaderCache(Arc<Mutex<Cached>>);

#[derive(Default)]
struct Cached {
    found: Arc<Vec<Reader>>,
    /// When the last search began.
    searched: Option<Instant>,
    is_searching: bool,
}

impl ReaderCache {
    /// The readers as of the last search. If that is long ago, a new search begins, on a thread of its own: reading the
    /// `maps` of a process can block forever. In that case no further search begins.
    pub(super) fn get(&self, directory: &Path) -> Arc<Vec<Reader>> {
        let mut cached = locked(&self.0);
        let is_recent = cached
            .searched
            .is_some_and(|at| at.elapsed() < SEARCH_INTERVAL);
        if !is_recent && !cached.is_searching {
            cached.searched = Some(Instant::now());
            let (state, directory) = (Arc::clone(&self.0), directory.to_owned());
            let search = move || {
                let found = Arc::new(consumers(&directory));
                let mut cached = locked(&state);
                cached.found = found;
                cached.is_searching = false;
            };
            let thread = thread::Builder::new().name("readers".to_owned());
            cached.is_searching = thread.spawn(search).is_ok();
        }
        Arc::clone(&cached.found)
    }
}

fn locked(cached: &Mutex<Cached>) -> MutexGuard<'_, Cached> {
    cached.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The readers without processes of this program: the adapter process maps every page, and is no consumer itself.
fn consumers(directory: &Path) -> Vec<Reader> {
    // By its path: the status of the file could hang with its file system.
    let program = |pid: &str| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = program("self");
    let mut found = readers(directory);
    found.retain(|reader| own.is_none() || program(&reader.pid.to_string()) != own);
    found
}

impl Reader {
    pub fn object(&self) -> Value {
        json!({"type": "reader", "pid": self.pid, "name": self.name, "target": self.target})
    }
}

/// The processes that map a page, in any container and under any path: found by the file's device and inode. A process
/// that reads the page as a file, as the Node library has to, cannot be seen.
pub fn readers(directory: &Path) -> Vec<Reader> {
    let mut pages: Vec<((u64, u64), String)> = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if let Ok(metadata) = fs::metadata(entry.path().join("page")) {
            let name = entry.file_name().to_string_lossy().into_owned();
            pages.push(((metadata.dev(), metadata.ino()), name));
        }
    }
    let mut readers = Vec::new();
    if pages.is_empty() {
        return readers;
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // The process has exited, or we may not read its maps.
        let Some(maps) = read_process_file(pid, "maps", MAX_MAPS_BYTES) else {
            continue;
        };
        let maps = String::from_utf8_lossy(&maps);
        let mapped: BTreeSet<(u64, u64)> = maps.lines().filter_map(mapping).collect();
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        readers.extend(pages.iter().filter(|(page, _)| mapped.contains(page)).map(
            |(_, target)| Reader {
                pid,
                name: name.trim_end().to_owned(),
                target: target.clone(),
            },
        ));
    }
    readers
}

/// Device and inode of a shared read-only mapping, from a line of `/proc/PID/maps`.
fn mapping(line: &str) -> Option<(u64, u64)> {
    // 7f… -7f… r--s 00000000 00:19 1234   /run/tailback/shop/page
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (access, _, device, inode) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    if access != "r--s" {
        return None;
    }
    let (major, minor) = device.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    Some((device, inode.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_read_only_mapping_is_a_reader() {
        let line = "7f3a00000000-7f3a00001000 r--s 00000000 00:19 1234    /run/tailback/shop/page";
        assert_eq!(mapping(line), Some((rustix::fs::makedev(0, 0x19), 1234)));
        assert_eq!(
            mapping(&line.replace("r--s", "rw-s")),
            None,
            "the agent's own mapping"
        );
        assert_eq!(mapping(""), None);
    }

    #[test]
    fn the_keys_of_a_reader_are_those_of_the_documentation() {
        let reader = Reader {
            pid: 43,
            name: "uwsgi".to_owned(),
            target: "shop".to_owned(),
        };
        crate::emit::json::reference::assert_documented("reader", &[reader.object()]);
    }
}
