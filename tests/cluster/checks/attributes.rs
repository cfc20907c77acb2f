//! The names of pod and node on metrics and spans.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::wait;

use super::verdicts::name;
use crate::{
    config::NODE,
    stage::{DEADLINE, NAMESPACE, Stage},
};

pub fn on_spans_and_metrics(stage: &Stage) -> Result<()> {
    let agent = stage.wait_agent()?;
    for pod in ["throttled", "jammed", "healthy"] {
        let (_, metrics) = agent.get("/metrics")?;
        let labels = [
            ("k8s_namespace_name", NAMESPACE),
            ("k8s_pod_name", pod),
            ("k8s_container_name", "web"),
            ("k8s_node_name", NODE),
        ];
        let series = metrics.lines().find(|line| {
            line.starts_with("tailback_target_info{")
                && line.contains(&format!("k8s_pod_name=\"{pod}\""))
        });
        let series = series.with_context(|| format!("no series of {pod} in {metrics}"))?;
        for (label, value) in labels {
            ensure!(
                series.contains(&format!("{label}=\"{value}\"")),
                "no {label} in {series}"
            );
        }
    }
    for pod in ["throttled", "jammed"] {
        let resource = resource(stage, &name(pod))?;
        expect(&resource, pod, "web")?;
    }
    Ok(())
}

/// The attributes of a service's resource in the collector, when its first span has arrived.
pub fn resource(stage: &Stage, service: &str) -> Result<BTreeMap<String, Value>> {
    wait::until_ok("a span of the service", DEADLINE, || {
        let traces = stage.collector.traces(service)?;
        let services = traces
            .iter()
            .filter_map(|trace| trace["processes"].as_object());
        let of = services
            .flat_map(serde_json::Map::values)
            .find(|process| process["serviceName"] == service);
        let of = of.with_context(|| {
            format!(
                "no span of {service}, but of {:?}",
                stage.collector.services()
            )
        })?;
        let tags = of["tags"].as_array().context("no tags")?;
        let tag = |tag: &Value| Some((tag["key"].as_str()?.to_owned(), tag["value"].clone()));
        Ok(tags.iter().filter_map(tag).collect())
    })
}

/// Checks the names of pod and node. `container`: empty if it is not known.
pub fn expect(resource: &BTreeMap<String, Value>, pod: &str, container: &str) -> Result<()> {
    let expected = [
        ("k8s.pod.name", pod),
        ("k8s.node.name", NODE),
        ("k8s.container.name", container),
    ];
    for (key, value) in expected {
        let found = resource
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default();
        ensure!(
            found == value,
            "{key} is {found:?}, not {value:?}: {resource:?}"
        );
    }
    ensure!(resource.contains_key("k8s.namespace.name"), "{resource:?}");
    Ok(())
}
