//! The agent itself, as a user starts it, and what it says.

use std::{
    env,
    ffi::OsStr,
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

/// Names the directory for what a service publishes, as systemd does it.
const RUN: &str = "RUNTIME_DIRECTORY";

/// What the agent may take of one core by default is 0.01. A test is no benchmark: on a busy machine the same work costs two or
/// three times as much; what is told apart by this is a budget that is kept from none.
pub const MOST_CPU: f64 = 0.04;

/// The binary: `TAILBACK_BIN`, else the release build of this checkout.
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

/// One line of `--json`.
#[derive(Clone, Debug)]
pub struct Event {
    /// When it was received.
    pub at: Instant,
    /// The same moment on the wall clock, ns since 1970.
    pub unix_ns: u64,
    pub value: Value,
}

impl Event {
    /// A key's text; empty where there is none.
    pub fn text(&self, key: &str) -> &str {
        self.value
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.value.get(key).and_then(Value::as_f64)
    }

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
    /// Where it publishes: each agent in a directory of its own, for one that is shared has one agent.
    run: TempDir,
}

impl Agent {
    /// `tailback run --json` with further arguments.
    pub fn run(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        Self::start(Command::new(binary()?).args(["run", "--json"]).args(args))
    }

    /// Any command line that writes JSON lines; for tests that need an environment of their own.
    pub fn start(command: &mut Command) -> Result<Self> {
        let run = TempDir::new("run")?;
        let given = command.get_envs().any(|(name, _)| name == RUN);
        if !given {
            command.env(RUN, run.path());
        }
        Ok(Self {
            process: Process::start("tailback", command)?,
            run,
        })
    }

    /// Where it publishes its pages and its stream, unless it was told another place.
    pub fn run_directory(&self) -> &Path {
        self.run.path()
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Gives it up for its process: to stop it and see how it ends.
    pub fn into_process(self) -> Process {
        self.process
    }

    /// How many lines have come: where to go on with [`Agent::events_since`] and [`Agent::wait_since`].
    pub fn mark(&self) -> usize {
        self.process.lines().count()
    }

    /// All events so far. What is not JSON on standard output is an error.
    pub fn events(&self) -> Result<Vec<Event>> {
        self.events_since(0)
    }

    pub fn events_since(&self, mark: usize) -> Result<Vec<Event>> {
        let lines = self.process.lines().since(mark);
        lines
            .iter()
            .filter(|line| line.stream == Stream::Stdout)
            .map(Event::try_from)
            .collect()
    }

    /// The first event that is `wanted`, also if it came before.
    pub fn wait_for(
        &self,
        what: &str,
        deadline: Duration,
        wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        self.wait_since(0, what, deadline, wanted)
    }

    /// The first event after `mark` that is `wanted`.
    pub fn wait_since(
        &self,
        mark: usize,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        let what = format!("tailback to say {what}");
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

/// Runs `tailback` once, to its end, and returns its JSON lines. Anything but exit code 0 is an error.
pub fn once_with(command: &mut Command, deadline: Duration) -> Result<Vec<Value>> {
    let events = once_heard(command, deadline)?.into_iter();
    Ok(events.map(|event| event.value).collect())
}

/// As [`once_with`], with when each line was heard.
pub fn once_heard(command: &mut Command, deadline: Duration) -> Result<Vec<Event>> {
    let agent = Agent::start(command)?;
    let end = agent.process.wait_end(deadline)?;
    let lines = agent.process.lines();
    lines.wait_end(Duration::from_secs(5))?;
    if end != crate::process::End::Code(0) {
        let said: Vec<String> = lines.all().into_iter().map(|line| line.text).collect();
        bail!("tailback ended with {end:?}: {}", said.join("\n"));
    }
    agent.events()
}
