//! A real Jaeger: one process, in-memory storage, read through its query API.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{http, ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout of each response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Path of the binary: `TAILBACK_JAEGER`, else on `PATH`, else the build of `cargo xtask setup`.
pub fn find() -> Option<PathBuf> {
    let built = || {
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
        Some(cache.join("tailback/bin/jaeger"))
    };
    env::var_os("TAILBACK_JAEGER")
        .map(PathBuf::from)
        .or_else(|| program::find(&["jaeger"]))
        .or_else(|| built().filter(|file| file.is_file()))
}

/// A running Jaeger that accepts spans and queries.
pub struct Jaeger {
    process: Process,
    ports: Ports,
    _temp: TempDir,
}

struct Ports {
    address: IpAddr,
    grpc: u16,
    http: u16,
    query: u16,
    query_grpc: u16,
}

impl Jaeger {
    pub fn start() -> Result<Self> {
        Self::start_on(None)
    }

    /// Like [`Jaeger::start`], at another address than that of the loopback device.
    pub fn start_at(address: IpAddr) -> Result<Self> {
        Self::start_with(address, None)
    }

    /// Like [`Jaeger::start`], with a fixed OTLP/HTTP port, for tests in which the collector starts late.
    pub fn start_on(otlp_http: Option<u16>) -> Result<Self> {
        Self::start_with(Ipv4Addr::LOCALHOST.into(), otlp_http)
    }

    fn start_with(address: IpAddr, otlp_http: Option<u16>) -> Result<Self> {
        let Some(program) = find() else {
            bail!("Jaeger is not installed: run `cargo xtask setup`");
        };
        let temp = TempDir::new("jaeger")?;
        let ports = Ports {
            address,
            grpc: ports::free()?,
            http: otlp_http.map_or_else(ports::free, Ok)?,
            query: ports::free()?,
            query_grpc: ports::free()?,
        };
        let config = temp.write("jaeger.yaml", &config(&ports))?;
        let process = Process::start("Jaeger", Command::new(program).arg("--config").arg(config))?;
        let jaeger = Self {
            process,
            ports,
            _temp: temp,
        };
        wait::until("a response from Jaeger", START_DEADLINE, || {
            jaeger.process.check_running()?;
            // The receivers start after the query service.
            let receives = std::net::TcpStream::connect(jaeger.at(jaeger.ports.http)).is_ok();
            Ok(jaeger.services().ok().filter(|_| receives))
        })?;
        Ok(jaeger)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ports.address, port)
    }

    /// `OTEL_EXPORTER_OTLP_ENDPOINT` for OTLP/HTTP.
    pub fn otlp_http(&self) -> String {
        format!("http://{}", self.at(self.ports.http))
    }

    /// `OTEL_EXPORTER_OTLP_ENDPOINT` for OTLP/gRPC.
    pub fn otlp_grpc(&self) -> String {
        format!("http://{}", self.at(self.ports.grpc))
    }

    /// Address of the query API.
    pub fn query(&self) -> SocketAddr {
        self.at(self.ports.query)
    }

    /// Names of all services that sent spans.
    pub fn services(&self) -> Result<Vec<String>> {
        let Some(found) = self.ask("/api/services")? else {
            return Ok(Vec::new());
        };
        let names = found.as_array().into_iter().flatten();
        Ok(names.filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// All traces with a span of `service`, in Jaeger's JSON: `traceID`, `spans`, `processes`.
    pub fn traces(&self, service: &str) -> Result<Vec<Value>> {
        let found = self.ask(&format!(
            "/api/traces?limit=1000&service={}",
            encoded(service)
        ))?;
        Ok(found
            .and_then(|found| found.as_array().cloned())
            .unwrap_or_default())
    }

    /// The trace with this id, if any.
    pub fn trace(&self, id: &str) -> Result<Option<Value>> {
        let found = self.ask(&format!("/api/traces/{id}"))?;
        Ok(found.and_then(|found| found.get(0).cloned()))
    }

    /// The `data` of a response.
    fn ask(&self, path: &str) -> Result<Option<Value>> {
        let response = http::get(self.query(), path, RESPONSE_TIMEOUT)?;
        if response.status == 404 {
            return Ok(None);
        }
        if response.status != 200 {
            let body = String::from_utf8_lossy(&response.body).into_owned();
            bail!("Jaeger responded {} to {path}: {body}", response.status);
        }
        let mut body: Value = serde_json::from_slice(&response.body)
            .with_context(|| format!("read Jaeger's response to {path}"))?;
        Ok(body
            .get_mut("data")
            .map(Value::take)
            .filter(|data| !data.is_null()))
    }
}

fn encoded(word: &str) -> String {
    word.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// The built-in all-in-one configuration with our ports, without batching and without unused listeners.
fn config(ports: &Ports) -> String {
    let Ports {
        address,
        grpc,
        http,
        query,
        query_grpc,
    } = ports;
    format!(
        "service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines:
    traces:
      receivers: [otlp]
      exporters: [jaeger_storage_exporter]
  telemetry:
    metrics:
      level: none
    logs:
      level: warn
extensions:
  jaeger_storage:
    backends:
      memory:
        memory:
          max_traces: 100000
  jaeger_query:
    storage:
      traces: memory
    http:
      endpoint: {address}:{query}
    grpc:
      endpoint: {address}:{query_grpc}
receivers:
  otlp:
    protocols:
      grpc:
        endpoint: {address}:{grpc}
      http:
        endpoint: {address}:{http}
exporters:
  jaeger_storage_exporter:
    trace_storage: memory
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    #[test]
    fn jaeger_starts_and_serves_its_query_api() {
        if find().is_none() {
            return skip(
                "jaeger_starts_and_serves_its_query_api",
                "Jaeger is not installed",
            );
        }
        let jaeger = Jaeger::start().unwrap();
        assert!(jaeger.services().unwrap().is_empty());
        assert!(jaeger.traces("nobody's shop").unwrap().is_empty());
        assert_eq!(
            jaeger.trace("00000000000000000000000000000001").unwrap(),
            None
        );
    }
}
