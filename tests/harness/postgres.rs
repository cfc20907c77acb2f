//! PostgreSQL with a temporary database.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::geteuid;

use crate::{ports, process::Process, program, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// User for PostgreSQL and PgBouncer, which both refuse to run as root.
const USER: &str = "postgres";

/// A running PostgreSQL that accepts connections. The database is removed on drop.
pub struct Postgres {
    process: Process,
    port: u16,
    _temp: TempDir,
}

impl Postgres {
    pub fn start() -> Result<Self> {
        let temp = TempDir::new("postgres")?;
        let data = temp.path().join("data");
        fs::create_dir(&data).with_context(|| format!("create {}", data.display()))?;
        give(&data)?;
        let initdb = as_user(&tool("initdb")?)?
            .args([
                "--no-sync",
                "--no-locale",
                "-E",
                "UTF8",
                "-A",
                "trust",
                "-U",
                USER,
                "-D",
            ])
            .arg(&data)
            .current_dir(temp.path())
            .output()
            .context("start initdb")?;
        ensure!(
            initdb.status.success(),
            "initdb: {}: {}",
            initdb.status,
            String::from_utf8_lossy(&initdb.stderr)
        );
        let port = ports::free()?;
        let mut command = as_user(&tool("postgres")?)?;
        command.arg("-D").arg(&data).args(["-k", ""]);
        // No fsync: the server must wait only for what a test plants.
        for setting in [
            "listen_addresses=127.0.0.1",
            &format!("port={port}"),
            "fsync=off",
            "autovacuum=off",
            "shared_buffers=16MB",
            "max_connections=60",
        ] {
            command.args(["-c", setting]);
        }
        let process = Process::start("PostgreSQL", command.current_dir(temp.path()))?;
        process.wait_line(
            "database system is ready to accept connections",
            START_DEADLINE,
        )?;
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

    /// Runs SQL commands in a new session.
    pub fn run(&self, sql: &str) -> Result<()> {
        sql_at(self.port, "postgres", sql)
    }
}

/// Runs SQL commands on the server or pooler at this port.
pub fn sql_at(port: u16, database: &str, sql: &str) -> Result<()> {
    let output = Command::new(program::need(&["psql"])?)
        .args(["-X", "-q", "-h", "127.0.0.1", "-U", USER])
        .args(["-p", &port.to_string(), "-d", database])
        .args(["-v", "ON_ERROR_STOP=1", "-c", sql])
        .output()
        .context("start psql")?;
    ensure!(
        output.status.success(),
        "psql -c {sql:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A command that runs a program as [`USER`]. It execs rather than forks, so that its pid is the server's.
pub(crate) fn as_user(program: &Path) -> Result<Command> {
    if !geteuid().is_root() {
        return Ok(Command::new(program));
    }
    let mut command = Command::new(program::need(&["setpriv"])?);
    command
        .args(["--reuid", USER, "--regid", USER, "--clear-groups", "--"])
        .arg(program);
    Ok(command)
}

/// Makes [`USER`] the owner of a path.
pub(crate) fn give(path: &Path) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let users = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    let ids = users.lines().find_map(|line| {
        let words: Vec<&str> = line.split(':').collect();
        (words.first() == Some(&USER))
            .then(|| Some((words.get(2)?.parse().ok()?, words.get(3)?.parse().ok()?)))?
    });
    let (user, group) = ids.with_context(|| format!("no such user: {USER}"))?;
    chown(path, Some(user), Some(group)).with_context(|| format!("chown {}", path.display()))
}

/// Path of a PostgreSQL program. Debian installs them per version, outside of `PATH`.
pub fn tool(name: &str) -> Result<PathBuf> {
    if let Some(path) = program::find(&[name]) {
        return Ok(path);
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let found = versions
        .flatten()
        .map(|version| version.path().join("bin").join(name))
        .filter(|path| path.is_file())
        .max();
    match found {
        Some(path) => Ok(path),
        None => bail!("{name} of PostgreSQL is not installed: run `cargo xtask setup`"),
    }
}
