//! What the agents say of the services.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    cluster::output,
    stage::{NAMESPACE, Stage, host_agent},
};

const DIAGNOSE: [&str; 4] = ["diagnose", "--for", "10s", "--json"];

/// The verdicts of `diagnose --json` on the services of the namespace, by service.
pub struct Verdicts(BTreeMap<String, Vec<Value>>);

impl Verdicts {
    pub fn read(text: &str) -> Result<Self> {
        let mut of: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for line in text.lines() {
            let line: Value =
                serde_json::from_str(line).with_context(|| format!("read {line:?}"))?;
            if let (Some(target), true) = (line["target"].as_str(), line["cause"].is_string()) {
                of.entry(target.to_owned()).or_default().push(line);
            }
        }
        Ok(Self(of))
    }

    /// The verdict on a service's queue of connections.
    pub fn accept(&self, target: &str) -> Result<&Value> {
        let of = self.0.get(target);
        let of = of.with_context(|| format!("no verdict on {target}: {}", self.text()))?;
        let accept = of.iter().find(|verdict| verdict["kind"] == "accept");
        accept.with_context(|| format!("no verdict on the connections of {target}: {of:#?}"))
    }

    /// The verdict on the queue of connections of the only service.
    pub fn only_accept(&self) -> Result<&Value> {
        ensure!(self.0.len() == 1, "verdicts on: {}", self.text());
        let target = self.0.keys().next().context("no verdict")?;
        self.accept(target)
    }

    /// All causes of a service.
    pub fn causes(&self, target: &str) -> BTreeSet<&str> {
        let of = self.0.get(target).into_iter().flatten();
        of.filter_map(|verdict| verdict["cause"].as_str()).collect()
    }

    fn text(&self) -> String {
        let names = self
            .0
            .iter()
            .map(|(name, of)| format!("{name} ({})", of.len()));
        names.collect::<Vec<_>>().join(", ")
    }
}

/// The name of a service on the node.
pub fn name(pod: &str) -> String {
    format!("{NAMESPACE}/{pod}/web")
}

pub fn check_throttled(place: &str, verdict: &Value) -> Result<()> {
    let evidence = verdict["evidence"].as_str().unwrap_or_default();
    ensure!(verdict["cause"] == "cpu_throttled", "{place}: {verdict}");
    ensure!(verdict["confidence"] == "high", "{place}: {verdict}");
    ensure!(
        evidence.contains("its quota is 0.20 CPUs"),
        "{place}: {verdict}"
    );
    Ok(())
}

pub fn of_node(stage: &Stage) -> Result<()> {
    let node = Verdicts::read(&stage.tailback(&DIAGNOSE)?)?;
    let host = Verdicts::read(&output(host_agent()?.args(DIAGNOSE))?)?;
    for (place, verdicts) in [("node agent", &node), ("host", &host)] {
        check_throttled(place, verdicts.accept(&name("throttled"))?)?;

        let jammed = verdicts.accept(&name("jammed"))?;
        ensure!(jammed["cause"] == "downstream_slow", "{place}: {jammed}");
        let path = jammed["path"].as_array().context("no path")?;
        let leads_to_slow = path.iter().any(|hop| hop["target"] == name("slow"));
        ensure!(leads_to_slow, "{place}: {jammed}");

        let healthy = verdicts.causes(&name("healthy"));
        ensure!(healthy.is_empty(), "{place}: {healthy:?}");
    }
    for pod in ["throttled", "jammed"] {
        let (node, host) = (node.accept(&name(pod))?, host.accept(&name(pod))?);
        ensure!(
            node["cause"] == host["cause"] && node["confidence"] == host["confidence"],
            "{node} is not {host}"
        );
        eprintln!(
            "    {pod}: {}, confidence {}",
            node["cause"], node["confidence"]
        );
    }
    Ok(())
}
