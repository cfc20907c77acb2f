//! The Helm chart and the manifests for Kubernetes.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use tailback_tests::{agent, program, skip::skip, temp::TempDir};

/// What the manifest has before the objects of the chart.
const NAMESPACE: &str = "\
# One agent per node. This file is what the chart in ../chart renders with its default values, after the namespace.
#
# There is no public registry: push the archive of `cargo xtask image` to yours, and replace the name of the image. Or use the chart:
# docs/guides/kubernetes.md.
apiVersion: v1
kind: Namespace
metadata:
  name: tailback
  labels:
    pod-security.kubernetes.io/enforce: privileged
";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn helm(test: &str) -> Option<PathBuf> {
    let helm = env::var_os("TAILBACK_HELM").map(PathBuf::from);
    let helm = helm.or_else(|| program::find(&["helm"]));
    if helm.is_none() {
        skip(test, "helm is not installed");
    }
    helm
}

/// What the chart renders with these options; the error is Helm's.
fn render(helm: &Path, options: &[&str]) -> Result<String> {
    run(
        helm,
        &[
            &[
                "template",
                "tailback",
                "--kube-version=1.34.0",
                "--namespace=tailback",
            ],
            options,
        ]
        .concat(),
    )
}

fn run(helm: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(helm);
    command.args(arguments).arg(deploy().join("chart/tailback"));
    let output = command.output().context("start helm")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm {arguments:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The names of the kinds, in order.
fn kinds(manifest: &str) -> Vec<&str> {
    let kinds = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("kind: "));
    kinds.collect()
}

#[test]
fn the_chart_renders_the_manifest_and_checks_its_values() -> Result<()> {
    let Some(helm) = helm("the_chart_renders_the_manifest_and_checks_its_values") else {
        return Ok(());
    };
    run(&helm, &["lint", "--strict"])?;
    let rendered = render(&helm, &[])?;
    let own = rendered
        .lines()
        .filter(|line| !line.starts_with("# Source: "));
    let manifest = own.fold(NAMESPACE.to_owned(), |text, line| text + line + "\n");
    let file = deploy().join("kubernetes/tailback.yaml");
    if env::var_os("TAILBACK_BLESS").is_some() {
        fs::write(&file, &manifest)?;
    }
    let kept = fs::read_to_string(&file).context("read deploy/kubernetes/tailback.yaml")?;
    ensure!(
        kept == manifest,
        "deploy/kubernetes/tailback.yaml is not what the chart renders: run this test with TAILBACK_BLESS=1"
    );
    let expected = [
        "NetworkPolicy",
        "PriorityClass",
        "ServiceAccount",
        "ConfigMap",
        "DaemonSet",
    ];
    let found = kinds(&rendered);
    for kind in expected {
        ensure!(found.contains(&kind), "no {kind} in {found:?}");
    }
    // No access to the API.
    ensure!(found.len() == expected.len(), "{found:?}");

    let all = [
        "--set=podMonitor.enabled=true",
        "--set=prometheusRule.enabled=true",
        "--set=prometheusRule.runbookUrl=https://wiki.example/runbook",
        "--set=grafanaDashboard.enabled=true",
        "--set=openshift.securityContextConstraints=true",
        "--set=otlpEndpoint=http://collector:4318",
        "--set=extraCapabilities={NET_BIND_SERVICE}",
    ];
    let all = render(&helm, &all)?;
    for part in [
        "kind: PodMonitor",
        "kind: PrometheusRule",
        "runbook_url: https://wiki.example/runbook#tailbackqueuefull",
        "{{ $labels.service }} receives more work",
        "grafana_dashboard: \"1\"",
        "tailback.json: |\n    {\n      \"uid\": \"tailback\"",
        "kind: SecurityContextConstraints",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "- NET_BIND_SERVICE",
    ] {
        ensure!(all.contains(part), "no {part:?} in {all}");
    }
    for wrong in [
        "--set=port=70000",
        "--set=port=9401",
        "--set=image.pullPolicy=Sometimes",
        "--set=extraCapabilities={SYS_ADMIN}",
        "--set=hostDirectory=run",
        "--set=unknown=1",
    ] {
        ensure!(render(&helm, &[wrong]).is_err(), "{wrong} is accepted");
    }
    Ok(())
}

/// The text of `tailback.toml` in a manifest: a block that is indented by four.
fn config(manifest: &str) -> Result<String> {
    let start = "  tailback.toml: |\n";
    let (_, after) = manifest.split_once(start).context("no configuration")?;
    let block = after
        .lines()
        .take_while(|line| line.is_empty() || line.starts_with("    "));
    Ok(block.fold(String::new(), |text, line| text + line.trim() + "\n"))
}

#[test]
fn the_configurations_in_the_manifests_are_valid() -> Result<()> {
    for name in ["tailback.yaml", "sidecar.yaml"] {
        let manifest = fs::read_to_string(deploy().join("kubernetes").join(name))?;
        let directory = TempDir::new("manifest")?;
        let file = directory.write("tailback.toml", &config(&manifest)?)?;
        let mut command = Command::new(agent::binary()?);
        let output = command.args(["config", "check"]).arg(file).output()?;
        if !output.status.success() {
            bail!("{name}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}
