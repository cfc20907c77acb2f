//! All scenarios.

use anyhow::Result;
use tailback_tests::workloads::PooledApp;

use crate::{
    blocked, control, cpu, disk, downstream, gateway, gridlock, limits, lock, network, peers,
    play::Play, pools,
};

/// One incident, or one healthy service.
pub struct Scenario {
    pub name: &'static str,
    /// The servers, the watched one first.
    pub on: &'static str,
    /// `None`: a healthy control. It must have no episode at all.
    pub planted: Option<Planted>,
    pub programs: &'static [&'static str],
    /// Python modules that it needs.
    pub modules: &'static [&'static str],
    /// Whether it needs the machine for itself: something in it computes all the time, or the cause is the CPU or the disk.
    /// The others wait for most of their time, and are played beside each other.
    pub alone: bool,
    pub play: fn(&mut Play) -> Result<()>,
}

/// The expected verdict.
#[derive(Clone, Copy)]
pub struct Planted {
    pub cause: &'static str,
    /// Also accepted: this cause, with the planted one as its root cause. For causes in another service.
    pub seen_as: Option<&'static str>,
    /// Affected queue kinds. At least one must warn, and the verdict on each must be right.
    pub queues: &'static [&'static str],
    /// Causes that other queues may report as well.
    pub also: &'static [&'static str],
    /// The verdict must name the planted culprit. Not so where the callers are the cause.
    pub names: bool,
}

const fn planted(cause: &'static str, queues: &'static [&'static str]) -> Planted {
    Planted {
        cause,
        seen_as: None,
        queues,
        also: &[],
        names: true,
    }
}

const UWSGI: &str = "uwsgi-core";
/// Queues that can fill in an asynchronous service, which accepts immediately.
const GATEWAY: &[&str] = &["downstream", "inflight", "recv", "accept"];
/// Queues that can fill in a service whose threads wait.
const THREADED: &[&str] = &["inflight", "recv", "accept"];
/// Queues that can fill in a service whose event loop waits.
const LOOP: &[&str] = &["inflight", "recv", "accept", "eventloop"];

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "flash-sale",
        on: "uWSGI -> PostgreSQL",
        planted: Some(planted("downstream_slow", &["accept"])),
        programs: &[UWSGI, "psql"],
        modules: &["psycopg2"],
        alone: false,
        play: downstream::flash_sale,
    },
    Scenario {
        name: "slow-redis",
        on: "uWSGI -> Redis",
        planted: Some(planted("downstream_slow", &["accept"])),
        programs: &[UWSGI, "redis-server"],
        modules: &[],
        alone: true,
        play: downstream::slow_redis,
    },
    // One expensive command blocks all other clients. It burns CPU, but more CPU would not shorten their wait.
    Scenario {
        name: "redis-blocked",
        on: "Redis",
        planted: Some(planted("event_loop_blocked", &["recv", "eventloop"])),
        programs: &[UWSGI, "redis-server"],
        modules: &[],
        alone: true,
        play: downstream::redis_blocked,
    },
    // For uWSGI a downstream service is slow; the exhausted pool is that service's.
    Scenario {
        name: "pool-exhausted",
        on: "uWSGI -> PgBouncer -> PostgreSQL",
        planted: Some(Planted {
            seen_as: Some("downstream_slow"),
            ..planted("pool_exhausted", &["accept"])
        }),
        programs: &[UWSGI, "psql", "pgbouncer"],
        modules: &["psycopg2"],
        alone: false,
        play: downstream::pool_exhausted,
    },
    // Watched from the first request on, so there is no healthy baseline: only the arithmetic shows the cause.
    Scenario {
        name: "few-workers",
        on: "uWSGI",
        planted: Some(planted("undersized_limit", &["accept"])),
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: limits::few_workers,
    },
    Scenario {
        name: "surge",
        on: "uWSGI",
        planted: Some(Planted {
            names: false,
            ..planted("producer_surge", &["accept"])
        }),
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: limits::surge,
    },
    // It accepts immediately, so requests in flight pile up instead of the backlog.
    Scenario {
        name: "surge-nginx",
        on: "nginx with a limit of requests",
        planted: Some(Planted {
            names: false,
            ..planted("producer_surge", &["inflight"])
        }),
        programs: &["nginx"],
        modules: &[],
        alone: false,
        play: limits::surge_of_nginx,
    },
    Scenario {
        name: "stopped",
        on: "uWSGI",
        planted: Some(planted("consumer_stalled", &["accept"])),
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: blocked::stopped,
    },
    Scenario {
        name: "convoy",
        on: "a threaded server in C",
        planted: Some(planted("lock_contention", &["accept", "lock"])),
        programs: &["gcc"],
        modules: &[],
        alone: true,
        play: lock::holder_computes,
    },
    Scenario {
        name: "convoy-downstream",
        on: "a threaded server in C -> Redis",
        planted: Some(planted("downstream_slow", &["accept", "lock"])),
        programs: &["gcc", "redis-server"],
        modules: &[],
        alone: true,
        play: lock::holder_waits,
    },
    Scenario {
        name: "deadlock",
        on: "a threaded server in C",
        planted: Some(planted("consumer_stalled", &["accept", "lock"])),
        programs: &["gcc"],
        modules: &[],
        alone: false,
        play: lock::deadlock,
    },
    Scenario {
        name: "interpreter-lock",
        on: "a threaded server in Python",
        planted: Some(planted("lock_contention", &["accept", "lock"])),
        programs: &[],
        modules: &["socket"],
        alone: true,
        play: lock::interpreter,
    },
    Scenario {
        name: "event-loop",
        on: "uvicorn",
        planted: Some(planted(
            "event_loop_blocked",
            &["accept", "eventloop", "recv"],
        )),
        programs: &[],
        modules: &["uvicorn"],
        alone: true,
        play: blocked::event_loop,
    },
    Scenario {
        name: "output-pipe",
        on: "uWSGI -> cat",
        planted: Some(planted("output_blocked", &["accept", "pipe"])),
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: blocked::output,
    },
    Scenario {
        name: "cpu-neighbour",
        on: "uWSGI beside stress-ng in another control group",
        planted: Some(planted("cpu_starved", &["accept", "runqueue"])),
        programs: &[UWSGI, "stress-ng"],
        modules: &[],
        alone: true,
        play: cpu::neighbour,
    },
    Scenario {
        name: "own-threads",
        on: "a threaded server in C",
        planted: Some(planted("cpu_bound", &["accept", "runqueue"])),
        programs: &["gcc"],
        modules: &[],
        alone: true,
        play: cpu::own_threads,
    },
    Scenario {
        name: "quota",
        on: "uWSGI in a control group with a CPU quota",
        planted: Some(planted("cpu_throttled", &["accept", "runqueue"])),
        programs: &[UWSGI],
        modules: &[],
        alone: true,
        play: cpu::quota,
    },
    Scenario {
        name: "quota-podman",
        on: "uWSGI in a podman container with a CPU quota",
        planted: Some(planted("cpu_throttled", &["accept", "runqueue"])),
        programs: &[UWSGI, "podman"],
        modules: &[],
        alone: true,
        play: cpu::quota_of_container,
    },
    Scenario {
        name: "silent-clients",
        on: "uWSGI",
        planted: Some(planted("peer_not_sending", &["accept"])),
        programs: &[UWSGI],
        modules: &["socket"],
        alone: false,
        play: peers::silent,
    },
    // No client has ever sent a byte: neither a surge nor an undersized limit explains that.
    Scenario {
        name: "non-sending-clients-haproxy",
        on: "HAProxy -> nginx",
        planted: Some(planted("peer_not_sending", &["accept"])),
        programs: &["haproxy", "nginx"],
        modules: &["socket"],
        alone: false,
        play: peers::non_sending_haproxy,
    },
    Scenario {
        name: "non-reading-clients",
        on: "uWSGI",
        planted: Some(planted("peer_not_reading", &["accept", "send"])),
        programs: &[UWSGI],
        modules: &["socket"],
        alone: false,
        play: peers::non_reading,
    },
    Scenario {
        name: "non-reading-clients-nginx",
        on: "nginx",
        planted: Some(planted("peer_not_reading", &["send"])),
        programs: &["nginx"],
        modules: &["socket"],
        alone: false,
        play: peers::non_reading_nginx,
    },
    Scenario {
        name: "llm-slow-provider",
        on: "uvicorn gateway -> uvicorn provider",
        planted: Some(planted("downstream_slow", GATEWAY)),
        programs: &[],
        modules: &["uvicorn"],
        alone: false,
        play: gateway::slow_provider,
    },
    Scenario {
        name: "llm-small-pool",
        on: "uvicorn gateway -> uvicorn provider",
        planted: Some(planted("pool_exhausted", GATEWAY)),
        programs: &[],
        modules: &["uvicorn"],
        alone: false,
        play: gateway::small_pool,
    },
    Scenario {
        name: "iot-gridlock",
        on: "Mosquitto -> consumer -> PostgreSQL",
        planted: Some(planted("downstream_slow", &["recv"])),
        programs: &["mosquitto", "psql"],
        modules: &["paho.mqtt.client", "psycopg2"],
        alone: false,
        play: gridlock::devices,
    },
    Scenario {
        name: "fsync",
        on: "Redis with its journal on a slow disk",
        planted: Some(planted("disk_slow", &["recv", "eventloop", "disk"])),
        programs: &[UWSGI, "redis-server"],
        modules: &[],
        alone: true,
        play: disk::fsync,
    },
    Scenario {
        name: "link-limited",
        on: "nginx behind a slow link",
        planted: Some(planted("network_limited", &["send"])),
        programs: &["nginx", "tc", "ip"],
        modules: &[],
        alone: false,
        play: network::limited,
    },
    Scenario {
        name: "small-backlog",
        on: "uWSGI",
        planted: Some(planted("undersized_limit", &["accept"])),
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: limits::small_backlog,
    },
    Scenario {
        name: "files-exhausted",
        on: "nginx",
        planted: Some(planted("fd_exhausted", &["fd", "accept"])),
        programs: &["nginx"],
        modules: &[],
        alone: false,
        play: limits::files,
    },
    // Taken from a pool and never given back: the database is idle, and no call is outstanding.
    Scenario {
        name: "leaked-connections",
        on: "gunicorn with psycopg's pool -> PostgreSQL",
        planted: Some(planted("pool_exhausted", THREADED)),
        programs: &["psql"],
        modules: PooledApp::MODULES,
        alone: false,
        play: pools::leaked,
    },
    Scenario {
        name: "pool-deadlock",
        on: "gunicorn with psycopg's pool -> PostgreSQL",
        planted: Some(planted("pool_exhausted", THREADED)),
        programs: &["psql"],
        modules: PooledApp::MODULES,
        alone: false,
        play: pools::deadlocked,
    },
    // The gateway's own limit is used up as a consequence.
    Scenario {
        name: "slow-behind-semaphore",
        on: "HAProxy -> uvicorn gateway -> uvicorn provider",
        planted: Some(planted("downstream_slow", GATEWAY)),
        programs: &["haproxy"],
        modules: &["uvicorn"],
        alone: false,
        play: pools::slow_behind_a_semaphore,
    },
    Scenario {
        name: "blocking-call",
        on: "uvicorn -> uvicorn",
        planted: Some(planted("downstream_slow", LOOP)),
        programs: &[],
        modules: &["uvicorn"],
        alone: false,
        play: pools::blocking_call,
    },
    Scenario {
        name: "loop-calls-itself",
        on: "uvicorn",
        planted: Some(planted("consumer_stalled", LOOP)),
        programs: &[],
        modules: &["uvicorn"],
        alone: false,
        play: pools::calls_itself,
    },
    Scenario {
        name: "keep-alive-workers",
        on: "Apache, one process per connection",
        planted: Some(planted("undersized_limit", &["accept"])),
        programs: &["apache2"],
        modules: &["socket"],
        alone: false,
        play: pools::keep_alive,
    },
    Scenario {
        name: "busy",
        on: "uWSGI at 70%",
        planted: None,
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: control::busy,
    },
    Scenario {
        name: "bursty",
        on: "uWSGI, bursts that drain",
        planted: None,
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: control::bursty,
    },
    Scenario {
        name: "batch",
        on: "gzip behind a full pipe",
        planted: None,
        programs: &["gzip"],
        modules: &[],
        alone: true,
        play: control::batch,
    },
    Scenario {
        name: "keep-alive",
        on: "nginx with 10,000 idle connections",
        planted: None,
        programs: &["nginx"],
        modules: &[],
        alone: false,
        play: control::idle,
    },
    Scenario {
        name: "rolling-restart",
        on: "uWSGI",
        planted: None,
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: control::rolling_restart,
    },
    Scenario {
        name: "slow-by-design",
        on: "uWSGI, one second a request",
        planted: None,
        programs: &[UWSGI],
        modules: &[],
        alone: false,
        play: control::slow_by_design,
    },
    Scenario {
        name: "normal-collection",
        on: "the JDK's HTTP server",
        planted: None,
        programs: &["javac"],
        modules: &[],
        alone: true,
        play: pools::normal_collection,
    },
    Scenario {
        name: "keep-alive-free",
        on: "Apache, idle connections and workers to spare",
        planted: None,
        programs: &["apache2"],
        modules: &["socket"],
        alone: false,
        play: pools::keep_alive_and_free_workers,
    },
    Scenario {
        name: "small-pool-busy",
        on: "gunicorn with psycopg's pool -> PostgreSQL",
        planted: None,
        programs: &["psql"],
        modules: PooledApp::MODULES,
        alone: false,
        play: pools::small_pool,
    },
];
