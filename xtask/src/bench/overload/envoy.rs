//! Envoy's configuration: a listener that forwards everything to one cluster.

use std::{net::SocketAddr, path::Path};

use tailback_tests::envoy::socket_address;

/// The resource monitor that reads Tailback's file.
const MONITOR: &str = "envoy.resource_monitors.injected_resource";
/// The cluster's name.
pub const CLUSTER: &str = "back";

/// An endpoint of the cluster.
pub struct Endpoint {
    pub server: SocketAddr,
    /// Port of active health checks, on the same address; `None`: no check.
    pub health_port: Option<u16>,
}

/// The configuration. `pressure`: the file by which the overload manager rejects requests.
pub fn config(front: SocketAddr, endpoints: &[Endpoint], pressure: Option<&Path>) -> String {
    let overload = pressure.map_or_else(String::new, overload_manager);
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
    // One request per connection: uWSGI closes the connection after its response, and says nothing of that in it. No delayed
    // close: by default Envoy closes a client's connection up to a second after the response, and the load waits for that.
    format!(
        "{overload}static_resources:
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
              routes: [{{match: {{prefix: /}}, route: {{cluster: {CLUSTER}, timeout: 30s}}}}]
  clusters:
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
{all}",
        socket_address(front)
    )
}

/// `no_traffic_interval` is 60 s by default, and holds for the first check of a cluster.
const HEALTH_CHECKS: &str = "    health_checks:
    - {timeout: 1s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, healthy_threshold: 1, http_health_check: {path: /ready}}
";

/// Rejects the share of requests that the file says.
fn overload_manager(pressure: &Path) -> String {
    let trigger =
        format!("{{name: {MONITOR}, scaled: {{scaling_threshold: 0, saturation_threshold: 1}}}}");
    format!(
        "overload_manager:
  refresh_interval: 0.1s
  resource_monitors:
  - name: {MONITOR}
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig
      filename: {}
  actions:
  - {{name: envoy.overload_actions.stop_accepting_requests, triggers: [{trigger}]}}
",
        pressure.display()
    )
}
