//! The table of presets: `presets.toml`, and the rows that users add in the configuration. Every key is checked.

mod check;
mod value;

use std::{collections::BTreeMap, sync::LazyLock, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Deserializer, de};
pub use value::{Metric, Time, Value};

use super::series::Names;
use crate::sample::AppUnit;

/// Maximum number of presets: the agent's own, and 64 of the user.
const MAX_PRESETS: usize = 80;

/// The agent's own rows.
static OWN: LazyLock<Result<Vec<Preset>, String>> = LazyLock::new(|| {
    let file: File =
        toml::from_str(include_str!("presets.toml")).map_err(|error| error.to_string())?;
    Ok(file.presets)
});

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "preset")]
    presets: Vec<Preset>,
}

/// How to recognize one kind of process, where to ask it, and what its numbers mean.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// Lower-case letters, digits and `_`. A row of the user replaces the agent's own row of the same name.
    pub name: String,
    pub find: Find,
    #[serde(default)]
    pub at: At,
    /// A value that every answer has: it shows that the process is what it seems to be.
    pub proof: String,
    /// Interval between requests.
    #[serde(default = "pace", deserialize_with = "duration")]
    pub pace: Duration,
    /// The same while the service is focused.
    #[serde(default = "focused_pace", deserialize_with = "duration")]
    pub focused_pace: Duration,
    /// Asked only if the configuration names it: its processes cannot be recognized with certainty.
    #[serde(default)]
    pub opt_in: bool,
    /// The requests. All go to the same listener.
    pub ask: Vec<Ask>,
    pub queue: Vec<QueueRow>,
}

/// Which processes. All keys that are given must match.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Find {
    /// Base name of the executable: one of these; `*` matches any text.
    #[serde(default)]
    pub exe: Vec<String>,
    /// Consecutive arguments, or their base names: one of these.
    #[serde(default)]
    pub argv: Vec<String>,
}

/// Which listeners of the process.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct At {
    /// Only these ports. Default: any on which the process listens, the lowest first.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// Options of the process that name the port: `-m 8222`, `--port=8222`. It comes before `ports`.
    #[serde(default)]
    pub port_options: Vec<String>,
    /// Base names of unix sockets, asked before ports; `*` matches any text.
    #[serde(default)]
    pub sockets: Vec<String>,
    /// No port is asked.
    #[serde(default)]
    pub only_sockets: bool,
}

/// One request, by a protocol.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(tag = "protocol", rename_all = "lowercase", deny_unknown_fields)]
pub enum Ask {
    /// An HTTP GET. The values keep the names of the exposition.
    Prometheus {
        /// Tried in this order until one has the proof.
        paths: Vec<String>,
        /// Left out from then on if the answer is too large.
        #[serde(default)]
        optional: bool,
        /// Not requested if an earlier answer has this value.
        #[serde(default)]
        unless: Option<String>,
    },
    /// An HTTP GET. Values are called by their paths in the document.
    Json {
        path: String,
        /// Text before the path of each value.
        #[serde(default)]
        table: String,
        /// Labels of arrays with other names.
        #[serde(default)]
        rename: BTreeMap<String, String>,
        /// Texts of an object that are labels of the values in it; `region=zone`: with another name.
        #[serde(default)]
        labels: Vec<String>,
        /// As above.
        #[serde(default)]
        optional: bool,
    },
    /// A command of one line; the answer ends with the connection. Values are called `TABLE.COLUMN`.
    Csv {
        command: String,
        table: String,
        /// Columns that are labels; `name=database`: with another name.
        labels: Vec<String>,
    },
    /// The same; each line of the answer is `key: value`.
    Pairs { command: String, table: String },
    /// A query of PostgreSQL's simple protocol. Values are called `TABLE.COLUMN`.
    Postgres {
        user: String,
        database: String,
        query: String,
        table: String,
        labels: Vec<String>,
    },
    /// Commands of Redis. Values are called `TABLE.NAME`, with the label `queue`.
    Redis {
        table: String,
        /// Names of queues; without it, the values have no label.
        #[serde(default)]
        queues: Option<RedisQueues>,
        values: Vec<RedisValue>,
    },
}

/// Where the names of queues are kept in Redis.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RedisQueues {
    /// Members of this set.
    #[serde(default)]
    pub set: Option<String>,
    /// Keys that match this pattern, found by SCAN; the text at the first `*` is the name.
    #[serde(default)]
    pub scan: Option<String>,
    /// Only keys of this type.
    #[serde(default)]
    pub key_type: Option<String>,
    /// The keys are sets, whose members are the names.
    #[serde(default)]
    pub members: bool,
    /// Only the text after the last of these is the name.
    #[serde(default)]
    pub after: Option<String>,
    /// Names that are no queues; `*` matches any text.
    #[serde(default)]
    pub without: Vec<String>,
}

/// A command for each queue, or one for the server if the request names no queues.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RedisValue {
    pub name: String,
    /// `{queue}` stands for the name of the queue.
    pub command: Vec<String>,
    /// Another command; `{reply}` stands for the reply to the first one.
    #[serde(default)]
    pub then: Option<Vec<String>>,
    /// The reply is a JSON document: the number, or the time, under this key.
    #[serde(default)]
    pub key: Option<String>,
    /// The reply is a list of members and scores: the score of the first member.
    #[serde(default)]
    pub score: bool,
    /// The reply is a list of lists of keys and values: each has the values `TABLE.NAME.KEY`, with the label `name`.
    #[serde(default)]
    pub rows: bool,
    /// The reply is a list; the reply to `then`, for each of its members, is the address of a client that takes items from the queue.
    #[serde(default)]
    pub clients: bool,
}

/// What one queue is made of. Labels in its name make a queue of each of their values; values that differ in others are added up.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct QueueRow {
    /// `{label}` stands for the value of a label.
    pub name: String,
    #[serde(deserialize_with = "unit")]
    pub unit: AppUnit,
    pub depth: Value,
    #[serde(default)]
    pub limit: Option<Value>,
    /// Reaching the limit loses work or blocks a producer.
    #[serde(default)]
    pub limit_rejects: bool,
    #[serde(default)]
    pub serving: Option<Value>,
    #[serde(default)]
    pub slots: Option<Value>,
    /// Counters: items that entered, left, were lost.
    #[serde(default)]
    pub entered: Option<Value>,
    #[serde(default)]
    pub left: Option<Value>,
    #[serde(default)]
    pub lost: Option<Value>,
    /// Counters: the time that items waited in total; and their number.
    #[serde(default)]
    pub waited: Option<Time>,
    #[serde(default)]
    pub waits: Option<Value>,
    #[serde(default)]
    pub oldest: Option<Time>,
    #[serde(default)]
    pub consumers: Option<Value>,
    /// The value with the addresses of its clients.
    #[serde(default)]
    pub consumed_by: Option<String>,
    /// The queue of a proxy or of a connection pool: the value with the addresses at one end of the connections over which its items are
    /// served. A value that is a number is a port, and its label `address` the address.
    #[serde(default)]
    pub served_on: Option<String>,
    /// Values that are shown as evidence, never judged: the text that is shown, and the value.
    #[serde(default)]
    pub context: BTreeMap<String, Value>,
}

/// All presets in force.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table(Vec<Preset>);

impl Table {
    /// The agent's own presets without `disabled`, and with those of its opt-in presets that are in `also`; and `own`, which
    /// replace presets of the same name.
    pub fn new(own: &[Preset], disabled: &[String], also: &[String]) -> Result<Self> {
        let shipped = match &*OWN {
            Ok(presets) => presets,
            Err(error) => bail!("invalid presets of the agent: {error}"),
        };
        for name in disabled.iter().chain(also) {
            let mut all = shipped.iter().chain(own);
            ensure!(
                all.any(|preset| preset.name == *name),
                "no preset {name:?}; there are {}",
                shipped
                    .iter()
                    .map(|preset| preset.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
        let mut presets: Vec<Preset> = Vec::new();
        for (index, preset) in own.iter().enumerate() {
            preset
                .check()
                .with_context(|| format!("preset number {}, {:?}", index + 1, preset.name))?;
            ensure!(
                presets.iter().all(|other| other.name != preset.name),
                "two presets are called {:?}",
                preset.name
            );
            presets.push(preset.clone());
        }
        for preset in shipped {
            let is_replaced = own.iter().any(|other| other.name == preset.name);
            if !is_replaced && (!preset.opt_in || also.contains(&preset.name)) {
                presets.push(preset.clone());
            }
        }
        presets.retain(|preset| !disabled.contains(&preset.name));
        ensure!(
            presets.len() <= MAX_PRESETS,
            "more than {MAX_PRESETS} presets"
        );
        Ok(Self(presets))
    }

    pub fn presets(&self) -> &[Preset] {
        &self.0
    }
}

impl Preset {
    /// The values of an answer that the rows use.
    pub fn names(&self) -> Names {
        let values = self.queue.iter().flat_map(QueueRow::values);
        let names = values.flat_map(Value::names).map(str::to_owned);
        let unless = self.ask.iter().filter_map(|ask| match ask {
            Ask::Prometheus { unless, .. } => unless.clone(),
            _ => None,
        });
        let rows = self.queue.iter();
        let addresses = rows.flat_map(|row| [row.consumed_by.clone(), row.served_on.clone()]);
        Names::new(
            names
                .chain(unless)
                .chain(addresses.flatten())
                .chain([self.proof.clone()]),
        )
    }
}

impl QueueRow {
    /// The labels in the name.
    pub fn labels(&self) -> Result<Vec<&str>> {
        let mut labels = Vec::new();
        for part in self.name.split('{').skip(1) {
            let (label, rest) = part.split_once('}').context("a `{` is not closed")?;
            ensure!(
                !label.is_empty() && !rest.contains('}'),
                "a label is empty, or a `}}` is not opened"
            );
            labels.push(label);
        }
        Ok(labels)
    }

    fn values(&self) -> impl Iterator<Item = &Value> {
        let times = [&self.waited, &self.oldest];
        let times = times.into_iter().flatten().flat_map(|time| {
            [
                &time.seconds,
                &time.milliseconds,
                &time.microseconds,
                &time.since_seconds,
                &time.since_milliseconds,
            ]
        });
        let plain = [
            &self.limit,
            &self.serving,
            &self.slots,
            &self.entered,
            &self.left,
            &self.lost,
            &self.waits,
            &self.consumers,
        ];
        let optional = plain.into_iter().chain(times).flatten();
        [&self.depth]
            .into_iter()
            .chain(optional)
            .chain(self.context.values())
    }
}

fn unit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AppUnit, D::Error> {
    let text = String::deserialize(deserializer)?;
    let unit = AppUnit::ALL.iter().find(|unit| unit.name() == text);
    unit.copied().ok_or_else(|| {
        let units: Vec<&str> = AppUnit::ALL.iter().map(|unit| unit.name()).collect();
        de::Error::custom(format!("no unit {text:?}; there are {}", units.join(", ")))
    })
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        de::Error::custom(format!(
            "{text:?} is not a duration with a unit, such as 1s: {error}"
        ))
    })
}

fn pace() -> Duration {
    Duration::from_secs(5)
}

fn focused_pace() -> Duration {
    Duration::from_secs(1)
}

#[cfg(test)]
#[path = "table/tests.rs"]
mod tests;
