//! Sets the thresholds of Envoy's circuit breakers: the concurrency limit, as a disk layer of Envoy's runtime (`envoy_layer`).
//!
//! Envoy keeps the last layer. This is why the adapters run in a process of their own: it removes the limit when the agent is
//! gone. Whether anyone reads the layer is seen by inotify.

use std::{
    ffi::CStr,
    fs,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::inotify;
use serde_json::{Value, json};
use tailback_page::Pressure;

use super::{
    Shared,
    adapter_stats::AdapterStats,
    clock, envoy_layer,
    warning::{Consumers, Warning},
};
use crate::{config::signal::Envoy, text::duration};

/// How often the pressure is checked for a change.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the layer is replaced although the limit is the same: the directory may have been replaced, and an Envoy that follows
/// the link reads it again.
const REWRITE_INTERVAL: Duration = Duration::from_secs(10);
/// Most events read at a time. The others are read at the next check.
const MAX_EVENTS: usize = 256;
/// How long a new layer may stay unread. Envoy reads it at once.
const READ_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the service may shed load without a known limit until that is reported. When an overload ends, the limit ends a few
/// seconds before the admit ratio is 1 again.
const LIMIT_TIMEOUT: Duration = Duration::from_secs(15);

/// Writes the layer whenever the limit changes, until dropped.
pub async fn serve(config: Envoy, stats: Arc<AdapterStats>, shared: Arc<Shared>) {
    let watch = Watch::new();
    let readers = Arc::new(Readers::new(watch.is_some()));
    stats.set_consumers(Arc::clone(&readers) as _);
    let marker = envoy_layer::marker(&config);
    let mut clock = clock(CHECK_INTERVAL);
    let mut last: Option<(Option<u32>, Instant)> = None;
    loop {
        clock.tick().await;
        if let Some(watch) = &watch {
            watch.count_reads(&marker, &mut readers.lock());
        }
        let pressure = shared.pressure(&config.target);
        readers.lock().set_pressure(&pressure);
        let limit = pressure.concurrency_limit;
        let is_current =
            |(last, at): &(Option<u32>, Instant)| *last == limit && at.elapsed() < REWRITE_INTERVAL;
        if last.as_ref().is_some_and(is_current) {
            continue;
        }
        // In a thread of its own: the directory may be on a mount that hangs.
        let config = config.clone();
        let inotify = watch.as_ref().map(|watch| Arc::clone(&watch.inotify));
        // Before the layer changes: it may be read at once.
        readers.lock().unread_since.get_or_insert_with(Instant::now);
        let written = tokio::task::spawn_blocking(move || {
            let written = envoy_layer::write(&config, limit, inotify.as_deref());
            (written, unreachable_directory(&config.symlink_root))
        })
        .await;
        let written = written.map_err(Into::into).and_then(|(written, closed)| {
            readers.lock().closed_directory = closed;
            written
        });
        match written {
            Ok(()) => {
                stats.replied(&envoy_layer::words(limit));
                last = Some((limit, Instant::now()));
            }
            Err(error) => stats.failed(&format!("{error:#}")),
        }
    }
}

/// Watches the layer for reads.
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

    /// Counts each time that this file of a layer was closed after it was open for reading. Does not wait.
    fn count_reads(&self, file: &str, state: &mut ReadersState) {
        let mut buffer = [MaybeUninit::uninit(); 4_096];
        let mut events = inotify::Reader::new(&*self.inotify, &mut buffer);
        for _ in 0..MAX_EVENTS {
            // Mostly: there is no further event.
            let Ok(event) = events.next() else {
                return;
            };
            if event.file_name().map(CStr::to_bytes) == Some(file.as_bytes()) {
                state.read();
            }
        }
    }
}

/// What is known about those who read the layer, and about the limit.
#[derive(Debug)]
pub struct Readers {
    state: Mutex<ReadersState>,
}

#[derive(Debug, Default)]
pub struct ReadersState {
    is_watched: bool,
    reads: u64,
    last_read: Option<Instant>,
    /// Since when a new layer has been in place that nobody has read.
    unread_since: Option<Instant>,
    /// Since when the service has been shedding load without a known limit.
    unlimited_since: Option<Instant>,
    /// A directory on the way to the layer that other users may not enter, at the last write.
    closed_directory: Option<PathBuf>,
}

impl ReadersState {
    /// Counts a read.
    pub fn read(&mut self) {
        self.reads += 1;
        self.last_read = Some(Instant::now());
        self.unread_since = None;
    }

    fn set_pressure(&mut self, pressure: &Pressure) {
        if pressure.admit_ratio < 1.0 && pressure.concurrency_limit.is_none() {
            self.unlimited_since.get_or_insert_with(Instant::now);
        } else {
            self.unlimited_since = None;
        }
    }

    /// Nobody reads the layer.
    fn unread_warning(&self) -> Option<Warning> {
        let since = self.unread_since.filter(|_| self.is_watched)?;
        let unread = since.elapsed();
        if unread < READ_TIMEOUT {
            return None;
        }
        let unread = duration(unread.as_nanos() as u64);
        let (reason, remedy) = match &self.closed_directory {
            Some(directory) => (
                format!(": other users cannot enter {}", directory.display()),
                format!("`chmod o+x {}`", directory.display()),
            ),
            None => (
                String::new(),
                "Envoy must run with this path as `symlink_root`; in a container, mount the directory that contains the link"
                    .to_owned(),
            ),
        };
        Some(Warning::new(
            "layer_not_read",
            format!("nobody has read the layer for {unread}{reason}"),
            remedy,
        ))
    }

    /// The service sheds, but Envoy does not know how much.
    fn unlimited_warning(&self) -> Option<Warning> {
        let since = self.unlimited_since?;
        (since.elapsed() >= LIMIT_TIMEOUT).then(|| {
            Warning::new(
                "limit_unknown",
                "the service is overloaded, but its concurrency limit is unknown: Envoy admits everything",
                "shed in the service itself, by its page: it takes every request immediately, or its requests in \
                 flight cannot be seen",
            )
        })
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
        let warnings = [state.unread_warning(), state.unlimited_warning()];
        warnings.into_iter().flatten().collect()
    }
}

/// The first directory on the way to a path that only its owner or group may enter.
fn unreachable_directory(path: &Path) -> Option<PathBuf> {
    let mut directories: Vec<&Path> = path.ancestors().skip(1).collect();
    directories.reverse();
    let is_closed = |directory: &&Path| {
        fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 == 0)
    };
    directories.into_iter().find(is_closed).map(Into::into)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tailback_tests::temp::TempDir;

    use super::*;

    #[test]
    fn a_directory_that_others_may_not_enter_is_named() {
        let temp = TempDir::new("envoy").unwrap();
        let closed = temp.path().join("closed");
        fs::create_dir_all(closed.join("open")).unwrap();
        let layer = closed.join("open/shop");
        let chmod = |mode| {
            fs::set_permissions(&closed, fs::Permissions::from_mode(mode)).unwrap();
        };
        chmod(0o755);
        assert_eq!(unreachable_directory(&layer), None);
        chmod(0o750);
        assert_eq!(unreachable_directory(&layer), Some(closed.clone()));
    }

    #[test]
    fn an_overload_without_a_known_limit_is_reported_after_a_while() {
        let readers = Readers::new(true);
        let at = |admit_ratio, concurrency_limit| Pressure {
            alive: true,
            admit_ratio,
            concurrency_limit,
            ..Pressure::NONE
        };
        let codes = || -> Vec<&str> {
            let warnings = readers.warnings();
            warnings.iter().map(|warning| warning.code).collect()
        };
        readers.lock().set_pressure(&at(0.5, None));
        assert_eq!(codes(), [""; 0]);
        let since = Instant::now().checked_sub(LIMIT_TIMEOUT);
        readers.lock().unlimited_since = since;
        readers.lock().set_pressure(&at(0.5, None));
        assert_eq!(codes(), ["limit_unknown"]);
        for fine in [at(0.5, Some(4)), at(1.0, None), Pressure::NONE] {
            readers.lock().unlimited_since = since;
            readers.lock().set_pressure(&fine);
            assert_eq!(codes(), [""; 0], "{fine:?}");
        }
    }
}
