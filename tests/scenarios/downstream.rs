//! The service waits for a downstream service.

use std::time::Duration;

use anyhow::Result;
use tailback_tests::{
    pgbouncer::PgBouncer,
    postgres::Postgres,
    redis::Redis,
    uwsgi::{App, Uwsgi},
    workloads::FlashSale,
};

use crate::{
    play::{Culprit, Play},
    programs::{app, load, uwsgi_is_full},
};

/// One session updates the contended row and does not commit.
pub fn flash_sale(play: &mut Play) -> Result<()> {
    let sale = FlashSale::start(4, 100)?;
    let load = load(sale.uwsgi.address(), FlashSale::PATH, 20.0)?;
    play.watch_pid(sale.uwsgi.process().pid())?;
    play.watch_own_messages(sale.uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let holder = sale.hold_the_row()?;
    play.planted(Culprit::process(holder.backend));
    play.hold()?;
    play.removing(Some(&load));
    drop(holder);
    play.recover()
}

/// Redis runs slow scripts, one after another.
pub fn slow_redis(play: &mut Play) -> Result<()> {
    let redis = Redis::start()?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![("APP_REDIS_PORT", redis.port().to_string())],
        ..app(4, 100)
    })?;
    let load = load(uwsgi.address(), "/ask/2/sleep/20", 25.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    play.planted(Culprit::server(redis.process().pid(), redis.port()));
    let hog = redis.hog(Duration::from_millis(300), Duration::from_millis(2))?;
    play.hold()?;
    play.removing(Some(&load));
    hog.stop()?;
    play.recover()
}

/// The same incident with Redis as the target.
pub fn redis_blocked(play: &mut Play) -> Result<()> {
    let redis = Redis::start()?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![("APP_REDIS_PORT", redis.port().to_string())],
        ..app(8, 100)
    })?;
    let _load = load(uwsgi.address(), "/ask/2/sleep/20", 40.0)?;
    play.watch_pid(redis.process().pid())?;
    play.healthy()?;
    play.planted(Culprit::server(redis.process().pid(), redis.port()));
    let hog = redis.hog(Duration::from_millis(700), Duration::from_millis(2))?;
    play.hold()?;
    play.removing(None);
    hog.stop()?;
    play.recover()
}

/// The pooler's pool shrinks: queries take as long as before, but fewer run concurrently.
pub fn pool_exhausted(play: &mut Play) -> Result<()> {
    let postgres = Postgres::start()?;
    let pooler = PgBouncer::start(&postgres, 6)?;
    let uwsgi = Uwsgi::start_app(&App {
        env: vec![
            ("APP_SQL_PORT", pooler.port().to_string()),
            ("APP_SQL", "SELECT pg_sleep(0.1)".to_owned()),
        ],
        ..app(8, 100)
    })?;
    let load = load(uwsgi.address(), "/sell/1", 30.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    play.planted(Culprit::server(pooler.process().pid(), pooler.port()));
    pooler.set_pool_size(1)?;
    play.hold()?;
    play.removing(Some(&load));
    pooler.set_pool_size(8)?;
    load.set_rate(10.0)?;
    play.recover()
}
