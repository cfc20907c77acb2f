//! The adapter process: serves HAProxy, Envoy, KEDA and others from the agent's pages, and fails open if the agent dies.
//!
//! It runs apart from the agent. It reads the pages like any other consumer (`page_cache`) and asks the agent (`agent`) for
//! nothing that a decision depends on. If the agent is killed or hangs, its pages go stale within their TTL and every adapter
//! reports no pressure: HAProxy gets 100%, Envoy no limit, readiness probes succeed. The process drops its privileges, loads nothing
//! into the kernel and cannot slow down the agent's sampling.
//!
//! Each adapter has its own file: `http` (with the `live` page, for the allowed `hosts`), `haproxy`, `envoy`, `pressure_socket`, and, on top of `grpc`, `orca` and `keda`.
//! `drain_policy` decides which services may be drained, `adapter_stats` counts replies, and `warning` reports consumers that cannot
//! act on the signal. With `takeover` a new adapter process replaces a running one.
#![forbid(unsafe_code)]

mod adapter_stats;
pub mod agent;
mod agent_checks;
mod drain_policy;
mod envoy;
mod envoy_layer;
mod grpc;
mod haproxy;
mod hosts;
mod http;
mod keda;
mod listen;
mod live;
mod metrics_format;
mod orca;
mod page_cache;
mod pressure_socket;
mod privileges;
mod takeover;
mod warning;

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use adapter_stats::AdapterStats;
use anyhow::{Context as _, Result, bail};
use drain_policy::DrainPolicy;
use hosts::Hosts;
use listen::{Endpoint, Listener};
use page_cache::PageCache;
use serde_json::{Value, json};
use tailback_page::Pressure;
pub use takeover::{ask_to_exit, is_asked};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};
use warning::Warning;

use crate::{
    config::{
        self,
        signal::{Listen, Signal},
    },
    signal::{
        directory::{ADAPTERS_SOCKET, Directory},
        exposition::{Exposition, Type},
        names::directory_of,
        stream,
    },
};

/// How long "no pressure" is reported before the process exits, for clients that keep the last reply. Longer than HAProxy's
/// default check interval, 2 s.
const DRAIN_TIME: Duration = Duration::from_millis(2_500);
/// How long the exit waits for file writes in progress, which may hang on a dead mount.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// How often `exit_when_idle` checks whether an agent runs.
const AGENT_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a client of the status socket may take to write its request and read the reply.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// State shared by all adapters.
struct Shared {
    pages: PageCache,
    drain_policy: Mutex<DrainPolicy>,
    adapters: Vec<Arc<AdapterStats>>,
    since: Instant,
    /// The process is about to exit: report no pressure, whatever the pages say.
    is_draining: AtomicBool,
}

impl Shared {
    /// The pressure that the adapters of a service report.
    fn pressure(&self, name: &str) -> Pressure {
        if self.is_draining.load(Ordering::Relaxed) {
            return Pressure::NONE;
        }
        self.pages.pressure(name)
    }

    /// Reports no pressure until clients that keep the last reply have asked again. Their number is unknown (several HAProxy
    /// instances may check one port), so this waits for a fixed time.
    async fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
        let has_clients =
            |adapter: &Arc<AdapterStats>| adapter.keeps_last_reply && adapter.replies() > 0;
        if self.adapters.iter().any(has_clients) {
            tokio::time::sleep(DRAIN_TIME).await;
        }
    }

    /// Whether this service is drained, or reported as not ready.
    fn is_drained(&self, name: &str) -> bool {
        let mut policy = self
            .drain_policy
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        policy.is_drained(name, |name| {
            let pressure = self.pressure(name);
            // The page of a service that just exited stays for a moment, without a pid.
            (pressure.alive && pressure.pid != 0).then_some(pressure.level)
        })
    }

    async fn status(&self) -> Value {
        let agent_runs = agent::is_running(&self.pages.directory).await;
        let adapters = self.adapters.iter().map(|stats| {
            let mut object = stats.to_json();
            let warnings = self.warnings(stats, agent_runs);
            object["warnings"] = warnings.iter().map(Warning::to_json).collect();
            object
        });
        let adapters: Value = adapters.collect();
        json!({
            "type": "status",
            "of": "adapter_process",
            "pid": std::process::id(),
            "uptime_s": self.since.elapsed().as_secs(),
            "adapters": adapters,
        })
    }

    /// What keeps the adapter or its consumers from doing their work. Without an agent, a missing page is not reported.
    fn warnings(&self, stats: &AdapterStats, agent_runs: bool) -> Vec<Warning> {
        let mut warnings = stats.warnings();
        let Some(target) = &stats.target else {
            return warnings;
        };
        let name = directory_of(target);
        let same = self.pages.instances(target);
        let is_published = same.iter().any(|(directory, _)| *directory == name);
        if agent_runs && !is_published {
            warnings.push(Warning::new(
                "no_such_service",
                format!("no service {target} is published: \"no pressure\" is reported"),
                "set target to a name in `tailback status`, and let a [[target]] match the service",
            ));
        }
        if same.len() > 1 {
            let names: Vec<&str> = same.iter().map(|(directory, _)| &**directory).collect();
            warnings.push(Warning::new(
                "same_name",
                format!(
                    "{} services are called {target} ({}): only the oldest is reported",
                    same.len(),
                    names.join(", ")
                ),
                "give each service its own service_name, and its own adapter",
            ));
        }
        warnings
    }

    fn metrics(&self, agent_runs: bool) -> Exposition {
        /// Name, type, help, value.
        type Family = (
            &'static str,
            Type,
            &'static str,
            fn(&Shared, &AdapterStats, bool) -> u64,
        );
        const FAMILIES: [Family; 6] = [
            (
                "tailback_adapter_replies_total",
                Type::Counter,
                "Replies sent by the adapter.",
                |_, stats, _| stats.replies(),
            ),
            (
                "tailback_adapter_connections",
                Type::Gauge,
                "Clients connected to the adapter.",
                |_, stats, _| stats.connections(),
            ),
            (
                "tailback_adapter_rejected_total",
                Type::Counter,
                "Clients rejected because there were too many, and pressure socket notifications that a client did not read.",
                |_, stats, _| stats.rejections(),
            ),
            (
                "tailback_adapter_closed_total",
                Type::Counter,
                "Connections closed to make room for others, or because the client sent no request or did not read.",
                |_, stats, _| stats.closed_connections(),
            ),
            (
                "tailback_adapter_failed",
                Type::Gauge,
                "1 while the adapter cannot listen or write its file, else 0.",
                |_, stats, _| stats.failures(),
            ),
            (
                "tailback_adapter_warnings",
                Type::Gauge,
                "Warnings about the adapter: its service does not exist or is not unique, or a consumer cannot act on the signal.",
                |shared, stats, agent_runs| shared.warnings(stats, agent_runs).len() as u64,
            ),
        ];
        let mut all = Exposition::default();
        for (name, kind, help, value) in FAMILIES {
            let family = all.family(name, kind, help);
            for adapter in &self.adapters {
                let value = value(self, adapter, agent_runs);
                let labels = [("adapter", adapter.kind), ("at", &adapter.at)];
                family.add(&labels, value as f64);
            }
        }
        all
    }
}

/// Serves the adapters until a signal stops it or, with `exit_idle_time`, until no agent has been seen for that time. `in_use` is
/// the directory of a running agent that has started this process.
pub fn run(config: &Signal, in_use: Option<&Path>, exit_idle_time: Option<Duration>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot serve the adapters")?;
    let kept = with_kept_values(config);
    let own = match in_use {
        Some(path) => Directory::open_in_use(path)?,
        None => Directory::open(&config.directory())?,
    };
    if !own.is_plausible() {
        bail!(
            "{} belongs to another user, and no agent of this user publishes there: start the agent first, or run as that user",
            config.directory().display()
        );
    }
    // Others may replace the directory that the path leads to.
    let directory = own.path_to("");
    // What a running adapter process knows about its clients, before it is replaced.
    let previous = runtime.block_on(agent::adapter_process_status(&directory));
    let _lock = takeover::take(&own.fd, &own.path, &kept)?;
    let successor = OnceLock::new();
    let outcome = runtime.block_on(serve(
        config,
        &own,
        exit_idle_time,
        previous.unwrap_or_default(),
        &successor,
    ));
    // A write in progress finishes before the final one below, unless it hangs.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    // Fail open, whatever the outcome: the layers outlive the process.
    let successor = successor.get();
    for envoy in &config.envoy {
        if !successor.is_some_and(|adapters| adapters.contains(&kept_layer(envoy))) {
            let _ = envoy_layer::write(envoy, None, None);
        }
    }
    outcome
}

/// The adapters whose consumers keep the last value.
fn with_kept_values(config: &Signal) -> BTreeSet<String> {
    let haproxies = config.haproxy.iter().map(kept_checks);
    haproxies
        .chain(config.envoy.iter().map(kept_layer))
        .collect()
}

fn kept_checks(haproxy: &config::signal::Haproxy) -> String {
    format!("haproxy {} {:?}", haproxy.listen, haproxy.target)
}

fn kept_layer(envoy: &config::signal::Envoy) -> String {
    format!(
        "envoy {} {:?} {:?}",
        envoy.symlink_root.display(),
        envoy.cluster,
        envoy.target
    )
}

/// Serves until it has to exit. `previous` is the status of the process that was replaced. `successor` is set to the adapters of
/// the process that takes over.
async fn serve(
    config: &Signal,
    own: &Directory,
    exit_idle_time: Option<Duration>,
    previous: Value,
    successor: &OnceLock<BTreeSet<String>>,
) -> Result<()> {
    let directory = own.path_to("");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut taken_over = signal(SignalKind::user_defined1())?;
    // Does not end the process: the agent restarts it if the configuration has changed.
    let _ignored = signal(SignalKind::hangup())?;
    // Bind before dropping privileges.
    let mut adapters = Vec::new();
    let mut stats_of = |kind, at: String, target: Option<&String>| {
        let stats = AdapterStats::new(kind, at, target.cloned());
        adapters.push(Arc::clone(&stats));
        stats
    };
    let mut endpoint = |kind, at: &Listen, target: Option<&String>| {
        let stats = stats_of(kind, at.to_string(), target);
        Endpoint::bind(at.clone(), stats)
    };
    let http = config
        .http
        .as_ref()
        .map(|it| endpoint("http", &it.listen, None));
    let keda = config
        .keda
        .as_ref()
        .map(|it| endpoint("keda", &it.listen, None));
    let haproxies = with_endpoints(&config.haproxy, |it| {
        endpoint("haproxy", &it.listen, Some(&it.target))
    });
    let orcas = with_endpoints(&config.orca, |it| {
        endpoint("orca", &it.listen, Some(&it.target))
    });
    let sockets = with_endpoints(&config.pressure_socket, |it| {
        let at = Listen::Unix(it.path.clone());
        endpoint("pressure_socket", &at, Some(&it.target))
    });
    let envoys = with_endpoints(&config.envoy, |it| {
        let at = it.symlink_root.display().to_string();
        stats_of("envoy", at, Some(&it.target))
    });
    let status = Listener::Unix(stream::bind_locked(&own.path_to(ADAPTERS_SOCKET), 0o660)?);
    privileges::drop_privileges(!envoys.is_empty())?;
    privileges::refuse_system_calls(!envoys.is_empty());

    let shared = Arc::new(Shared {
        pages: PageCache::new(directory.clone()),
        drain_policy: Mutex::new(DrainPolicy::new(config.group.clone())),
        adapters,
        since: Instant::now(),
        is_draining: AtomicBool::new(false),
    });
    let mut tasks = JoinSet::new();
    let share = || Arc::clone(&shared);
    tasks.spawn(serve_status(status, share()));
    if let Some((endpoint, config)) = http.zip(config.http.as_ref()) {
        tasks.spawn(http::serve(
            endpoint,
            Hosts::new(config, machine_name()),
            share(),
        ));
    }
    keda.map(|endpoint| tasks.spawn(keda::serve(endpoint, share())));
    for (haproxy, endpoint) in haproxies {
        let at = haproxy.listen.to_string();
        let mut of_previous = previous["adapters"].as_array().into_iter().flatten();
        let of_previous = of_previous.find(|adapter| adapter["at"] == *at);
        let of_previous = of_previous.cloned().unwrap_or_default();
        tasks.spawn(haproxy::serve(haproxy, endpoint, share(), of_previous));
    }
    for (orca, endpoint) in orcas {
        tasks.spawn(orca::serve(orca.target, endpoint, share()));
    }
    for (socket, endpoint) in sockets {
        tasks.spawn(pressure_socket::serve(socket, endpoint, share()));
    }
    for (envoy, stats) in envoys {
        tasks.spawn(envoy::serve(envoy, stats, share()));
    }
    let asked = async {
        tokio::select! {
            _ = taken_over.recv() => {}
            () = takeover::asked_to_exit(&own.fd) => {}
        }
    };
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = asked => {
            let _ = successor.set(takeover::successor(&own.fd));
            None
        }
        () = exit_when_idle(&directory, exit_idle_time) => None,
        task = tasks.join_next() => task,
    };
    // A process that takes over and serves the same adapters continues without a gap.
    let is_continued = |adapters: &BTreeSet<String>| with_kept_values(config).is_subset(adapters);
    if !successor.get().is_some_and(is_continued) {
        shared.drain().await;
    }
    match ended {
        Some(Err(error)) => Err(error).context("an adapter ended"),
        _ => Ok(()),
    }
}

/// The name of this machine.
fn machine_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// Pairs each configured adapter with its endpoint or statistics.
fn with_endpoints<T: Clone, E>(adapters: &[T], endpoint: impl FnMut(&T) -> E) -> Vec<(T, E)> {
    adapters
        .iter()
        .cloned()
        .zip(adapters.iter().map(endpoint))
        .collect()
}

/// Ticks immediately and then at this interval. Missed ticks are not caught up on: only the current pressure matters.
fn clock(interval: Duration) -> Interval {
    let mut clock = tokio::time::interval(interval);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    clock
}

/// Returns once no agent has been seen for `exit_idle_time`; never without it.
async fn exit_when_idle(directory: &Path, exit_idle_time: Option<Duration>) {
    let Some(exit_idle_time) = exit_idle_time else {
        return std::future::pending().await;
    };
    let mut seen = Instant::now();
    while seen.elapsed() < exit_idle_time {
        tokio::time::sleep(AGENT_CHECK_INTERVAL).await;
        if agent::is_running(directory).await {
            seen = Instant::now();
        }
    }
}

/// Replies with the status to every client of the status socket.
async fn serve_status(listener: Listener, shared: Arc<Shared>) {
    loop {
        let (mut stream, _) = listener.accept().await;
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let reply = async {
                // The request is ignored, but closing with unread data would discard the reply.
                let _ = stream.read(&mut [0; 1_024]).await?;
                stream
                    .write_all(format!("{}\n", shared.status().await).as_bytes())
                    .await
            };
            // A client that is too slow gets no reply and may ask again.
            let _ = tokio::time::timeout(STATUS_TIMEOUT, reply).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{agent_checks::AgentChecks, listen::Peer, *};
    use crate::emit::json::reference::assert_documented;

    /// A HAProxy that checks every 10 s, an Envoy that reads its layer, and ORCA.
    fn shared() -> Shared {
        let stats =
            |kind| AdapterStats::new(kind, "127.0.0.1:1".to_owned(), Some("shop".to_owned()));
        let adapters = ["haproxy", "envoy", "orca"].map(stats);
        adapters[0].replied("up ready 62%");
        adapters[0].failed("cannot listen");
        let began = Instant::now();
        let mut checks = AgentChecks::new(true, began);
        for turn in 0..3 {
            let at = began + Duration::from_secs(10) * turn;
            checks.check(Peer::Process(Some(1)), b"weight=100", at);
        }
        let readers = envoy::Readers::new(true);
        readers.lock().read();
        adapters[0].set_consumers(Arc::new(haproxy::Checks(Mutex::new(checks))));
        adapters[1].set_consumers(Arc::new(readers));
        adapters[2].set_consumers(Arc::new(orca::RaisedIntervals::default()));
        Shared {
            pages: PageCache::new("/nonexistent".into()),
            drain_policy: Mutex::new(DrainPolicy::new(Vec::new())),
            adapters: adapters.into(),
            since: Instant::now(),
            is_draining: AtomicBool::new(false),
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_keys_of_the_status_are_those_of_the_documentation() {
        assert_documented(r#""of": "adapter_process""#, &[shared().status().await]);
    }

    #[test]
    fn the_metrics_are_those_of_the_documentation() {
        crate::signal::metrics::reference::assert_documented(
            &["Adapters"],
            &shared().metrics(true).text(),
        );
    }

    /// No page of it is published: of the three adapters one has a warning of its consumer, too.
    #[test]
    fn a_service_that_does_not_exist_counts_as_a_warning_while_an_agent_runs() {
        let shared = shared();
        let warnings = |agent_runs| {
            let text = shared.metrics(agent_runs).text();
            let lines = text.lines();
            let lines = lines.filter(|line| line.starts_with("tailback_adapter_warnings{"));
            lines
                .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
                .collect::<Vec<u64>>()
        };
        let (without, with) = (warnings(false), warnings(true));
        assert_eq!(without.len(), 3);
        let each_one_more: Vec<u64> = without.iter().map(|count| count + 1).collect();
        assert_eq!(with, each_one_more);
    }
}
