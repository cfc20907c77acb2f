//! Queues inside brokers. Others take items from them: what these wait for is why the queue grows.

use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};
use tailback_tests::{
    postgres::Postgres,
    process::children_of,
    redis::{Redis, Reply},
    wait,
    workloads::Session,
};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, Program},
};

const TEXT: &str = include_str!("apps/orders.py");
const MODULES: [&str; 3] = ["rq", "redis", "psycopg2"];
const SELL: &str = "UPDATE stock SET left_over = left_over - 1 WHERE item = 1";
const WORKERS: usize = 4;
/// Observation time of the healthy queue: several answers of Redis.
const TIME: Duration = Duration::from_secs(16);

/// Orders in Redis, workers of RQ that take them, and the database that each order updates.
struct Orders {
    redis: Redis,
    postgres: Postgres,
    workers: Program,
    producer: Program,
}

impl Orders {
    /// `kind`: "work", the workers work themselves; "fork", each forks a process for each order, which is RQ's default.
    fn start(kind: &str) -> Result<Self> {
        let (redis, postgres) = (Redis::start()?, Postgres::start()?);
        postgres.run(
            "CREATE TABLE stock (item int PRIMARY KEY, left_over int);
             INSERT INTO stock VALUES (1, 1000000)",
        )?;
        let ports = [redis.port(), postgres.port()].map(|port| port.to_string());
        let args = [kind, &ports[0], &ports[1], &WORKERS.to_string()];
        let workers = Program::python("orders", TEXT, &MODULES, &args)?;
        workers.process.wait_line("ready", DEADLINE)?;
        wait::until("the workers of RQ", DEADLINE, || {
            workers.process.check_running()?;
            let known = redis.client()?.call(&["SCARD", "rq:workers:orders"])?;
            Ok((known == Reply::Number(WORKERS as i64)).then_some(()))
        })?;
        let producer = Program::python("orders", TEXT, &MODULES, &["add", &ports[0], "10"])?;
        producer.process.wait_line("ready", DEADLINE)?;
        Ok(Self {
            redis,
            postgres,
            workers,
            producer,
        })
    }
}

/// A session updates the row that each order updates, and does not commit. Only Redis is watched.
pub fn jobs_wait_for_a_row(play: &mut Play) -> Result<()> {
    wait_for_a_row(play, &Orders::start("work")?)
}

/// The same, and each worker waits for the process that it has forked.
pub fn forked_jobs_wait_for_a_row(play: &mut Play) -> Result<()> {
    wait_for_a_row(play, &Orders::start("fork")?)
}

fn wait_for_a_row(play: &mut Play, orders: &Orders) -> Result<()> {
    play.watch_pid(orders.redis.process().pid())?;
    play.healthy()?;
    let holder = Session::open(orders.postgres.port(), &[SELL])?;
    play.planted(Culprit::process(holder.backend));
    play.hold()?;
    play.removing(None);
    drop(holder);
    play.recover()?;
    orders.workers.process.check_running()
}

/// All workers of the queue have ended.
pub fn no_workers(play: &mut Play) -> Result<()> {
    let orders = Orders::start("work")?;
    play.watch_pid(orders.redis.process().pid())?;
    play.healthy()?;
    play.planted(Culprit::default());
    for worker in children_of(orders.workers.pid())? {
        let worker = Pid::from_raw(i32::try_from(worker)?).context("no pid")?;
        kill_process(worker, Signal::TERM)?;
    }
    play.hold()?;
    play.removing(None);
    drop(orders.producer);
    orders.redis.client()?.call(&["DEL", "rq:queue:orders"])?;
    play.recover()
}

/// Workers that keep up.
pub fn jobs(play: &mut Play) -> Result<()> {
    let orders = Orders::start("work")?;
    play.watch_pid(orders.redis.process().pid())?;
    play.lasts(TIME)?;
    orders.workers.process.check_running()?;
    orders.producer.process.check_running()
}
