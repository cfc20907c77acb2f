//! What the tests of the signal have in common: a service that jams, an agent that publishes, and looks at what it says.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tailback_page::{Page, Pressure, layout::TTL_AT};
use tailback_tests::{agent::Agent, ports, service::Service, temp::TempDir, wait};

pub const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
pub const SOON: Duration = Duration::from_secs(20);
/// Of `[signal]`: what the page says holds, though the agent may get no time on a busy machine for a while.
pub const FOR_LONG: &str = "ttl = \"20s\"\n";

/// An agent, and where it publishes.
pub struct Stage {
    pub agent: Agent,
    pub directory: PathBuf,
    pub config: PathBuf,
    pub http: SocketAddr,
    /// Before the directory goes.
    _guard: GuardEnd,
    temp: TempDir,
}

/// Ends the guard, which would stay for a while to say that there is no pressure.
struct GuardEnd(SocketAddr);

impl Stage {
    /// Watches what listens on `port`, under the name `shop`; the configuration is `[signal]` with HTTP, and `more`.
    pub fn start(port: u16, more: &str) -> Result<Self> {
        Self::start_in(TempDir::new("signal")?, port, more)
    }

    pub fn start_in(temp: TempDir, port: u16, more: &str) -> Result<Self> {
        let http = ports::local(ports::free()?);
        let directory = temp.path().join("run");
        let text = format!(
            "[[target]]\nport = {port}\nservice_name = \"shop\"\n[signal]\ndirectory = \"{}\"\n\
             http.listen = \"{http}\"\n{more}",
            directory.display()
        );
        let config = temp.write("tailback.toml", &text)?;
        let agent = Agent::run([Path::new("--config"), &config])?;
        let stage = Self {
            agent,
            directory,
            config,
            http,
            _guard: GuardEnd(http),
            temp,
        };
        wait::until("the page of the service", SOON, || {
            stage.agent.process().check_running()?;
            Ok(stage.pressure().alive.then_some(()))
        })?;
        wait::until("an answer of the guard", SOON, || {
            Ok(stage.get("/health").ok())
        })?;
        Ok(stage)
    }

    pub fn page(&self) -> PathBuf {
        self.directory.join("shop/page")
    }

    /// As any reader sees it.
    pub fn pressure(&self) -> Pressure {
        Page::open(self.page()).pressure()
    }

    /// For how long that which stands on the page holds: longer after a tick that came late.
    pub fn time_to_live(&self) -> Result<Duration> {
        let mut ns = [0; 8];
        File::open(self.page())?.read_exact_at(&mut ns, TTL_AT as u64)?;
        Ok(Duration::from_nanos(u64::from_le_bytes(ns)))
    }

    /// Head and body of what the guard answers.
    pub fn get(&self, path: &str) -> Result<(String, String)> {
        get(self.http, path)
    }

    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.get("/status")?.1)?)
    }

    /// What the agent's own socket answers to a line.
    pub fn ask(&self, line: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.directory.join("agent.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// The guard's process.
    pub fn guard(&self) -> Result<u32> {
        guard(self.http)
    }

    /// Waits until the page says this.
    pub fn wait(&self, what: &str, is_it: impl Fn(&Pressure) -> bool) -> Result<Pressure> {
        let page = Page::open(self.page());
        wait::until(what, SOON, || {
            let pressure = page.pressure();
            Ok(is_it(&pressure).then_some(pressure))
        })
    }

    /// Ends the agent, for another one to be started in the same place.
    pub fn into_temp(self) -> TempDir {
        drop(self.agent);
        self.temp
    }
}

impl Drop for GuardEnd {
    fn drop(&mut self) {
        if let Ok(guard) = guard(self.0)
            && let Some(pid) = rustix::process::Pid::from_raw(guard.cast_signed())
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn guard(http: SocketAddr) -> Result<u32> {
    let status: Value = serde_json::from_str(&get(http, "/status")?.1)?;
    let pid = status["adapter_process"]["pid"]
        .as_u64()
        .context("the guard tells no pid")?;
    Ok(u32::try_from(pid)?)
}

/// A service with `waiting` connections that it does not accept.
pub fn jam(address: &str, waiting: u32) -> Result<Service> {
    let waiting = waiting.to_string();
    let args = ["jam", "--listen", address, "--waiting", &waiting];
    Service::start(&mut Command::new(SUBJECT), &args)
}

pub fn get(to: SocketAddr, path: &str) -> Result<(String, String)> {
    let mut stream = std::net::TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: tailback\r\nConnection: close\r\n\r\n");
    // At once: a small server reads once.
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the answer is not HTTP")?;
    Ok((head.to_owned(), body.to_owned()))
}
