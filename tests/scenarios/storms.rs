//! Clients that cost more than before: each connection needs a full handshake, or each call is made several times.

use std::{net::SocketAddr, process::Command};

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{nginx::Nginx, ports, process::Process, temp::TempDir, uwsgi::Uwsgi};

use crate::{
    cpu::{CpuGroup, HIGH_CPU_SHARES},
    play::{Culprit, Play},
    programs::{DEADLINE, Program, app, go, uwsgi_is_full, with_children},
};

/// As many connections as before, but no session is resumed: the server signs for each of them, on its only CPU.
pub fn handshakes(play: &mut Play) -> Result<()> {
    let group = CpuGroup::new("service", HIGH_CPU_SHARES)?;
    let port = ports::free()?;
    let nginx = Nginx::start_tls(port, |words| {
        words.splice(0..0, group.before());
    })?;
    let clients = Clients::start(ports::local(port), 380)?;
    play.watch_pid(nginx.process().pid())?;
    play.healthy()?;
    let pids = with_children(nginx.process().pid())?;
    play.planted(Culprit::default().and(pids));
    clients.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(None);
    clients.process.signal(Signal::USR2)?;
    play.recover()
}

/// Clients with TLS.
struct Clients {
    process: Process,
    _directory: TempDir,
}

impl Clients {
    fn start(address: SocketAddr, per_s: u32) -> Result<Self> {
        let directory = TempDir::new("handshakes")?;
        let binary = go(&directory, "handshakes", include_str!("apps/handshakes.go"))?;
        let mut command = Command::new(binary);
        command.args([address.to_string(), per_s.to_string()]);
        let process = Process::start("handshakes", &mut command)?;
        process.wait_line("ready", DEADLINE)?;
        Ok(Self {
            process,
            _directory: directory,
        })
    }
}

/// After a short burst every call takes longer than its client waits, and is made again: the workers are busy with calls that
/// nobody waits for any more. Capacity: 4 workers / 20 ms = 200 requests a second.
pub fn retries(play: &mut Play) -> Result<()> {
    let uwsgi = Uwsgi::start_app(&app(4, 1000))?;
    let (text, port) = (include_str!("apps/retries.py"), uwsgi.port().to_string());
    let clients = Program::python("retries", text, &["asyncio"], &[&port, "110"])?;
    clients.process.wait_line("ready", DEADLINE)?;
    play.watch_pid(uwsgi.process().pid())?;
    play.watch_own_messages(uwsgi.process().lines(), uwsgi_is_full);
    play.healthy()?;
    play.planted(Culprit::default());
    clients.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(None);
    clients.process.signal(Signal::USR2)?;
    play.recover()
}
