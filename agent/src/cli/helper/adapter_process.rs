//! Runs the adapter process, and supervises it.

use std::{
    io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::debug;

use super::in_memory;
use crate::{
    adapters::{agent::ask_adapter_process, ask_to_exit, is_asked},
    cli::{exit_code::print_stderr, logging},
    config::file,
    sample::Notice,
    signal::directory::Directory,
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

/// The adapter process: a child that serves the adapters.
pub(super) struct AdapterProcess {
    /// The configuration that it serves. It gets a copy of the text that the agent has accepted: the file may be gone, or
    /// invalid.
    text: String,
    child: State,
    /// Replaces `child`, but only once no process is retired: with three processes, any could take over from any other.
    next: Option<State>,
    /// The process that `child` replaces, or that is no longer wanted, and when it is killed.
    retired: Option<(Child, Instant)>,
    /// Unanswered health checks in a row.
    unanswered: Arc<AtomicU32>,
    has_health_checks: bool,
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
    /// One that [`supervise`](Self::supervise) starts.
    pub(super) fn new(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            child: State::Due(Instant::now()),
            next: None,
            retired: None,
            unanswered: Arc::default(),
            has_health_checks: false,
            reported: None,
        }
    }

    /// Starts a process with another configuration, which takes over from the running one.
    pub(super) fn replace(&mut self, text: &str) {
        text.clone_into(&mut self.text);
        self.next = Some(State::Due(Instant::now()));
    }

    /// Ends the running process, and starts no other.
    pub(super) fn end(&mut self) {
        self.next = Some(State::Unwanted);
    }

    /// Restarts the process if it has exited, and kills it if it hangs.
    pub(super) fn supervise(&mut self, directory: &Directory) -> Option<Notice> {
        if let Some((child, _)) = &mut self.retired
            && !matches!(child.try_wait(), Ok(None))
        {
            self.retired = None;
        }
        if self.retired.is_none()
            && let Some(next) = self.next.take()
            && let State::Running(child) = std::mem::replace(&mut self.child, next)
        {
            self.retired = Some((child, Instant::now() + RETIREMENT));
        }
        self.end_retired(directory);
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
            State::Due(_) => match self.start(directory) {
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

    fn start(&mut self, directory: &Directory) -> io::Result<Child> {
        if !self.has_health_checks {
            start_health_checks(directory.path_to(""), &self.unanswered)?;
            self.has_health_checks = true;
        }
        spawn(&self.text, directory)
    }

    /// The retired process exits when it is asked to: by the one that takes over, or, if there is none, here. It is killed if it
    /// has not done so within [`RETIREMENT`].
    fn end_retired(&mut self, directory: &Directory) {
        let Some((child, deadline)) = &mut self.retired else {
            return;
        };
        // Again if it takes over only now: then it has removed the request, as one that was meant for its predecessor.
        let is_unasked = matches!(self.child, State::Unwanted) && !is_asked(&directory.fd);
        if is_unasked && ask_to_exit(&directory.fd).is_ok() {
            *deadline = Instant::now() + RETIREMENT;
        } else if Instant::now() > *deadline {
            let _ = child.kill();
        }
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

/// This program, to be run once more with the same log.
pub(super) fn own_program() -> Command {
    // Started by its path it has its name in `ps`. If the file was replaced, /proc/self/exe still works.
    let own = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(own.unwrap_or_else(|| "/proc/self/exe".into()));
    if let Some(filter) = logging::filter() {
        command.env(logging::VARIABLE, filter);
    }
    command
}

/// Starts the adapter process in its own process group, so that Ctrl-C in our terminal does not reach it. It reads its
/// configuration from standard input.
fn spawn(text: &str, directory: &Directory) -> io::Result<Child> {
    let (path, _inherited) = directory.for_child()?;
    let mut command = own_program();
    let child = in_memory(text.as_bytes()).and_then(|config| {
        command
            .args(["adapters", "--config", file::STDIN, "--directory"])
            .arg(path)
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
