//! Reports to the service manager that started the agent, by the protocol of sd_notify(3): ready, alive, reloaded, stopping.
//!
//! A message that the manager does not take is dropped, because the agent's loop must not wait. The next one follows soon.
#![forbid(unsafe_code)]

use std::{
    env,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::{Duration, Instant},
};

use tracing::debug;

use crate::collect::mono_ns;

/// Minimum time between two messages with the status.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The service manager. Without one, nothing is done.
pub(super) struct ServiceManager {
    socket: Option<UnixDatagram>,
    is_ready: bool,
    /// How often to report that the agent is alive: half the watchdog timeout.
    alive_interval: Option<Duration>,
    alive_due: Instant,
    status_due: Instant,
    status: String,
}

impl ServiceManager {
    /// The service manager whose socket is in `NOTIFY_SOCKET`.
    pub(super) fn from_environment() -> Self {
        let now = Instant::now();
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|path| {
            connected(path.as_bytes())
                .inspect_err(|error| debug!(%error, "cannot reach the service manager"))
                .ok()
        });
        Self {
            socket,
            is_ready: false,
            alive_interval: watchdog().map(|time| time / 2),
            alive_due: now,
            status_due: now,
            status: String::new(),
        }
    }

    /// Call after each sample that is published. `services`: how many are watched, and how many have a queue that is not ok.
    pub(super) fn sampled(&mut self, services: (usize, usize)) {
        if self.socket.is_none() {
            return;
        }
        let now = Instant::now();
        let mut message = String::new();
        if !self.is_ready {
            self.is_ready = true;
            message += "READY=1\n";
        }
        if let Some(interval) = self.alive_interval
            && now >= self.alive_due
        {
            self.alive_due = now + interval;
            message += "WATCHDOG=1\n";
        }
        if now >= self.status_due {
            self.status_due = now + STATUS_INTERVAL;
            let status = match services {
                (all, 0) => format!("{all} services watched, all queues ok"),
                (all, filling) => format!("{all} services watched, {filling} with a filling queue"),
            };
            if status != self.status {
                message += &format!("STATUS={status}\n");
                self.status = status;
            }
        }
        self.send(&message);
    }

    /// A reload was requested and is done: applied, or rejected with this error.
    pub(super) fn reloaded(&mut self, error: Option<&str>) {
        if !self.is_ready {
            return;
        }
        let now_us = mono_ns() / 1_000;
        let status = match error {
            // The text is that of a file which others may have written, and one line of the protocol is a field.
            Some(error) => format!("configuration rejected: {}", error.replace('\n', " ")),
            None => "configuration reloaded".to_owned(),
        };
        self.send(&format!(
            "RELOADING=1\nMONOTONIC_USEC={now_us}\nSTATUS={status}\n"
        ));
        self.send("READY=1\n");
        self.status = status;
        self.status_due = Instant::now() + STATUS_INTERVAL;
    }

    pub(super) fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    fn send(&self, message: &str) {
        if let Some(socket) = &self.socket
            && !message.is_empty()
            && let Err(error) = socket.send(message.as_bytes())
        {
            debug!(%error, "the service manager does not accept a message");
        }
    }
}

/// A socket to this path, or, after `@`, to this abstract name.
fn connected(path: &[u8]) -> std::io::Result<UnixDatagram> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// Time without a sign of life after which the manager kills this process.
fn watchdog() -> Option<Duration> {
    let number = |name: &str| env::var(name).ok()?.parse::<u64>().ok();
    let of_another = number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id()));
    let time = Duration::from_micros(number("WATCHDOG_USEC")?);
    (!of_another && !time.is_zero()).then_some(time)
}
