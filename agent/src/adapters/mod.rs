//! The guard: a process of its own that serves the adapters, so that they fail open whatever becomes of the agent.
//!
//! It reads the pages as any service may (`page_cache`), and asks the agent (`agent`) for nothing that a decision rests on. When the
//! agent is killed or hangs, its pages go stale within their time to live, and every adapter says "no pressure": HAProxy gets
//! 100%, Envoy 0, probes are ready. It holds no privilege, loads nothing into the kernel, and cannot slow the agent's tick.
//!
//! One file per adapter: `http`, `haproxy`, `envoy`, `pressure_socket`, and over `grpc` `orca` and `keda`. `drain_policy` decides who may be taken out of service,
//! `adapter_stats` keeps what was said to whom, `takeover` is how a guard follows another.
#![forbid(unsafe_code)]

mod adapter_stats;
pub mod agent;
mod drain_policy;
mod envoy;
mod grpc;
mod haproxy;
mod http;
mod keda;
mod listen;
mod orca;
mod page_cache;
mod pressure_socket;
mod privileges;
mod takeover;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use adapter_stats::AdapterStats;
use anyhow::{Context as _, Result};
use drain_policy::DrainPolicy;
use listen::{Door, Listener};
use page_cache::PageCache;
use serde_json::{Value, json};
use tailback_page::Pressure;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};

use crate::{
    config::signal::{Listen, Signal},
    signal::{metrics, own_directory, stream},
};

/// Those who keep what they heard last are given this long to hear that there is no pressure: HAProxy asks every 2 s unless
/// it is told otherwise.
const LET_GO: Duration = Duration::from_millis(2_500);
/// The guard's own socket within the directory: who connects is told how things stand.
pub const SOCKET: &str = "guard.sock";

const AT_THE_END: Duration = Duration::from_secs(1);

/// What the adapters share.
struct Shared {
    book: PageCache,
    floor: Mutex<DrainPolicy>,
    adapters: Vec<Arc<AdapterStats>>,
    since: Instant,
    /// We are about to end: there is no pressure any more, whatever the pages say.
    lets_go: AtomicBool,
}

impl Shared {
    /// What the adapters of a service go by.
    fn pressure(&self, name: &str) -> Pressure {
        if self.lets_go.load(Ordering::Relaxed) {
            return Pressure::NONE;
        }
        self.book.pressure(name)
    }

    /// Says "no pressure" for as long as it takes those who keep what they heard last to ask again. How many those are is not
    /// known: two HAProxies may ask at one port.
    async fn let_go(&self) {
        self.lets_go.store(true, Ordering::Relaxed);
        let is_asked = |adapter: &Arc<AdapterStats>| adapter.is_kept && adapter.count() > 0;
        if self.adapters.iter().any(is_asked) {
            tokio::time::sleep(LET_GO).await;
        }
    }

    /// Whether this service is to be drained, or called unready.
    fn is_out(&self, name: &str) -> bool {
        let mut floor = self.floor.lock().unwrap_or_else(PoisonError::into_inner);
        floor.is_out(name, |name| {
            let pressure = self.pressure(name);
            // A service that has just gone is told of for a moment, without a process.
            (pressure.alive && pressure.pid != 0).then_some(pressure.level)
        })
    }

    fn status(&self) -> Value {
        let adapters: Vec<Value> = self.adapters.iter().map(|tally| tally.object()).collect();
        json!({
            "type": "status",
            "of": "adapter_process",
            "pid": std::process::id(),
            "uptime_s": self.since.elapsed().as_secs(),
            "adapters": adapters,
        })
    }

    fn metrics(&self) -> String {
        /// Name, type, help, value.
        type Family = (
            &'static str,
            &'static str,
            &'static str,
            fn(&AdapterStats) -> u64,
        );
        const FAMILIES: [Family; 3] = [
            (
                "tailback_adapter_replies_total",
                "counter",
                "Replies sent by an adapter.",
                AdapterStats::count,
            ),
            (
                "tailback_adapter_connections",
                "gauge",
                "Clients connected to an adapter.",
                AdapterStats::listeners,
            ),
            (
                "tailback_adapter_rejected_total",
                "counter",
                "Rejected connections.",
                AdapterStats::refusals,
            ),
        ];
        let mut text = String::new();
        for (name, kind, help, value) in FAMILIES {
            metrics::head(&mut text, name, kind, help);
            for adapter in &self.adapters {
                let (kind, at) = (adapter.kind, metrics::escaped(&adapter.at));
                let value = value(adapter);
                text += &format!("{name}{{adapter=\"{kind}\",at=\"{at}\"}} {value}\n");
            }
        }
        text
    }
}

/// Serves the adapters until asked to end; with `linger`, until no agent was there for so long.
pub fn run(config: &Signal, linger: Option<Duration>) -> Result<()> {
    let directory = config.directory();
    let _held = takeover::take(&own_directory(&directory)?, &directory)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot serve the adapters")?;
    let outcome = runtime.block_on(serve(config, &directory, linger));
    // What is being written to a file now comes before the last word, or, on a mount that hangs, not in time.
    runtime.shutdown_timeout(AT_THE_END);
    // However it ended: what stays is open.
    for envoy in &config.envoy {
        let _ = envoy::put(&envoy.file, "0.000\n");
    }
    outcome
}

async fn serve(config: &Signal, directory: &Path, linger: Option<Duration>) -> Result<()> {
    let mut end = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut handed_over = signal(SignalKind::user_defined1())?;
    // Bound before privileges are given up.
    let mut adapters = Vec::new();
    let mut tally = |kind, at: String, target: Option<&String>| {
        let tally = AdapterStats::new(kind, at, target.cloned());
        adapters.push(Arc::clone(&tally));
        tally
    };
    let mut door = |kind, at: &Listen, target: Option<&String>| {
        let tally = tally(kind, at.to_string(), target);
        Door::at(at.clone(), tally)
    };
    let http = config
        .http
        .as_ref()
        .map(|it| door("http", &it.listen, None));
    let keda = config
        .keda
        .as_ref()
        .map(|it| door("keda", &it.listen, None));
    let haproxies = with_doors(&config.haproxy, |it| {
        door("haproxy", &it.listen, Some(&it.target))
    });
    let orcas = with_doors(&config.orca, |it| {
        door("orca", &it.listen, Some(&it.target))
    });
    let sockets = with_doors(&config.pressure_socket, |it| {
        let at = Listen::Unix(it.path.clone());
        door("pressure_socket", &at, Some(&it.target))
    });
    let envoys = with_doors(&config.envoy, |it| {
        tally("envoy", it.file.display().to_string(), Some(&it.target))
    });
    let own = Listener::Unix(stream::bind(&directory.join(SOCKET), 0o660)?);
    privileges::give_up(!envoys.is_empty())?;

    let shared = Arc::new(Shared {
        book: PageCache::new(directory.to_owned()),
        floor: Mutex::new(DrainPolicy::new(config.group.clone())),
        adapters,
        since: Instant::now(),
        lets_go: AtomicBool::new(false),
    });
    let mut tasks = JoinSet::new();
    let share = || Arc::clone(&shared);
    tasks.spawn(tell_status(own, share()));
    http.map(|door| tasks.spawn(http::serve(door, share())));
    keda.map(|door| tasks.spawn(keda::serve(door, share())));
    for (haproxy, door) in haproxies {
        tasks.spawn(haproxy::serve(haproxy, door, share()));
    }
    for (orca, door) in orcas {
        tasks.spawn(orca::serve(orca.target, door, share()));
    }
    for (socket, door) in sockets {
        tasks.spawn(pressure_socket::serve(socket, door, share()));
    }
    for (envoy, tally) in envoys {
        tasks.spawn(envoy::serve(envoy, tally, share()));
    }
    let ended = tokio::select! {
        _ = end.recv() => None,
        _ = interrupt.recv() => None,
        // Another guard takes over. It may not serve all that we do.
        _ = handed_over.recv() => None,
        () = alone(directory, linger) => None,
        task = tasks.join_next() => task,
    };
    shared.let_go().await;
    match ended {
        Some(Err(error)) => Err(error).context("an adapter ended"),
        _ => Ok(()),
    }
}

/// Each with where it is served.
fn with_doors<T: Clone, D>(of: &[T], door: impl FnMut(&T) -> D) -> Vec<(T, D)> {
    of.iter().cloned().zip(of.iter().map(door)).collect()
}

/// Ticks at once, and then at this pace. A tick that was missed is not made up for: how things stood then is of no interest now.
fn clock(every: Duration) -> Interval {
    let mut clock = tokio::time::interval(every);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    clock
}

/// Until no agent was there for so long; for ever without a limit.
async fn alone(directory: &Path, linger: Option<Duration>) {
    let Some(linger) = linger else {
        return std::future::pending().await;
    };
    let mut seen = Instant::now();
    while seen.elapsed() < linger {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if agent::is_there(directory).await {
            seen = Instant::now();
        }
    }
}

async fn tell_status(listener: Listener, shared: Arc<Shared>) {
    loop {
        let mut stream = listener.accept().await;
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let answer = async {
                // What it says is of no interest, but closing with it unread would take the answer away.
                let _ = stream.read(&mut [0; 1_024]).await?;
                stream
                    .write_all(format!("{}\n", shared.status()).as_bytes())
                    .await
            };
            // Whoever asked and does not read has to ask again.
            let _ = tokio::time::timeout(Duration::from_secs(1), answer).await;
        });
    }
}
