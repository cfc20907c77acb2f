//! The servers of the overload benchmark: HAProxy in front of uWSGI with PostgreSQL, or in front of nginx and uWSGI.

use std::{net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use tailback_tests::{
    agent::Agent,
    http,
    nginx::Nginx,
    ports,
    postgres::Postgres,
    process::Process,
    program,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
    wait,
};

use crate::tools;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);
const BACKLOG: u32 = 128;
/// `maxconn` without tuning.
const UNTUNED_MAXCONN: u32 = 100;

/// The overloaded service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Workers that each wait 40 ms for PostgreSQL.
    Sql { workers: u32 },
    /// nginx in front of 2 workers on one CPU, each computing for 10 ms.
    Compute,
}

/// What sheds the excess load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Guard {
    #[value(name = "nothing")]
    Nobody,
    /// HAProxy, with limits tuned by hand for this service.
    Static,
    /// HAProxy, by the maxconn from Tailback's agent-check.
    Maxconn,
    /// HAProxy, by the weight from Tailback's agent-check.
    Weight,
    /// The service itself, by the admit ratio of its page.
    Share,
    /// The service itself, by the max queue wait of its page.
    Page,
}

impl Service {
    pub fn all(workers: u32) -> [Self; 2] {
        [Self::Sql { workers }, Self::Compute]
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Sql { .. } => "uwsgi-postgresql",
            Self::Compute => "nginx-uwsgi",
        }
    }

    pub fn workers(self) -> u32 {
        match self {
            Self::Sql { workers } => workers,
            Self::Compute => 2,
        }
    }

    /// Approximate service time of a request.
    pub fn service_time(self) -> Duration {
        match self {
            Self::Sql { .. } => Duration::from_millis(40),
            Self::Compute => Duration::from_millis(20),
        }
    }

    /// Target delay: half the service time, as the agent sets it.
    pub fn target_delay(self) -> Duration {
        self.service_time() / 2
    }
}

impl Guard {
    pub const ALL: [Self; 6] = [
        Self::Nobody,
        Self::Static,
        Self::Maxconn,
        Self::Weight,
        Self::Share,
        Self::Page,
    ];

    /// Whether Tailback controls the shedding.
    pub fn is_ours(self) -> bool {
        match self {
            Self::Nobody | Self::Static => false,
            Self::Maxconn | Self::Weight | Self::Share | Self::Page => true,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nothing",
            Self::Static => "static limit",
            Self::Maxconn => "Tailback, maxconn",
            Self::Weight => "Tailback, weight",
            Self::Share => "Tailback, admit ratio",
            Self::Page => "Tailback, max queue wait",
        }
    }
}

/// The running servers, with or without an agent.
pub struct Stage {
    pub front: SocketAddr,
    _haproxy: Process,
    _agent: Option<Agent>,
    _nginx: Option<Nginx>,
    _uwsgi: Uwsgi,
    _postgres: Option<Postgres>,
    _temp: TempDir,
}

impl Stage {
    pub fn start(service: Service, guard: Guard) -> Result<Self> {
        let temp = TempDir::new("overload")?;
        let run = temp.path().join("run");
        let postgres = match service {
            Service::Sql { .. } => Some(Postgres::start()?),
            Service::Compute => None,
        };
        let uwsgi = uwsgi(service, guard, postgres.as_ref(), &run.join("bench/page"))?;
        let nginx = match service {
            Service::Sql { .. } => None,
            Service::Compute => Some(Nginx::start_proxy(1, uwsgi.address())?),
        };
        let check = ports::free()?;
        let maxconn = match guard {
            Guard::Maxconn => format!("maxconn = {UNTUNED_MAXCONN}\n"),
            _ => String::new(),
        };
        let agent = if guard.is_ours() {
            let text = format!(
                "[[target]]\nport = {}\nservice_name = \"bench\"\n[signal]\ndirectory = \"{}\"\n\
                     [[signal.haproxy]]\ntarget = \"bench\"\nlisten = \"127.0.0.1:{check}\"\n{maxconn}",
                uwsgi.port(),
                run.display()
            );
            let config = temp.write("tailback.toml", &text)?;
            let mut command = Command::new(super::super::agent()?);
            let agent = Agent::start(command.args(["run", "--json", "--config"]).arg(config))?;
            wait::until("the page", DEADLINE, || {
                Ok(run.join("bench/page").exists().then_some(()))
            })?;
            Some(agent)
        } else {
            None
        };
        let before = nginx.as_ref().map_or(uwsgi.address(), Nginx::address);
        let front = ports::local(ports::free()?);
        let config = temp.write(
            "haproxy.cfg",
            &haproxy(service, guard, front, before, check),
        )?;
        let mut command = Command::new(program::need(&["haproxy"])?);
        let haproxy = Process::start("HAProxy", command.arg("-db").arg("-f").arg(config))?;
        let stage = Self {
            front,
            _haproxy: haproxy,
            _agent: agent,
            _nginx: nginx,
            _uwsgi: uwsgi,
            _postgres: postgres,
            _temp: temp,
        };
        wait::until("a response through HAProxy", DEADLINE, || {
            Ok(http::get(stage.front, service.path(), DEADLINE)
                .ok()
                .filter(|response| response.status == 200))
        })?;
        Ok(stage)
    }
}

impl Service {
    pub fn path(self) -> &'static str {
        match self {
            Self::Sql { .. } => "/",
            Self::Compute => "/up",
        }
    }
}

fn uwsgi(
    service: Service,
    guard: Guard,
    postgres: Option<&Postgres>,
    page: &Path,
) -> Result<Uwsgi> {
    let work = match service {
        Service::Sql { .. } => "sql",
        Service::Compute => "compute",
    };
    let mut env = vec![("APP_WORK", work.to_owned())];
    if let Some(postgres) = postgres {
        env.push(("APP_SQL_PORT", postgres.port().to_string()));
    }
    if let Guard::Share | Guard::Page = guard {
        let by = if guard == Guard::Page {
            "wait"
        } else {
            "admit_ratio"
        };
        env.push(("TAILBACK_BY", by.to_owned()));
        env.push(("TAILBACK_PAGE", page.display().to_string()));
        env.push((
            "TAILBACK_READERS",
            tools::root()
                .join("deploy/readers/python")
                .display()
                .to_string(),
        ));
    }
    let before = match service {
        Service::Sql { .. } => Vec::new(),
        Service::Compute => ["taskset", "-c", "1"].map(str::to_owned).to_vec(),
    };
    Uwsgi::start_app(&App {
        text: include_str!("app.py"),
        env,
        workers: service.workers(),
        backlog: BACKLOG,
        args: vec!["--disable-logging".to_owned()],
        before,
        output: None,
        log: None,
    })
    .context("start the service")
}

fn haproxy(
    service: Service,
    guard: Guard,
    front: SocketAddr,
    before: SocketAddr,
    check: u16,
) -> String {
    let agent_check =
        format!(" agent-check agent-addr 127.0.0.1 agent-port {check} agent-inter 100ms");
    let (mut deny, mut server, mut queue) = (String::new(), String::new(), String::new());
    match guard {
        Guard::Nobody | Guard::Share | Guard::Page => {}
        Guard::Static => {
            // One request per worker, plus as many as can wait for half the service time.
            let workers = service.workers();
            server = format!(" maxconn {}", workers + (workers / 2).max(1));
            queue = format!(" timeout queue {}ms\n", service.target_delay().as_millis());
        }
        Guard::Maxconn => {
            server = format!(" weight 100 maxconn {UNTUNED_MAXCONN}{agent_check}");
            queue = format!(" timeout queue {}ms\n", service.target_delay().as_millis());
        }
        Guard::Weight => {
            server = format!(" weight 100{agent_check}");
            // HAProxy rejects the excess: `weight` of 100 requests pass, evenly spaced. `proc.turn` accumulates the credit of
            // the next request.
            deny = " http-request set-var(txn.weight) srv_weight(back/one)\n \
                    http-request set-var(proc.turn) int(50) unless { var(proc.turn) -m found }\n \
                    http-request set-var(proc.turn) var(proc.turn),add(txn.weight)\n \
                    http-request deny deny_status 503 unless { var(proc.turn) -m int ge 100 }\n \
                    http-request set-var(proc.turn) var(proc.turn),mod(100)\n"
                .to_owned();
        }
    }
    format!(
        "global\n maxconn 4000\n nbthread 1\n\
         defaults\n mode http\n option http-server-close\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n{queue}\
         frontend front\n bind {front}\n default_backend back\n\
         backend back\n{deny} server one {before}{server}\n"
    )
}
