//! gunicorn with one process of many threads, and a WSGI application that shares a pool of PostgreSQL connections.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::DEADLINE;
use crate::{http, ports, postgres::Postgres, process::Process, python, temp::TempDir, wait};

/// A running gunicorn in front of PostgreSQL.
pub struct PooledApp {
    pub process: Process,
    pub postgres: Postgres,
    port: u16,
    _directory: TempDir,
}

impl PooledApp {
    /// Python modules that it needs.
    pub const MODULES: &[&str] = &["gunicorn", "psycopg_pool"];
    /// Path of a request that takes one connection for 20 ms.
    pub const PATH: &str = "/";
    /// Path of a request that does not give its connection back.
    pub const LEAK: &str = "/leak";
    /// Path of a request that takes a second connection while it holds the first.
    pub const TWICE: &str = "/twice";

    /// Starts both, with a pool of this many connections.
    pub fn start(pool: u32) -> Result<Self> {
        let postgres = Postgres::start()?;
        let directory = TempDir::new("pooled")?;
        directory.write("app.py", include_str!("apps/pooled.py"))?;
        let port = ports::free()?;
        let mut command = Command::new(python::with(Self::MODULES)?);
        command
            .args(["-m", "gunicorn", "--worker-class", "gthread"])
            .args(["--workers", "1", "--threads", "40", "--timeout", "300"])
            .args(["--bind", &format!("127.0.0.1:{port}"), "app:application"])
            .env("APP_SQL_PORT", postgres.port().to_string())
            .env("APP_POOL", pool.to_string())
            .current_dir(directory.path());
        let process = Process::start("gunicorn", &mut command)?;
        wait::until("a response from gunicorn", DEADLINE, || {
            process.check_running()?;
            Ok(http::get(ports::local(port), "/", DEADLINE).ok())
        })?;
        Ok(Self {
            process,
            postgres,
            port,
            _directory: directory,
        })
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }

    /// Kills the worker process. gunicorn starts a new one.
    pub fn restart_worker(&self) -> Result<()> {
        let pid = self.process.pid();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        for child in children.split_whitespace() {
            let child = child.parse::<i32>().ok().and_then(Pid::from_raw);
            kill_process(child.context("the pid of a worker")?, Signal::KILL)
                .context("kill the worker")?;
        }
        Ok(())
    }
}
