//! Checks the rows of the table when they are read: what a row could do wrong is an error that names the row and the key.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Ask, Preset, QueueRow, RedisValue, Time, Value};

/// Shortest interval between two requests.
const MIN_PACE: Duration = Duration::from_millis(500);
/// Longest interval.
const MAX_PACE: Duration = Duration::from_hours(1);
/// Longest name of a preset, bytes. It is part of every name of its queues.
const MAX_NAME_BYTES: usize = 40;

/// Commands of Redis that read. The agent's own rows use each in constant or logarithmic time.
const REDIS_COMMANDS: &[&str] = &[
    "GET",
    "HGET",
    "HLEN",
    "INFO",
    "LINDEX",
    "LLEN",
    "SCARD",
    "SRANDMEMBER",
    "XINFO",
    "XLEN",
    "ZCARD",
    "ZRANGE",
];
/// First words of the read-only commands of line protocols: HAProxy's, memcached's.
const LINE_COMMANDS: &[&str] = &["show", "stats"];

impl Preset {
    pub(super) fn check(&self) -> Result<()> {
        let is_name =
            |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'_';
        ensure!(
            !self.name.is_empty()
                && self.name.len() <= MAX_NAME_BYTES
                && self.name.bytes().all(is_name),
            "name: must be lower-case letters, digits and `_`, at most {MAX_NAME_BYTES}"
        );
        ensure!(
            !self.find.exe.is_empty() || !self.find.argv.is_empty(),
            "find: give `exe` or `argv`: a process is recognized by its program, not by its port"
        );
        let texts = self.find.exe.iter().chain(&self.find.argv);
        ensure!(
            texts
                .chain(&self.at.sockets)
                .all(|text| !text.trim_matches('*').is_empty()),
            "find, at: a text must not be empty, and not `*` alone"
        );
        for (key, pace) in [("pace", self.pace), ("focused_pace", self.focused_pace)] {
            ensure!(
                (MIN_PACE..=MAX_PACE).contains(&pace),
                "{key}: must be {MIN_PACE:?} to {MAX_PACE:?}"
            );
        }
        ensure!(!self.ask.is_empty(), "ask: at least one request is needed");
        ensure!(
            !self.queue.is_empty(),
            "queue: at least one queue is needed"
        );
        for (index, ask) in self.ask.iter().enumerate() {
            ask.check()
                .with_context(|| format!("ask number {}", index + 1))?;
        }
        for (index, row) in self.queue.iter().enumerate() {
            row.check()
                .with_context(|| format!("queue number {}, {:?}", index + 1, row.name))?;
        }
        Ok(())
    }
}

impl Ask {
    fn check(&self) -> Result<()> {
        let is_path =
            |path: &str| path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
        let is_line =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        match self {
            Self::Prometheus { paths, .. } => ensure!(
                !paths.is_empty() && paths.iter().all(|path| is_path(path)),
                "paths: each must begin with `/`, without spaces"
            ),
            Self::Json { path, .. } => {
                ensure!(is_path(path), "path: must begin with `/`, without spaces");
            }
            Self::Csv { command, .. } | Self::Pairs { command, .. } => {
                ensure!(
                    is_line(command) && !command.contains(';'),
                    "command: must be one line of printable text, without `;`"
                );
                let word = command.split(' ').next().unwrap_or_default();
                ensure!(
                    LINE_COMMANDS.contains(&word),
                    "command {command:?}: must begin with one of these read-only commands: {}",
                    LINE_COMMANDS.join(", ")
                );
            }
            Self::Postgres {
                user,
                database,
                query,
                ..
            } => {
                ensure!(
                    is_line(user) && is_line(database),
                    "user, database: must not be empty"
                );
                ensure!(
                    query.starts_with("SHOW ") && is_line(query) && !query.contains(';'),
                    "query: only one SHOW statement is allowed (read-only)"
                );
            }
            Self::Redis { queues, values, .. } => {
                if let Some(queues) = queues {
                    ensure!(
                        queues.set.is_some() != queues.scan.is_some(),
                        "queues: give one of `set` and `scan`"
                    );
                }
                let is_complete =
                    |value: &RedisValue| !value.clients || value.then.is_some() && queues.is_some();
                ensure!(
                    values.iter().all(is_complete),
                    "clients: needs `then`, which asks for their addresses, and `queues`"
                );
                let commands = values
                    .iter()
                    .flat_map(|value| [Some(&value.command), value.then.as_ref()]);
                for command in commands.flatten() {
                    let name = command.first().map_or("", String::as_str);
                    ensure!(
                        REDIS_COMMANDS.contains(&name),
                        "command {name:?}: only these read-only commands are allowed: {}",
                        REDIS_COMMANDS.join(", ")
                    );
                }
            }
        }
        Ok(())
    }
}

impl QueueRow {
    fn check(&self) -> Result<()> {
        ensure!(!self.name.is_empty(), "name: must not be empty");
        self.labels().context("name")?;
        for (key, time) in [("waited", &self.waited), ("oldest", &self.oldest)] {
            let Some(time) = time else {
                continue;
            };
            let Time {
                seconds,
                milliseconds,
                microseconds,
                since_seconds,
                since_milliseconds,
            } = time;
            let durations = [seconds, milliseconds, microseconds];
            let moments = [since_seconds, since_milliseconds];
            let given = |of: &[&Option<Value>]| of.iter().filter(|value| value.is_some()).count();
            ensure!(
                matches!((given(&durations), given(&moments)), (1.., 0) | (0, 1)),
                "{key}: give durations, which are added up, or one moment"
            );
            ensure!(
                key == "oldest" || given(&moments) == 0,
                "waited: must be a duration"
            );
        }
        ensure!(
            self.waited.is_some() == self.waits.is_some(),
            "waited, waits: one is useless without the other"
        );
        ensure!(
            self.consumed_by.is_none() || self.served_on.is_none(),
            "consumed_by, served_on: others take items from the queue, or the process passes them on: give one"
        );
        ensure!(
            !self.limit_rejects || self.limit.is_some(),
            "limit_rejects: there is no limit"
        );
        Ok(())
    }
}
