//! The running servers of a scenario: a proxy in front of a service, with or without an agent.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
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
    envoy::{self, CLUSTER, Endpoint, Envoy},
    http, ports,
    process::Process,
    program,
    temp::TempDir,
    wait,
};

use super::{
    run::Run,
    service::{Running, Service, Start},
    shedding::{POLL_INTERVAL, Proxy, Shedding},
};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
/// `maxconn` without tuning.
const UNTUNED_MAXCONN: u32 = 100;

/// The running servers, with or without an agent. Fields are dropped in this order.
pub struct Stage {
    /// The proxy's address.
    pub front: SocketAddr,
    pub service: Service,
    _front: Front,
    /// The last one is running, unless it was killed.
    agents: Vec<Agent>,
    agent: AgentSetup,
    _service: Running,
    _temp: TempDir,
}

/// The proxy in front of the service.
enum Front {
    Haproxy { _process: Process },
    Envoy { _envoy: Envoy },
}

/// How the agent is started.
struct AgentSetup {
    program: PathBuf,
    config: PathBuf,
    /// Where it publishes.
    directory: PathBuf,
}

impl Stage {
    pub fn start(run: &mut Run, service: Service, shedding: Shedding) -> Result<Self> {
        let temp = TempDir::new("overload")?;
        let directory = temp.path().join("run");
        let page = directory.join("bench/page");
        let running = service.start(&Start {
            workers: run.workers(service),
            page: shedding.reads_page.then_some(page.as_path()),
            postgres_port: run.postgres_port(service)?,
            programs: run.programs(),
        })?;
        let check = ports::free()?;
        let maxconn = match shedding.proxy {
            Proxy::Maxconn => format!("maxconn = {UNTUNED_MAXCONN}\n"),
            _ => String::new(),
        };
        let symlink_root = temp.path().join("envoy");
        let adapter = match shedding.proxy {
            Proxy::Envoy => format!(
                "[[signal.envoy]]\ntarget = \"bench\"\ncluster = \"{CLUSTER}\"\nsymlink_root = \"{}\"\n",
                symlink_root.display()
            ),
            _ => format!(
                "[[signal.haproxy]]\ntarget = \"bench\"\nlisten = \"127.0.0.1:{check}\"\n{maxconn}"
            ),
        };
        let text = format!(
            "[[target]]\nport = {}\nservice_name = \"bench\"\n[signal]\ndirectory = \"{}\"\n{adapter}",
            running.port,
            directory.display()
        );
        let agent = AgentSetup {
            program: run.agent().to_owned(),
            config: temp.write("tailback.toml", &text)?,
            directory,
        };
        let agents = if shedding.needs_agent() {
            vec![agent.start()?]
        } else {
            Vec::new()
        };
        let (front, proxy) = if shedding.proxy == Proxy::Envoy {
            let endpoint = Endpoint {
                server: running.address,
                health_port: None,
            };
            let envoy =
                Envoy::start(|front| envoy::forward(front, &[endpoint], Some(&symlink_root)))?;
            (envoy.address(), Front::Envoy { _envoy: envoy })
        } else {
            let front = ports::local(ports::free()?);
            let config = Config {
                service,
                workers: run.workers(service),
                proxy: shedding.proxy,
                front,
                server: running.address,
                check,
            };
            let config = temp.write("haproxy.cfg", &config.text())?;
            let mut command = Command::new(program::need(&["haproxy"])?);
            let process = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
            (front, Front::Haproxy { _process: process })
        };
        let stage = Self {
            front,
            service,
            _front: proxy,
            agents,
            agent,
            _service: running,
            _temp: temp,
        };
        wait::until("a response through the proxy", DEADLINE, || {
            Ok(http::get(stage.front, service.path(), DEADLINE)
                .ok()
                .filter(|response| response.status == 200))
        })?;
        Ok(stage)
    }

    /// Kills the agent with SIGKILL. The adapter process survives it.
    pub fn kill_agent(&mut self) -> Result<()> {
        match self.agents.last() {
            Some(agent) => agent.process().signal(Signal::KILL),
            None => bail!("no agent to kill"),
        }
    }

    /// Starts an agent and waits for its page.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agents.push(self.agent.start()?);
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.agents.is_empty() {
            return;
        }
        // It would outlive the agent for a while, to report that there is no pressure.
        if let Ok(pid) = adapter_process(&self.agent.directory) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl AgentSetup {
    /// Starts it and waits until its page is alive.
    fn start(&self) -> Result<Agent> {
        let mut command = Command::new(&self.program);
        let agent = Agent::start(
            command
                .args(["run", "--json", "--config"])
                .arg(&self.config),
        )?;
        let page = Page::open(self.directory.join("bench/page"));
        wait::until("the page", DEADLINE, || {
            agent.process().check_running()?;
            Ok(page.pressure().alive.then_some(()))
        })?;
        Ok(agent)
    }
}

/// Pid of the process that serves the adapters, from its status socket.
fn adapter_process(directory: &Path) -> Result<Pid> {
    let mut stream = UnixStream::connect(directory.join("adapters.sock"))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"status\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status: Value = serde_json::from_str(&text)?;
    let pid = status["pid"].as_i64().context("the status has no pid")?;
    Pid::from_raw(i32::try_from(pid)?).context("the status has an invalid pid")
}

/// HAProxy's configuration.
struct Config {
    service: Service,
    workers: u32,
    proxy: Proxy,
    front: SocketAddr,
    server: SocketAddr,
    /// Port of the agent-check.
    check: u16,
}

impl Config {
    fn text(&self) -> String {
        let agent_check = format!(
            " agent-check agent-addr 127.0.0.1 agent-port {} agent-inter {}ms agent-send \"weight=100\\n\"",
            self.check,
            POLL_INTERVAL.as_millis()
        );
        let timeout = format!(
            " timeout queue {}ms\n",
            self.service.proxy_queue_timeout(self.workers).as_millis()
        );
        let (mut server, mut queue) = (String::new(), String::new());
        match self.proxy {
            Proxy::Forward | Proxy::Envoy => {}
            Proxy::Static => {
                // One request per worker, plus as many as can wait for half the service time.
                let limit = self.workers + (self.workers / 2).max(1);
                server = format!(" maxconn {limit}");
                queue = timeout;
            }
            Proxy::Maxconn => {
                server = format!(" weight 100 maxconn {UNTUNED_MAXCONN}{agent_check}");
                queue = timeout;
            }
        }
        format!(
            "global\n maxconn 4000\n nbthread 1\n\
             defaults\n mode http\n option http-server-close\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n{queue}\
             frontend front\n bind {}\n default_backend back\n \
             http-request set-header X-Request-Start t=%[date(0,us)]\n\
             backend back\n server one {}{server}\n",
            self.front, self.server
        )
    }
}
