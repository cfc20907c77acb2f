//! Connections and workers that are taken and not used, and pools behind which a service is slow.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use tailback_tests::{
    apache::Apache,
    haproxy::Haproxy,
    hikari, http, ports,
    postgres::Postgres,
    process::Process,
    program,
    temp::TempDir,
    workloads::{LlmGateway, PooledApp, Uvicorn},
};

use crate::{
    limits::Bursts,
    peers::callers,
    play::{Culprit, Play},
    programs::{DEADLINE, go_module, load, steady_load, with_children},
};

/// Connections in each pool.
const POOL: u32 = 4;

/// An error path takes connections and does not give them back.
pub fn leaked(play: &mut Play) -> Result<()> {
    let app = PooledApp::start(POOL)?;
    taken(play, &app, || {
        for _ in 0..POOL {
            http::get(app.address(), PooledApp::LEAK, DEADLINE)?;
        }
        Ok(None)
    })
}

/// The same with HikariCP.
pub fn leaked_in_java(play: &mut Play) -> Result<()> {
    let postgres = Postgres::start()?;
    let free = ports::free()?;
    let java = Java::shop(postgres.port(), POOL, free)?;
    let load = load(java.address, "/", 30.0)?;
    play.watch_pid(java.process.pid())?;
    play.healthy()?;
    let pool = format!("a pool of {POOL} connections");
    play.planted(Culprit::process(java.process.pid()).or(&pool));
    for _ in 0..POOL {
        http::get(java.address, "/leak", DEADLINE)?;
    }
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(5.0)?;
    http::get(ports::local(free), "/", DEADLINE)?;
    play.recover()
}

/// The same with Go's database/sql: rows that are not closed keep their connections.
pub fn leaked_in_go(play: &mut Play) -> Result<()> {
    let postgres = Postgres::start()?;
    let directory = TempDir::new("shop")?;
    let address = ports::local(ports::free()?);
    let mut command = Command::new(go_module(&directory, "shop")?);
    for number in [address.port(), postgres.port()] {
        command.arg(number.to_string());
    }
    let service = Process::start("shop", command.arg(POOL.to_string()))?;
    service.wait_line("listening", DEADLINE)?;
    let load = load(address, "/", 30.0)?;
    play.watch_pid(service.pid())?;
    play.healthy()?;
    let pool = format!("a pool of {POOL} connections");
    play.planted(Culprit::process(service.pid()).or(&pool));
    for _ in 0..POOL {
        http::get(address, "/leak", DEADLINE)?;
    }
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(5.0)?;
    service.signal(Signal::USR2)?;
    play.recover()
}

/// As many requests as the pool has connections hold one each, and wait for a second.
pub fn deadlocked(play: &mut Play) -> Result<()> {
    let app = PooledApp::start(POOL)?;
    taken(play, &app, || {
        let again = Duration::from_secs(60);
        let burst = Bursts::start(app.address(), PooledApp::TWICE, 2 * POOL, again);
        Ok(Some(burst))
    })
}

fn taken(
    play: &mut Play,
    app: &PooledApp,
    plant: impl FnOnce() -> Result<Option<Bursts>>,
) -> Result<()> {
    let load = load(app.address(), PooledApp::PATH, 15.0)?;
    play.watch_pid(app.process.pid())?;
    play.healthy()?;
    let pids = with_children(app.process.pid())?;
    let pool = format!("a pool of {POOL} connections");
    play.planted(Culprit::default().and(pids).or(&pool));
    let burst = plant()?;
    play.hold()?;
    play.removing(Some(&load));
    drop(burst);
    load.set_rate(5.0)?;
    app.restart_worker()?;
    play.recover()
}

/// HAProxy → a gateway that admits four calls at a time → a provider, which becomes slow.
pub fn slow_behind_a_semaphore(play: &mut Play) -> Result<()> {
    let chat = LlmGateway::start(4)?;
    let haproxy = Haproxy::start(ports::local(chat.gateway.port), 2000)?;
    let load = load(haproxy.address(), LlmGateway::PATH, 8.0)?;
    play.watch_pid(haproxy.process().pid())?;
    play.healthy()?;
    let provider = &chat.provider;
    play.planted(Culprit::server(provider.process.pid(), provider.port));
    chat.slow_provider(Duration::from_millis(1500))?;
    play.hold()?;
    play.removing(Some(&load));
    chat.restore_provider()?;
    load.set_rate(2.0)?;
    play.recover()
}

const BLOCKING: &str = include_str!("apps/blocking.py");

/// An event loop calls another service synchronously, and that becomes slow.
pub fn blocking_call(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("slow")?;
    let slow = directory.path().join("ms");
    let env = [("APP_SLOW", slow.display().to_string())];
    let called = Uvicorn::start("called", BLOCKING, &env)?;
    let env = [("APP_CALLS", called.port.to_string())];
    let app = Uvicorn::start("asks", BLOCKING, &env)?;
    let load = load(ports::local(app.port), "/ask", 20.0)?;
    play.watch_pid(app.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::server(called.process.pid(), called.port));
    let new = directory.write("ms.new", "400")?;
    fs::rename(&new, &slow).context("make it slow")?;
    play.hold()?;
    play.removing(Some(&load));
    fs::remove_file(&slow).context("make it fast")?;
    load.set_rate(5.0)?;
    play.recover()
}

/// An event loop calls its own port synchronously: nobody is left to answer.
pub fn calls_itself(play: &mut Play) -> Result<()> {
    let app = Uvicorn::start("itself", BLOCKING, &[])?;
    let address = ports::local(app.port);
    let usual = load(address, "/", 20.0)?;
    play.watch_pid(app.process.pid())?;
    play.healthy()?;
    play.planted(Culprit::server(app.process.pid(), app.port));
    let once = steady_load(address, "/self", 0.25)?;
    play.hold()?;
    play.removing(Some(&usual));
    once.stop()?;
    play.recover()
}

/// Each worker of Apache serves one connection until it ends. As many clients as there are workers keep theirs.
pub fn keep_alive(play: &mut Play) -> Result<()> {
    const WORKERS: u32 = 6;
    let apache = Apache::start(WORKERS, Duration::from_secs(60))?;
    apache.file("page", 4_000_000)?;
    let load = load(apache.address(), "/", 15.0)?;
    play.watch_pid(apache.process().pid())?;
    play.healthy()?;
    let pids = with_children(apache.process().pid())?;
    play.planted(Culprit::default().and(pids).or("workers"));
    let callers = callers(apache.address().port(), WORKERS, "kept", "/page")?;
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}

/// Healthy: the same with workers to spare.
pub fn keep_alive_and_free_workers(play: &mut Play) -> Result<()> {
    let apache = Apache::start(16, Duration::from_secs(60))?;
    apache.file("page", 4_000_000)?;
    let load = load(apache.address(), "/", 15.0)?;
    let _callers = callers(apache.address().port(), 6, "kept", "/page")?;
    play.watch_pid(apache.process().pid())?;
    crate::control::observed(play, load)
}

/// Healthy: two connections carry 100 requests a second, 60 arrive.
pub fn small_pool(play: &mut Play) -> Result<()> {
    let app = PooledApp::start(2)?;
    let load = load(app.address(), PooledApp::PATH, 60.0)?;
    play.watch_pid(app.process.pid())?;
    crate::control::observed(play, load)
}

/// Maximum heap of a JVM, MB.
pub const HEAP_MB: u32 = 96;

/// The JDK's own HTTP server, with a heap that the serial collector collects.
pub struct Java {
    pub process: Process,
    pub address: SocketAddr,
    _directory: TempDir,
}

impl Java {
    /// Each request allocates; others keep objects, and drop them.
    pub fn heap(mb: u32) -> Result<Self> {
        let text = include_str!("apps/Heap.java");
        Self::start("Heap.java", text, mb, &[], &[])
    }

    /// Each request takes a connection to PostgreSQL from a pool of this size. A request to the port `free` gives back those that
    /// leaked.
    fn shop(postgres: u16, pool: u32, free: u16) -> Result<Self> {
        let args = [postgres.to_string(), pool.to_string(), free.to_string()];
        let jars = hikari::class_path()?;
        let jars = ["-cp", jars.as_str()];
        let text = include_str!("apps/Shop.java");
        Self::start("Shop.java", text, HEAP_MB, &jars, &args)
    }

    /// Each request calls the server on `port`, one at a time.
    pub fn monitor(port: u16) -> Result<Self> {
        let text = include_str!("apps/Monitor.java");
        Self::start("Monitor.java", text, HEAP_MB, &[], &[port.to_string()])
    }

    fn start(
        name: &str,
        text: &str,
        heap_mb: u32,
        options: &[&str],
        args: &[String],
    ) -> Result<Self> {
        let directory = TempDir::new("java")?;
        let source = directory.write(name, text)?;
        let port = ports::free()?;
        let mut command = Command::new(program::need(&["java"])?);
        command.args([&format!("-Xmx{heap_mb}m"), "-XX:+UseSerialGC"]);
        command.args(options).arg(source);
        command.arg(port.to_string()).args(args);
        let process = Process::start("java", &mut command)?;
        process.wait_line("listening", DEADLINE)?;
        Ok(Self {
            process,
            address: ports::local(port),
            _directory: directory,
        })
    }
}

/// Healthy: it collects garbage as it goes.
pub fn normal_collection(play: &mut Play) -> Result<()> {
    let java = Java::heap(HEAP_MB)?;
    let load = load(java.address, "/", 60.0)?;
    play.watch_pid(java.process.pid())?;
    crate::control::observed(play, load)
}
