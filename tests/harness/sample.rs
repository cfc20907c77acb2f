//! One sample of every queue: the output of `tailback sample --json`.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    agent::{self, Event},
    wait,
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(30);
/// A queue line normally arrives within this time after the moment that it describes. A later one means that the agent or
/// the test was held up.
pub const MAX_OUTPUT_DELAY: Duration = Duration::from_millis(20);

/// The lines of `tailback sample --json`.
pub struct Sample(Vec<Event>);

impl Sample {
    /// Samples the targets that `args` name.
    pub fn of(args: &[&str]) -> Result<Self> {
        Self::from_command(
            Command::new(agent::binary()?)
                .args(["sample", "--json"])
                .args(args),
        )
    }

    /// Samples one process.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::of(&["--pid", &pid.to_string()])
    }

    /// Samples one process, again if the agent was held up: see [`Sample::is_prompt`].
    pub fn prompt_of_process(pid: u32) -> Result<Self> {
        wait::until("an undelayed sample", DEADLINE, || {
            let sample = Self::of_process(pid)?;
            Ok(sample.is_prompt()?.then_some(sample))
        })
    }

    /// Runs any command that writes the output of `sample`.
    pub fn from_command(command: &mut Command) -> Result<Self> {
        agent::run_once_timed(command, DEADLINE).map(Self)
    }

    /// Whether every queue line arrived within [`MAX_OUTPUT_DELAY`] of its time. On a busy machine the agent is sometimes held
    /// up between taking the time and reading the queues.
    pub fn is_prompt(&self) -> Result<bool> {
        for event in self.0.iter().filter(|event| event.is("queue")) {
            let moment_ns = number(&event.value, "time_unix_ns")?;
            let delay = Duration::from_nanos(event.unix_ns.saturating_sub(moment_ns));
            if delay > MAX_OUTPUT_DELAY {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The target lines.
    pub fn targets(&self) -> impl Iterator<Item = &Value> {
        self.lines().filter(|line| line["type"] == "target")
    }

    /// The queue lines of this kind.
    pub fn queues<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        let kind = kind.to_owned();
        let is_queue = move |line: &&Value| line["type"] == "queue" && line["kind"] == *kind;
        self.lines().filter(is_queue)
    }

    fn lines(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().map(|event| &event.value)
    }

    /// The queue of this kind and name.
    pub fn queue(&self, kind: &str, name: &str) -> Result<&Value> {
        self.queues(kind)
            .find(|line| line["name"] == name)
            .with_context(|| {
                let names = self.queues(kind).filter_map(|line| line["name"].as_str());
                let names: Vec<&str> = names.collect();
                format!("no {kind} queue {name}, only {names:?}")
            })
    }

    /// Time of the first poll, ns since 1970. It reports the targets; the second poll reports the queues.
    pub fn first_poll_ns(&self) -> Result<u64> {
        number(
            self.targets().next().context("no target was reported")?,
            "time_unix_ns",
        )
    }
}

/// The integer value of a key.
pub fn number(line: &Value, key: &str) -> Result<u64> {
    line[key]
        .as_u64()
        .with_context(|| format!("no {key} in {line}"))
}

/// The floating-point value of a key.
pub fn float(line: &Value, key: &str) -> Result<f64> {
    line[key]
        .as_f64()
        .with_context(|| format!("no {key} in {line}"))
}
