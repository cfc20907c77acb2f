//! Servers with a service time that can be changed while they run, and agents that can die and come back.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tailback_page::Page;
use tailback_tests::{
    agent::Agent,
    cgroup::Cgroup,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
    wait,
};

/// Deadline of each wait.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// Service time of a request, in ms; the slow server takes twice as long.
pub const SERVICE_MS: u32 = 40;
/// Accept backlog of a server.
pub const BACKLOG: u32 = 128;
/// Workers of each server.
pub const WORKERS: u32 = 4;

/// One server: uWSGI whose workers take [`SERVICE_MS`] for a request.
pub struct Server {
    pub uwsgi: Uwsgi,
    service_ms: PathBuf,
    _temp: TempDir,
}

impl Server {
    pub fn start(backlog: u32) -> Result<Self> {
        Self::start_with(backlog, Vec::new())
    }

    /// Starts it in a cgroup.
    pub fn start_in(cgroup: &Cgroup) -> Result<Self> {
        Self::start_with(BACKLOG, cgroup.prefix())
    }

    fn start_with(backlog: u32, before: Vec<String>) -> Result<Self> {
        let temp = TempDir::new("server")?;
        let service_ms = temp.write("service_ms", &SERVICE_MS.to_string())?;
        let uwsgi = Uwsgi::start_app(&App {
            text: include_str!("app.py"),
            env: vec![("APP_SERVICE_MS", service_ms.display().to_string())],
            workers: WORKERS,
            backlog,
            args: vec!["--disable-logging".to_owned()],
            before,
            output: None,
            log: None,
        })
        .context("start the service")?;
        Ok(Self {
            uwsgi,
            service_ms,
            _temp: temp,
        })
    }

    /// Changes the service time from the next request on.
    pub fn set_service_time(&self, ms: u32) -> Result<()> {
        // By rename: a worker must not read an empty file.
        let new = self.service_ms.with_extension("new");
        fs::write(&new, ms.to_string())?;
        fs::rename(&new, &self.service_ms).context("change the service time")
    }

    /// Requests that its workers have completed, by uWSGI's own count.
    pub fn requests(&self) -> Result<u64> {
        let stats = self.uwsgi.stats()?;
        let workers = stats["workers"].as_array().context("no list of workers")?;
        Ok(workers
            .iter()
            .filter_map(|worker| worker["requests"].as_u64())
            .sum())
    }
}

/// An agent that publishes in a directory of its own. It can be killed and started again.
pub struct Tailback {
    program: PathBuf,
    /// The last one is running, unless it was killed.
    agents: Vec<Agent>,
    config: PathBuf,
    run: PathBuf,
    services: Vec<String>,
    _temp: TempDir,
}

impl Tailback {
    /// Watches servers, given by name and port. `adapters` is the rest of the configuration: the sections below `[signal]`.
    pub fn start(program: &Path, services: &[(&str, u16)], adapters: &str) -> Result<Self> {
        let targets: String = services
            .iter()
            .map(|(name, port)| format!("[[target]]\nport = {port}\nservice_name = \"{name}\"\n"))
            .collect();
        let names: Vec<&str> = services.iter().map(|(name, _)| *name).collect();
        Self::start_with(program, &names, &targets, adapters)
    }

    /// Like [`Tailback::start`], with the `[[target]]` sections of these services.
    pub fn start_with(
        program: &Path,
        services: &[&str],
        targets: &str,
        adapters: &str,
    ) -> Result<Self> {
        let temp = TempDir::new("tailback")?;
        let run = temp.path().join("run");
        let text = format!(
            "{targets}[signal]\ndirectory = \"{}\"\n{adapters}",
            run.display()
        );
        let mut tailback = Self {
            program: program.to_owned(),
            agents: Vec::new(),
            config: temp.write("tailback.toml", &text)?,
            run,
            services: services.iter().map(|name| (*name).to_owned()).collect(),
            _temp: temp,
        };
        tailback.start_agent()?;
        Ok(tailback)
    }

    /// Starts the agent, and waits until it publishes.
    pub fn start_agent(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        command
            .args(["run", "--json", "--config"])
            .arg(&self.config);
        let agent = Agent::start(&mut command)?;
        for service in &self.services {
            wait::until("the page", DEADLINE, || {
                agent.process().check_running()?;
                Ok(self.page(service).pressure().alive.then_some(()))
            })?;
        }
        self.agents.push(agent);
        Ok(())
    }

    /// Kills the agent with SIGKILL. The adapter process survives it.
    pub fn kill_agent(&self) -> Result<()> {
        match self.agents.last() {
            Some(agent) => agent.process().signal(Signal::KILL),
            None => bail!("no agent to kill"),
        }
    }

    fn page(&self, service: &str) -> Page {
        Page::open(self.run.join(service).join("page"))
    }
}

impl Tailback {
    /// Pid of the adapter process, which outlives a killed agent for a while.
    fn adapter_process(&self) -> Result<Option<Pid>> {
        let mut stream = UnixStream::connect(self.run.join("adapters.sock"))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(b"\n")?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        let status: Value = serde_json::from_str(&reply)?;
        let pid = status["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok());
        Ok(pid.and_then(Pid::from_raw))
    }
}

impl Drop for Tailback {
    fn drop(&mut self) {
        // The agent first: it would start another adapter process.
        self.agents.clear();
        if let Ok(Some(pid)) = self.adapter_process() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
