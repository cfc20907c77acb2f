//! PgBouncer, a connection pooler for PostgreSQL.

use std::time::Duration;

use anyhow::Result;

use crate::{
    ports,
    postgres::{Postgres, as_user, give, sql_at},
    process::Process,
    program,
    temp::TempDir,
};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A running PgBouncer that accepts connections.
pub struct PgBouncer {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl PgBouncer {
    /// Starts it in front of `before` with at most `pool_size` connections to the server.
    pub fn start(before: &Postgres, pool_size: u32) -> Result<Self> {
        let temp = TempDir::new("pgbouncer")?;
        give(temp.path())?;
        let port = ports::free()?;
        let server = before.port();
        let config = temp.write(
            "pgbouncer.ini",
            &format!(
                "[databases]\npostgres = host=127.0.0.1 port={server} dbname=postgres user=postgres\n\
                 [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
                 auth_type = any\nadmin_users = postgres\npool_mode = transaction\n\
                 default_pool_size = {pool_size}\nmax_client_conn = 100\n\
                 ignore_startup_parameters = extra_float_digits\n"
            ),
        )?;
        let mut command = as_user(&program::need(&["pgbouncer"])?)?;
        let process = Process::start("PgBouncer", command.arg(config))?;
        process.wait_line("process up", START_DEADLINE)?;
        Ok(Self {
            process,
            port,
            _temp: temp,
        })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the pool size. Excess connections are closed when they are returned to the pool.
    pub fn set_pool_size(&self, size: u32) -> Result<()> {
        sql_at(
            self.port,
            "pgbouncer",
            &format!("SET default_pool_size = {size}"),
        )
    }
}
