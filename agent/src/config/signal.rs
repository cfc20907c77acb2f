//! `[signal]`: who hears of the pressure, and how.

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Result, bail};
use serde::{Deserialize, Deserializer, de};

use super::duration;

/// Where pages and sockets are, unless systemd names a directory for the service.
const DIRECTORY: &str = "/run/tailback";
const TTL: Duration = Duration::from_secs(1);
const MAX_TTL: Duration = Duration::from_secs(60);
const MAX_PAGES: usize = 256;
/// Adapters of one kind.
const MAX_ADAPTERS: usize = 64;

/// What is signalled. Pages and the stream are on; adapters are off until they are named.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Whether anything is published at all.
    #[serde(default)]
    publish: Option<bool>,
    /// Where pages and sockets are.
    #[serde(default)]
    directory: Option<PathBuf>,
    /// What is published holds for so long.
    #[serde(default, deserialize_with = "duration")]
    ttl: Option<Duration>,
    #[serde(default)]
    max_pages: Option<usize>,
    /// Whether the agent starts the process that serves the adapters; `false`: it is run beside it, `tailback adapters`.
    #[serde(default)]
    start_guard: Option<bool>,
    #[serde(default)]
    pub http: Option<Http>,
    #[serde(default)]
    pub haproxy: Vec<Haproxy>,
    #[serde(default)]
    pub envoy: Vec<Envoy>,
    /// As systemd's `*_PRESSURE_WATCH`.
    #[serde(default)]
    pub pressure_socket: Vec<PressureSocket>,
    #[serde(default)]
    pub orca: Vec<Orca>,
    #[serde(default)]
    pub keda: Option<Keda>,
    #[serde(default)]
    pub group: Vec<Group>,
}

/// Pages as JSON, events, readiness, metrics, over HTTP.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub listen: Listen,
}

/// Answers HAProxy's agent-check.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Haproxy {
    pub target: String,
    pub listen: Listen,
    /// Say `maxconn:` too: this many while everything is admitted. While work is to be turned away, as many at once as keep the
    /// service busy; its share of this, where that is not known.
    #[serde(default)]
    pub maxconn: Option<u32>,
}

/// Reports the load to gRPC's balancers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orca {
    pub target: String,
    pub listen: Listen,
}

/// An external scaler for KEDA.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keda {
    pub listen: Listen,
}

/// A file for Envoy's `injected_resource`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envoy {
    pub target: String,
    pub file: PathBuf,
}

/// A socket on which a byte comes whenever the level rises.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PressureSocket {
    pub target: String,
    pub path: PathBuf,
}

/// Instances of one service on this node, behind one balancer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub targets: Vec<String>,
    /// So many of them stay ready and undrained, however full they are.
    #[serde(default = "one")]
    pub keep_ready: usize,
}

fn one() -> usize {
    1
}

/// `127.0.0.1:9400`, `[::1]:9400` or `unix:/run/tailback/http.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() => Ok(Self::Unix(path.into())),
            Some(path) => bail!("unix:{path}: the path of a socket begins with /"),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => bail!(
                    "{text:?} is no address to listen on, such as \"127.0.0.1:9400\" or \"unix:/run/tailback/http.sock\""
                ),
            },
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|error| de::Error::custom(format!("{error:#}")))
    }
}

impl Signal {
    /// Whether anything is published.
    pub fn publishes(&self) -> bool {
        self.publish.unwrap_or(true)
    }

    /// The directory of pages and sockets: as configured, else as systemd gives it (`RuntimeDirectory=`), else the usual.
    pub fn directory(&self) -> PathBuf {
        let given = || {
            let several = std::env::var_os("RUNTIME_DIRECTORY")?;
            let first = std::env::split_paths(&several).next()?;
            first.is_absolute().then_some(first)
        };
        let configured = self.directory.clone();
        configured
            .or_else(given)
            .unwrap_or_else(|| DIRECTORY.into())
    }

    /// How long what is published holds, when it is renewed every `interval`.
    pub fn ttl_ns(&self, interval: Duration) -> u64 {
        let ttl = self
            .ttl
            .unwrap_or_else(|| TTL.max(3 * interval).min(MAX_TTL));
        ttl.as_nanos() as u64
    }

    pub fn max_pages(&self) -> usize {
        self.max_pages.unwrap_or(MAX_PAGES)
    }

    /// Whether there is anything that the guard has to serve.
    pub fn has_adapters(&self) -> bool {
        self.http.is_some()
            || self.keda.is_some()
            || !(self.haproxy.is_empty()
                && self.envoy.is_empty()
                && self.orca.is_empty()
                && self.pressure_socket.is_empty())
    }

    /// Whether the agent starts the guard itself.
    pub fn starts_guard(&self) -> bool {
        self.publishes() && self.has_adapters() && self.start_guard.unwrap_or(true)
    }

    /// Refuses what cannot work. `interval` is the agent's, between looks.
    pub fn check(&self, interval: Duration) -> Result<()> {
        let ttl = self.ttl.unwrap_or(2 * interval);
        if ttl < 2 * interval {
            bail!(
                "ttl = {ttl:?} is shorter than two ticks ({interval:?} each): readers would take a late tick for an agent that is gone; raise ttl or shorten interval"
            );
        }
        if self.ttl.is_some() && ttl > MAX_TTL {
            bail!(
                "ttl = {ttl:?}: for so long would an agent that is gone still hold work back; at most 60s"
            );
        }
        if let Some(directory) = self
            .directory
            .as_deref()
            .filter(|directory| !directory.is_absolute())
        {
            bail!("directory = {directory:?} does not begin with /");
        }
        if !(1..=4096).contains(&self.max_pages()) {
            bail!("max_pages = {}: between 1 and 4096", self.max_pages());
        }
        for (key, count) in [
            ("haproxy", self.haproxy.len()),
            ("envoy", self.envoy.len()),
            ("orca", self.orca.len()),
            ("pressure_socket", self.pressure_socket.len()),
            ("group", self.group.len()),
        ] {
            if count > MAX_ADAPTERS {
                bail!("{count} [[signal.{key}]]: at most {MAX_ADAPTERS}");
            }
        }
        let mut listens: Vec<String> = self
            .haproxy
            .iter()
            .map(|entry| entry.listen.to_string())
            .collect();
        listens.extend(self.orca.iter().map(|orca| orca.listen.to_string()));
        listens.extend(self.http.iter().map(|http| http.listen.to_string()));
        listens.extend(self.keda.iter().map(|keda| keda.listen.to_string()));
        listens.extend(
            self.pressure_socket
                .iter()
                .map(|entry| format!("unix:{}", entry.path.display())),
        );
        listens.sort_unstable();
        if let Some(twice) = listens.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("two adapters listen on {}", twice[0]);
        }
        for path in self
            .envoy
            .iter()
            .map(|entry| &entry.file)
            .chain(self.pressure_socket.iter().map(|entry| &entry.path))
        {
            if !path.is_absolute() {
                bail!("{path:?} does not begin with /");
            }
        }
        for group in &self.group {
            if group.keep_ready > group.targets.len() {
                bail!(
                    "keep_ready = {} of {} targets",
                    group.keep_ready,
                    group.targets.len()
                );
            }
        }
        for target in self.group.iter().flat_map(|group| &group.targets) {
            let times = self
                .group
                .iter()
                .flat_map(|group| &group.targets)
                .filter(|other| *other == target)
                .count();
            if times > 1 {
                bail!("target {target} stands in [[signal.group]] twice");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::config::Config;

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn without_a_word_pages_are_published_and_no_adapter_is_served() {
        let config = Config::parse("").unwrap();
        assert!(
            config.signal.publishes()
                && !config.signal.has_adapters()
                && !config.signal.starts_guard()
        );
        assert_eq!(
            config.signal.ttl_ns(Duration::from_millis(100)),
            1_000_000_000
        );
    }

    #[test]
    fn adapters_are_understood() {
        let config = Config::parse(
            r#"
            [signal]
            directory = "/run/other"
            ttl = "500ms"
            [signal.http]
            listen = "unix:/run/other/http.sock"
            [[signal.haproxy]]
            target = "shop"
            listen = "127.0.0.1:9401"
            maxconn = 50
            [[signal.envoy]]
            target = "shop"
            file = "/run/envoy/pressure"
            [[signal.pressure_socket]]
            target = "shop"
            path = "/run/other/shop.sock"
            [[signal.orca]]
            target = "shop"
            listen = "127.0.0.1:9402"
            [signal.keda]
            listen = "127.0.0.1:9403"
            [[signal.group]]
            targets = ["shop", "shop-b"]
            "#,
        );
        let signal = config.unwrap().signal;
        assert!(signal.starts_guard());
        assert_eq!(signal.directory().to_str(), Some("/run/other"));
        assert_eq!(signal.group[0].keep_ready, 1);
    }

    #[test]
    fn what_cannot_work_is_named_with_the_remedy() {
        for (text, words) in [
            (
                "[signal]\nttl = \"150ms\"\n",
                "ttl = 150ms is shorter than two ticks",
            ),
            (
                "interval = \"2s\"\n[signal]\nttl = \"1s\"\n",
                "shorter than two ticks (2s each)",
            ),
            ("[signal]\nttl = \"2h\"\n", "at most 60s"),
            ("[signal]\ndirectory = \"run\"\n", "does not begin with /"),
            ("[signal]\nmax_pages = 0\n", "between 1 and 4096"),
            ("[signal.http]\nlisten = \"9400\"\n", "127.0.0.1:9400"),
            ("[signal.http]\nlisten = \"unix:x\"\n", "begins with /"),
            ("[signal.htp]\n", "htp"),
            ("[[signal.haproxy]]\nlisten = \"127.0.0.1:1\"\n", "target"),
            (
                "[[signal.haproxy]]\ntarget = \"a\"\nlisten = \"127.0.0.1:1\"\n[signal.http]\nlisten = \"127.0.0.1:1\"\n",
                "two adapters listen on 127.0.0.1:1",
            ),
            (
                "[[signal.orca]]\ntarget = \"a\"\nlisten = \"127.0.0.1:1\"\n[signal.keda]\nlisten = \"127.0.0.1:1\"\n",
                "two adapters listen on 127.0.0.1:1",
            ),
            (
                "[[signal.group]]\ntargets = [\"a\"]\nkeep_ready = 2\n",
                "keep_ready = 2 of 1",
            ),
            ("[[signal.group]]\ntargets = [\"a\", \"a\"]\n", "twice"),
        ] {
            let error = error(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
