//! Queues inside proxies and connection pools. Why they fill is at the other ends of their connections to servers.

use std::time::Duration;

use anyhow::Result;
use tailback_tests::{
    haproxy::Haproxy,
    pgbouncer::PgBouncer,
    postgres::Postgres,
    uwsgi::{App, Uwsgi},
    workloads::FlashSale,
};

use crate::{
    control::observed_for,
    play::{Culprit, Play},
    programs::{DEADLINE, Program, app, load},
};

/// Requests that HAProxy sends to the server at a time: as many as it has workers.
const AT_ONCE: u32 = 4;
/// Server connections of PgBouncer.
const POOL: u32 = 2;
/// Observation time of healthy queues: several answers.
const TIME: Duration = Duration::from_secs(16);

/// A session updates the row that each request behind the proxy updates, and does not commit. Only HAProxy is watched.
pub fn jammed_server(play: &mut Play) -> Result<()> {
    let sale = FlashSale::start(AT_ONCE, 100)?;
    let haproxy = Haproxy::start_queueing(sale.uwsgi.address(), AT_ONCE)?;
    let load = load(haproxy.address(), FlashSale::PATH, 20.0)?;
    play.watch_pid(haproxy.process().pid())?;
    play.healthy()?;
    let holder = sale.hold_the_row()?;
    play.planted(Culprit::process(holder.backend));
    play.hold()?;
    play.removing(Some(&load));
    drop(holder);
    load.set_rate(5.0)?;
    play.recover()
}

/// Healthy: requests wait in HAProxy now and then.
pub fn busy_proxy(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(AT_ONCE, 100))?;
    let haproxy = Haproxy::start_queueing(uwsgi.address(), AT_ONCE)?;
    let load = load(haproxy.address(), "/sleep/50", 40.0)?;
    play.watch_pid(haproxy.process().pid())?;
    observed_for(TIME, play, load)
}

const REPORT: &str = include_str!("apps/report.py");

/// A client opens a transaction on each server connection of the pool, and then does something else. Only PgBouncer is watched.
pub fn held_in_transactions(play: &mut Play) -> Result<()> {
    let postgres = Postgres::start()?;
    let pooler = PgBouncer::start(&postgres, POOL)?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![
            ("APP_SQL_PORT", pooler.port().to_string()),
            ("APP_SQL", "SELECT pg_sleep(0.02)".to_owned()),
        ],
        ..app(8, 100)
    })?;
    let load = load(uwsgi.address(), "/sell/1", 20.0)?;
    play.watch_pid(pooler.process().pid())?;
    play.healthy()?;
    let port = pooler.port().to_string();
    let report = Program::python("report", REPORT, &["psycopg2"], &[&port, &POOL.to_string()])?;
    play.planted(Culprit::process(report.pid()));
    report.process.wait_line("open", DEADLINE)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(report);
    load.set_rate(5.0)?;
    play.recover()
}
