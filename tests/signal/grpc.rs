//! The gRPC adapters with their real consumers: gRPC's weighted round robin (ORCA) and KEDA's external scaler client.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tailback_tests::{needs, ports, process::Process, program, temp::TempDir, wait};

use crate::{
    readers::{go_program, run},
    stage::{DEADLINE, Stage, jam},
};

fn consumer(temp: &TempDir, name: &str) -> Result<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("signal/consumers");
    go_program(
        &directory,
        &format!("./cmd/{name}"),
        &temp.path().join(name),
    )
}

/// A gRPC server pinned to one CPU, behind an nginx that forwards ORCA load requests to the agent.
struct Backend {
    _server: Process,
    _nginx: Process,
    port: u16,
    front: SocketAddr,
    orca: u16,
    /// File with the service time of a call, ms.
    service_ms: PathBuf,
    _temp: TempDir,
}

impl Backend {
    fn start(program: &Path, cpu: usize) -> Result<Self> {
        let temp = TempDir::new("grpc")?;
        let service_ms = temp.write("service_ms", "4")?;
        let [port, front, orca] = [ports::free()?, ports::free()?, ports::free()?];
        let mut command = Command::new("taskset");
        command
            .args(["-c", &cpu.to_string()])
            .arg(program)
            .arg(format!("127.0.0.1:{port}"))
            .arg(&service_ms);
        let server = Process::start("server", command.env("GOMAXPROCS", "1"))?;
        let directory = temp.path().display();
        let config = format!(
            "daemon off;\nuser root;\npid {directory}/pid;\nerror_log stderr warn;\nevents {{}}\n\
             http {{\n access_log off;\n\
             client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;\n\
             uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;\n\
             upstream server {{ server 127.0.0.1:{port}; keepalive 64; }}\n\
             server {{\n listen 127.0.0.1:{front} http2;\n keepalive_requests 1000000;\n\
             location / {{ grpc_pass grpc://server; }}\n\
             location /xds.service.orca.v3.OpenRcaService/ {{ grpc_pass grpc://127.0.0.1:{orca}; }}\n }}\n}}\n"
        );
        let config = temp.write("nginx.conf", &config)?;
        let mut command = Command::new(program::need(&["nginx"])?);
        command.args(["-e", "stderr", "-p"]).arg(temp.path());
        let nginx = Process::start("nginx", command.arg("-c").arg(config))?;
        for port in [port, front] {
            wait::until("a listener", DEADLINE, || {
                server.check_running()?;
                nginx.check_running()?;
                Ok(TcpStream::connect(ports::local(port)).ok().map(drop))
            })?;
        }
        Ok(Self {
            _server: server,
            _nginx: nginx,
            port,
            front: ports::local(front),
            orca,
            service_ms,
            _temp: temp,
        })
    }

    fn set_service_time(&self, ms: u32) -> Result<()> {
        Ok(fs::write(&self.service_ms, ms.to_string())?)
    }
}

/// Share of each of two servers in the calls completed in the last second.
fn shares(client: &Process, of: &[&Backend; 2]) -> Result<[f64; 2]> {
    client.check_running()?;
    let lines = client.lines().all();
    let last = lines.iter().rfind(|line| line.text.starts_with('{'));
    let Some(last) = last else {
        return Ok([0.0, 0.0]);
    };
    let counts: Value = serde_json::from_str(&last.text)?;
    let count = |backend: &Backend| counts[backend.front.to_string()].as_f64().unwrap_or(0.0);
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
    let server = consumer(&temp, "server")?;
    let (a, b) = (Backend::start(&server, 0)?, Backend::start(&server, 1)?);
    let more = format!(
        "[[signal.orca]]\ntarget = \"shop\"\nlisten = \"127.0.0.1:{}\"\n\
         [[signal.orca]]\ntarget = \"other\"\nlisten = \"127.0.0.1:{}\"\n\
         [[target]]\nport = {}\nservice_name = \"other\"\n",
        a.orca, b.orca, b.port
    );
    let stage = Stage::start(a.port, &more)?;
    let mut command = Command::new(consumer(&temp, "balanced")?);
    command
        .arg("60")
        .args([a.front.to_string(), b.front.to_string()]);
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
    let scaler = consumer(&temp, "scaler")?;
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
