//! The backpressure signals of a live session: publishes them and supervises the adapter process.

use std::{
    fs::File,
    io::{self, Seek as _, Write as _},
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

use anyhow::{Context as _, bail};
use rustix::fs::{MemfdFlags, memfd_create};
use tracing::debug;

use super::{
    Failure,
    exit_code::{Outcome, print_stderr},
    logging,
};
use crate::{
    adapters::{agent::ask_adapter_process, ask_to_exit},
    collect::OutputStats,
    config::{file, signal::Signal},
    event::Event,
    pipeline::Pipeline,
    sample::{Notice, Sample},
    signal::{ConfigFile, Signals},
};

/// Delay before an adapter process that exited is started again.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How long a process that was replaced may take to exit before it is killed: it hands over within 6 s (`takeover`).
const RETIREMENT: Duration = Duration::from_secs(10);
/// How often the adapter process is asked for its status.
const HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Unanswered health checks in a row after which the adapter process counts as hung, and is killed and restarted.
const MAX_UNANSWERED: u32 = 3;
/// How long the adapter process outlives the agent. HAProxy and other pollers ask again within this time and learn that
/// there is no pressure.
const EXIT_IDLE_TIME: &str = "30s";

pub(super) struct LiveSignals {
    /// `None` if publishing is off or failed; the agent keeps watching.
    signals: Option<Signals>,
    adapter_process: Option<AdapterProcess>,
    notices: Vec<Notice>,
}

impl LiveSignals {
    /// Starts publishing. A failure is only a notice, unless adapters are configured: then it is an error. `text` is the
    /// text of the configuration, for the adapter process.
    pub(super) fn start(config: &Signal, text: &str, interval: Duration) -> Outcome<Self> {
        let mut live = Self {
            signals: None,
            adapter_process: None,
            notices: Vec::new(),
        };
        if !config.publishes() {
            return Ok(live);
        }
        // Checked again: the command line may override the file's interval.
        config
            .check(interval)
            .context("invalid [signal]")
            .map_err(Failure::usage)?;
        match Signals::start(config, interval) {
            Ok(signals) => {
                debug!(directory = %signals.directory().path.display(), "publishing signals");
                live.signals = Some(signals);
            }
            Err(error) if config.has_adapters() => {
                return Err(Failure::usage(error.context("cannot publish signals")));
            }
            Err(error) => live.notices.push(Notice {
                code: "not_published".to_owned(),
                text: format!("signals are not published: {error:#}"),
            }),
        }
        if config.starts_adapter_process() {
            live.adapter_process = Some(AdapterProcess::start(text, live.directory(config))?);
        }
        Ok(live)
    }

    /// Fails if the configuration cannot replace the one in force.
    pub(super) fn check(&self, next: &Signal, interval: Duration) -> anyhow::Result<()> {
        if !next.publishes() {
            return Ok(());
        }
        next.check(interval).context("invalid [signal]")?;
        if self.signals.is_none() && next.starts_adapter_process() {
            bail!("adapters need pages, and signals are not published: restart the agent");
        }
        Ok(())
    }

    /// Applies a configuration that was [checked](Self::check). Adapters that are not changed are not interrupted.
    pub(super) fn reload(&mut self, from: &Signal, to: &Signal, text: &str, interval: Duration) {
        if let Some(signals) = &mut self.signals {
            signals.set_limits(to, interval);
        }
        if to == from {
            return;
        }
        let directory = self.directory(to);
        match (&mut self.adapter_process, to.starts_adapter_process()) {
            (Some(process), true) => process.replace(text),
            (Some(process), false) => {
                process.retire(State::Unwanted);
                if let Some(signals) = &self.signals {
                    // An error means that it is killed after its time.
                    let _ = ask_to_exit(&signals.directory().fd);
                }
            }
            (None, true) => match AdapterProcess::start(text, directory) {
                Ok(process) => self.adapter_process = Some(process),
                Err(error) => self.notices.push(Notice {
                    code: "adapter_process_exited".to_owned(),
                    text: format!("{error}"),
                }),
            },
            (None, false) => {}
        }
    }

    /// The directory in use.
    fn directory(&self, config: &Signal) -> PathBuf {
        let signals = self.signals.as_ref();
        signals.map_or_else(
            || config.directory(),
            |signals| signals.directory().path.clone(),
        )
    }

    /// Publishes the state of the configuration file.
    pub(super) fn set_config_file(&self, file: &ConfigFile) {
        if let Some(signals) = &self.signals {
            signals.set_config_file(file.clone());
        }
    }

    /// Adds the notices about publishing to the next sample.
    pub(super) fn report(&mut self, outputs: &mut OutputStats) {
        if let Some(signals) = &mut self.signals {
            self.notices.append(&mut signals.notices());
        }
        if let Some(process) = &mut self.adapter_process {
            self.notices.extend(process.supervise());
        }
        outputs.notices.append(&mut self.notices);
    }

    /// Publishes the state after a sample, and its events.
    pub(super) fn publish(&mut self, sample: &Sample, pipeline: &Pipeline, events: &[Event]) {
        if let Some(signals) = &mut self.signals {
            signals.publish(sample.mono_ns, sample.unix_ns, pipeline, events);
        }
    }

    /// Publishes "no pressure" and stops. The adapter process lives on for [`EXIT_IDLE_TIME`] to report it.
    pub(super) fn finish(self, events: &[Event], pipeline: &Pipeline) {
        if let Some(signals) = self.signals {
            signals.finish(events, pipeline);
        }
    }
}

/// The adapter process: a child that serves the adapters.
struct AdapterProcess {
    directory: PathBuf,
    /// The configuration that it serves. It gets a copy of the text that the agent has accepted: the file may be gone, or
    /// invalid.
    text: String,
    child: State,
    /// Processes that `child` replaces, or that are no longer wanted, and when they are killed.
    retired: Vec<(Child, Instant)>,
    /// Unanswered health checks in a row.
    unanswered: Arc<AtomicU32>,
    /// The reason in the last notice: each is reported once.
    reported: Option<String>,
}

enum State {
    Running(Child),
    /// Started again at this time.
    Due(Instant),
    /// No adapter is configured.
    Unwanted,
}

impl AdapterProcess {
    fn start(text: &str, directory: PathBuf) -> Outcome<Self> {
        let child = spawn(text, &directory)
            .context("cannot start the adapter process")
            .map_err(Failure::bug)?;
        let unanswered = Arc::default();
        start_health_checks(directory.clone(), &unanswered)
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self {
            directory,
            text: text.to_owned(),
            child: State::Running(child),
            retired: Vec::new(),
            unanswered,
            reported: None,
        })
    }

    /// Starts a process with another configuration, which takes over from the running one.
    fn replace(&mut self, text: &str) {
        text.clone_into(&mut self.text);
        self.retire(State::Due(Instant::now()));
    }

    /// Goes on with `next`. The running process exits when it is asked to, by the one that takes over or by
    /// [`ask_to_exit`], or is killed after [`RETIREMENT`].
    fn retire(&mut self, next: State) {
        let now = Instant::now();
        if let State::Running(child) = std::mem::replace(&mut self.child, next) {
            // Two changes in a row: earlier processes end now.
            for (_, deadline) in &mut self.retired {
                *deadline = now;
            }
            self.retired.push((child, now + RETIREMENT));
        }
    }

    /// Restarts the process if it has exited, and kills it if it hangs.
    fn supervise(&mut self) -> Option<Notice> {
        self.retired.retain_mut(|(child, deadline)| {
            if Instant::now() > *deadline {
                let _ = child.kill();
            }
            matches!(child.try_wait(), Ok(None))
        });
        let ended = match &mut self.child {
            State::Running(child) => match child.try_wait() {
                Ok(None) if self.unanswered.load(Ordering::Relaxed) < MAX_UNANSWERED => {
                    return None;
                }
                Ok(None) => {
                    self.unanswered.store(0, Ordering::Relaxed);
                    let _ = child.kill();
                    return Some(Notice {
                        code: "adapter_process_hung".to_owned(),
                        text: "the adapter process does not respond: killing it".to_owned(),
                    });
                }
                Ok(Some(status)) => status.to_string(),
                Err(error) => error.to_string(),
            },
            State::Unwanted => return None,
            State::Due(at) if Instant::now() < *at => return None,
            State::Due(_) => match spawn(&self.text, &self.directory) {
                Ok(child) => {
                    self.unanswered.store(0, Ordering::Relaxed);
                    self.child = State::Running(child);
                    return None;
                }
                Err(error) => error.to_string(),
            },
        };
        debug!(reason = ended, "adapter process exited");
        self.child = State::Due(Instant::now() + RESTART_DELAY);
        // Once per reason: the process may exit every second.
        if self.reported.as_ref() == Some(&ended) {
            return None;
        }
        self.reported = Some(ended.clone());
        Some(Notice {
            code: "adapter_process_exited".to_owned(),
            text: format!("the adapter process exited ({ended}): restarting it"),
        })
    }
}

/// Starts the health-check thread, which ends when `unanswered` is dropped.
fn start_health_checks(directory: PathBuf, unanswered: &Arc<AtomicU32>) -> io::Result<()> {
    let unanswered = Arc::downgrade(unanswered);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ask = move || {
        loop {
            thread::sleep(HEALTH_CHECK_INTERVAL);
            let answer = runtime.block_on(ask_adapter_process(&directory));
            let Some(unanswered) = unanswered.upgrade() else {
                return;
            };
            match answer {
                Ok(_) => unanswered.store(0, Ordering::Relaxed),
                Err(error) => {
                    debug!(%error, "adapter process did not answer");
                    unanswered.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    thread::Builder::new()
        .name("health-check".to_owned())
        .spawn(ask)?;
    Ok(())
}

/// Starts the adapter process in its own process group, so that Ctrl-C in our terminal does not reach it. It reads its
/// configuration from standard input.
fn spawn(text: &str, directory: &Path) -> io::Result<Child> {
    // Started by its path it has its name in `ps`. If the file was replaced, /proc/self/exe still works.
    let own = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(own.unwrap_or_else(|| "/proc/self/exe".into()));
    if let Some(filter) = logging::filter() {
        command.env(logging::VARIABLE, filter);
    }
    let child = in_memory(text).and_then(|config| {
        command
            .args(["adapters", "--config", file::STDIN, "--directory"])
            .arg(directory)
            .args(["--exit-idle-time", EXIT_IDLE_TIME])
            .stdin(config)
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
    });
    match &child {
        Ok(child) => debug!(pid = child.id(), "adapter process started"),
        Err(error) => print_stderr(format!("cannot start the adapter process: {error}")),
    }
    child
}

/// A file in memory with this text. A pipe would block on a process that does not read.
fn in_memory(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("tailback-config", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}
