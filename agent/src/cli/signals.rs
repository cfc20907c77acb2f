//! The backpressure signals of a live session: publishes them and supervises the adapter process.

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
use tracing::debug;

use super::{
    Failure,
    exit_code::{Outcome, print_stderr},
    logging,
};
use crate::{
    adapters::agent::ask_adapter_process,
    collect::OutputStats,
    config::signal::Signal,
    event::Event,
    pipeline::Pipeline,
    sample::{Notice, Sample},
    signal::Signals,
};

/// Delay before an adapter process that exited is started again.
const RESTART_DELAY: Duration = Duration::from_secs(1);
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
    /// Starts publishing. A failure is only a notice, unless adapters are configured: then it is an error.
    pub(super) fn start(config: &Signal, file: Option<&Path>, interval: Duration) -> Outcome<Self> {
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
                debug!(directory = %config.directory().display(), "publishing signals");
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
        if let Some(file) = file.filter(|_| config.starts_adapter_process()) {
            live.adapter_process = Some(AdapterProcess::start(file, config.directory())?);
        }
        Ok(live)
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
    config_file: PathBuf,
    /// `Err`: the time at which it is started again.
    child: Result<Child, Instant>,
    /// Unanswered health checks in a row.
    unanswered: Arc<AtomicU32>,
    /// The reason in the last notice: each is reported once.
    reported: Option<String>,
}

impl AdapterProcess {
    fn start(file: &Path, directory: PathBuf) -> Outcome<Self> {
        let file = file
            .canonicalize()
            .context("cannot resolve the path of the configuration")
            .map_err(Failure::usage)?;
        let child = spawn(&file)
            .context("cannot start the adapter process")
            .map_err(Failure::bug)?;
        let unanswered = Arc::default();
        start_health_checks(directory, &unanswered)
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self {
            config_file: file,
            child: Ok(child),
            unanswered,
            reported: None,
        })
    }

    /// Restarts the process if it has exited, and kills it if it hangs.
    fn supervise(&mut self) -> Option<Notice> {
        let ended = match &mut self.child {
            Ok(child) => match child.try_wait() {
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
            Err(due) if Instant::now() < *due => return None,
            Err(_) => match spawn(&self.config_file) {
                Ok(child) => {
                    self.child = Ok(child);
                    return None;
                }
                Err(error) => error.to_string(),
            },
        };
        debug!(reason = ended, "adapter process exited");
        self.child = Err(Instant::now() + RESTART_DELAY);
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

/// Starts the adapter process in its own process group, so that Ctrl-C in our terminal does not reach it.
fn spawn(config_file: &Path) -> io::Result<Child> {
    // Started by its path it has its name in `ps`. If the file was replaced, /proc/self/exe still works.
    let own = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(own.unwrap_or_else(|| "/proc/self/exe".into()));
    if let Some(filter) = logging::filter() {
        command.env(logging::VARIABLE, filter);
    }
    let child = command
        .arg("adapters")
        .arg("--config")
        .arg(config_file)
        .args(["--exit-idle-time", EXIT_IDLE_TIME])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn();
    match &child {
        Ok(child) => debug!(pid = child.id(), "adapter process started"),
        Err(error) => print_stderr(format!("cannot start the adapter process: {error}")),
    }
    child
}
