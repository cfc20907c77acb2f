//! gunicorn with one process of many threads, and a WSGI application that shares a pool of PostgreSQL connections.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::DEADLINE;
use crate::{
    ports,
    postgres::Postgres,
    process::{Process, children_of},
    python,
    temp::TempDir,
};

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
        process.wait_response(ports::local(port), DEADLINE)?;
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
        for worker in children_of(self.process.pid())? {
            let worker = Pid::from_raw(worker.cast_signed()).context("the pid of a worker")?;
            kill_process(worker, Signal::KILL).context("kill the worker")?;
        }
        Ok(())
    }
}
