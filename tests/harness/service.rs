//! Runs the test service `tailback-subject`, whose speed and number of processes a test controls.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{process::Process, temp::TempDir};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Backlog of a service that accepts nothing. The kernel lets one more connection wait.
const JAM_BACKLOG: u32 = 20;

/// A running service that listens.
pub struct Service {
    process: Process,
    address: SocketAddr,
}

impl Service {
    /// `command` runs the subject, directly or through a wrapper; `args` are the subject's arguments.
    pub fn start(command: &mut Command, args: &[&str]) -> Result<Self> {
        let process = Process::start("the service", command.args(args))?;
        let line = process.wait_line("listening ", START_DEADLINE)?;
        let address = line.text.trim_start_matches("listening ");
        let address = address
            .parse()
            .with_context(|| format!("parse the address {address:?}"))?;
        Ok(Self { process, address })
    }

    /// A service that accepts nothing, while this many connections wait: with 21, its accept queue is full. `command` is as for
    /// [`Service::start`].
    pub fn jammed(command: &mut Command, waiting: u32) -> Result<Self> {
        let (backlog, waiting) = (JAM_BACKLOG.to_string(), waiting.to_string());
        let listen = ["jam", "--listen", "127.0.0.1:0"];
        command.args(listen);
        Self::start(command, &["--backlog", &backlog, "--waiting", &waiting])
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Returns the process, to stop it and check its exit code.
    pub fn into_process(self) -> Process {
        self.process
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The service time per request, adjustable while the service runs.
pub struct Pace {
    directory: TempDir,
    file: PathBuf,
}

impl Pace {
    pub fn new(work: Duration) -> Result<Self> {
        let directory = TempDir::new("pace")?;
        let file = directory.path().join("ms");
        let pace = Self { directory, file };
        pace.set(work)?;
        Ok(pace)
    }

    /// Changes the service time from the next request on.
    pub fn set(&self, work: Duration) -> Result<()> {
        // Renamed into place, so that the service never reads a partial file.
        let ms = (work.as_secs_f64() * 1e3).to_string();
        let new = self.directory.write("ms.new", &ms)?;
        fs::rename(&new, &self.file).with_context(|| format!("write {}", self.file.display()))
    }

    /// Argument for `--pace`.
    pub fn file(&self) -> &Path {
        &self.file
    }
}
