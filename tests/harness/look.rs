//! One look at every queue: what `tailback sample` answers.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::agent;

const DEADLINE: Duration = Duration::from_secs(30);

/// The lines of `tailback sample --json`.
pub struct Look(Vec<Value>);

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

    /// Any command line that answers as `sample` does.
    pub fn with(command: &mut Command) -> Result<Self> {
        agent::once_with(command, DEADLINE).map(Self)
    }

    pub fn targets(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(|line| line["type"] == "target")
    }

    pub fn queues<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        let kind = kind.to_owned();
        let is_queue = move |line: &&Value| line["type"] == "queue" && line["kind"] == *kind;
        self.0.iter().filter(is_queue)
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
