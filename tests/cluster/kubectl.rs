//! Requests to the API server, by kubectl.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::cluster::output;

pub struct Kubectl {
    /// Directory with `kubectl`, for commands that are run by a shell.
    directory: PathBuf,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    /// `base`: directory with the kubeconfig files.
    pub fn new(program: &Path, base: &Path) -> Result<Self> {
        let directory = program.parent().context("a directory")?.to_owned();
        let cache = base.join("kubectl-cache");
        fs::create_dir(&cache).with_context(|| format!("create {}", cache.display()))?;
        Ok(Self {
            directory,
            kubeconfig: base.join("admin.kubeconfig"),
            cache,
        })
    }

    /// A command whose kubectl and helm are connected to the cluster.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("KUBECACHEDIR", &self.cache)
            .env("HELM_CACHE_HOME", &self.cache)
            .env("HELM_CONFIG_HOME", &self.cache)
            .env("HELM_DATA_HOME", &self.cache);
        command
    }

    /// `kubectl` itself.
    pub fn kubectl(&self) -> Command {
        self.command(self.directory.join("kubectl"))
    }

    /// Directory with `kubectl`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        output(self.kubectl().args(arguments))
    }

    /// Runs with this text on standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.kubectl();
        command.args(arguments).stdin(Stdio::piped());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("standard input")?;
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let (text, error) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        ensure!(
            output.status.success(),
            "kubectl {arguments:?}: {text}{error}"
        );
        Ok(text.into_owned())
    }

    /// An object, or a list of objects.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).context("read kubectl's JSON")
    }

    /// A field of an object, by its JSONPath.
    pub fn field(&self, arguments: &[&str], path: &str) -> Result<String> {
        let path = format!("--output=jsonpath={path}");
        self.run(&[&["get", &path], arguments].concat())
    }

    /// Runs a program in a container.
    pub fn exec(&self, namespace: &str, target: &[&str], command: &[&str]) -> Result<String> {
        let start = ["--namespace", namespace, "exec"];
        self.run(&[&start, target, &["--"], command].concat())
    }
}
