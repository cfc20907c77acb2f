//! MariaDB with a temporary database.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Its administrator, who needs no password over TCP here.
const USER: &str = "root";

/// A running MariaDB with a database named `shop`. It is removed on drop.
pub struct MariaDb {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl MariaDb {
    /// Starts it and runs this SQL.
    pub fn start(sql: &str) -> Result<Self> {
        let temp = TempDir::new("mariadb")?;
        let data = format!("--datadir={}", temp.path().join("data").display());
        let mut install = Command::new(program::need(&["mariadb-install-db"])?);
        let installed = install
            .args(["--no-defaults", "--user=root", "--skip-test-db", &data])
            .arg("--auth-root-authentication-method=normal")
            .output()
            .context("start mariadb-install-db")?;
        ensure!(
            installed.status.success(),
            "mariadb-install-db: {}",
            String::from_utf8_lossy(&installed.stderr)
        );
        let port = ports::free()?;
        let mut command = Command::new(program::need(&["mariadbd"])?);
        command
            .args(["--no-defaults", "--user=root", &data])
            .args(["--bind-address=127.0.0.1", &format!("--port={port}")])
            .arg(format!("--socket={}", temp.path().join("sock").display()))
            .arg(format!("--pid-file={}", temp.path().join("pid").display()))
            // No fsync: the server must wait only for what a test plants.
            .args([
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-flush-method=nosync",
            ]);
        let process = Process::start("MariaDB", &mut command)?;
        let this = Self {
            process,
            port,
            _temp: temp,
        };
        wait::until("MariaDB to answer", START_DEADLINE, || {
            this.process.check_running()?;
            Ok(this.run("SELECT 1").ok())
        })?;
        this.run(&format!("CREATE DATABASE shop; USE shop; {sql}"))?;
        Ok(this)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Runs SQL and waits for its end.
    pub fn run(&self, sql: &str) -> Result<()> {
        let output = self.client()?.args(["-e", sql]).output();
        let output = output.context("start mariadb")?;
        ensure!(
            output.status.success(),
            "mariadb: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Runs SQL in the database `shop`, in a session that ends on drop.
    pub fn session(&self, sql: &str) -> Result<Process> {
        let mut client = self.client()?;
        Process::start("mariadb", client.args(["--unbuffered", "shop", "-e", sql]))
    }

    fn client(&self) -> Result<Command> {
        let mut client = Command::new(program::need(&["mariadb"])?);
        client
            .args(["--no-defaults", "--host=127.0.0.1"])
            .args([&format!("--port={}", self.port), &format!("--user={USER}")]);
        Ok(client)
    }
}
