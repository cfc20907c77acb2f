//! Databases: a lock that blocks one statement and all others behind it, and healthy routine.

use std::time::Duration;

use anyhow::Result;
use tailback_tests::{
    load::Load,
    mariadb::MariaDb,
    redis::Redis,
    uwsgi::{App, Uwsgi},
    workloads::FlashSale,
};

use crate::{
    control::observed_for,
    play::{Culprit, Play},
    programs::{DEADLINE, app, load, uwsgi_is_full},
};

/// uWSGI in front of MariaDB, and its load. Each request reads a row.
fn shop() -> Result<(MariaDb, Uwsgi, Load)> {
    let mariadb = MariaDb::start(
        "CREATE TABLE stock (item INT PRIMARY KEY, left_over INT) ENGINE=InnoDB; INSERT INTO stock VALUES (1, 1000)",
    )?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![
            ("APP_SQL_PORT", mariadb.port().to_string()),
            (
                "APP_SQL",
                "SELECT left_over FROM stock WHERE item = 1".to_owned(),
            ),
        ],
        ..app(4, 100)
    })?;
    let load = load(uwsgi.address(), "/read/1", 25.0)?;
    Ok((mariadb, uwsgi, load))
}

/// How long the healthy ones are watched.
const TIME: Duration = Duration::from_secs(8);

const ADD_COLUMN: &str = "ALTER TABLE stock ADD COLUMN place INT";
const DROP_COLUMN: &str = "ALTER TABLE stock DROP COLUMN place";

/// A transaction that has read the table stays open, a change of the table waits for it, and all reads wait behind the change.
pub fn metadata_lock(play: &mut Play) -> Result<()> {
    let (mariadb, uwsgi, load) = shop()?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let holder = mariadb.session("BEGIN; SELECT 'open' FROM stock; SELECT SLEEP(60)")?;
    holder.wait_line("open", DEADLINE)?;
    play.planted(Culprit::server(mariadb.process().pid(), mariadb.port()));
    let change = mariadb.session(ADD_COLUMN)?;
    play.hold()?;
    play.removing(Some(&load));
    drop((holder, change));
    play.recover()
}

/// Healthy: the table is changed, and no transaction is open.
pub fn schema_change(play: &mut Play) -> Result<()> {
    let (mariadb, uwsgi, load) = shop()?;
    play.watch_pid(uwsgi.process().pid())?;
    for change in [ADD_COLUMN, DROP_COLUMN] {
        play.lasts(TIME / 4)?;
        mariadb.run(&format!("USE shop; {change}"))?;
    }
    observed_for(TIME / 2, play, load)
}

/// Healthy: eight clients update the same row in short transactions, and wait for each other now and then.
pub fn short_row_locks(play: &mut Play) -> Result<()> {
    let sale = FlashSale::start(8, 100)?;
    let load = load(sale.uwsgi.address(), FlashSale::PATH, 80.0)?;
    play.watch_pid(sale.postgres.process().pid())?;
    observed_for(TIME, play, load)
}

/// Healthy: one Redis copies all that it writes to another.
pub fn replication(play: &mut Play) -> Result<()> {
    let primary = Redis::start()?;
    let replica = Redis::start_with(|words| {
        let of = ["--replicaof", "127.0.0.1", &primary.port().to_string()];
        words.extend(of.map(str::to_owned));
    })?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![
            ("APP_REDIS_PORT", primary.port().to_string()),
            (
                "APP_REDIS_COMMAND",
                format!("SET greeting {}", "x".repeat(10_000)),
            ),
        ],
        ..app(4, 100)
    })?;
    let load = load(uwsgi.address(), "/ask/4", 40.0)?;
    let pids = [&primary, &replica].map(|redis| redis.process().pid().to_string());
    play.watch(&["--pid", &pids[0], "--pid", &pids[1]])?;
    observed_for(TIME, play, load)
}
