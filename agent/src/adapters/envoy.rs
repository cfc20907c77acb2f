//! Writes the file that Envoy's resource monitor `injected_resource` reads: the share of new requests to reject, from 0 to 1.
//!
//! Envoy only notices a file that is moved into place, so each value is written to a temporary file and renamed. Whether
//! anyone reads it is seen by inotify.

use std::{
    ffi::{CStr, OsStr},
    fs,
    io::{self, Write as _},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{AtFlags, Mode, OFlags, inotify},
    io::Errno,
};
use serde_json::{Value, json};
use tailback_page::Pressure;

use super::{
    Shared,
    adapter_stats::AdapterStats,
    clock,
    warning::{Consumers, Warning},
};
use crate::{config::signal::Envoy, text::duration};

/// How often the pressure is checked for a change.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the file is replaced although the value is the same: the directory may have been replaced, and a reader that
/// follows the file reads it again.
const REWRITE_INTERVAL: Duration = Duration::from_secs(10);
/// Most events read at a time. The others are read at the next check.
const MAX_EVENTS: usize = 256;
/// How long a new file may stay unread. Envoy reads it at its next refresh, by default every second.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// 1 − admit ratio: a `scaled` trigger from 0 to 1 rejects with exactly this probability. The score would not do: it says that work
/// waits, not how much to reject, so Envoy would alternate between rejecting too much and too little.
fn value(pressure: &Pressure) -> String {
    format!("{:.3}\n", (1.0 - pressure.admit_ratio).clamp(0.0, 1.0))
}

/// Writes the file whenever the value changes, until dropped.
pub async fn serve(config: Envoy, stats: Arc<AdapterStats>, shared: Arc<Shared>) {
    let watch = Watch::new();
    let readers = Arc::new(Readers::new(watch.is_some()));
    stats.set_consumers(Arc::clone(&readers) as _);
    let mut clock = clock(CHECK_INTERVAL);
    let mut last: Option<(String, Instant)> = None;
    loop {
        clock.tick().await;
        if let Some(watch) = &watch {
            watch.count_reads(&config.file, &mut readers.lock());
        }
        let text = value(&shared.pressure(&config.target));
        let is_current =
            |(last, at): &(String, Instant)| *last == text && at.elapsed() < REWRITE_INTERVAL;
        if last.as_ref().is_some_and(is_current) {
            continue;
        }
        // In a thread of its own: the file may be on a mount that hangs.
        let (file, value) = (config.file.clone(), text.clone());
        let inotify = watch.as_ref().map(|watch| Arc::clone(&watch.inotify));
        // Before the file changes: it may be read at once.
        readers.lock().unread_since.get_or_insert_with(Instant::now);
        let written = tokio::task::spawn_blocking(move || {
            // Repeated, because the directory may have been replaced. If it is missing, put() says so.
            if let (Some(inotify), Some(directory)) = (inotify, file.parent()) {
                let flags = inotify::WatchFlags::CLOSE_NOWRITE;
                let _ = inotify::add_watch(&*inotify, directory, flags);
            }
            (put(&file, &value), unreachable_directory(&file))
        })
        .await;
        let written = written.map_err(Into::into).and_then(|(written, closed)| {
            readers.lock().closed_directory = closed;
            written
        });
        match written {
            Ok(()) => {
                stats.replied(&text);
                last = Some((text, Instant::now()));
            }
            Err(error) => stats.failed(&format!("{error:#}")),
        }
    }
}

/// Watches the file for reads.
struct Watch {
    inotify: Arc<OwnedFd>,
}

impl Watch {
    /// `None` if the user has used up their inotify instances: then nothing is known about readers.
    fn new() -> Option<Self> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let inotify = Arc::new(inotify::init(flags).ok()?);
        Some(Self { inotify })
    }

    /// Counts each time that the file was closed after it was open for reading. Does not wait.
    fn count_reads(&self, file: &Path, state: &mut ReadersState) {
        let mut buffer = [MaybeUninit::uninit(); 4_096];
        let mut events = inotify::Reader::new(&*self.inotify, &mut buffer);
        let name = file.file_name().map(OsStr::as_encoded_bytes);
        for _ in 0..MAX_EVENTS {
            // Mostly: there is no further event.
            let Ok(event) = events.next() else {
                return;
            };
            if event.file_name().map(CStr::to_bytes) == name {
                state.read();
            }
        }
    }
}

/// What is known about the readers of the file.
#[derive(Debug)]
pub struct Readers {
    state: Mutex<ReadersState>,
}

#[derive(Debug, Default)]
pub struct ReadersState {
    is_watched: bool,
    reads: u64,
    last_read: Option<Instant>,
    /// Since when a new file has been in place that nobody has read.
    unread_since: Option<Instant>,
    /// A directory on the way to the file that other users may not enter, at the last write.
    closed_directory: Option<PathBuf>,
}

impl ReadersState {
    /// Counts a read.
    pub fn read(&mut self) {
        self.reads += 1;
        self.last_read = Some(Instant::now());
        self.unread_since = None;
    }
}

impl Readers {
    /// `is_watched`: whether reads are noticed.
    pub fn new(is_watched: bool) -> Self {
        let state = ReadersState {
            is_watched,
            ..ReadersState::default()
        };
        Self {
            state: Mutex::new(state),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, ReadersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumers for Readers {
    fn describe(&self, status: &mut Value) {
        let state = self.lock();
        if !state.is_watched {
            return;
        }
        let mut object = json!({"count": state.reads});
        if let Some(last_read) = state.last_read {
            object["last_age_ns"] = (last_read.elapsed().as_nanos() as u64).into();
        }
        status["reads"] = object;
    }

    fn warnings(&self) -> Vec<Warning> {
        let state = self.lock();
        let unread = state.unread_since.filter(|_| state.is_watched);
        let unread = unread.map_or(Duration::ZERO, |since| since.elapsed());
        if unread < READ_TIMEOUT {
            return Vec::new();
        }
        let unread = duration(unread.as_nanos() as u64);
        let (reason, remedy) = match &state.closed_directory {
            Some(directory) => (
                format!(": other users may not enter {}", directory.display()),
                format!("`chmod o+x {}`", directory.display()),
            ),
            None => (
                String::new(),
                "Envoy must run with this path as `filename`; in a container, mount the directory, not the file"
                    .to_owned(),
            ),
        };
        vec![Warning::new(
            "file_not_read",
            format!("nobody has read the file for {unread}{reason}"),
            remedy,
        )]
    }
}

/// The first directory on the way to a file that only its owner or group may enter.
fn unreachable_directory(file: &Path) -> Option<PathBuf> {
    let mut directories: Vec<&Path> = file.ancestors().skip(1).collect();
    directories.reverse();
    let is_closed = |directory: &&Path| {
        fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 == 0)
    };
    directories.into_iter().find(is_closed).map(Into::into)
}

/// Writes the file atomically. The directory may belong to another user, so symbolic links are not followed and a leftover
/// temporary file is not reused.
pub fn put(path: &Path, text: &str) -> Result<()> {
    let write = || -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = rustix::fs::open(
            directory,
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut temporary = name.to_owned();
        temporary.push(".new");
        match rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = rustix::fs::openat(&directory, &temporary, flags, mode)?;
        // Envoy runs as another user, and the umask may be stricter.
        rustix::fs::fchmod(&file, mode)?;
        fs::File::from(file).write_all(text.as_bytes())?;
        Ok(rustix::fs::renameat(
            &directory, &temporary, &directory, name,
        )?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn the_value_is_the_share_to_reject() {
        let at = |admit_ratio: f64| {
            value(&Pressure {
                admit_ratio,
                ..Pressure::NONE
            })
        };
        assert_eq!(
            (at(1.0), at(0.2636), at(-1.0)),
            ("0.000\n".into(), "0.736\n".into(), "1.000\n".into())
        );
        assert_eq!(value(&Pressure::NONE), "0.000\n", "without an agent");
    }

    #[test]
    fn a_directory_that_others_may_not_enter_is_named() {
        let temp = TempDir::new("envoy").unwrap();
        let closed = temp.path().join("closed");
        fs::create_dir_all(closed.join("open")).unwrap();
        let file = closed.join("open/pressure");
        let chmod = |mode| {
            fs::set_permissions(&closed, fs::Permissions::from_mode(mode)).unwrap();
        };
        chmod(0o755);
        assert_eq!(unreachable_directory(&file), None);
        chmod(0o750);
        assert_eq!(unreachable_directory(&file), Some(closed.clone()));
    }

    #[test]
    fn the_file_is_readable_for_all() {
        let temp = TempDir::new("envoy").unwrap();
        let file = temp.path().join("pressure");
        put(&file, "0.500\n").unwrap();
        let mode = fs::metadata(&file).unwrap().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(fs::read_to_string(file).unwrap(), "0.500\n");
    }
}
