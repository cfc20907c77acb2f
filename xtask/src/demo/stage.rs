//! A scene with Tailback beside it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, bail};
use serde_json::Value;
use tailback_tests::{
    agent::{Agent, run_once},
    lines::{Line, Stream},
    process::{End, Process},
    temp::TempDir,
};

use super::scene::Scene;

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(10);

/// Re-reports open episodes every second, because a demo is short.
const CONFIG: &str = "[detect.all]\nrepeat_interval = \"1s\"\n";

/// The scene and the agent, stopped on drop.
pub struct Stage {
    /// Path of the agent.
    tailback: PathBuf,
    pub agent: Agent,
    _config: TempDir,
    pub scene: Box<dyn Scene>,
}

impl Stage {
    pub fn set(tailback: &Path, scene: Box<dyn Scene>) -> Result<Self> {
        let directory = TempDir::new("demo")?;
        let config = directory.write("tailback.toml", CONFIG)?;
        let mut command = Command::new(tailback);
        command.args(["run", "--json", "--config"]).arg(config);
        command.args(scene.targets());
        let agent = Agent::start(&mut command)?;
        agent.wait_for("its target", DEADLINE, |event| event.is("target"))?;
        Ok(Self {
            tailback: tailback.to_owned(),
            agent,
            _config: directory,
            scene,
        })
    }

    /// All queues from `tailback sample`.
    pub fn sample(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(&self.tailback);
        command
            .args(["sample", "--json"])
            .args(self.scene.targets());
        let mut sample = run_once(&mut command, DEADLINE)?;
        sample.retain(|object| object["type"] == "queue");
        Ok(sample)
    }

    /// Checks that the agent and all processes of the scene are running.
    pub fn check(&self) -> Result<()> {
        let agent = self.agent.process();
        if let Some(end) = agent.ended()? {
            bail!("tailback ended with {end:?}:\n{}", errors_of(agent));
        }
        let processes = self.scene.processes();
        processes.into_iter().try_for_each(Process::check_running)
    }

    /// Starts `tailback diagnose`.
    pub fn diagnose(&self, time: &str) -> Result<Diagnosis> {
        let args = ["diagnose", "--for", time].map(str::to_owned);
        let args = [args.to_vec(), self.scene.targets()].concat();
        let mut command = Command::new(&self.tailback);
        let process = Process::start("tailback diagnose", command.args(&args))?;
        let command = format!("tailback {}", args.join(" "));
        Ok(Diagnosis { process, command })
    }
}

/// A running `tailback diagnose`.
pub struct Diagnosis {
    process: Process,
    /// Its command line.
    pub command: String,
}

impl Diagnosis {
    pub fn is_done(&self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// Waits for its end and returns its output lines.
    pub fn report(self) -> Result<Vec<String>> {
        let end = self.process.wait_end(DEADLINE)?;
        if end != End::Code(0) {
            let errors = errors_of(&self.process);
            bail!("`{}` ended with {end:?}:\n{errors}", self.command);
        }
        let lines = self.process.lines();
        lines.wait_end(DEADLINE)?;
        let mut lines = lines.all();
        lines.retain(|line| line.stream == Stream::Stdout);
        Ok(lines.into_iter().map(|line| line.text).collect())
    }
}

/// Standard error of a process.
pub fn errors_of(process: &Process) -> String {
    let errors =
        |line: &Line| (line.stream == Stream::Stderr).then(|| format!("    {}\n", line.text));
    process.lines().all().iter().filter_map(errors).collect()
}
