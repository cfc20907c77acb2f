//! The services under overload. Each one takes about 100 requests per second and leaves the CPUs mostly idle.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tailback_tests::{
    http,
    nginx::Nginx,
    ports,
    process::Process,
    program,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::{cargo, command::Cmd, tools};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
const BACKLOG: u32 = 128;

/// An overloaded service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Service {
    /// uWSGI workers that each wait 40 ms for PostgreSQL.
    UwsgiPostgresql,
    /// nginx in front of 2 uWSGI workers on one CPU, each computing for 10 ms.
    NginxUwsgi,
    /// net/http: takes every request immediately, and works on 4 at a time, for 40 ms each.
    GoNetHttp,
    /// One event loop, which each request blocks for 10 ms.
    NodeHttp,
    /// tower on tokio: takes every request immediately, and works on 4 at a time, for 40 ms each.
    RustTower,
    /// 4 threads, each of which accepts a connection and works for 40 ms.
    CThreads,
}

/// A running service.
pub struct Running {
    /// Where to send requests.
    pub address: SocketAddr,
    /// The port that the agent watches.
    pub port: u16,
    _parts: Parts,
}

enum Parts {
    Uwsgi { _uwsgi: Uwsgi },
    Proxied { _nginx: Nginx, _uwsgi: Uwsgi },
    Program { _process: Process },
}

/// How a service is started.
pub struct Start<'a> {
    pub workers: u32,
    /// The page that it reads, if any.
    pub page: Option<&'a Path>,
    pub postgres_port: Option<u16>,
    pub programs: &'a Programs,
}

impl Service {
    pub const ALL: [Self; 6] = [
        Self::UwsgiPostgresql,
        Self::NginxUwsgi,
        Self::GoNetHttp,
        Self::NodeHttp,
        Self::RustTower,
        Self::CThreads,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::UwsgiPostgresql => "uwsgi-postgresql",
            Self::NginxUwsgi => "nginx-uwsgi",
            Self::GoNetHttp => "go-net-http",
            Self::NodeHttp => "node-http",
            Self::RustTower => "rust-tower",
            Self::CThreads => "c-threads",
        }
    }

    /// Parts of `cargo xtask setup` that it consists of.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Self::UwsgiPostgresql => &["uWSGI", "PostgreSQL", "psycopg2"],
            Self::NginxUwsgi => &["uWSGI", "nginx"],
            Self::GoNetHttp => &["Go"],
            Self::NodeHttp => &["node"],
            Self::RustTower => &[],
            Self::CThreads => &["gcc"],
        }
    }

    /// Workers, unless the command line says otherwise.
    pub fn default_workers(self) -> u32 {
        match self {
            Self::NginxUwsgi => 2,
            Self::NodeHttp => 1,
            Self::UwsgiPostgresql | Self::GoNetHttp | Self::RustTower | Self::CThreads => 4,
        }
    }

    /// Approximate service time of a request while all workers are busy.
    pub fn service_time(self) -> Duration {
        match self {
            Self::NginxUwsgi => Duration::from_millis(20),
            Self::NodeHttp => Duration::from_millis(10),
            Self::UwsgiPostgresql | Self::GoNetHttp | Self::RustTower | Self::CThreads => {
                Duration::from_millis(40)
            }
        }
    }

    /// Target delay: half the service time, as the agent sets it.
    pub fn target_delay(self) -> Duration {
        self.service_time() / 2
    }

    /// How long a request may wait in HAProxy, as docs/guides/haproxy.md recommends: half the service time, or 60% of it for
    /// one or two workers, which would otherwise idle too often under random arrivals.
    pub fn proxy_queue_timeout(self, workers: u32) -> Duration {
        if workers <= 2 {
            self.service_time().mul_f64(0.6)
        } else {
            self.service_time() / 2
        }
    }

    /// Whether it needs CPU time, so that a neighbour slows it down.
    pub fn computes(self) -> bool {
        self == Self::NginxUwsgi
    }

    /// Whether it takes every request immediately, so that none waits where it could be rejected at dequeue.
    pub fn takes_all(self) -> bool {
        matches!(self, Self::GoNetHttp | Self::RustTower)
    }

    pub fn path(self) -> &'static str {
        match self {
            Self::NginxUwsgi => "/up",
            _ => "/",
        }
    }

    pub fn start(self, start: &Start<'_>) -> Result<Running> {
        let running = match self {
            Self::UwsgiPostgresql => {
                let uwsgi = uwsgi("sql", &[], start)?;
                Running {
                    address: uwsgi.address(),
                    port: uwsgi.port(),
                    _parts: Parts::Uwsgi { _uwsgi: uwsgi },
                }
            }
            Self::NginxUwsgi => {
                let uwsgi = uwsgi("compute", &["taskset", "-c", "1"], start)?;
                let nginx = Nginx::start_proxy(1, uwsgi.address())?;
                Running {
                    address: nginx.address(),
                    port: uwsgi.port(),
                    _parts: Parts::Proxied {
                        _nginx: nginx,
                        _uwsgi: uwsgi,
                    },
                }
            }
            Self::GoNetHttp | Self::NodeHttp | Self::RustTower | Self::CThreads => {
                self.start_program(start)?
            }
        };
        Ok(running)
    }

    /// All of them take the same arguments.
    fn start_program(self, start: &Start<'_>) -> Result<Running> {
        let port = ports::free()?;
        let words = start.programs.command(self)?;
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg(port.to_string())
            // Without a page, everything is admitted.
            .arg(start.page.unwrap_or(Path::new("/nonexistent")))
            .arg(start.workers.to_string())
            .arg(self.service_time().as_millis().to_string());
        let process = Process::start(self.name(), &mut command)?;
        let address = ports::local(port);
        wait::until("a response from the service", DEADLINE, || {
            process.check_running()?;
            Ok(http::get(address, "/", DEADLINE)
                .ok()
                .filter(|response| response.status == 200))
        })?;
        Ok(Running {
            address,
            port,
            _parts: Parts::Program { _process: process },
        })
    }
}

fn uwsgi(work: &str, before: &[&str], start: &Start<'_>) -> Result<Uwsgi> {
    let mut env = vec![("APP_WORK", work.to_owned())];
    if let Some(port) = start.postgres_port {
        env.push(("APP_SQL_PORT", port.to_string()));
    }
    if let Some(page) = start.page {
        env.push(("TAILBACK_PAGE", page.display().to_string()));
        env.push((
            "TAILBACK_READERS",
            readers().join("python").display().to_string(),
        ));
    }
    Uwsgi::start_app(&App {
        text: include_str!("services/app.py"),
        env,
        workers: start.workers,
        backlog: BACKLOG,
        args: vec!["--disable-logging".to_owned()],
        before: before.iter().map(|word| (*word).to_owned()).collect(),
        output: None,
        log: None,
    })
    .context("start the service")
}

fn readers() -> PathBuf {
    tools::root().join("deploy/readers")
}

/// The built programs of the services that are not scripts for a server.
pub struct Programs {
    temp: TempDir,
    built: Vec<(Service, Vec<PathBuf>)>,
}

impl Programs {
    pub fn build(services: impl IntoIterator<Item = Service>) -> Result<Self> {
        let mut programs = Self {
            temp: TempDir::new("overload-services")?,
            built: Vec::new(),
        };
        for service in services {
            let command = programs
                .build_one(service)
                .with_context(|| format!("build {}", service.name()))?;
            programs.built.push((service, command));
        }
        Ok(programs)
    }

    fn command(&self, service: Service) -> Result<&[PathBuf]> {
        match self.built.iter().find(|(built, _)| *built == service) {
            Some((_, words)) => Ok(words),
            None => bail!("{} has not been built", service.name()),
        }
    }

    fn build_one(&self, service: Service) -> Result<Vec<PathBuf>> {
        let program = self.temp.path().join(service.name());
        let words = match service {
            Service::UwsgiPostgresql | Service::NginxUwsgi => Vec::new(),
            Service::GoNetHttp => vec![self.go(program)?],
            Service::NodeHttp => {
                let script = self
                    .temp
                    .write("service.js", include_str!("services/http.js"))?;
                let reader = readers().join("node/tailback_page.js");
                vec![program::need(&["node"])?, script, reader]
            }
            Service::RustTower => vec![cargo::build(cargo::OVERLOAD_TOWER)?],
            Service::CThreads => {
                let source = self
                    .temp
                    .write("threads.c", include_str!("services/threads.c"))?;
                Cmd::new(program::need(&["gcc"])?)
                    .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"])
                    .arg("-I")
                    .arg(readers().join("c"))
                    .arg(source)
                    .arg("-o")
                    .arg(&program)
                    .output()?;
                vec![program]
            }
        };
        Ok(words)
    }

    /// A module that uses the reader as its documentation says.
    fn go(&self, program: PathBuf) -> Result<PathBuf> {
        let module = self.temp.path().join("go");
        fs::create_dir(&module).with_context(|| format!("create {}", module.display()))?;
        self.temp
            .write("go/main.go", include_str!("services/nethttp.go"))?;
        let text = format!(
            "module overload\n\ngo 1.21\n\nrequire tailback.dev/page v0.0.0\n\nreplace tailback.dev/page => {}\n",
            readers().join("go").display()
        );
        self.temp.write("go/go.mod", &text)?;
        Cmd::new(program::need(&["go"])?)
            .current_dir(module)
            .args(["build", "-o"])
            .arg(&program)
            .arg(".")
            .output()?;
        Ok(program)
    }
}
