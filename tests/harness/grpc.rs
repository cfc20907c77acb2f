//! gRPC servers, and the real consumers of what Tailback serves over gRPC: Go programs, built from `tests/signal/consumers`.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{ports, process::Process, program, temp::TempDir, wait};

/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Builds one of the programs: `server`, `balanced`, `scaler` or `reports`.
pub fn build(temp: &TempDir, name: &str) -> Result<PathBuf> {
    let program = temp.path().join(name);
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("signal/consumers");
    let mut go = Command::new(program::need(&["go"])?);
    let output = go
        .current_dir(module)
        .args(["build", "-o"])
        .arg(&program)
        .arg(format!("./cmd/{name}"))
        .output()
        .context("start go")?;
    if !output.status.success() {
        bail!("build {name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(program)
}

/// A gRPC server behind an nginx that forwards ORCA load requests to the agent.
pub struct Backend {
    _server: Process,
    _nginx: Process,
    port: u16,
    front: SocketAddr,
    orca: u16,
    /// File with the CPU time of a call, ms.
    service_ms: PathBuf,
    _temp: TempDir,
}

impl Backend {
    /// Starts `server` ([`build`]) with a prefix, such as `taskset -c 1`.
    pub fn start(server: &Path, prefix: &[String], service_ms: u32) -> Result<Self> {
        let temp = TempDir::new("grpc")?;
        let service_ms = temp.write("service_ms", &service_ms.to_string())?;
        let [port, front, orca] = [ports::free()?, ports::free()?, ports::free()?];
        let mut words = prefix.to_vec();
        words.push(server.display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
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

    /// The server's own port, which the agent watches.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where clients connect.
    pub fn front(&self) -> SocketAddr {
        self.front
    }

    /// Where the agent has to serve its load reports.
    pub fn orca_port(&self) -> u16 {
        self.orca
    }

    /// Changes the CPU time of a call from the next one on.
    pub fn set_service_time(&self, ms: u32) -> Result<()> {
        // By rename: the server must not read an empty file.
        let new = self.service_ms.with_extension("new");
        fs::write(&new, ms.to_string())?;
        fs::rename(&new, &self.service_ms).context("change the service time")
    }
}
