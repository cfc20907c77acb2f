//! HAProxy as a reverse proxy.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::Result;

use crate::{ports, process::Process, program, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// A running HAProxy that responds.
pub struct Haproxy {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl Haproxy {
    /// Proxies to `before`, with at most `at_once` requests there at a time; further ones wait in its own queue. It can be asked at its
    /// stats socket.
    pub fn start_queueing(before: SocketAddr, at_once: u32) -> Result<Self> {
        let temp = TempDir::new("haproxy")?;
        let socket = temp.path().join("admin.sock");
        let global = format!("global\n stats socket {} level admin\n", socket.display());
        Self::start_with(temp, &global, 2000, &format!("{before} maxconn {at_once}"))
    }

    /// Has a stats socket and this many backends without traffic, besides the one that responds: with an error, since nobody listens at
    /// its server.
    pub fn start_backends(backends: u32) -> Result<Self> {
        let temp = TempDir::new("haproxy")?;
        let socket = temp.path().join("admin.sock");
        let global = format!("global\n stats socket {} level admin\n", socket.display());
        let server = "127.0.0.1:1 maxconn 10";
        let more = (0..backends).map(|number| format!("\nbackend b{number}\n server one {server}"));
        let last = format!("{server}{}", more.collect::<String>());
        Self::start_with(temp, &global, 2000, &last)
    }

    /// Proxies to `before`. Accepts at most `maxconn` connections at a time; others wait in its accept queue.
    pub fn start(before: SocketAddr, maxconn: u32) -> Result<Self> {
        Self::start_with(TempDir::new("haproxy")?, "", maxconn, &before.to_string())
    }

    fn start_with(temp: TempDir, global: &str, maxconn: u32, server: &str) -> Result<Self> {
        let port = ports::free()?;
        let config = temp.write(
            "haproxy.cfg",
            &format!(
                "{global}defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
                 frontend front\n bind 127.0.0.1:{port}\n maxconn {maxconn}\n default_backend back\n\
                 backend back\n server one {server}\n"
            ),
        )?;
        let mut command = Command::new(program::need(&["haproxy"])?);
        let process = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
        process.wait_response(ports::local(port), START_DEADLINE)?;
        Ok(Self {
            process,
            port,
            _temp: temp,
        })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }
}
