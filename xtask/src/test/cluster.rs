//! `cargo xtask test --cluster`: Tailback in a real Kubernetes cluster of one node, which `tests/cluster` starts and checks.

use std::{
    env,
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{checked::Checked, cleanup};

use super::{Outcome, Tally};
use crate::{
    cargo,
    command::Cmd,
    image,
    setup::{self, Purpose, kubernetes},
    tools,
};

/// The image of the service in the pods, as `deploy/kubernetes/sidecar.yaml` names it.
const SERVICE_IMAGE: &str = "registry.example/shop:1";
const SANDBOX_IMAGE: &str = "localhost/pause:1";

/// Runs the checks whose names contain `filter`, or all.
pub fn run(filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "only root can start a cluster: run `sudo -E env \"PATH=$PATH\" cargo xtask test --cluster`"
    );
    std::fs::create_dir_all(kubernetes::directory())?;
    setup::ensure_all(Purpose::Cluster)?;
    let [agent, cluster, pod] = cargo::build_all([cargo::AGENT, cargo::CLUSTER, cargo::POD])?;
    let images = tools::root().join("target/cluster");
    let [of_agent, of_pod, of_sandbox] =
        ["agent", "pod", "pause"].map(|name| images.join(format!("{name}.oci.tar")));
    image::write(&agent, &of_agent)?;
    let command = ["compute", "15"];
    image::write_for_test(SERVICE_IMAGE, &pod, "usr/bin/pod", &command, &of_pod)?;
    let pause = kubernetes::pause_program();
    image::write_for_test(SANDBOX_IMAGE, &pause, "pause", &[], &of_sandbox)?;

    let definitions = kubernetes::DEFINITIONS
        .iter()
        .map(kubernetes::Definition::path);
    let helm = tools::helm().context("helm")?;
    let jaeger = tools::jaeger().context("jaeger")?;
    let run = Cmd::new(cluster)
        .current_dir(tools::root())
        .env("TAILBACK_BIN", &agent)
        .env("TAILBACK_IMAGE", &of_agent)
        .env("TAILBACK_POD_IMAGE", &of_pod)
        .env("TAILBACK_PAUSE_IMAGE", &of_sandbox)
        .env("TAILBACK_KUBERNETES", kubernetes::directory())
        .env("TAILBACK_CRDS", env::join_paths(definitions)?)
        .env("TAILBACK_HELM", &helm)
        .env("TAILBACK_JAEGER", &jaeger)
        .args(filter);
    watch(&run, tally)
}

/// Runs the program and records its checks.
fn watch(run: &Cmd, tally: &mut Tally) -> Result<()> {
    // What is left if the program itself is killed.
    cleanup::adopt_orphans();
    let mut child = run
        .command()
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{run}`"))?;
    let output = child.stdout.take().context("standard output")?;
    let mut checks = 0;
    for line in BufReader::new(output).lines() {
        let line = line.context("read the checks")?;
        let Some(checked) = Checked::from_json(&line) else {
            println!("{line}");
            continue;
        };
        checks += 1;
        let took = Duration::from_secs_f64(checked.took_s.max(0.0));
        let name = format!("cluster: {}", checked.name);
        let outcome = checked.failure.map_or(Outcome::Passed, Outcome::Failed);
        match &outcome {
            Outcome::Failed(why) => println!("test {name} ... FAILED: {why}"),
            _ => println!("test {name} ... ok ({:.1} s)", checked.took_s),
        }
        tally.record_timed(&name, outcome, Some(took));
    }
    let status = child.wait().context("wait for the cluster")?;
    ensure!(
        cleanup::end_descendants(),
        "processes of the cluster cannot be ended"
    );
    let is_explained = status.success() || !tally.is_green();
    ensure!(checks > 0 && is_explained, "`{run}` ended with {status}");
    Ok(())
}
