//! Which host a request to the HTTP adapter may be for: the defence against DNS rebinding.
//!
//! A web page can let its own name resolve to 127.0.0.1. The browser then takes the adapter for the page's own server, and lets the
//! page read its responses. Such a request is for the page's name. So a request over loopback must be for a name that no one else
//! can resolve: an IP address, localhost, the name of this machine, or a configured name.
//!
//! Requests from elsewhere are checked only if names are configured. A Service, a load balancer or a Prometheus on another machine
//! uses any name that DNS has for this one, and an adapter that listens on such an address is open to that network.

use http::{Request, header::HOST, uri::Authority};
use tracing::debug;

use super::listen::Peer;
use crate::config::signal::{Http, Listen};

/// Paths that are not checked: what they reveal is not worth a health check that fails, and so takes a server out of use, for its
/// `Host`. Load balancers send the name of the service there.
const UNCHECKED: [&str; 3] = ["/ready", "/livez", "/readyz"];

/// The hosts that are allowed.
pub struct Hosts {
    configured: Vec<String>,
    /// The name of this machine, as in `/proc/sys/kernel/hostname`.
    machine: Option<String>,
    /// Requests of all peers are checked, not only of those on this machine.
    checks_all: bool,
}

impl Hosts {
    pub fn new(config: &Http, machine: Option<String>) -> Self {
        let is_loopback =
            matches!(config.listen, Listen::Tcp(at) if at.ip().to_canonical().is_loopback());
        Self {
            configured: config.allowed_hosts.clone(),
            machine,
            checks_all: is_loopback || !config.allowed_hosts.is_empty(),
        }
    }

    /// The host that the request is for, if it is not allowed.
    pub fn refused<T>(&self, peer: Peer, request: &Request<T>) -> Option<String> {
        let is_checked = match peer {
            Peer::Address(ip) => self.checks_all || ip.to_canonical().is_loopback(),
            // No browser connects to a unix socket for a web page.
            Peer::Process(_) => false,
        };
        if !is_checked || UNCHECKED.contains(&request.uri().path()) {
            return None;
        }
        // Health checkers that speak HTTP/1.0 may send none; browsers always do. Of several, each must be allowed.
        let headers = request.headers().get_all(HOST).into_iter();
        let sent = headers.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let in_target = request.uri().authority().map(Authority::to_string);
        let refused = sent.chain(in_target).find(|host| !self.allows(host));
        if let Some(host) = &refused {
            debug!(host, "request refused: its Host is not allowed");
        }
        refused
    }

    /// Whether `host`, with or without a port, is allowed. The port is not compared: it differs behind a forwarded port.
    fn allows(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else {
            return false;
        };
        let name = authority.host().to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let address = name
            .strip_prefix('[')
            .map_or(Some(name), |rest| rest.strip_suffix(']'));
        let is_address = address.is_some_and(|text| text.parse::<std::net::IpAddr>().is_ok());
        let is_machine = || {
            self.machine
                .as_ref()
                .is_some_and(|it| it.eq_ignore_ascii_case(name))
        };
        is_address
            || name == "localhost"
            || name.ends_with(".localhost")
            || is_machine()
            || self.configured.iter().any(|it| matches(it, name))
    }
}

/// Whether a configured name is this one or, if it begins with a dot, this one's domain.
fn matches(configured: &str, name: &str) -> bool {
    let configured = configured.to_ascii_lowercase();
    match configured.strip_prefix('.') {
        Some(domain) => name
            .strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
        None => name == configured,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: Peer = Peer::Address(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));

    fn hosts(listen: &str, names: &[&str]) -> Hosts {
        let config = Http {
            listen: listen.parse().unwrap(),
            allowed_hosts: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        Hosts::new(&config, Some("Node-7.example.com".to_owned()))
    }

    fn is_refused(hosts: &Hosts, peer: Peer, path: &str, host: &str) -> bool {
        let request = Request::get(path).header(HOST, host).body(()).unwrap();
        hosts.refused(peer, &request).is_some()
    }

    #[test]
    fn over_loopback_only_names_that_nobody_else_can_resolve_are_allowed() {
        let hosts = hosts("127.0.0.1:9400", &["tailback.example.com", ".lan.example"]);
        for allowed in [
            "localhost",
            "LOCALHOST:9400",
            "localhost.",
            "a.localhost:1",
            "127.0.0.1:9400",
            "127.0.0.2",
            "[::1]:9400",
            "[::1]",
            "10.0.0.7:9400",
            "[fd00::7]:80",
            "node-7.example.com:9400",
            "tailback.example.com",
            "Tailback.Example.com:443",
            "lan.example",
            "a.b.lan.example:80",
        ] {
            assert!(!is_refused(&hosts, LOOPBACK, "/live", allowed), "{allowed}");
        }
        for refused in [
            "evil.example",
            "evil.example:9400",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "notlocalhost",
            "a.tailback.example.com",
            "evillan.example",
            "tailback.example.com.evil.example",
            "",
            "a b",
            "[::1",
            "127.0.0.1@evil.example",
        ] {
            assert!(
                is_refused(&hosts, LOOPBACK, "/live", refused),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn every_path_with_data_is_checked_and_health_checks_are_not() {
        let hosts = hosts("[::1]:9400", &[]);
        for path in ["/", "/live", "/pressure", "/events", "/metrics", "/status"] {
            assert!(is_refused(&hosts, LOOPBACK, path, "shop"), "{path}");
        }
        for path in ["/ready", "/ready?target=shop", "/livez", "/readyz"] {
            assert!(!is_refused(&hosts, LOOPBACK, path, "shop"), "{path}");
        }
    }

    #[test]
    fn all_names_in_a_request_must_be_allowed_and_there_may_be_none() {
        let hosts = hosts("127.0.0.1:9400", &[]);
        let without = Request::get("/live").body(()).unwrap();
        assert_eq!(hosts.refused(LOOPBACK, &without), None);
        let two = Request::get("/live")
            .header(HOST, "localhost")
            .header(HOST, "evil.example");
        let two = two.body(()).unwrap();
        assert_eq!(
            hosts.refused(LOOPBACK, &two).as_deref(),
            Some("evil.example")
        );
        let absolute = Request::get("http://evil.example/live").header(HOST, "localhost");
        let absolute = absolute.body(()).unwrap();
        assert_eq!(
            hosts.refused(LOOPBACK, &absolute).as_deref(),
            Some("evil.example")
        );
    }

    /// A pod's address, a Service, a node's name: none is known to the adapter.
    #[test]
    fn requests_from_other_machines_may_be_for_any_name_unless_names_are_configured() {
        let (all, only) = (
            hosts("0.0.0.0:9400", &[]),
            hosts("[::]:9400", &["tailback"]),
        );
        let other = Peer::Address("10.0.0.9".parse().unwrap());
        let mapped = Peer::Address("::ffff:127.0.0.1".parse().unwrap());
        for host in ["tailback.monitoring.svc:9400", "10.0.0.7:9400", "node-9"] {
            assert!(!is_refused(&all, other, "/metrics", host), "{host}");
        }
        assert!(is_refused(&all, LOOPBACK, "/metrics", "node-9"));
        assert!(is_refused(&all, mapped, "/metrics", "node-9"));
        assert!(is_refused(&only, other, "/metrics", "node-9"));
        assert!(!is_refused(&only, other, "/metrics", "tailback:9400"));
        assert!(!is_refused(
            &only,
            Peer::Process(None),
            "/metrics",
            "node-9"
        ));
    }
}
