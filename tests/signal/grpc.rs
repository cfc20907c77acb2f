//! The gRPC adapters with their real consumers: gRPC's weighted round robin (ORCA) and KEDA's external scaler client.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{
    grpc::{Backend, build},
    needs, ports,
    process::Process,
    temp::TempDir,
    wait,
};

use crate::{
    readers::run,
    stage::{DEADLINE, Stage, jam},
};

/// Share of each of two servers in the calls completed in the last second.
fn shares(client: &Process, of: &[&Backend; 2]) -> Result<[f64; 2]> {
    client.check_running()?;
    let lines = client.lines().all();
    let last = lines.iter().rfind(|line| line.text.starts_with('{'));
    let Some(last) = last else {
        return Ok([0.0, 0.0]);
    };
    let counts: Value = serde_json::from_str(&last.text)?;
    let count = |backend: &Backend| counts[backend.front().to_string()].as_f64().unwrap_or(0.0);
    let [a, b] = of.map(count);
    Ok([a, b].map(|count| count / (a + b).max(1.0)))
}

#[test]
fn grpc_weighted_round_robin_follows_the_load_and_forgets_it_when_the_agent_is_killed() -> Result<()>
{
    const TEST: &str =
        "grpc_weighted_round_robin_follows_the_load_and_forgets_it_when_the_agent_is_killed";
    if !needs::met(TEST, &["go", "nginx", "taskset"]) {
        return Ok(());
    }
    let temp = TempDir::new("consumers")?;
    let server = build(&temp, "server")?;
    let start = |cpu| Backend::start(&server, &["taskset", "-c", cpu].map(str::to_owned), 4);
    let (a, b) = (start("0")?, start("1")?);
    let more = format!(
        "[[signal.orca]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{}\"\n\
         [[signal.orca]]\ntarget = \"other\"\nlisten = \"127.0.0.1:{}\"\n\
         [[target]]\nport = {}\nservice_name = \"other\"\n",
        a.orca_port(),
        b.orca_port(),
        b.port()
    );
    let stage = Stage::start(a.port(), &more)?;
    let mut command = Command::new(build(&temp, "balanced")?);
    command
        .arg("60")
        .args([a.front().to_string(), b.front().to_string()]);
    let client = Process::start("balanced", &mut command)?;
    let both = [&a, &b];
    let shares = || shares(&client, &both);
    let adapter_reports = || -> Result<Vec<String>> {
        let status = stage.status()?;
        let adapters = status["adapter_process"]["adapters"]
            .as_array()
            .context("no list")?;
        Ok(adapters
            .iter()
            .map(|one| format!("{}: {}", one["target"], one["last_reply"]))
            .collect())
    };
    let until = |what: &str, is_it: &dyn Fn(f64) -> bool| -> Result<Duration> {
        let began = Instant::now();
        wait::until(what, DEADLINE, || Ok(is_it(shares()?[0]).then_some(()))).with_context(
            || {
                let lines = client.lines().all();
                let last: Vec<&str> = lines
                    .iter()
                    .rev()
                    .take(12)
                    .map(|line| &*line.text)
                    .collect();
                format!(
                    "client output, last line first: {last:#?}; adapters: {:#?}",
                    adapter_reports()
                )
            },
        )?;
        let took = began.elapsed();
        println!("{what}: after {took:.1?}, shares {:.2?}", shares()?);
        Ok(took)
    };
    until("equal shares", &|share| (0.3..0.7).contains(&share))?;
    let reports = || -> Result<Value> {
        let status = stage.status()?;
        let adapters = status["adapter_process"]["adapters"]
            .as_array()
            .context("no list")?;
        let orca = adapters.iter().find(|one| one["adapter"] == "orca");
        Ok(orca.context("no ORCA adapter")?.clone())
    };
    ensure!(
        reports()?["connections"].as_u64() >= Some(1),
        "{}",
        reports()?
    );

    // 15 times the service time: half of the calls would be 1.8 times the capacity of its CPU.
    a.set_service_time(60)?;
    let took = until("a smaller share of the slow server", &|share| share < 0.25)?;
    ensure!(took < stage.ttl()? + Duration::from_secs(9), "{took:?}");
    a.set_service_time(4)?;
    until("equal shares again", &|share| (0.35..0.65).contains(&share))?;

    a.set_service_time(60)?;
    until("a smaller share again", &|share| share < 0.25)?;
    a.set_service_time(4)?;
    stage.agent.process().signal(Signal::KILL)?;
    // The TTL, plus the client's own weight expiration, plus the second that it reports on.
    let took = until("equal shares without an agent", &|share| {
        (0.45..0.55).contains(&share)
    })?;
    ensure!(took < stage.ttl()? + Duration::from_secs(6), "{took:?}");
    let report = reports()?;
    ensure!(
        report["last_reply"] == "utilization 0.00 at 0/s",
        "report without an agent: {report}"
    );
    Ok(())
}

#[test]
fn keda_gets_the_load_and_no_value_where_it_is_unknown() -> Result<()> {
    const TEST: &str = "keda_gets_the_load_and_no_value_where_it_is_unknown";
    if !needs::met(TEST, &["go"]) {
        return Ok(());
    }
    let temp = TempDir::new("consumers")?;
    let scaler = build(&temp, "scaler")?;
    let port = ports::free()?;
    let service = jam("127.0.0.1:0", 20)?;
    // Long enough for a busy machine, and shorter than the deadline of the wait for its expiry.
    let more = format!("ttl = \"5s\"\n[signal.keda]\nlisten = \"127.0.0.1:{port}\"\n");
    let stage = Stage::start(service.address().port(), &more)?;
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.admit_ratio <= 0.05
    })?;
    let query = |metadata: &[&str]| -> Result<Value> {
        let mut command = Command::new(&scaler);
        let response = run(command.arg(format!("127.0.0.1:{port}")).args(metadata))?;
        serde_json::from_str(&response)
            .with_context(|| format!("parse the scaler's output {response:?}"))
    };
    let response = query(&["target=shop", "targetLoad=0.7"])?;
    ensure!(
        response["active"] == true && response["stream_active"] == true,
        "{response}"
    );
    let (spec, value) = (&response["spec"][0], &response["metrics"][0]);
    ensure!(
        spec["metricName"] == "tailback_load" && spec["targetSizeFloat"] == 0.7,
        "{response}"
    );
    // It accepts nothing: the load is capped at 2.
    ensure!(
        value["metricName"] == "tailback_load"
            && value["metricValueFloat"] == 2.0
            && value["metricValue"] == 2,
        "{response}"
    );
    ensure!(
        response["stream_spec"]
            .as_str()
            .is_some_and(|error| error.starts_with("Unimplemented")),
        "KEDA falls back to the spec where it is not streamed: {response}"
    );
    let response = query(&["target=shop", "metric=mean"])?;
    ensure!(
        response["metrics"][0]["metricValueFloat"] == 2.0,
        "{response}"
    );
    let response = query(&["target=shop", "activationLoad=2.5"])?;
    ensure!(response["active"] == false, "{response}");

    let code = |response: &Value, code: &str| {
        response["metrics"]
            .as_str()
            .is_some_and(|error| error.starts_with(code))
    };
    for (metadata, expected) in [
        (&["target=nobody"][..], "Unavailable"),
        (&[], "InvalidArgument"),
        (&["target=shop", "targetLoad=much"], "InvalidArgument"),
    ] {
        let response = query(metadata)?;
        ensure!(code(&response, expected), "{metadata:?}: {response}");
    }
    stage.agent.process().signal(Signal::KILL)?;
    wait::until("no value without an agent", DEADLINE, || {
        Ok(code(&query(&["target=shop"])?, "Unavailable").then_some(()))
    })
}
