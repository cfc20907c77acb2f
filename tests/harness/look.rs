//! One look at every queue: what `tailback sample` answers.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    agent::{self, Event},
    wait,
};

const DEADLINE: Duration = Duration::from_secs(30);
/// What is told of queues at a moment is heard so soon after it, unless something came between.
pub const SOON_HEARD: Duration = Duration::from_millis(20);

/// The lines of `tailback sample --json`.
pub struct Look(Vec<Event>);

impl Look {
    /// At the targets that `args` name.
    pub fn at(args: &[&str]) -> Result<Self> {
        Self::with(
            Command::new(agent::binary()?)
                .args(["sample", "--json"])
                .args(args),
        )
    }

    /// At one process.
    pub fn at_process(pid: u32) -> Result<Self> {
        Self::at(&["--pid", &pid.to_string()])
    }

    /// At one process, again where the agent was held up: see [`Look::is_of_its_moment`].
    pub fn in_time_at_process(pid: u32) -> Result<Self> {
        wait::until("a look that nothing holds up", DEADLINE, || {
            let look = Self::at_process(pid)?;
            Ok(look.is_of_its_moment()?.then_some(look))
        })
    }

    /// Any command line that answers as `sample` does.
    pub fn with(command: &mut Command) -> Result<Self> {
        agent::once_heard(command, DEADLINE).map(Self)
    }

    /// Whether the queues were looked at in the moment that is told, as far as the time shows at which it was heard: a busy
    /// machine stops whoever looks, now and then.
    pub fn is_of_its_moment(&self) -> Result<bool> {
        for event in self.0.iter().filter(|event| event.is("queue")) {
            let moment_ns = number(&event.value, "time_unix_ns")?;
            let after = Duration::from_nanos(event.unix_ns.saturating_sub(moment_ns));
            if after > SOON_HEARD {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub fn targets(&self) -> impl Iterator<Item = &Value> {
        self.lines().filter(|line| line["type"] == "target")
    }

    pub fn queues<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        let kind = kind.to_owned();
        let is_queue = move |line: &&Value| line["type"] == "queue" && line["kind"] == *kind;
        self.lines().filter(is_queue)
    }

    fn lines(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().map(|event| &event.value)
    }

    /// The one queue of this kind and name.
    pub fn queue(&self, kind: &str, name: &str) -> Result<&Value> {
        self.queues(kind)
            .find(|line| line["name"] == name)
            .with_context(|| {
                let names = self.queues(kind).filter_map(|line| line["name"].as_str());
                let names: Vec<&str> = names.collect();
                format!("there is no {kind} queue {name}, only {names:?}")
            })
    }

    /// Its first look at all, ns since 1970: the targets are told at the first, the queues at the second.
    pub fn began_ns(&self) -> Result<u64> {
        number(
            self.targets().next().context("it told no target")?,
            "time_unix_ns",
        )
    }
}

/// A key's whole number.
pub fn number(line: &Value, key: &str) -> Result<u64> {
    line[key]
        .as_u64()
        .with_context(|| format!("no {key} in {line}"))
}

/// A key's number.
pub fn float(line: &Value, key: &str) -> Result<f64> {
    line[key]
        .as_f64()
        .with_context(|| format!("no {key} in {line}"))
}
