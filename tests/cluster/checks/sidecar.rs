//! `deploy/kubernetes/sidecar.yaml` as it is, with a CPU limit for its service, and as the guide says that it can be changed.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
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
    let kubectl = |arguments: &[&str]| {
        stage
            .kubectl()
            .run(&[&["--namespace", NAMESPACE], arguments].concat())
    };
    prepare(stage, NAMESPACE)?;
    let apply = ["--namespace", NAMESPACE, "apply", "--filename=-"];
    stage.kubectl().run_with_input(&apply, &manifest()?)?;
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
    kubectl(&["delete", "deployment", "--all", "--wait=true"]).map(drop)
}

fn manifest() -> Result<String> {
    let file = repository().join("deploy/kubernetes/sidecar.yaml");
    fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

/// Creates a namespace that admits the agent.
fn prepare(stage: &Stage, namespace: &str) -> Result<()> {
    let kubectl = stage.kubectl();
    kubectl.run(&["create", "namespace", namespace])?;
    let label = "pod-security.kubernetes.io/enforce=privileged";
    kubectl.run(&["label", "namespace", namespace, label])?;
    stage.wait_account(namespace)
}

/// The specification of the manifest's pods. Its configuration is created in the namespace.
fn specification(stage: &Stage, namespace: &str) -> Result<Value> {
    prepare(stage, namespace)?;
    let read = ["apply", "--dry-run=client", "--output=json", "--filename=-"];
    let printed = stage.kubectl().run_with_input(&read, &manifest()?)?;
    let list: Value = serde_json::from_str(&printed).context("read the objects")?;
    let object = |kind: &str| {
        let mut items = list["items"].as_array().into_iter().flatten();
        let found = items.find(|object| object["kind"] == kind);
        found
            .cloned()
            .with_context(|| format!("no {kind} in {printed}"))
    };
    let mut config = object("ConfigMap")?;
    config["metadata"] = json!({"name": config["metadata"]["name"]});
    create(stage, namespace, &config)?;
    Ok(object("Deployment")?["spec"]["template"]["spec"].clone())
}

fn create(stage: &Stage, namespace: &str, object: &Value) -> Result<()> {
    let create = ["--namespace", namespace, "create", "--filename=-"];
    let created = stage.kubectl().run_with_input(&create, &object.to_string());
    created.map(drop)
}

/// A Job completes although the agent beside its container would run on. As the manifest's user, and as root, as its comment says.
pub fn ends_with_its_job(stage: &Stage) -> Result<()> {
    let namespace = "once";
    let mut pod = specification(stage, namespace)?;
    pod["restartPolicy"] = "Never".into();
    pod["containers"][0]["args"] = json!(["page", "/run/tailback/shop/page"]);
    for name in ["as-user", "as-root"] {
        if name == "as-root" {
            let context = &mut pod["initContainers"][0]["securityContext"];
            context["runAsUser"] = 0.into();
            context["runAsNonRoot"] = false.into();
            context["allowPrivilegeEscalation"] = false.into();
            let added = context["capabilities"]["add"].as_array_mut();
            added
                .context("no capabilities")?
                .extend([json!("SETUID"), json!("KILL")]);
        }
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}},
        });
        create(stage, namespace, &job)?;
        let timeout = format!("--timeout={}s", DEADLINE.as_secs());
        let job = format!("job/{name}");
        let complete = ["--namespace", namespace, "wait", "--for=condition=complete"];
        stage
            .kubectl()
            .run(&[&complete[..], &[&job, &timeout]].concat())?;
    }
    Ok(())
}
