//! The manifests of `deploy/`, and what the chart renders with all options, as the API server validates them.

use std::{env, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::install::{CHART, helm, repository};
use crate::{
    cluster::output,
    stage::{DEADLINE, Stage},
};

/// Values that add every optional object.
const ALL_OBJECTS: [&str; 4] = [
    "--set=podMonitor.enabled=true",
    "--set=prometheusRule.enabled=true",
    "--set=grafanaDashboard.enabled=true",
    "--set=openshift.securityContextConstraints=true",
];

pub fn are_accepted(stage: &Stage) -> Result<()> {
    // A dry run creates no namespace for the objects that follow it.
    stage.kubectl().run(&["create", "namespace", "tailback"])?;
    let accepted = check(stage);
    stage.kubectl().run(&["delete", "namespace", "tailback"])?;
    accepted
}

/// Version of the API server.
fn version(stage: &Stage) -> Result<String> {
    let text = stage.kubectl().run(&["get", "--raw", "/version"])?;
    let version: serde_json::Value = serde_json::from_str(&text)?;
    Ok(version["gitVersion"]
        .as_str()
        .context("no version")?
        .to_owned())
}

fn check(stage: &Stage) -> Result<()> {
    // Definitions of KEDA, the Prometheus operator and OpenShift.
    let definitions = env::var_os("TAILBACK_CRDS").context("TAILBACK_CRDS is not set")?;
    for file in env::split_paths(&definitions) {
        let file = file.display().to_string();
        // Some are too large for the annotation of a client-side apply.
        stage
            .kubectl()
            .run(&["create", "--filename", &file])
            .with_context(|| format!("create {file}"))?;
    }
    let timeout = format!("--timeout={}s", DEADLINE.as_secs());
    stage.kubectl().run(&[
        "wait",
        "--for=condition=Established",
        "customresourcedefinitions",
        "--all",
        &timeout,
    ])?;
    let dry_run = |name: &str, text: &str| -> Result<()> {
        let arguments = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "--validate=strict",
            "--filename=-",
        ];
        let applied = stage
            .kubectl()
            .run_with_input(&arguments, text)
            .with_context(|| name.to_owned())?;
        let objects = text
            .lines()
            .filter(|line| line.starts_with("kind: "))
            .count();
        let accepted = applied
            .lines()
            .filter(|line| line.contains("(server dry run)"))
            .count();
        ensure!(
            objects > 0 && accepted == objects,
            "{name}: {accepted} of {objects} objects: {applied}"
        );
        eprintln!("    {name}: {objects} objects");
        Ok(())
    };
    let directory = repository().join("deploy/kubernetes");
    for entry in fs::read_dir(&directory)? {
        let file = entry?.path();
        let name = file.file_name().map(Path::new).context("a name")?;
        dry_run(&name.display().to_string(), &fs::read_to_string(&file)?)?;
    }
    let mut command = stage.kubectl().command(helm()?);
    command.args(["template", "tailback", CHART, "--namespace=tailback"]);
    // Helm does not ask the API server for its version here.
    command.args(["--kube-version", &version(stage)?]);
    command.args(ALL_OBJECTS).current_dir(repository());
    let rendered = output(&mut command)?;
    dry_run("the chart with all objects", &rendered)
}
