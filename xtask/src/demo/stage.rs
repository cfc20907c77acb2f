//! A scene, and Tailback beside it.

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

const SOON: Duration = Duration::from_secs(10);

/// How an episode stands is told so often: a demo is short.
const CONFIG: &str = "[detect.all]\nrepeat_interval = \"1s\"\n";

/// All that runs. It ends with its owner.
pub struct Stage {
    /// Its program.
    tailback: PathBuf,
    pub agent: Agent,
    _config: TempDir,
    pub scene: Box<dyn Scene>,
}

impl Stage {
    pub fn set(tailback: &Path, scene: Box<dyn Scene>) -> Result<Self> {
        let folder = TempDir::new("demo")?;
        let config = folder.write("tailback.toml", CONFIG)?;
        let mut command = Command::new(tailback);
        command.args(["run", "--json", "--config"]).arg(config);
        command.args(scene.targets());
        let agent = Agent::start(&mut command)?;
        agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
        Ok(Self {
            tailback: tailback.to_owned(),
            agent,
            _config: folder,
            scene,
        })
    }

    /// Every queue, as `tailback sample` shows it.
    pub fn sample(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(&self.tailback);
        command
            .args(["sample", "--json"])
            .args(self.scene.targets());
        let mut sample = run_once(&mut command, SOON)?;
        sample.retain(|object| object["type"] == "queue");
        Ok(sample)
    }

    /// All are as alive as they should be.
    pub fn check(&self) -> Result<()> {
        let agent = self.agent.process();
        if let Some(end) = agent.ended()? {
            bail!("tailback ended with {end:?}:\n{}", errors_of(agent));
        }
        let processes = self.scene.processes();
        processes.into_iter().try_for_each(Process::check_running)
    }

    /// As a person would who asks why.
    pub fn diagnose(&self, time: &str) -> Result<Diagnosis> {
        let args = ["diagnose", "--for", time].map(str::to_owned);
        let args = [args.to_vec(), self.scene.targets()].concat();
        let mut command = Command::new(&self.tailback);
        let process = Process::start("tailback diagnose", command.args(&args))?;
        let command = format!("tailback {}", args.join(" "));
        Ok(Diagnosis { process, command })
    }
}

/// A `tailback diagnose` under way.
pub struct Diagnosis {
    process: Process,
    /// As one types it.
    pub command: String,
}

impl Diagnosis {
    pub fn is_done(&self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// Its lines.
    pub fn report(self) -> Result<Vec<String>> {
        let end = self.process.wait_end(SOON)?;
        if end != End::Code(0) {
            let errors = errors_of(&self.process);
            bail!("`{}` ended with {end:?}:\n{errors}", self.command);
        }
        let lines = self.process.lines();
        lines.wait_end(SOON)?;
        let mut lines = lines.all();
        lines.retain(|line| line.stream == Stream::Stdout);
        Ok(lines.into_iter().map(|line| line.text).collect())
    }
}

/// What it wrote to standard error.
pub fn errors_of(process: &Process) -> String {
    let errors =
        |line: &Line| (line.stream == Stream::Stderr).then(|| format!("    {}\n", line.text));
    process.lines().all().iter().filter_map(errors).collect()
}
