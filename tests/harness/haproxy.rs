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
    /// Proxies to `before`. Accepts at most `maxconn` connections at a time; others wait in its accept queue.
    pub fn start(before: SocketAddr, maxconn: u32) -> Result<Self> {
        let temp = TempDir::new("haproxy")?;
        let port = ports::free()?;
        let config = temp.write(
            "haproxy.cfg",
            &format!(
                "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
                 frontend front\n bind 127.0.0.1:{port}\n maxconn {maxconn}\n default_backend back\n\
                 backend back\n server one {before}\n"
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
