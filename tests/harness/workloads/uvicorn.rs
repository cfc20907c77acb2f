//! uvicorn with one ASGI application.

use std::process::Command;

use anyhow::Result;

use super::DEADLINE;
use crate::{ports, process::Process, python, temp::TempDir};

/// A running uvicorn that serves requests.
pub struct Uvicorn {
    pub process: Process,
    pub port: u16,
    _directory: TempDir,
}

impl Uvicorn {
    pub fn start(name: &str, text: &str, env: &[(&str, String)]) -> Result<Self> {
        Self::start_within(&[], name, text, env)
    }

    /// Like [`Uvicorn::start`], with a command prefix.
    pub fn start_within(
        before: &[String],
        name: &str,
        text: &str,
        env: &[(&str, String)],
    ) -> Result<Self> {
        let directory = TempDir::new(name)?;
        directory.write("app.py", text)?;
        let port = ports::free()?;
        let python = python::with(&["uvicorn"])?.display().to_string();
        let mut words = before.iter().chain([&python]);
        let mut command = Command::new(words.next().unwrap_or(&python));
        command
            .args(words)
            .args(["-m", "uvicorn", "--no-access-log", "--loop", "asyncio"])
            .args(["--timeout-keep-alive", "75"])
            .args(["--port", &port.to_string(), "app:application"])
            .envs(env.iter().map(|(key, value)| (key, value)))
            .current_dir(directory.path());
        let process = Process::start(name, &mut command)?;
        process.wait_response(ports::local(port), DEADLINE)?;
        Ok(Self {
            process,
            port,
            _directory: directory,
        })
    }
}
