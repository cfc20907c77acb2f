//! Runs the agent as a user would, and parses its JSON output.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    lines::{Line, Stream},
    process::Process,
    temp::TempDir,
};

/// Environment variable that names the directory for pages and sockets, as systemd sets it.
const RUNTIME_DIRECTORY: &str = "RUNTIME_DIRECTORY";

/// Upper bound for the agent's CPU use in tests, as a share of one core. The default budget is 0.01, but on a busy machine
/// the same work costs two or three times as much. The bound only distinguishes a working budget from none.
pub const MAX_CPU_SHARE: f64 = 0.04;

/// Path of the binary: `TAILBACK_BIN`, else the release build of this checkout.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("TAILBACK_BIN") {
        return Ok(PathBuf::from(path));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."));
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let path = target.join("release/tailback");
    if !path.is_file() {
        bail!(
            "{} is not built: run `cargo build --release`",
            path.display()
        );
    }
    Ok(path)
}

/// Programs that `--tier watch` attaches: at sched_switch, sched_wakeup and sched_wakeup_new.
pub const HOOKS: usize = 3;

/// Number of hooks that a process has attached.
pub fn attached_hooks(pid: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    let files = files.into_iter().flatten().flatten();
    let is_link = |file: &fs::DirEntry| {
        let kind = fs::read_link(file.path());
        kind.is_ok_and(|kind| kind.to_string_lossy().contains("bpf_link"))
    };
    let texts = files.filter(is_link).filter_map(|file| {
        let info = Path::new("/proc").join(pid.to_string()).join("fdinfo");
        fs::read_to_string(info.join(file.file_name())).ok()
    });
    // Programs at BTF tracepoints have this type of link.
    texts
        .filter(|text| text.contains("link_type:\traw_tracepoint"))
        .count()
}

/// Number of hooks that an agent uses which drops its privileges (`run`, `record`). Before it does, it attaches them for a moment, to
/// find those that it must keep.
pub fn hooks_in_use(pid: u32) -> usize {
    if is_confined(pid) {
        attached_hooks(pid)
    } else {
        0
    }
}

/// Whether an agent has dropped its privileges: it has more filters for system calls than this process, which may be in a container.
pub fn is_confined(pid: u32) -> bool {
    let filters = |process: &str| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("Seccomp_filters:"))?;
        count.trim().parse::<u32>().ok()
    };
    filters(&pid.to_string()) > filters("self")
}

/// One line of `--json` output.
#[derive(Clone, Debug)]
pub struct Event {
    /// When it was received.
    pub at: Instant,
    /// The same moment on the wall clock, ns since 1970.
    pub unix_ns: u64,
    pub value: Value,
}

impl Event {
    /// The text of a key, empty if missing.
    pub fn text(&self, key: &str) -> &str {
        self.value
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The number of a key.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.value.get(key).and_then(Value::as_f64)
    }

    /// Whether the event has this `type`.
    pub fn is(&self, kind: &str) -> bool {
        self.text("type") == kind
    }
}

impl TryFrom<&Line> for Event {
    type Error = anyhow::Error;

    fn try_from(line: &Line) -> Result<Self> {
        let value = serde_json::from_str(&line.text)
            .with_context(|| format!("read the agent's line {:?}", line.text))?;
        Ok(Self {
            at: line.at,
            unix_ns: line.unix_ns,
            value,
        })
    }
}

/// A running agent whose standard output is JSON lines.
pub struct Agent {
    process: Process,
    /// Where it publishes pages: a directory of its own, because only one agent may use a directory.
    run: TempDir,
}

impl Agent {
    /// Starts `tailback run --json` with further arguments.
    pub fn run(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        Self::start(Command::new(binary()?).args(["run", "--json"]).args(args))
    }

    /// Starts a command that writes JSON lines, for tests that need their own environment.
    pub fn start(command: &mut Command) -> Result<Self> {
        let run = TempDir::new("run")?;
        let given = command
            .get_envs()
            .any(|(name, _)| name == RUNTIME_DIRECTORY);
        if !given {
            command.env(RUNTIME_DIRECTORY, run.path());
        }
        // So that no system call that the adapter process needs is refused unnoticed.
        command.env("TAILBACK_ADAPTERS_SECCOMP", "kill");
        Ok(Self {
            process: Process::start("tailback", command)?,
            run,
        })
    }

    /// Directory of its pages and its event socket, unless its configuration names another.
    pub fn run_directory(&self) -> &Path {
        self.run.path()
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Returns the process, to stop it and check its exit code.
    pub fn into_process(self) -> Process {
        self.process
    }

    /// Number of lines received so far, for [`Agent::events_since`] and [`Agent::wait_since`].
    pub fn mark(&self) -> usize {
        self.process.lines().count()
    }

    /// All events so far. A line on standard output that is not JSON is an error.
    pub fn events(&self) -> Result<Vec<Event>> {
        self.events_since(0)
    }

    /// Events after the first `mark` lines.
    pub fn events_since(&self, mark: usize) -> Result<Vec<Event>> {
        let lines = self.process.lines().since(mark);
        lines
            .iter()
            .filter(|line| line.stream == Stream::Stdout)
            .map(Event::try_from)
            .collect()
    }

    /// Waits for the first `wanted` event, including past ones.
    pub fn wait_for(
        &self,
        what: &str,
        deadline: Duration,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        self.wait_since(0, what, deadline, wanted)
    }

    /// Waits for the first `wanted` event after `mark`.
    pub fn wait_since(
        &self,
        mark: usize,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        let what = format!("tailback to report {what}");
        self.process.lines().wait(&what, mark, deadline, |line| {
            if line.stream != Stream::Stdout {
                return None;
            }
            match Event::try_from(line) {
                Ok(event) => wanted(&event).then_some(Ok(event)),
                Err(error) => Some(Err(error)),
            }
        })?
    }
}

/// Runs `tailback` to completion and returns its JSON lines. An exit code other than 0 is an error.
pub fn run_once(command: &mut Command, deadline: Duration) -> Result<Vec<Value>> {
    let events = run_once_timed(command, deadline)?.into_iter();
    Ok(events.map(|event| event.value).collect())
}

/// Like [`run_once`], with the time at which each line was received.
pub fn run_once_timed(command: &mut Command, deadline: Duration) -> Result<Vec<Event>> {
    let agent = Agent::start(command)?;
    let end = agent.process.wait_end(deadline)?;
    let lines = agent.process.lines();
    lines.wait_end(Duration::from_secs(5))?;
    if end != crate::process::End::Code(0) {
        let output: Vec<String> = lines.all().into_iter().map(|line| line.text).collect();
        bail!("tailback ended with {end:?}: {}", output.join("\n"));
    }
    agent.events()
}
