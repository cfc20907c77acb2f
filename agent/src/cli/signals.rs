//! The signals of a live session: published, and their guard kept running.

use std::{
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{
    Failure,
    exit_code::{Outcome, say},
};
use crate::{
    adapters::agent::ask_guard,
    collect::Others,
    config::signal::Signal,
    event::Event,
    pipeline::Pipeline,
    sample::{Notice, Sample},
    signal::Signals,
};

/// A guard that ended is started again after this long.
const AGAIN: Duration = Duration::from_secs(1);
/// The guard is asked this often whether it is there. One that did not answer so often in a row hangs: it is ended, and started
/// again.
const ASKED_EVERY: Duration = Duration::from_secs(5);
const HANGS_AFTER: u32 = 3;
/// The guard stays for so long without an agent: HAProxy and its like have asked again by then.
const LINGER: &str = "30s";

pub(super) struct LiveSignals {
    /// `None`: nothing can be published. Watching is worth as much without it.
    signals: Option<Signals>,
    guard: Option<Guard>,
    notices: Vec<Notice>,
}

impl LiveSignals {
    /// Publishes where it can; what is in the way is said, and is a reason to end only where adapters are asked for.
    pub(super) fn start(config: &Signal, file: Option<&Path>, interval: Duration) -> Outcome<Self> {
        let mut live = Self {
            signals: None,
            guard: None,
            notices: Vec::new(),
        };
        if !config.publishes() {
            return Ok(live);
        }
        // The command line may ask for another interval than the file.
        config
            .check(interval)
            .context("[signal] cannot be used")
            .map_err(Failure::usage)?;
        match Signals::start(config, interval) {
            Ok(signals) => live.signals = Some(signals),
            Err(error) if config.has_adapters() => {
                return Err(Failure::usage(
                    error.context("the pressure cannot be published"),
                ));
            }
            Err(error) => live.notices.push(Notice {
                code: "not_published".to_owned(),
                text: format!("the pressure is not published: {error:#}"),
            }),
        }
        if let Some(file) = file.filter(|_| config.starts_guard()) {
            live.guard = Some(Guard::start(file, config.directory())?);
        }
        Ok(live)
    }

    /// What there is to say of the publishing, with the next sample.
    pub(super) fn report(&mut self, others: &mut Others) {
        if let Some(signals) = &mut self.signals {
            self.notices.append(&mut signals.notices());
        }
        if let Some(guard) = &mut self.guard {
            self.notices.extend(guard.keep());
        }
        others.notices.append(&mut self.notices);
    }

    pub(super) fn tell(&mut self, sample: &Sample, pipeline: &Pipeline, events: &[Event]) {
        if let Some(signals) = &mut self.signals {
            signals.tell(sample.mono_ns, sample.unix_ns, pipeline, events);
        }
    }

    /// No pressure from now on. The guard stays for a while, to say so.
    pub(super) fn finish(self, events: &[Event], pipeline: &Pipeline) {
        if let Some(signals) = self.signals {
            signals.finish(events, pipeline);
        }
    }
}

/// The process that serves the adapters.
struct Guard {
    file: PathBuf,
    /// `None`: it is to be started at that time.
    child: Result<Child, Instant>,
    /// How often it did not answer, in a row.
    unanswered: Arc<AtomicU32>,
    told: Option<String>,
}

impl Guard {
    fn start(file: &Path, directory: PathBuf) -> Outcome<Self> {
        let file = file
            .canonicalize()
            .context("cannot find the configuration again")
            .map_err(Failure::usage)?;
        let child = spawn(&file)
            .context("cannot start the guard")
            .map_err(Failure::bug)?;
        let unanswered = Arc::default();
        ask_on(directory, &unanswered)
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self {
            file,
            child: Ok(child),
            unanswered,
            told: None,
        })
    }

    /// Starts it again where it ended, and ends it where it hangs.
    fn keep(&mut self) -> Option<Notice> {
        let ended = match &mut self.child {
            Ok(child) => match child.try_wait() {
                Ok(None) if self.unanswered.load(Ordering::Relaxed) < HANGS_AFTER => return None,
                Ok(None) => {
                    self.unanswered.store(0, Ordering::Relaxed);
                    let _ = child.kill();
                    return Some(Notice {
                        code: "guard_hangs".to_owned(),
                        text: "the guard does not answer, and is ended".to_owned(),
                    });
                }
                Ok(Some(status)) => status.to_string(),
                Err(error) => error.to_string(),
            },
            Err(due) if Instant::now() < *due => return None,
            Err(_) => match spawn(&self.file) {
                Ok(child) => {
                    self.child = Ok(child);
                    return None;
                }
                Err(error) => error.to_string(),
            },
        };
        self.child = Err(Instant::now() + AGAIN);
        // Once for each reason: it may end every second.
        if self.told.as_ref() == Some(&ended) {
            return None;
        }
        self.told = Some(ended.clone());
        Some(Notice {
            code: "guard_ended".to_owned(),
            text: format!("the guard ended ({ended}) and is started again"),
        })
    }
}

/// Asks the guard in a thread of its own, for as long as somebody wants to know.
fn ask_on(directory: PathBuf, unanswered: &Arc<AtomicU32>) -> io::Result<()> {
    let unanswered = Arc::downgrade(unanswered);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ask = move || {
        loop {
            thread::sleep(ASKED_EVERY);
            let answer = runtime.block_on(ask_guard(&directory));
            let Some(unanswered) = unanswered.upgrade() else {
                return;
            };
            match answer {
                Ok(_) => unanswered.store(0, Ordering::Relaxed),
                Err(_) => _ = unanswered.fetch_add(1, Ordering::Relaxed),
            }
        }
    };
    thread::Builder::new()
        .name("ask-guard".to_owned())
        .spawn(ask)?;
    Ok(())
}

/// In a process group of its own: what is typed at our terminal does not reach it.
fn spawn(file: &Path) -> io::Result<Child> {
    // By its path it has its name in `ps`; replaced meanwhile, it is found in another way.
    let own = std::env::current_exe().ok().filter(|path| path.exists());
    let child = Command::new(own.unwrap_or_else(|| "/proc/self/exe".into()))
        .arg("adapters")
        .arg("--config")
        .arg(file)
        .args(["--linger", LINGER])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn();
    if let Err(error) = &child {
        say(format!("cannot start the guard: {error}"));
    }
    child
}
