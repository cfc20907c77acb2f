//! The software bill of materials: what the binary is built from, in CycloneDX (<https://cyclonedx.org/docs/1.5/json>).

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::crates::Crate;
use crate::command::Cmd;

const SPECIFICATION: &str = "1.5";

/// Describes the binary that is built from these crates. There is no serial number: it would be random.
pub fn json(crates: &BTreeMap<String, Crate>, epoch: &str) -> Result<String> {
    let key = format!("tailback@{}", env!("CARGO_PKG_VERSION"));
    let agent = crates
        .get(&key)
        .context("the agent is not among its crates")?;
    let time = Cmd::new("date").args([
        "--utc",
        "--date",
        &format!("@{epoch}"),
        "+%Y-%m-%dT%H:%M:%SZ",
    ]);
    let libraries = crates.iter().filter(|(other, _)| **other != key);
    let components: Vec<Value> = libraries
        .map(|(key, part)| component("library", key, part))
        .collect();
    let uses = |(key, part): (&String, &Crate)| json!({"ref": key, "dependsOn": part.uses});
    let sbom = json!({
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {
            "timestamp": time.output()?.trim(),
            "component": component("application", &key, agent),
        },
        "components": components,
        "dependencies": crates.iter().map(uses).collect::<Vec<_>>(),
    });
    Ok(format!("{sbom:#}\n"))
}

fn component(kind: &str, key: &str, part: &Crate) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": key,
        "name": part.name,
        "version": part.version,
        // Cargo's older separator is not SPDX.
        "licenses": [{"expression": part.licence.replace('/', " OR ")}],
        "purl": format!("pkg:cargo/{key}"),
    });
    if let Some(sha256) = &part.sha256 {
        component["hashes"] = json!([{"alg": "SHA-256", "content": sha256}]);
    }
    component
}
