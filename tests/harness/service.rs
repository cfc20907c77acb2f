//! A service made for a test (`subject`): it serves as fast, and with as many processes, as the test wants.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{process::Process, temp::TempDir};

const START: Duration = Duration::from_secs(10);

/// Running, and listening.
pub struct Service {
    process: Process,
    address: SocketAddr,
}

impl Service {
    /// `command` runs the subject, on its own or within something; `args` are the subject's own.
    pub fn start(command: &mut Command, args: &[&str]) -> Result<Self> {
        let process = Process::start("the service", command.args(args))?;
        let line = process.wait_line("listening ", START)?;
        let address = line.text.trim_start_matches("listening ");
        let address = address
            .parse()
            .with_context(|| format!("read the address {address:?}"))?;
        Ok(Self { process, address })
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Gives it up for its process: to stop it and see how it ends.
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

/// How long a service works on each request, changed while it runs.
pub struct Pace {
    folder: TempDir,
    file: PathBuf,
}

impl Pace {
    pub fn new(work: Duration) -> Result<Self> {
        let folder = TempDir::new("pace")?;
        let file = folder.path().join("ms");
        let pace = Self { folder, file };
        pace.set(work)?;
        Ok(pace)
    }

    /// From the next request on.
    pub fn set(&self, work: Duration) -> Result<()> {
        // Renamed into place: the service never reads half of it.
        let ms = (work.as_secs_f64() * 1e3).to_string();
        let new = self.folder.write("ms.new", &ms)?;
        fs::rename(&new, &self.file).with_context(|| format!("write {}", self.file.display()))
    }

    /// For `--pace`.
    pub fn file(&self) -> &Path {
        &self.file
    }
}
