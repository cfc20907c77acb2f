//! Envoy's overload manager, and an Envoy that cannot read the file.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{agent, envoy::Envoy, needs, skip::skip, temp::TempDir, wait};

use crate::stage::{DEADLINE, Stage, jam};

/// Until an unread file is reported, it is replaced once without a change, and 15 s pass.
const UNREAD: Duration = Duration::from_secs(45);

fn start(file: &Path) -> Result<Envoy> {
    Envoy::start(|_| {
        format!(
            "overload_manager:
  refresh_interval: 0.25s
  resource_monitors:
  - name: envoy.resource_monitors.injected_resource
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig
      filename: {}
",
            file.display()
        )
    })
}

/// The pressure that Envoy knows, in percent.
fn wait_pressure(envoy: &Envoy, percent: u64) -> Result<()> {
    wait::until_ok(&format!("Envoy's pressure {percent}"), DEADLINE, || {
        let name = "overload.envoy.resource_monitors.injected_resource.pressure";
        let now = envoy.statistic(name)?;
        ensure!(now == percent, "it is {now}");
        Ok(())
    })
}

fn adapter(stage: &Stage) -> Result<Value> {
    let status = stage.status()?;
    let adapters = status["adapter_process"]["adapters"].as_array();
    let envoy = adapters
        .into_iter()
        .flatten()
        .find(|adapter| adapter["adapter"] == "envoy");
    Ok(envoy.context("no such adapter")?.clone())
}

#[test]
fn an_envoy_that_cannot_read_the_file_is_reported_and_follows_again_after_a_restart() -> Result<()>
{
    const TEST: &str =
        "an_envoy_that_cannot_read_the_file_is_reported_and_follows_again_after_a_restart";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    if tailback_tests::envoy::find().is_none() {
        skip(TEST, "Envoy is not installed");
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 101)?;
    let temp = TempDir::new("signal")?;
    let directory = temp.path().join("envoy");
    let file = directory.join("pressure");
    let more = format!(
        "ttl = \"5s\"\n[[signal.envoy]]\ntarget = \"shop\"\nfile = \"{}\"\n",
        file.display()
    );
    let stage = Stage::start_in(temp, service.address().port(), &more)?;
    let doctor = || -> Result<String> {
        let mut command = Command::new(agent::binary()?);
        let output = command
            .args(["doctor", "--config"])
            .arg(&stage.config)
            .output()?;
        Ok(String::from_utf8(output.stdout)?)
    };

    // The directory is missing.
    let missing = adapter(&stage)?;
    let failure = missing["failure"].as_str().unwrap_or_default();
    ensure!(
        failure.contains("cannot write") && failure.contains("No such file"),
        "{missing}"
    );
    ensure!(doctor()?.contains("cannot write"), "{}", doctor()?);
    fs::create_dir(&directory)?;
    wait::until("the file", DEADLINE, || Ok(file.exists().then_some(())))?;

    let envoy = start(&file)?;
    wait_pressure(&envoy, 95)?;
    wait::until_ok("a read", DEADLINE, || {
        let status = adapter(&stage)?;
        ensure!(
            status["reads"]["count"].as_u64() >= Some(1)
                && status["warnings"] == Value::Array(Vec::new())
                && status["failure"].is_null(),
            "{status}"
        );
        Ok(())
    })?;

    // Envoy watches the directory that it found, and keeps the value.
    fs::rename(&directory, directory.with_extension("old"))?;
    fs::create_dir(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    wait::until_ok("the warning", UNREAD, || {
        let status = adapter(&stage)?;
        ensure!(status["warnings"][0]["code"] == "file_not_read", "{status}");
        Ok(())
    })?;
    wait_pressure(&envoy, 95)?;
    let text = doctor()?;
    let closed = format!("other users may not enter {}", directory.display());
    ensure!(
        text.contains("nobody has read the file for") && text.contains(&closed),
        "{text}"
    );

    drop(envoy);
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
    let envoy = start(&file)?;
    wait_pressure(&envoy, 95)?;
    wait::until_ok("no warning", DEADLINE, || {
        let status = adapter(&stage)?;
        ensure!(status["warnings"] == Value::Array(Vec::new()), "{status}");
        Ok(())
    })?;
    stage.agent.process().signal(Signal::KILL)?;
    wait_pressure(&envoy, 0)
}
