//! Common parts of the signal tests: a service with a full queue, an agent that publishes, and access to what it publishes.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_page::{Page, Pressure, layout::TTL_AT};
use tailback_tests::{agent::Agent, ports, service::Service, temp::TempDir, wait};

pub const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// Deadline of each wait.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// Setting of `[signal]`: the page stays valid even if a busy machine does not schedule the agent for a while.
pub const LONG_TTL: &str = "ttl = \"20s\"\n";
/// Deadline of each wait for the start of an agent, which loads programs into the kernel.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// An agent, and where it publishes.
pub struct Stage {
    pub agent: Agent,
    pub directory: PathBuf,
    pub config: PathBuf,
    pub http: SocketAddr,
    /// Dropped before the directory.
    _adapter_process: KillAdapterProcess,
    temp: TempDir,
}

/// Kills the adapter process on drop; it would outlive the agent for a while to report that there is no pressure.
pub struct KillAdapterProcess(pub SocketAddr);

impl Stage {
    /// Monitors the service on `port` under the name `shop`. The configuration is `[signal]` with HTTP, and `more`.
    pub fn start(port: u16, more: &str) -> Result<Self> {
        Self::start_in(TempDir::new("signal")?, port, more)
    }

    /// Like [`Stage::start`], in a given directory.
    pub fn start_in(temp: TempDir, port: u16, more: &str) -> Result<Self> {
        Self::start_with(temp, |temp, base| {
            let text = format!("[[target]]\nport = {port}\nservice_name = \"shop\"\n{base}{more}");
            temp.write("tailback.toml", &text)
        })
    }

    /// Starts with the file that `write` makes of a `[signal]` section, which ends in that section.
    pub fn start_with(
        temp: TempDir,
        write: impl FnOnce(&TempDir, &str) -> Result<PathBuf>,
    ) -> Result<Self> {
        let http = ports::local(ports::free()?);
        let directory = temp.path().join("run");
        let base = format!(
            "[signal]\ndirectory = \"{}\"\nhttp.listen = \"{http}\"\n",
            directory.display()
        );
        let config = write(&temp, &base)?;
        let agent = Agent::run([Path::new("--config"), &config])?;
        let stage = Self {
            agent,
            directory,
            config,
            http,
            _adapter_process: KillAdapterProcess(http),
            temp,
        };
        wait::until("the page of the service", START_DEADLINE, || {
            stage.agent.process().check_running()?;
            Ok(stage.pressure().alive.then_some(()))
        })?;
        wait::until(
            "a response from the adapter process",
            START_DEADLINE,
            || Ok(stage.get("/ready").ok()),
        )?;
        Ok(stage)
    }

    pub fn page(&self) -> PathBuf {
        self.directory.join("shop/page")
    }

    /// The page as a reader sees it.
    pub fn pressure(&self) -> Pressure {
        Page::open(self.page()).pressure()
    }

    /// Current TTL of the page. It is longer after a late sample.
    pub fn ttl(&self) -> Result<Duration> {
        let mut ns = [0; 8];
        File::open(self.page())?.read_exact_at(&mut ns, TTL_AT as u64)?;
        Ok(Duration::from_nanos(u64::from_le_bytes(ns)))
    }

    /// Sends a GET to the adapter process. Returns head and body of the response.
    pub fn get(&self, path: &str) -> Result<(String, String)> {
        get(self.http, path)
    }

    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.get("/status")?.1)?)
    }

    /// Sends a line to the agent's socket and returns the response.
    pub fn send_line(&self, line: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.directory.join("agent.sock"))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(line.as_bytes())?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(response)
    }

    /// Pid of the adapter process.
    pub fn adapter_process(&self) -> Result<u32> {
        adapter_process(self.http)
    }

    /// Waits until the page satisfies `is_it`.
    pub fn wait(&self, what: &str, is_it: impl Fn(&Pressure) -> bool) -> Result<Pressure> {
        let page = Page::open(self.page());
        wait::until(what, DEADLINE, || {
            let pressure = page.pressure();
            Ok(is_it(&pressure).then_some(pressure))
        })
    }

    /// Stops the agent and returns the directory, to start another agent in it.
    pub fn into_temp(self) -> TempDir {
        drop(self.agent);
        self.temp
    }
}

impl Drop for KillAdapterProcess {
    fn drop(&mut self) {
        if let Ok(pid) = adapter_process(self.0)
            && let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed())
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn adapter_process(http: SocketAddr) -> Result<u32> {
    let status: Value = serde_json::from_str(&get(http, "/status")?.1)?;
    let pid = status["adapter_process"]["pid"]
        .as_u64()
        .context("the status has no pid")?;
    Ok(u32::try_from(pid)?)
}

/// Starts a service with `waiting` connections that it never accepts.
pub fn jam(address: &str, waiting: u32) -> Result<Service> {
    let waiting = waiting.to_string();
    let args = ["jam", "--listen", address, "--waiting", &waiting];
    Service::start(&mut Command::new(SUBJECT), &args)
}

/// What a HAProxy that announces its weight is answered.
pub fn agent_check(at: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"weight=100\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    ensure!(reply.starts_with("up ready"), "{reply:?}");
    Ok(reply)
}

/// Sends a GET over HTTP/1.1. Returns head and body of the response.
pub fn get(to: SocketAddr, path: &str) -> Result<(String, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    exchange(to, &request)
}

/// Sends a request. Returns head and body of the response.
pub fn exchange(to: SocketAddr, request: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // In one write: a small server reads only once.
    stream.write_all(request.as_bytes())?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response
        .split_once("\r\n\r\n")
        .context("the response is not HTTP")?;
    Ok((head.to_owned(), body.to_owned()))
}
