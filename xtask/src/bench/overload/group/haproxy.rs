//! HAProxy in front of two servers, steered by the agent-check or by its own health check of `/ready`.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use tailback_tests::{http, ports, process::Process, program, temp::TempDir, wait};

use super::servers::{DEADLINE, SERVICE_MS};

/// Names of the servers, also in Tailback's configuration.
pub const NAMES: [&str; 2] = ["one", "two"];
/// `maxconn` without pressure.
const MAXCONN: u32 = 100;

/// How HAProxy learns about pressure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    None,
    /// By the agent-check on each server's port, which sets the weight.
    Weight([u16; 2]),
    /// By the agent-check, which sets `maxconn` instead.
    Maxconn([u16; 2]),
    /// By `GET /ready` on this port.
    Ready(u16),
}

impl Check {
    /// Tailback's side of it: the sections below `[signal]`.
    pub fn adapters(self) -> String {
        let group = "[[signal.group]]\ntargets = [\"one\", \"two\"]\n";
        match self {
            Self::None => String::new(),
            Self::Weight(ports) | Self::Maxconn(ports) => {
                let maxconn = match self {
                    Self::Maxconn(_) => format!("maxconn = {MAXCONN}\n"),
                    _ => String::new(),
                };
                let each = NAMES.iter().zip(ports).map(|(name, port)| {
                    format!(
                        "[[signal.haproxy]]\ntarget = \"{name}\"\nlisten = \"127.0.0.1:{port}\"\n{maxconn}"
                    )
                });
                group.to_owned() + &each.collect::<String>()
            }
            Self::Ready(port) => format!("http.listen = \"127.0.0.1:{port}\"\n{group}"),
        }
    }

    /// HAProxy's side: lines of the backend.
    fn backend(self) -> String {
        match self {
            Self::None | Self::Weight(_) => String::new(),
            // Half a service time.
            Self::Maxconn(_) => format!(" timeout queue {}ms\n", SERVICE_MS / 2),
            Self::Ready(_) => {
                " option httpchk\n http-check send meth GET uri-lf \"/ready?target=%[srv_name]\"\n \
                              http-check expect status 200\n"
                    .to_owned()
            }
        }
    }

    /// HAProxy's side: options of a server.
    fn server(self, number: usize) -> String {
        let agent_check = |ports: [u16; 2]| {
            let port = ports[number];
            format!(
                " agent-check agent-addr 127.0.0.1 agent-port {port} agent-inter 100ms agent-send \"weight=100\\n\""
            )
        };
        match self {
            Self::None => String::new(),
            Self::Weight(ports) => agent_check(ports),
            Self::Maxconn(ports) => format!(" maxconn {MAXCONN}{}", agent_check(ports)),
            Self::Ready(port) => {
                format!(" check addr 127.0.0.1 port {port} inter 100ms fall 1 rise 2")
            }
        }
    }
}

/// A running HAProxy.
pub struct Haproxy {
    process: Process,
    front: SocketAddr,
    socket: PathBuf,
    _temp: TempDir,
}

impl Haproxy {
    pub fn start(servers: [SocketAddr; 2], check: Check) -> Result<Self> {
        let mut backend = check.backend();
        for (number, (name, address)) in NAMES.iter().zip(servers).enumerate() {
            let options = check.server(number);
            backend += &format!(" server {name} {address} weight 100{options}\n");
        }
        let haproxy = Self::start_with(&backend)?;
        wait::until("a response through HAProxy", DEADLINE, || {
            haproxy.process.check_running()?;
            Ok(http::get(haproxy.front, "/", DEADLINE)
                .ok()
                .filter(|response| response.status == 200))
        })?;
        Ok(haproxy)
    }

    /// Starts it with these lines of its backend `back`.
    pub fn start_with(backend: &str) -> Result<Self> {
        let temp = TempDir::new("haproxy")?;
        let front = ports::local(ports::free()?);
        let socket = temp.path().join("stats");
        let text = format!(
            "global\n maxconn 4000\n nbthread 1\n stats socket {} level admin\n\
             defaults\n mode http\n option http-server-close\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n\
             frontend front\n bind {front}\n default_backend back\n\
             backend back\n balance roundrobin\n{backend}",
            socket.display()
        );
        let config = temp.write("haproxy.cfg", &text)?;
        let mut command = Command::new(program::need(&["haproxy"])?);
        let process = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
        wait::until("HAProxy's socket", DEADLINE, || {
            process.check_running()?;
            Ok(UnixStream::connect(&socket).ok().map(drop))
        })?;
        Ok(Self {
            process,
            front,
            socket,
            _temp: temp,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.front
    }

    /// Sends a command of the runtime API. Returns the reply.
    pub fn command(&self, command: &str) -> Result<String> {
        self.process.check_running()?;
        command_to(&self.socket, command).with_context(|| format!("send HAProxy {command:?}"))
    }

    /// Whether both servers get traffic with the same weight and the same limit.
    pub fn is_even(&self) -> Result<bool> {
        let text = self.command("show stat back 4 -1")?;
        let mut lines = text.lines().filter(|line| !line.is_empty());
        let head: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let column = |name: &str| {
            let column = head.iter().position(|one| *one == name);
            column.with_context(|| format!("HAProxy's statistics have no {name}: {text:?}"))
        };
        let columns = [column("status")?, column("weight")?, column("slim")?];
        let servers: Vec<[&str; 3]> = lines
            .map(|line| {
                let values: Vec<&str> = line.split(',').collect();
                columns.map(|column| values.get(column).copied().unwrap_or_default())
            })
            .collect();
        let [one, two] = servers[..] else {
            bail!("HAProxy's statistics have no two servers: {text:?}");
        };
        Ok(one == two)
    }
}

fn command_to(socket: &Path, command: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("{command}\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
