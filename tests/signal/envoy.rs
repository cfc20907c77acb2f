//! Envoy's circuit breakers, which take the concurrency limit from a disk layer, and an Envoy that cannot read the layer.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    agent::{self, Agent},
    envoy::{self, CLUSTER, Endpoint, Envoy},
    load::{Load, Plan, Spacing},
    needs,
    skip::skip,
    temp::TempDir,
    wait,
};

use crate::{
    adapters::shop,
    stage::{DEADLINE, Stage},
};

/// Until an unread layer is reported, it is replaced once without a change, and 15 s pass.
const UNREAD: Duration = Duration::from_secs(45);
/// The threshold of the cluster itself.
const UNLIMITED: u64 = 10_000;
/// Four times what two workers can do at 0.4 s each.
const OVERLOAD_PER_S: f64 = 20.0;
/// Until the adapter has replaced the layer after a change of the page, and Envoy has read it: 0.3 s, and the pauses of a busy
/// machine.
const FOLLOW: Duration = Duration::from_secs(5);

fn is_possible(test: &str) -> bool {
    if !needs::met(test, &["uwsgi-core"]) {
        return false;
    }
    if envoy::find().is_none() {
        skip(test, "Envoy is not installed");
        return false;
    }
    true
}

fn start(server: SocketAddr, symlink_root: &Path) -> Result<Envoy> {
    let endpoint = Endpoint {
        server,
        health_port: None,
    };
    Envoy::start(|front| envoy::forward(front, &[endpoint], Some(symlink_root)))
}

fn adapter_config(symlink_root: &Path) -> String {
    format!(
        "[[signal.envoy]]\ntarget = \"shop\"\ncluster = \"{CLUSTER}\"\nsymlink_root = \"{}\"\n",
        symlink_root.display()
    )
}

fn overload(to: SocketAddr) -> Result<Load> {
    Load::start(Plan {
        to,
        path: "/".to_owned(),
        per_s: OVERLOAD_PER_S,
        spacing: Spacing::Even,
        duration: Duration::from_secs(180),
        timeout: Duration::from_secs(20),
        max_in_flight: 500,
    })
}

/// Waits until Envoy has the threshold that the concurrency limit of two workers allows, or its own.
fn wait_limited(envoy: &Envoy, is_limited: bool) -> Result<()> {
    let what = if is_limited { "a limit" } else { "no limit" };
    wait::until_ok(&format!("{what} in Envoy"), DEADLINE, || {
        let connections = envoy.threshold(CLUSTER, "max_connections")?;
        let waiting = envoy.threshold(CLUSTER, "max_pending_requests")?;
        let requests = envoy.threshold(CLUSTER, "max_requests")?;
        let all = (connections, waiting, requests);
        if is_limited {
            // Between two samples it may be raised by one.
            ensure!((1..=4).contains(&connections), "{all:?}");
            ensure!(
                waiting == connections.div_ceil(2) && requests == 2 * connections,
                "{all:?}"
            );
        } else {
            ensure!(all == (UNLIMITED, UNLIMITED, UNLIMITED), "{all:?}");
        }
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
fn envoy_holds_the_concurrency_limit_and_drops_it_when_the_agent_hangs_or_is_killed() -> Result<()>
{
    const TEST: &str =
        "envoy_holds_the_concurrency_limit_and_drops_it_when_the_agent_hangs_or_is_killed";
    if !is_possible(TEST) {
        return Ok(());
    }
    let temp = TempDir::new("signal")?;
    let slow = temp.path().join("slow");
    let layer = temp.path().join("layer");
    let service = shop(&slow)?;
    // Envoy starts without the layer.
    let envoy = start(service.address(), &layer)?;
    wait_limited(&envoy, false)?;
    let stage = Stage::start_in(temp, service.port(), &adapter_config(&layer))?;
    let load = overload(envoy.address())?;
    wait::until_ok("a first read", DEADLINE, || {
        let status = adapter(&stage)?;
        let is_read = status["reads"]["count"].as_u64() >= Some(1);
        ensure!(is_read && status["last_reply"] == "no limit", "{status}");
        Ok(())
    })?;
    wait_limited(&envoy, false)?;

    fs::write(&slow, "")?;
    wait_limited(&envoy, true)?;
    let reply = adapter(&stage)?["last_reply"].clone();
    ensure!(
        reply
            .as_str()
            .is_some_and(|reply| reply.starts_with("limit ")),
        "{reply}"
    );
    // Envoy itself rejects the excess, so that no more than the limit is in the service once the first backlog is served.
    let statistic = |name: &str| envoy.statistic(&format!("cluster.{CLUSTER}.{name}"));
    wait::until_ok("Envoy to hold the limit", DEADLINE, || {
        let limit = envoy.threshold(CLUSTER, "max_connections")?;
        let connections = statistic("upstream_cx_active")?;
        let rejected = statistic("upstream_rq_pending_overflow")?;
        ensure!(
            connections <= limit && rejected > 20,
            "{connections} connections of {limit}, {rejected} rejected"
        );
        Ok(())
    })?;
    wait_limited(&envoy, true)?;

    stage.agent.process().freeze()?;
    let frozen = Instant::now();
    wait_limited(&envoy, false)?;
    let took = frozen.elapsed();
    println!("no limit {took:?} after the agent was stopped");
    ensure!(took < stage.ttl()? + FOLLOW, "{took:?}");
    stage.agent.process().thaw()?;
    wait_limited(&envoy, true)?;

    stage.agent.process().signal(Signal::KILL)?;
    let killed = Instant::now();
    wait_limited(&envoy, false)?;
    let took = killed.elapsed();
    println!("no limit {took:?} after the agent was killed");
    ensure!(took < stage.ttl()? + FOLLOW, "{took:?}");

    // A new agent and its adapter process take over, until the overload ends.
    let config = stage.config.clone();
    let agent = Agent::run([Path::new("--config"), &config])?;
    wait_limited(&envoy, true)?;
    fs::remove_file(&slow)?;
    wait_limited(&envoy, false)?;
    load.stop()?;
    drop(agent);
    Ok(())
}

#[test]
fn an_envoy_that_cannot_read_the_layer_is_reported_and_follows_again_after_a_restart() -> Result<()>
{
    const TEST: &str =
        "an_envoy_that_cannot_read_the_layer_is_reported_and_follows_again_after_a_restart";
    if !is_possible(TEST) {
        return Ok(());
    }
    let temp = TempDir::new("signal")?;
    let slow = temp.write("slow", "")?;
    let directory = temp.path().join("envoy");
    let layer = directory.join("shop");
    let service = shop(&slow)?;
    let more = format!("ttl = \"5s\"\n{}", adapter_config(&layer));
    let stage = Stage::start_in(temp, service.port(), &more)?;
    let doctor = || -> Result<String> {
        let mut command = Command::new(agent::binary()?);
        let output = command
            .args(["doctor", "--config"])
            .arg(&stage.config)
            .output()?;
        Ok(String::from_utf8(output.stdout)?)
    };

    // The directory is missing.
    wait::until_ok("the failure", DEADLINE, || {
        let missing = adapter(&stage)?;
        let failure = missing["failure"].as_str().unwrap_or_default();
        ensure!(
            failure.contains("cannot write") && failure.contains("No such file"),
            "{missing}"
        );
        Ok(())
    })?;
    ensure!(doctor()?.contains("cannot write"), "{}", doctor()?);
    fs::create_dir(&directory)?;
    wait::until("the layer", DEADLINE, || Ok(layer.exists().then_some(())))?;

    // The load does not pass through Envoy, so the limit stays whether or not Envoy holds it.
    let load = overload(service.address())?;
    let envoy = start(service.address(), &layer)?;
    wait_limited(&envoy, true)?;
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

    // Envoy watches the directory that it found, and keeps the limit.
    fs::rename(&directory, directory.with_extension("old"))?;
    fs::create_dir(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    wait::until_ok("the warning", UNREAD, || {
        let status = adapter(&stage)?;
        ensure!(
            status["warnings"][0]["code"] == "layer_not_read",
            "{status}"
        );
        Ok(())
    })?;
    wait_limited(&envoy, true)?;
    let text = doctor()?;
    let closed = format!("other users cannot enter {}", directory.display());
    ensure!(
        text.contains("nobody has read the layer for") && text.contains(&closed),
        "{text}"
    );

    drop(envoy);
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
    let envoy = start(service.address(), &layer)?;
    wait_limited(&envoy, true)?;
    wait::until_ok("no warning", DEADLINE, || {
        let status = adapter(&stage)?;
        ensure!(status["warnings"] == Value::Array(Vec::new()), "{status}");
        Ok(())
    })?;
    stage.agent.process().signal(Signal::KILL)?;
    wait_limited(&envoy, false)?;
    load.stop()?;
    Ok(())
}
