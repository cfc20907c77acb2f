//! Healthy services in moments that resemble trouble: none of them may have an episode.

use std::{process::Command, thread, time::Duration};

use anyhow::Result;
use tailback_tests::{
    nginx::Nginx,
    ports,
    process::Process,
    program,
    redis::Redis,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
};

use crate::{
    control::{observed_for, stays_healthy},
    cpu::CpuGroup,
    play::Play,
    pools::{HEAP_MB, Java},
    programs::{DEADLINE, Program, app, load},
};

/// Observation time of services in which the same events recur every few seconds.
const TIME: Duration = Duration::from_secs(8);

/// 40 long polls a second begin, each of which waits for five seconds, and clients beside them ask for something quick. The agent
/// starts while the number of long polls still grows.
pub fn long_polls(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("polls")?;
    let source = directory.write("polls.js", include_str!("apps/polls.js"))?;
    let port = ports::free()?;
    let address = ports::local(port);
    let mut command = Command::new(program::need(&["node"])?);
    let node = Process::start("polls", command.arg(source).arg(port.to_string()))?;
    node.wait_line("listening", DEADLINE)?;
    let (text, port) = (include_str!("apps/kept.py"), port.to_string());
    let quick = Program::python("quick", text, &["asyncio"], &[&port, "8"])?;
    quick.process.wait_line("ready", DEADLINE)?;
    let polls = load(address, "/poll", 40.0)?;
    thread::sleep(Duration::from_secs(1));
    stays_healthy(play, node.pid(), polls)?;
    quick.process.check_running()
}

/// 200 websockets: the server sends without being asked.
pub fn websockets(play: &mut Play) -> Result<()> {
    let port = ports::free()?.to_string();
    let (text, modules) = (include_str!("apps/chat.py"), ["websockets"]);
    let server = Program::python("chat", text, &modules, &[&port])?;
    server.process.wait_line("listening", DEADLINE)?;
    play.watch_pid(server.pid())?;
    let clients = Program::python("clients", text, &modules, &[&port, "200"])?;
    clients.process.wait_line("connected", DEADLINE)?;
    play.lasts(TIME)?;
    clients.process.check_running()
}

/// Four workers take jobs from Redis; every two seconds 120 come at once, for 0.3 s of work.
pub fn batch_consumers(play: &mut Play) -> Result<()> {
    let redis = Redis::start()?;
    let port = redis.port().to_string();
    let text = include_str!("apps/jobs.py");
    let workers = Program::python("jobs", text, &["socket"], &["run", &port, "4"])?;
    workers.process.wait_line("ready", DEADLINE)?;
    let producer = Program::python("cron", text, &["socket"], &["add", &port, "120"])?;
    producer.process.wait_line("ready", DEADLINE)?;
    let pids = [workers.pid(), redis.process().pid()].map(|pid| pid.to_string());
    play.watch(&["--pid", &pids[0], "--pid", &pids[1]])?;
    play.lasts(TIME)?;
    workers.process.check_running()?;
    producer.process.check_running()
}

/// Every second the cached response is too old, and all requests of the next 200 ms fetch a new one.
pub fn cache_refill(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(20, 100))?;
    let nginx = Nginx::start_cache(uwsgi.address())?;
    let load = load(nginx.address(), "/sleep/200", 50.0)?;
    play.watch_pid(nginx.process().pid())?;
    observed_for(TIME, play, load)
}

/// A JVM that has just started: its compiler is busy.
pub fn warm_up(play: &mut Play) -> Result<()> {
    let java = Java::heap(HEAP_MB)?;
    play.watch_pid(java.process.pid())?;
    observed_for(TIME, play, load(java.address, "/", 120.0)?)
}

/// A job takes half of the service's CPU for half a second, every three seconds.
pub fn cron(play: &mut Play) -> Result<()> {
    let groups = (
        CpuGroup::new("service", "1024")?,
        CpuGroup::new("cron", "1024")?,
    );
    let uwsgi = Uwsgi::start_app(&App {
        before: groups.0.before(),
        ..app(2, 100)
    })?;
    let text = include_str!("apps/cron.py");
    let job = Program::python_in(&groups.1.before(), "cron", text, &["time"], &[])?;
    job.process.wait_line("ready", DEADLINE)?;
    let load = load(uwsgi.address(), "/compute/5", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    observed_for(TIME, play, load)?;
    job.process.check_running()
}
