//! nginx: serving a static file, also over TLS, as a reverse proxy or a cache, or with a request rate limit. It also exposes its own
//! request count.

use std::{net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};

use crate::{certificate::certify, http, ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Role besides serving files.
#[derive(Clone, Copy)]
enum Role {
    Files,
    Proxy(SocketAddr),
    Limiter(Limit),
    /// Serves files; each worker has a listening socket of its own.
    Sockets,
    /// Serves files, over TLS on a second port.
    Tls(u16),
    /// Reverse proxy that caches each response for a second. Concurrent misses are not coalesced.
    Cache(SocketAddr),
}

/// Rate limit (`limit_req`): requests above the rate are delayed inside nginx.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub per_s: u32,
    /// Maximum delayed requests; further ones are rejected.
    pub burst: u32,
}

/// A running nginx that responds.
pub struct Nginx {
    process: Process,
    port: u16,
    temp: TempDir,
}

impl Nginx {
    pub fn start(workers: u32) -> Result<Self> {
        Self::start_with(workers, |_| ())
    }

    /// `change` may wrap or extend the command line, for example to pin it to a CPU.
    pub fn start_with(workers: u32, change: impl FnOnce(&mut Vec<String>)) -> Result<Self> {
        Self::start_as(Role::Files, "127.0.0.1", workers, change)
    }

    /// Starts a reverse proxy: `/up` is forwarded to `upstream`.
    pub fn start_proxy(workers: u32, upstream: SocketAddr) -> Result<Self> {
        Self::start_as(Role::Proxy(upstream), "127.0.0.1", workers, |_| ())
    }

    /// Starts a server with one rate limit for all clients together.
    pub fn start_limited(workers: u32, limit: Limit) -> Result<Self> {
        Self::start_as(Role::Limiter(limit), "127.0.0.1", workers, |_| ())
    }

    /// Each worker has a listening socket of its own (SO_REUSEPORT).
    pub fn start_with_sockets(workers: u32) -> Result<Self> {
        Self::start_as(Role::Sockets, "127.0.0.1", workers, |_| ())
    }

    /// Serves files over TLS on this port as well, with an RSA key of 4,096 bits: a full handshake costs milliseconds.
    pub fn start_tls(port: u16, change: impl FnOnce(&mut Vec<String>)) -> Result<Self> {
        Self::start_as(Role::Tls(port), "127.0.0.1", 1, change)
    }

    /// Starts a cache in front of `upstream`.
    pub fn start_cache(upstream: SocketAddr) -> Result<Self> {
        Self::start_as(Role::Cache(upstream), "127.0.0.1", 1, |_| ())
    }

    /// Listens on all addresses of its network namespace.
    pub fn start_everywhere(workers: u32) -> Result<Self> {
        Self::start_as(Role::Files, "0.0.0.0", workers, |_| ())
    }

    fn start_as(
        role: Role,
        on: &str,
        workers: u32,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<Self> {
        let program = program::need(&["nginx"])?;
        let temp = TempDir::new("nginx")?;
        let port = ports::free()?;
        temp.write("index.html", &"<p>All is well.</p>\n".repeat(50))?;
        if let Role::Tls(_) = role {
            certify(temp.path(), 4_096)?;
        }
        let config = temp.write(
            "nginx.conf",
            &config(temp.path(), &format!("{on}:{port}"), workers, role),
        )?;
        let mut words = vec![program.display().to_string()];
        words.extend(
            [
                "-p",
                &temp.path().display().to_string(),
                "-e",
                "stderr",
                "-c",
            ]
            .map(str::to_owned),
        );
        words.push(config.display().to_string());
        change(&mut words);
        let process = Process::start("nginx", Command::new(&words[0]).args(&words[1..]))?;
        let nginx = Self {
            process,
            port,
            temp,
        };
        wait::until("a response from nginx", START_DEADLINE, || {
            nginx.process.check_running()?;
            Ok(nginx.requests().ok())
        })?;
        Ok(nginx)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }

    /// Adds a file of this size.
    pub fn file(&self, name: &str, bytes: usize) -> Result<()> {
        self.temp.write(name, &"x".repeat(bytes)).map(drop)
    }

    /// Requests served, from its own status page.
    pub fn requests(&self) -> Result<u64> {
        let response = http::get(self.address(), "/status", START_DEADLINE)?;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        // server accepts handled requests
        //  1 1 17
        let counts = text.lines().nth(2).unwrap_or_default();
        match (response.status, counts.split_whitespace().nth(2)) {
            (200, Some(requests)) => requests
                .parse()
                .with_context(|| format!("read nginx's status {text:?}")),
            (status, _) => bail!("nginx's status page responded {status}: {text:?}"),
        }
    }
}

fn config(directory: &Path, listen: &str, workers: u32, role: Role) -> String {
    let (before, location) = match role {
        Role::Files | Role::Sockets | Role::Tls(_) => Default::default(),
        Role::Proxy(upstream) => (
            format!("upstream behind {{ server {upstream}; keepalive 64; }}"),
            "location /up { proxy_pass http://behind; proxy_http_version 1.1; \
             proxy_set_header Connection \"\"; }"
                .to_owned(),
        ),
        Role::Limiter(Limit { per_s, burst }) => (
            format!("limit_req_zone $server_name zone=all:1m rate={per_s}r/s;"),
            format!("location / {{ limit_req zone=all burst={burst}; }}"),
        ),
        Role::Cache(upstream) => (
            format!(
                "proxy_cache_path {} keys_zone=all:1m;",
                directory.join("cache").display()
            ),
            format!(
                "location / {{ proxy_pass http://{upstream}; proxy_cache all; proxy_cache_valid 1s; }}"
            ),
        ),
    };
    let tls = match role {
        Role::Tls(port) => format!(
            "listen 127.0.0.1:{port} ssl backlog=511; ssl_certificate {0}/cert.pem; ssl_certificate_key {0}/key.pem;",
            directory.display()
        ),
        _ => String::new(),
    };
    let sockets = match role {
        Role::Sockets => " reuseport backlog=64",
        _ => "",
    };
    let directory = directory.display();
    // Started as root, its workers would switch to a user who may not read the directory.
    let user = if rustix::process::geteuid().is_root() {
        "user root;"
    } else {
        ""
    };
    format!(
        "daemon off;
{user}
worker_processes {workers};
pid {directory}/pid;
error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {before}
    server {{
        listen {listen}{sockets};
        {tls}
        server_name tailback;
        root {directory};
        location = /status {{ stub_status; }}
        {location}
    }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    #[test]
    fn nginx_serves_its_file_and_counts_requests() {
        if let Err(missing) = program::need(&["nginx"]) {
            return skip(
                "nginx_serves_its_file_and_counts_requests",
                &missing.to_string(),
            );
        }
        let nginx = Nginx::start(1).unwrap();
        let before = nginx.requests().unwrap();
        let response = http::get(nginx.address(), "/", START_DEADLINE).unwrap();
        assert_eq!((response.status, response.body.len()), (200, 1000));
        assert_eq!(nginx.requests().unwrap() - before, 2);
    }
}
