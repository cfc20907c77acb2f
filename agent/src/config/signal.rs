//! `[signal]`: what is published to other programs, and the adapters that serve it.
#![forbid(unsafe_code)]

use std::{
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Result, bail};
use serde::{Deserialize, Deserializer, de};

use super::duration;

/// Default directory of pages and sockets, if systemd does not set `$RUNTIME_DIRECTORY`.
pub(super) const DEFAULT_DIRECTORY: &str = "/run/tailback";
/// Default time to live of published signals (or three sampling intervals, if that is longer).
pub(super) const DEFAULT_TTL: Duration = Duration::from_secs(1);
/// Longest time to live: stale signals keep shedding this long after the agent dies.
pub(super) const MAX_TTL: Duration = Duration::from_secs(60);
/// Longest time to wait for another agent to end.
pub(super) const MAX_DIRECTORY_WAIT: Duration = Duration::from_secs(600);
/// Default number of services that get a page.
pub(super) const DEFAULT_PAGES: usize = 256;
/// Bounds of `max_pages`.
pub(super) const PAGES: RangeInclusive<usize> = 1..=4096;
/// Maximum number of adapters of one kind, and of groups.
pub(super) const MAX_ADAPTERS: usize = 64;
/// Longest host name, bytes (RFC 1035, section 2.3.4).
const MAX_HOST_BYTES: usize = 255;
/// Maximum number of `allowed_hosts`.
const MAX_HOSTS: usize = 64;
/// Longest name of an Envoy cluster, bytes: a runtime key with it is the name of a file, which has at most 255.
const MAX_CLUSTER_BYTES: usize = 200;

/// The `[signal]` section. Pages and the event stream are on by default; adapters are off until configured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    #[serde(default)]
    publish: Option<bool>,
    #[serde(default)]
    directory: Option<PathBuf>,
    #[serde(default, deserialize_with = "duration")]
    directory_wait: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    ttl: Option<Duration>,
    #[serde(default)]
    max_pages: Option<usize>,
    /// Whether the agent starts the adapter process itself; if `false`, the user runs `tailback adapters`.
    #[serde(default)]
    start_adapter_process: Option<bool>,
    #[serde(default)]
    pub http: Option<Http>,
    #[serde(default)]
    pub haproxy: Vec<Haproxy>,
    #[serde(default)]
    pub envoy: Vec<Envoy>,
    #[serde(default)]
    pub pressure_socket: Vec<PressureSocket>,
    #[serde(default)]
    pub orca: Vec<Orca>,
    #[serde(default)]
    pub keda: Option<Keda>,
    #[serde(default)]
    pub group: Vec<Group>,
}

/// `[signal.http]`: pages as JSON, events, readiness and metrics over HTTP.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub listen: Listen,
    /// Names of this adapter in requests, besides localhost, IP addresses and the name of this machine; a leading dot stands for a
    /// domain and the names in it.
    #[serde(default)]
    pub allowed_hosts: Vec<String>,
}

impl Http {
    fn check(&self) -> Result<()> {
        let count = self.allowed_hosts.len();
        if count > MAX_HOSTS {
            bail!("{count} allowed_hosts: at most {MAX_HOSTS} are allowed");
        }
        let is_name = |text: &str| {
            let name = text.strip_prefix('.').unwrap_or(text);
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !name.is_empty() && name.len() <= MAX_HOST_BYTES && name.bytes().all(is_allowed)
        };
        if let Some(host) = self.allowed_hosts.iter().find(|host| !is_name(host)) {
            bail!(
                "allowed_hosts: {host:?} is not a host name, such as \"tailback.example.com\" or \".example.com\" (the domain and all names in it); IP addresses are always allowed, and the port does not matter"
            );
        }
        Ok(())
    }
}

/// `[[signal.haproxy]]`: replies to HAProxy's agent-check.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Haproxy {
    pub target: String,
    pub listen: Listen,
    /// Control the server's `maxconn` instead of its weight. It is this value while everything is admitted, and the concurrency
    /// limit while the service sheds load (`admit_ratio` × this value if that limit is not known).
    #[serde(default)]
    pub maxconn: Option<u32>,
}

/// `[[signal.orca]]`: ORCA load reports for gRPC load balancers.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Orca {
    pub target: String,
    pub listen: Listen,
}

/// `[signal.keda]`: an external scaler for KEDA.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Keda {
    pub listen: Listen,
}

/// `[[signal.envoy]]`: a disk layer of Envoy's runtime, with the thresholds of a cluster's circuit breakers.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Envoy {
    pub target: String,
    /// Name of the cluster in Envoy's configuration.
    pub cluster: String,
    /// The symbolic link that Envoy follows, as in its configuration.
    pub symlink_root: PathBuf,
}

impl Envoy {
    /// The cluster is part of file names, and Envoy follows the name of the link.
    fn check(&self) -> Result<()> {
        let cluster = &self.cluster;
        if cluster.is_empty() || cluster.contains('/') || cluster.chars().any(char::is_control) {
            bail!(
                "cluster = {cluster:?} cannot be the name of a cluster: it must not be empty or contain `/` or control characters"
            );
        }
        if cluster.len() > MAX_CLUSTER_BYTES {
            bail!(
                "the name of an Envoy cluster has {} bytes: at most {MAX_CLUSTER_BYTES} are allowed",
                cluster.len()
            );
        }
        let root = &self.symlink_root;
        if root.file_name().is_none() || root.parent().is_none() {
            bail!(
                "symlink_root = {root:?} does not end in the name of a link, such as /run/envoy/tailback/shop"
            );
        }
        Ok(())
    }
}

/// `[[signal.pressure_socket]]`: a socket that delivers one byte whenever the level rises, as systemd's `*_PRESSURE_WATCH`
/// protocol does.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PressureSocket {
    pub target: String,
    pub path: PathBuf,
}

/// `[[signal.group]]`: instances of one service on this node, behind one load balancer.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub targets: Vec<String>,
    /// At least this many of them stay ready and undrained, however full they are.
    #[serde(default = "one")]
    pub min_ready: usize,
}

fn one() -> usize {
    1
}

/// A listening address: `127.0.0.1:9400`, `[::1]:9400` or `unix:/run/tailback/http.sock`.
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
            Some(path) => bail!("unix:{path}: a socket path must be absolute"),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => bail!(
                    "{text:?} is not a listening address, such as \"127.0.0.1:9400\" or \"unix:/run/tailback/http.sock\""
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
    /// Whether signals are published.
    pub fn publishes(&self) -> bool {
        self.publish.unwrap_or(true)
    }

    /// The directory of pages and sockets: the configured one, else systemd's (`RuntimeDirectory=`), else `/run/tailback`.
    pub fn directory(&self) -> PathBuf {
        let from_systemd = || {
            let directories = std::env::var_os("RUNTIME_DIRECTORY")?;
            let first = std::env::split_paths(&directories).next()?;
            first.is_absolute().then_some(first)
        };
        let configured = self.directory.clone();
        configured
            .or_else(from_systemd)
            .unwrap_or_else(|| DEFAULT_DIRECTORY.into())
    }

    /// How long to wait for another agent, which publishes in the directory, to end.
    pub fn directory_wait(&self) -> Duration {
        self.directory_wait.unwrap_or_default()
    }

    /// How long a published signal is valid, in nanoseconds, if it is renewed every `interval`.
    pub fn ttl_ns(&self, interval: Duration) -> u64 {
        let ttl = self
            .ttl
            .unwrap_or_else(|| DEFAULT_TTL.max(3 * interval).min(MAX_TTL));
        ttl.as_nanos() as u64
    }

    /// Maximum number of services that get a page.
    pub fn max_pages(&self) -> usize {
        self.max_pages.unwrap_or(DEFAULT_PAGES)
    }

    /// The number of configured adapters.
    pub fn adapters(&self) -> usize {
        usize::from(self.http.is_some())
            + usize::from(self.keda.is_some())
            + self.haproxy.len()
            + self.envoy.len()
            + self.orca.len()
            + self.pressure_socket.len()
    }

    /// Whether any adapter is configured.
    pub fn has_adapters(&self) -> bool {
        self.adapters() > 0
    }

    /// Whether the agent starts the adapter process itself.
    pub fn starts_adapter_process(&self) -> bool {
        self.publishes() && self.has_adapters() && self.start_adapter_process.unwrap_or(true)
    }

    /// Whether the adapter process would do the same with the other configuration.
    pub fn has_same_adapters(&self, other: &Self) -> bool {
        let adapters = |of: &Self| Self {
            publish: None,
            directory: None,
            directory_wait: None,
            ttl: None,
            max_pages: None,
            ..of.clone()
        };
        adapters(self) == adapters(other)
    }

    /// Replaces the settings that only take effect at the start by those of `running`. Returns the keys that differed.
    pub(super) fn keep_fixed(&mut self, running: &Self) -> Vec<&'static str> {
        let mut kept = Vec::new();
        if self.publishes() != running.publishes() {
            kept.push("signal.publish");
        }
        if self.directory() != running.directory() {
            kept.push("signal.directory");
        }
        self.publish = running.publish;
        self.directory.clone_from(&running.directory);
        kept
    }

    /// Publishes in this directory, whatever the file says.
    pub fn set_directory(&mut self, directory: PathBuf) {
        self.directory = Some(directory);
    }

    /// Rejects settings that cannot work with the agent's sampling `interval`.
    pub fn check(&self, interval: Duration) -> Result<()> {
        let ttl = self.ttl.unwrap_or(2 * interval);
        if ttl < 2 * interval {
            bail!(
                "ttl = {ttl:?} is shorter than two sampling intervals ({interval:?} each): one late sample would look like a dead agent; raise ttl or shorten interval"
            );
        }
        if self.ttl.is_some() && ttl > MAX_TTL {
            bail!(
                "ttl must be at most {MAX_TTL:?}: stale signals would keep shedding that long after the agent dies"
            );
        }
        if let Some(directory) = self
            .directory
            .as_deref()
            .filter(|directory| !directory.is_absolute())
        {
            bail!("directory = {directory:?} is not an absolute path");
        }
        if self.directory_wait() > MAX_DIRECTORY_WAIT {
            bail!(
                "directory_wait must be at most {MAX_DIRECTORY_WAIT:?}: until then an agent that cannot start looks like one that starts"
            );
        }
        if !PAGES.contains(&self.max_pages()) {
            bail!(
                "max_pages = {} is not between {} and {}",
                self.max_pages(),
                PAGES.start(),
                PAGES.end()
            );
        }
        for (key, count) in [
            ("haproxy", self.haproxy.len()),
            ("envoy", self.envoy.len()),
            ("orca", self.orca.len()),
            ("pressure_socket", self.pressure_socket.len()),
            ("group", self.group.len()),
        ] {
            if count > MAX_ADAPTERS {
                bail!("{count} [[signal.{key}]] sections: at most {MAX_ADAPTERS} are allowed");
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
        // Two writers of one layer would replace each other's limit.
        listens.extend(
            self.envoy
                .iter()
                .map(|envoy| envoy.symlink_root.display().to_string()),
        );
        listens.sort_unstable();
        if let Some(duplicate) = listens.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!(
                "two adapters use {}: give each its own address or path",
                duplicate[0]
            );
        }
        for path in self
            .envoy
            .iter()
            .map(|entry| &entry.symlink_root)
            .chain(self.pressure_socket.iter().map(|entry| &entry.path))
        {
            if !path.is_absolute() {
                bail!("{path:?} is not an absolute path");
            }
        }
        for envoy in &self.envoy {
            envoy.check()?;
        }
        if let Some(http) = &self.http {
            http.check()?;
        }
        for group in &self.group {
            if group.min_ready > group.targets.len() {
                bail!(
                    "min_ready = {} exceeds the group's number of targets, {}",
                    group.min_ready,
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
                bail!("target {target} appears twice in [[signal.group]]");
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
    fn by_default_pages_are_published_and_no_adapter_is_served() {
        let config = Config::parse("").unwrap();
        assert!(
            config.signal.publishes()
                && !config.signal.has_adapters()
                && !config.signal.starts_adapter_process()
        );
        assert_eq!(
            config.signal.ttl_ns(Duration::from_millis(100)),
            1_000_000_000
        );
    }

    #[test]
    fn all_adapters_are_parsed() {
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
            cluster = "shop"
            symlink_root = "/run/envoy/shop"
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
        assert!(signal.starts_adapter_process());
        assert_eq!(signal.directory().to_str(), Some("/run/other"));
        assert_eq!(signal.group[0].min_ready, 1);
    }

    #[test]
    fn settings_that_cannot_work_are_rejected_with_the_reason() {
        for (text, words) in [
            (
                "[signal]\nttl = \"150ms\"\n",
                "ttl = 150ms is shorter than two sampling intervals",
            ),
            (
                "interval = \"2s\"\n[signal]\nttl = \"1s\"\n",
                "shorter than two sampling intervals (2s each)",
            ),
            ("[signal]\nttl = \"2h\"\n", "at most 60s"),
            ("[signal]\ndirectory = \"run\"\n", "not an absolute path"),
            ("[signal]\nmax_pages = 0\n", "between 1 and 4096"),
            ("[signal.http]\nlisten = \"9400\"\n", "127.0.0.1:9400"),
            ("[signal.http]\nlisten = \"unix:x\"\n", "must be absolute"),
            (
                "[signal.http]\nlisten = \"127.0.0.1:1\"\nallowed_hosts = [\"a\", \"shop:9400\"]\n",
                "\"shop:9400\" is not a host name",
            ),
            ("[signal.htp]\n", "htp"),
            ("[[signal.haproxy]]\nlisten = \"127.0.0.1:1\"\n", "target"),
            (
                "[[signal.haproxy]]\ntarget = \"a\"\nlisten = \"127.0.0.1:1\"\n[signal.http]\nlisten = \"127.0.0.1:1\"\n",
                "two adapters use 127.0.0.1:1: give each its own",
            ),
            (
                "[[signal.orca]]\ntarget = \"a\"\nlisten = \"127.0.0.1:1\"\n[signal.keda]\nlisten = \"127.0.0.1:1\"\n",
                "two adapters use 127.0.0.1:1: give each its own",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"a\"\nsymlink_root = \"/x/p\"\n[[signal.envoy]]\ntarget = \"b\"\ncluster = \"b\"\nsymlink_root = \"/x/p\"\n",
                "two adapters use /x/p",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\nsymlink_root = \"/x/p\"\n",
                "cluster",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"a\"\nfile = \"/x/p\"\n",
                "unknown field `file`",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"\"\nsymlink_root = \"/x/p\"\n",
                "must not be empty",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"a/b\"\nsymlink_root = \"/x/p\"\n",
                "cluster = \"a/b\" cannot be the name",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"a\"\nsymlink_root = \"x/p\"\n",
                "\"x/p\" is not an absolute path",
            ),
            (
                "[[signal.envoy]]\ntarget = \"a\"\ncluster = \"a\"\nsymlink_root = \"/\"\n",
                "does not end in the name of a link",
            ),
            (
                "[[signal.group]]\ntargets = [\"a\"]\nmin_ready = 2\n",
                "min_ready = 2 exceeds",
            ),
            ("[[signal.group]]\ntargets = [\"a\", \"a\"]\n", "twice"),
        ] {
            let error = error(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
