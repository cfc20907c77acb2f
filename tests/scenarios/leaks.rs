//! Connections that the peer has closed and the service has not: descriptors run out.

use std::net::SocketAddr;

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{nginx::Nginx, ports};

use crate::{
    lock::trouble,
    play::{Culprit, Play},
    programs::{DEADLINE, Program, load},
};

/// Limit of descriptors of the service.
const FILES: u32 = 160;
const REQUESTS_PER_S: f64 = 30.0;

fn service(mode: &str) -> Result<(Program, SocketAddr)> {
    let port = ports::free()?;
    let (at, files) = (port.to_string(), FILES.to_string());
    let text = include_str!("apps/leak.py");
    let server = Program::python("leak", text, &["asyncio"], &[&at, &files, mode])?;
    server.process.wait_line("listening", DEADLINE)?;
    Ok((server, ports::local(port)))
}

/// Those that it accepted. The usual load waits for the server to close, so clients are needed that close first.
pub fn accepted(play: &mut Play) -> Result<()> {
    let (server, address) = service("accepted")?;
    let args = [address.port().to_string(), REQUESTS_PER_S.to_string()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = include_str!("apps/client.py");
    let clients = Program::python("client", text, &["socket"], &args)?;
    clients.process.wait_line("ready", DEADLINE)?;
    play.watch_pid(server.pid())?;
    play.healthy()?;
    play.planted(Culprit::process(server.pid()));
    server.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(None);
    server.process.signal(Signal::USR2)?;
    play.recover()
}

/// Those that it opened to another server.
pub fn opened(play: &mut Play) -> Result<()> {
    let backend = Nginx::start(1)?;
    let (server, address) = service(&backend.address().port().to_string())?;
    let load = load(address, "/", REQUESTS_PER_S)?;
    let culprit = Culprit::process(server.pid());
    trouble(play, &server, &load, culprit)
}
