//! Who is at the other end of a connection, or what lies between.

use anyhow::Result;
use tailback_tests::{
    haproxy::Haproxy,
    nginx::Nginx,
    uwsgi::{App, Uwsgi},
};

use crate::{
    play::{Culprit, Play},
    programs::{Program, app, load, uwsgi_is_full},
};

fn callers(port: u16, count: u32, role: &str, path: &str) -> Result<Program> {
    let (port, count) = (port.to_string(), count.to_string());
    let args = ["127.0.0.1", &port, &count, role, path];
    let text = include_str!("apps/caller.py");
    let program = Program::python("caller", text, &["socket"], &args)?;
    program.number("done")?;
    Ok(program)
}

/// As many callers as there are workers announce a body and never send it.
pub fn silent(play: &mut Play) -> Result<()> {
    let mut service = app(4, 100);
    service
        .args
        .extend(["--socket-timeout", "60"].map(str::to_owned));
    among_others(play, &service, "silent", "/sleep/20")
}

/// As many callers as there are workers ask for much and read nothing.
pub fn deaf(play: &mut Play) -> Result<()> {
    let mut service = app(4, 100);
    service
        .args
        .extend(["--socket-timeout", "60"].map(str::to_owned));
    among_others(play, &service, "deaf", "/size/20000000")
}

fn among_others(play: &mut Play, service: &App<'_>, role: &str, path: &str) -> Result<()> {
    let uwsgi = Uwsgi::start_app(service)?;
    let load = load(uwsgi.address(), "/sleep/20", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.own_words(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let callers = callers(uwsgi.port(), 4, role, path)?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}

/// An event-driven server has no worker to block: the answers stand.
pub fn deaf_of_nginx(play: &mut Play) -> Result<()> {
    let nginx = Nginx::start(1)?;
    nginx.file("large", 20_000_000)?;
    let load = load(nginx.address(), "/", 20.0)?;
    play.watch_pid(nginx.process().pid())?;
    play.healthy()?;
    let callers = callers(nginx.address().port(), 5, "deaf", "/large")?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}

/// As many callers as it may have connections connect and send nothing; whoever comes later waits to be accepted.
pub fn mute_before_haproxy(play: &mut Play) -> Result<()> {
    const MOST: u32 = 20;
    let nginx = Nginx::start(1)?;
    let haproxy = Haproxy::start(nginx.address(), MOST)?;
    let load = load(haproxy.address(), "/", 20.0)?;
    play.watch_pid(haproxy.process().pid())?;
    play.healthy()?;
    let callers = callers(haproxy.address().port(), MOST, "mute", "/")?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}
