//! Scenarios of what processes share: locks on files and in memory, a log socket. The cause is what the other process does.

use std::{fs, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use tailback_tests::{load::Load, ports, process::Process, program, redis::Redis, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, Program, load},
};

const REQUESTS_PER_S: f64 = 30.0;
const WORKERS: &str = include_str!("apps/workers.py");
const HOLDER: &str = include_str!("apps/holder.py");
const LOG: &str = include_str!("apps/log.py");
const BACKEND: &str = include_str!("apps/backend.py");

/// A service of several processes, and its address. Each request needs `argument`, see `apps/workers.py`.
pub fn workers(mode: &str, argument: &str) -> Result<(Program, SocketAddr)> {
    let port = ports::free()?;
    let args = [port.to_string(), "4".to_owned(), mode.to_owned()];
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    args.push(argument);
    let server = Program::python("workers", WORKERS, &["socket"], &args)?;
    server.process.wait_line("listening", DEADLINE)?;
    Ok((server, ports::local(port)))
}

fn python(name: &str, text: &str, args: &[&str], line: &str) -> Result<Program> {
    let program = Program::python(name, text, &["socket"], args)?;
    program.process.wait_line(line, DEADLINE)?;
    Ok(program)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The fault: `stopped` is stopped.
fn stops(play: &mut Play, stopped: &Program, load: &Load, culprit: Culprit) -> Result<()> {
    play.planted(culprit);
    stopped.process.freeze()?;
    let held = play.hold();
    play.removing(Some(load));
    stopped.process.thaw()?;
    held?;
    play.recover()
}

/// A command of the shell holds the lock on a file that each request needs.
pub fn file_lock(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let file = directory.path().join("state.lock");
    let (server, address) = workers("flock", &text(&file))?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    let mut command = Command::new(program::need(&["flock"])?);
    command.args(["--no-fork"]).arg(&file).args(["sleep", "60"]);
    let holder = Process::start("flock", &mut command)?;
    play.planted(Culprit::process(holder.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(holder);
    play.recover()
}

/// A job in PHP holds the lock on the cache file that each request of PHP's own server needs.
pub fn file_lock_in_php(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("php")?;
    let script = directory.write("cached.php", include_str!("apps/cached.php"))?;
    let cache = directory.path().join("cache");
    let php = program::need(&["php"])?;
    let address = ports::local(ports::free()?);
    let mut command = Command::new(&php);
    command.env("PHP_CLI_SERVER_WORKERS", "4");
    command.args(["-S", &address.to_string()]).arg(&script);
    let server = Process::start("php", command.env("CACHE", &cache))?;
    server.wait_response(address, DEADLINE)?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    let mut command = Command::new(&php);
    let job = Process::start("job", command.arg(&script).env("CACHE", &cache))?;
    play.planted(Culprit::process(job.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(job);
    play.recover()
}

/// Another process waits for Redis while it holds the lock.
pub fn file_lock_downstream(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let file = text(&directory.path().join("state.lock"));
    let redis = Redis::start()?;
    let (server, address) = workers("lockf", &file)?;
    let args = ["lockf", &file, &redis.port().to_string()];
    let holder = python("holder", HOLDER, &args, "ready")?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let hog = redis.hog(Duration::from_millis(400), Duration::from_millis(2))?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(Culprit::server(redis.process().pid(), redis.port()));
    holder.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    holder.process.signal(Signal::USR2)?;
    play.recover()?;
    hog.stop()
}

/// A batch job keeps a transaction open that writes; the service sleeps and tries again.
pub fn sqlite(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let file = text(&directory.path().join("shop.db"));
    let (server, address) = workers("sqlite", &file)?;
    let holder = python("batch", HOLDER, &["sqlite", &file, "0"], "ready")?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(holder.pid()));
    holder.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    holder.process.signal(Signal::USR2)?;
    play.recover()
}

/// The process that holds a mutex in shared memory is stopped.
pub fn mutex(play: &mut Play) -> Result<()> {
    let port = ports::free()?;
    let args = [port.to_string(), "4".to_owned()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let server = Program::c("shared", include_str!("apps/shared.c"), &[], &args)?;
    let keeper = server.number("keeper")?;
    let load = load(ports::local(port), "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(keeper));
    let keeper = rustix::process::Pid::from_raw(keeper.cast_signed()).context("pid 0")?;
    let signal = |signal| rustix::process::kill_process(keeper, signal);
    signal(Signal::USR1)?;
    std::thread::sleep(Duration::from_millis(200));
    signal(Signal::STOP)?;
    let held = play.hold();
    play.removing(Some(&load));
    signal(Signal::CONT)?;
    signal(Signal::USR2)?;
    held?;
    play.recover()
}

/// The log daemon cannot forward, since its collector is stopped: the service waits in sendto.
pub fn log_socket(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let path = text(&directory.path().join("log"));
    let port = ports::free()?.to_string();
    let collector = python("collector", LOG, &["collect", &port], "listening")?;
    let _daemon = python("logd", LOG, &["forward", &path, &port], "listening")?;
    let (server, address) = workers("syslog", &path)?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    let culprit = Culprit::process(collector.pid());
    stops(play, &collector, &load, culprit)
}

/// The server that each request connects to is stopped: its backlog is full, and connections are not answered.
pub fn connect(play: &mut Play) -> Result<()> {
    let port = ports::free()?;
    let backend = python("backend", BACKEND, &[&port.to_string()], "listening")?;
    let (server, address) = workers("call", &port.to_string())?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    let culprit = Culprit::server(backend.pid(), port);
    stops(play, &backend, &load, culprit)
}

/// Each request opens new connections to Redis and closes them, until no local port is left to connect from.
pub fn local_ports(play: &mut Play) -> Result<()> {
    const PORTS: &str = "20000 20999";
    // These are settings of the scenario's own network namespace.
    let settings = Path::new("/proc/sys/net/ipv4");
    fs::write(settings.join("ip_local_port_range"), PORTS).context("set the range of ports")?;
    fs::write(settings.join("tcp_tw_reuse"), "0").context("forbid to reuse TIME_WAIT")?;
    let redis = Redis::start()?;
    let (server, address) = workers("redis", &redis.port().to_string())?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let culprit = Culprit::default().or("local ports");
    crate::lock::trouble(play, &server, &load, culprit)
}

/// The workers sleep between attempts at something else, and take no request.
pub fn back_off(play: &mut Play) -> Result<()> {
    let (server, address) = workers("backoff", "0")?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let family = crate::programs::with_children(server.pid())?;
    crate::lock::trouble(play, &server, &load, Culprit::default().and(family))
}

/// Healthy: each request holds the lock on a file for 2 ms of 33.
pub fn short_file_locks(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let (server, address) = workers("flock", &text(&directory.path().join("state.lock")))?;
    crate::control::stays_healthy(play, server.pid(), load(address, "/", REQUESTS_PER_S)?)
}

/// Healthy: the log daemon reads what is sent to it.
pub fn busy_log_socket(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("shared")?;
    let path = text(&directory.path().join("log"));
    let port = ports::free()?.to_string();
    let _collector = python("collector", LOG, &["collect", &port], "listening")?;
    let _daemon = python("logd", LOG, &["forward", &path, &port], "listening")?;
    let (server, address) = workers("syslog", &path)?;
    crate::control::stays_healthy(play, server.pid(), load(address, "/", 100.0)?)
}
