//! Checks of the configuration: the file, and the one that the running agent has in force.

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Check;
use crate::{
    adapters::agent::status,
    collect::unix_ns,
    config::{Config, signal::Signal},
    signal::directory::in_use,
    text::duration,
};

/// `config`: the file of `--config`, if given. `signal`: where the agent publishes.
pub(super) fn checks(config: Option<&Result<Config>>, signal: &Signal) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    if let Some(config) = config {
        checks.push(Check {
            name: "configuration file".into(),
            state: match config {
                Ok(_) => Ok("valid".to_owned()),
                Err(error) => Err(format!("{error:#}").replace('\n', " ")),
            },
            cost: "an agent does not start with it; a running one keeps the configuration that it has",
            remedy: "`tailback config check FILE` shows the line".into(),
            required: true,
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot connect to the agent")?;
    let status = runtime.block_on(status(&in_use(&signal.directory())));
    checks.extend(status.ok().and_then(|status| of_agent(&status["config"])));
    Ok(checks)
}

/// The configuration of the running agent; `None` if it has no file.
fn of_agent(config: &Value) -> Option<Check> {
    let file = config["file"].as_str()?;
    let waiting = config["needs_restart"].as_array();
    let waiting: Vec<&str> = waiting
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let state = match config["error"].as_str() {
        Some(error) => Err(format!("{file} was rejected: {error}")),
        None if !waiting.is_empty() => Err(format!(
            "{} of {file} takes effect only after a restart",
            waiting.join(", ")
        )),
        None => {
            let loaded = config["loaded_unix_ns"].as_u64().unwrap_or(0);
            let age = duration(unix_ns().saturating_sub(loaded));
            Ok(format!("{file}, loaded {age} ago"))
        }
    };
    Some(Check {
        name: "configuration in force".into(),
        state,
        cost: "the agent works with older settings than those of its file",
        remedy: if waiting.is_empty() || config["error"].is_string() {
            "fix the file: the agent loads it by itself; `tailback config check FILE` shows the line".into()
        } else {
            "restart the agent".into()
        },
        required: true,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rejected_file_and_a_needed_restart_fail() {
        let of = |more: Value| {
            let mut config = json!({"file": "/t.toml", "loaded_unix_ns": 1, "needs_restart": []});
            let Value::Object(more) = more else {
                panic!("{more}");
            };
            config.as_object_mut().unwrap().extend(more);
            of_agent(&config).unwrap()
        };
        assert!(of(json!({})).state.unwrap().starts_with("/t.toml, loaded "));
        let rejected = of(json!({"error": "line 3: no"}));
        assert_eq!(
            rejected.state.unwrap_err(),
            "/t.toml was rejected: line 3: no"
        );
        let waiting = of(json!({"needs_restart": ["otlp"]}));
        assert!(waiting.state.unwrap_err().contains("otlp"));
        assert_eq!(waiting.remedy, "restart the agent");
        // A restart would fail.
        let both = of(json!({"needs_restart": ["otlp"], "error": "line 3: no"}));
        assert!(both.remedy.starts_with("fix the file"));
        assert!(of_agent(&Value::Null).is_none());
    }
}
