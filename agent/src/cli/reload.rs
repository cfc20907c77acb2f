//! Reloads the configuration of a running agent: on SIGHUP, and when the file changes.
//!
//! A thread watches the file, because a file system may hang; it passes each new content to the sampling loop, which applies
//! it between two samples. Nothing is lost on the way: queues, episodes, pages and what the controllers have learned continue.
//! A file that is missing or invalid changes nothing, and is reported.

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use tracing::debug;

use super::{Failure, exit_code::Outcome};
use crate::{
    collect::unix_ns,
    config::{
        Config,
        file::{self, Identity, identity, parse_quietly, read_again},
    },
    emit::otlp::OtlpConfig,
    sample::Notice,
    signal::ConfigFile,
    text::bounded,
};

/// How often the file is checked for a change. This also bounds the number of reloads of a file that never stops changing.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the file must not change before it is read, and after a failure, before it is read again: it may be half written,
/// or absent between two steps of an update.
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// A file that never settles is read after this many times [`SETTLE_TIME`].
const MAX_SETTLE_TIMES: u32 = 5;
/// Longest reason in a notice, bytes.
const MAX_REASON_BYTES: usize = 400;

/// What the file says: its text and the configuration in it, or why there is none.
type Content = Result<(String, Config), String>;

/// The configuration of a running agent.
pub(super) struct Reload {
    changes: Receiver<Content>,
    /// In force.
    config: Config,
    status: ConfigFile,
    notices: Vec<Notice>,
}

impl Reload {
    /// Watches the file from which `config` was parsed. A message on `requests` reads it again at once.
    pub(super) fn start(
        path: &Path,
        text: String,
        config: Config,
        requests: Receiver<()>,
    ) -> Outcome<Self> {
        let (sender, changes) = sync_channel(1);
        let watch = Watch {
            path: path.to_owned(),
            owner: file::owner(path),
            // Here, not by the thread: the file may be gone before that one runs.
            seen: identity(path).map_err(|error| error.kind()),
            last: Ok(text),
            requests,
            changes: sender,
        };
        thread::Builder::new()
            .name("config".to_owned())
            .spawn(|| watch.run())
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self {
            changes,
            config,
            status: ConfigFile {
                path: path.display().to_string(),
                loaded_unix_ns: unix_ns(),
                ..ConfigFile::default()
            },
            notices: Vec::new(),
        })
    }

    pub(super) fn status(&self) -> &ConfigFile {
        &self.status
    }

    /// Takes the notices since the last call.
    pub(super) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Applies a change of the file, if there is one. `apply` gets its text, the configuration in force and the next one; it
    /// must either apply all of the next one or fail without an effect. Returns whether the status has changed.
    pub(super) fn poll(
        &mut self,
        apply: impl FnOnce(&str, &Config, &Config) -> Result<()>,
    ) -> bool {
        let Ok(content) = self.changes.try_recv() else {
            return false;
        };
        let applied = content
            .map_err(anyhow::Error::msg)
            .and_then(|(text, next)| {
                let mut next = next;
                let fixed = next.keep_fixed(&self.config);
                apply(&text, &self.config, &next).map(|()| (next, fixed))
            });
        match applied {
            Ok((config, fixed)) => self.loaded(config, &fixed),
            Err(error) => self.rejected(&format!("{error:#}")),
        }
        true
    }

    fn loaded(&mut self, config: Config, fixed: &[&str]) {
        debug!(?fixed, "configuration reloaded");
        self.config = config;
        self.status.loaded_unix_ns = unix_ns();
        self.status.reloads += 1;
        self.status.error = None;
        self.status.needs_restart = fixed.iter().map(|key| (*key).to_owned()).collect();
        self.notices.push(Notice {
            code: "config_reloaded".to_owned(),
            text: format!("configuration reloaded from {}", self.status.path),
        });
        if !fixed.is_empty() {
            self.notices.push(Notice {
                code: "config_needs_restart".to_owned(),
                text: format!(
                    "restart the agent to apply {} of {}; all other settings are in force",
                    fixed.join(", "),
                    self.status.path
                ),
            });
        }
    }

    fn rejected(&mut self, reason: &str) {
        let reason = bounded(&reason.replace('\n', " "), MAX_REASON_BYTES);
        debug!(reason, "configuration rejected");
        self.status.rejected += 1;
        self.notices.push(Notice {
            code: "config_rejected".to_owned(),
            text: format!(
                "configuration {} rejected, the previous one stays in force: {reason}",
                self.status.path
            ),
        });
        self.status.error = Some(reason);
    }
}

/// The watching thread.
struct Watch {
    path: PathBuf,
    /// The owner of the file at the start; `None`: it cannot be read again, such as a pipe.
    owner: Option<u32>,
    /// The file's identity at the last check, before its content was read.
    seen: Result<Identity, io::ErrorKind>,
    /// The text, or the error, that was passed on last.
    last: Result<String, String>,
    requests: Receiver<()>,
    changes: SyncSender<Content>,
}

impl Watch {
    /// Until the agent ends. Waits while a change was not yet applied, so there is never more than one.
    fn run(mut self) {
        // The file may have changed between the first read and now.
        let mut is_first = true;
        loop {
            let is_requested = match self.requests.recv_timeout(CHECK_INTERVAL) {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let now = self.identity();
            let is_initial = std::mem::take(&mut is_first) && now == self.seen;
            let is_unchanged = now == self.seen && !is_initial;
            // Taken before reading: a change during the read is found by the next check.
            self.seen = now;
            if !is_requested && (is_unchanged || self.owner.is_none()) {
                continue;
            }
            if !is_requested {
                // Part of a file may be valid.
                self.seen = self.settled(self.seen);
            }
            let mut content = self.content();
            // The agent has just accepted this very file, unless it is gone by now.
            let is_accepted = is_initial && now == self.seen && now.is_ok();
            if content.is_err() && is_accepted && !is_requested {
                continue;
            }
            if content.is_err() {
                thread::sleep(SETTLE_TIME);
                self.seen = self.identity();
                content = self.content();
            }
            let is_empty = |text: &str| text.trim().is_empty();
            if !is_requested
                && content.as_ref().is_ok_and(|(text, _)| is_empty(text))
                && !self.last.as_ref().is_ok_and(|text| is_empty(text))
            {
                content = Err("the file is empty: SIGHUP applies it nevertheless".to_owned());
            }
            let last = content.as_ref().map(|(text, _)| text.clone());
            let last = last.map_err(Clone::clone);
            if !is_requested && last == self.last {
                continue;
            }
            self.last = last;
            if self.changes.send(content).is_err() {
                return;
            }
        }
    }

    /// The file's identity once it does not change any more, or after a limited time.
    fn settled(
        &self,
        mut seen: Result<Identity, io::ErrorKind>,
    ) -> Result<Identity, io::ErrorKind> {
        for _ in 0..MAX_SETTLE_TIMES {
            thread::sleep(SETTLE_TIME);
            let before = std::mem::replace(&mut seen, self.identity());
            if before == seen {
                break;
            }
        }
        seen
    }

    fn identity(&self) -> Result<Identity, io::ErrorKind> {
        identity(&self.path).map_err(|error| error.kind())
    }

    fn content(&self) -> Content {
        let read = || {
            let owner = self.owner.ok_or_else(|| {
                anyhow!("it was not a regular file at the start: restart the agent")
            })?;
            let text = read_again(&self.path, owner)?;
            let config = parse_quietly(&text)?;
            if config.otlp.is_some() {
                // It takes effect only after a restart, which must not fail.
                OtlpConfig::from_env_and(config.otlp.as_deref()).context("otlp")?;
            }
            Ok((text, config))
        };
        read().map_err(|error: anyhow::Error| format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use tailback_tests::temp::TempDir;

    use super::*;

    /// The next change, applied, within a few seconds.
    fn next(reload: &mut Reload) -> Option<(String, Config)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut applied = None;
        while Instant::now() < deadline {
            let is_changed = reload.poll(|text, _, next| {
                applied = Some((text.to_owned(), next.clone()));
                Ok(())
            });
            if is_changed {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        applied
    }

    /// Watches a file with this text, from which the configuration was loaded.
    fn watching(text: &str, loaded: &str) -> (TempDir, PathBuf, SyncSender<()>, Reload) {
        let temp = TempDir::new("reload").unwrap();
        let path = temp.write("tailback.toml", text).unwrap();
        let (request, requests) = sync_channel(1);
        let config = Config::parse(loaded).unwrap();
        let reload = Reload::start(&path, loaded.to_owned(), config, requests).unwrap();
        (temp, path, request, reload)
    }

    fn codes(reload: &mut Reload) -> Vec<String> {
        let notices = reload.take_notices().into_iter();
        notices.map(|notice| notice.code).collect()
    }

    #[test]
    fn a_change_is_applied_a_bad_one_is_not_and_fixed_settings_are_named() {
        let old = "interval = \"200ms\"\n";
        let (temp, path, request, mut reload) = watching(old, old);
        // Without a change, a request loads the same again.
        request.send(()).unwrap();
        assert_eq!(next(&mut reload).unwrap().0, old);
        assert_eq!(codes(&mut reload), ["config_reloaded"]);
        temp.write("tailback.toml", "interval = \n").unwrap();
        assert!(next(&mut reload).is_none());
        assert_eq!(codes(&mut reload), ["config_rejected"]);
        let error = reload.status().error.clone().unwrap();
        assert!(error.starts_with("line 1: "), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(next(&mut reload).is_none());
        assert_eq!(codes(&mut reload), ["config_rejected"]);
        let new = "interval = \"300ms\"\notlp = \"http://127.0.0.1:1\"\n";
        temp.write("tailback.toml", new).unwrap();
        let (_, config) = next(&mut reload).unwrap();
        assert_eq!(config.budget().interval_ns, 300_000_000);
        assert_eq!(config.otlp, None, "in force only after a restart");
        assert_eq!(
            codes(&mut reload),
            ["config_reloaded", "config_needs_restart"]
        );
        let status = reload.status();
        assert_eq!(
            (status.reloads, status.rejected, &status.error),
            (2, 2, &None)
        );
        assert_eq!(status.needs_restart, ["otlp"]);
    }

    #[test]
    fn a_file_that_is_being_written_or_is_empty_is_not_applied() {
        let old = "interval = \"200ms\"\n";
        let (_temp, path, request, mut reload) = watching(old, old);
        for interval in ["300ms", "400ms", "500ms"] {
            let text = format!("interval = \"{interval}\"\n");
            let written = Instant::now();
            fs::write(&path, &text).unwrap();
            assert_eq!(next(&mut reload).unwrap().0, text);
            assert!(
                written.elapsed() >= SETTLE_TIME,
                "a part of it may be valid, too"
            );
        }
        assert_eq!(codes(&mut reload), ["config_reloaded"; 3]);
        fs::write(&path, "").unwrap();
        assert!(next(&mut reload).is_none());
        let error = reload.status().error.clone().unwrap();
        assert!(error.contains("empty"), "{error}");
        request.send(()).unwrap();
        assert_eq!(next(&mut reload).unwrap().0, "");
    }

    #[test]
    fn an_invalid_setting_that_would_take_effect_later_is_rejected() {
        let (_temp, _, request, mut reload) = watching("otlp = \"garbage\"\n", "");
        request.send(()).unwrap();
        assert!(next(&mut reload).is_none());
        let error = reload.status().error.clone().unwrap();
        assert!(error.starts_with("otlp: "), "{error}");
    }

    #[test]
    fn a_file_that_is_gone_at_once_is_reported() {
        // Before the thread runs, and during its first check.
        for after_ms in [0, 510, 560, 610, 660] {
            let (_temp, path, _request, mut reload) = watching("", "");
            thread::sleep(Duration::from_millis(after_ms));
            fs::remove_file(path).unwrap();
            assert!(next(&mut reload).is_none());
            assert_eq!(codes(&mut reload), ["config_rejected"]);
        }
    }

    #[test]
    fn what_cannot_be_applied_changes_nothing() {
        let (_temp, _, request, mut reload) = watching("", "");
        request.send(()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !reload.poll(|_, _, _| Err(anyhow!("no target"))) {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(reload.status().error.as_deref(), Some("no target"));
        assert_eq!(reload.status().reloads, 0);
    }
}
