//! Clients at the other end of a connection that do not send or do not read.

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

pub fn callers(port: u16, count: u32, role: &str, path: &str) -> Result<Program> {
    let (port, count) = (port.to_string(), count.to_string());
    let args = ["127.0.0.1", &port, &count, role, path];
    let text = include_str!("apps/caller.py");
    let program = Program::python("caller", text, &["socket"], &args)?;
    program.number("done")?;
    Ok(program)
}

/// One client per worker announces a body and never sends it.
pub fn silent(play: &mut Play) -> Result<()> {
    let mut service = app(4, 100);
    service
        .args
        .extend(["--socket-timeout", "60"].map(str::to_owned));
    among_others(play, &service, "silent", "/sleep/20")
}

/// One client per worker requests a large response and reads nothing.
pub fn non_reading(play: &mut Play) -> Result<()> {
    let mut service = app(4, 100);
    service
        .args
        .extend(["--socket-timeout", "60"].map(str::to_owned));
    among_others(play, &service, "non-reading", "/size/20000000")
}

fn among_others(play: &mut Play, service: &App<'_>, role: &str, path: &str) -> Result<()> {
    let uwsgi = Uwsgi::start_app(service)?;
    let load = load(uwsgi.address(), "/sleep/20", 20.0)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    let callers = callers(uwsgi.port(), 4, role, path)?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}

/// An event-driven server has no worker to block: the responses stay in the send buffers.
pub fn non_reading_nginx(play: &mut Play) -> Result<()> {
    let nginx = Nginx::start(1)?;
    nginx.file("large", 20_000_000)?;
    let load = load(nginx.address(), "/", 20.0)?;
    play.watch_pid(nginx.process().pid())?;
    play.healthy()?;
    let callers = callers(nginx.address().port(), 5, "non-reading", "/large")?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}

/// Silent clients use up the connection limit; later clients wait in the backlog.
pub fn non_sending_haproxy(play: &mut Play) -> Result<()> {
    const MAXCONN: u32 = 20;
    let nginx = Nginx::start(1)?;
    let haproxy = Haproxy::start(nginx.address(), MAXCONN)?;
    let load = load(haproxy.address(), "/", 20.0)?;
    play.watch_pid(haproxy.process().pid())?;
    play.healthy()?;
    let callers = callers(haproxy.address().port(), MAXCONN, "non-sending", "/")?;
    play.planted(Culprit::process(callers.pid()));
    play.hold()?;
    play.removing(Some(&load));
    drop(callers);
    play.recover()
}
