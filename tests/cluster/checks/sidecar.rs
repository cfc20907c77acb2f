//! `deploy/kubernetes/sidecar.yaml` as it is, with a CPU limit for its service.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::wait;

use super::{
    attributes::{expect, resource},
    install::repository,
    verdicts::{Verdicts, check_throttled},
};
use crate::stage::{DEADLINE, POD_PROGRAM, Stage};

const NAMESPACE: &str = "beside";
/// As the manifest calls it.
const SERVICE: &str = "shop";
const SELECTOR: &str = "--selector=app=shop";

pub fn same_verdict(stage: &Stage) -> Result<()> {
    let file = repository().join("deploy/kubernetes/sidecar.yaml");
    let manifest = fs::read_to_string(file)?;
    let kubectl = |arguments: &[&str]| {
        stage
            .kubectl()
            .run(&[&["--namespace", NAMESPACE], arguments].concat())
    };
    stage.kubectl().run(&["create", "namespace", NAMESPACE])?;
    stage.wait_account(NAMESPACE)?;
    kubectl(&[
        "label",
        "namespace",
        NAMESPACE,
        "pod-security.kubernetes.io/enforce=privileged",
    ])?;
    let apply = ["--namespace", NAMESPACE, "apply", "--filename=-"];
    stage.kubectl().run_with_input(&apply, &manifest)?;
    // What the manifest leaves to the reader: the limit of the service, and the collector.
    let deployment = format!("deployment/{SERVICE}");
    kubectl(&[
        "set",
        "resources",
        &deployment,
        "--containers=shop",
        "--limits=cpu=200m",
        "--requests=cpu=10m",
    ])?;
    let endpoint = format!(
        "OTEL_EXPORTER_OTLP_ENDPOINT={}",
        stage.collector.otlp_http()
    );
    kubectl(&[
        "set",
        "env",
        &deployment,
        "--containers=tailback",
        &endpoint,
    ])?;
    let timeout = format!("--timeout={}s", DEADLINE.as_secs());
    kubectl(&["rollout", "status", &deployment, &timeout])?;
    let pod = wait::until_ok("one pod of the service", DEADLINE, || {
        let pods = kubectl(&["get", "pods", SELECTOR, "--output=name"])?;
        let mut names = pods
            .lines()
            .map(|line| line.trim_start_matches("pod/").to_owned());
        let name = names.next().context("none")?;
        ensure!(names.next().is_none(), "several: {pods}");
        Ok(name)
    })?;
    let address = stage.wait_pod(NAMESPACE, &pod)?;
    stage.load(address, 20.0)?;

    wait::until_ok(
        "the level of the page in the service's container",
        DEADLINE,
        || {
            let page = stage.kubectl().exec(
                NAMESPACE,
                &[&pod, "--container=shop"],
                &[POD_PROGRAM, "page", "/run/tailback/shop/page"],
            )?;
            let page: Value = serde_json::from_str(&page)?;
            ensure!(page["alive"] == true && page["level"] != "ok", "{page}");
            Ok(())
        },
    )?;
    let command = [
        "/usr/bin/tailback",
        "diagnose",
        "--for",
        "10s",
        "--json",
        "--port",
        "8080",
    ];
    let printed = stage
        .kubectl()
        .exec(NAMESPACE, &[&pod, "--container=tailback"], &command)?;
    let verdicts = Verdicts::read(&printed)?;
    let verdict = verdicts.only_accept()?;
    check_throttled("sidecar", verdict)?;

    let resource = resource(stage, SERVICE)?;
    expect(&resource, &pod, "")?;
    let namespace = resource["k8s.namespace.name"].as_str();
    ensure!(namespace == Some(NAMESPACE), "{resource:?}");
    kubectl(&["delete", "deployment,configmap", "--all", "--wait=true"])?;
    Ok(())
}
