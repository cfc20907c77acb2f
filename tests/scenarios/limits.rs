//! A limit is too small for the work, or the work too much for the limit.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tailback_tests::{
    idle::Idle,
    load::{Load, Plan, Spacing},
    nginx::Nginx,
    sockets,
    uwsgi::Uwsgi,
};

use crate::{
    play::{Culprit, Play},
    programs::{app, family, load, uwsgi_is_full},
};

/// More work than three workers can do comes from the beginning, and nothing changes: no surge, no slowness.
pub fn few_workers(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(3, 200))?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    let family = family(&uwsgi)?;
    play.planted(Culprit::default().and(family).or("worker"));
    let load = load(uwsgi.address(), "/sleep/200", 25.0)?;
    play.hold()?;
    play.removing(Some(&load));
    drop(load);
    play.recover()
}

/// Three times as much comes as usual; each request takes what it always takes.
pub fn surge(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 100))?;
    let load = load(uwsgi.address(), "/sleep/100", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    play.planted(Culprit::default());
    load.set_rate(60.0)?;
    play.hold()?;
    play.removing(Some(&load));
    load.set_rate(10.0)?;
    play.recover()
}
