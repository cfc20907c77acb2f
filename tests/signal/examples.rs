//! The example servers under `deploy/readers`, each reading a real page.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{needs, ports, process::Process, program, python, temp::TempDir, wait};

use crate::{
    readers::{c_program, go, readers, rust_example},
    stage::{DEADLINE, LONG_TTL, Stage, jam},
};

const NEEDS: [&str; 5] = ["gcc", "go", "node", "python3", "uwsgi-core"];
/// Longer than `max_queue_wait`: requests that arrive while a server is stopped for this time must be shed.
const LONG_WAIT: Duration = Duration::from_millis(500);
const REQUESTS: u32 = 20;

/// A running example server.
struct Example {
    name: &'static str,
    process: Process,
    address: SocketAddr,
}

impl Example {
    fn start(name: &'static str, stage: &Stage, temp: &TempDir) -> Result<Self> {
        let address = ports::local(ports::free()?);
        let port = address.port().to_string();
        let python_example = |name: &str| readers().join("python/examples").join(name);
        let mut command = match name {
            "wsgi" | "asgi" => {
                let mut python = Command::new(python::with(&["uvicorn"])?);
                python.arg(python_example(&format!("{name}.py"))).arg(&port);
                python
            }
            "wsgi in gunicorn" => {
                let mut gunicorn = Command::new(python::with(&["gunicorn"])?);
                gunicorn
                    .args(["-m", "gunicorn", "--bind", &address.to_string()])
                    .arg("--chdir")
                    .arg(readers().join("python/examples"))
                    .arg("wsgi:application");
                gunicorn
            }
            "wsgi in uWSGI" => {
                let mut uwsgi = Command::new(program::need(&["uwsgi-core", "uwsgi"])?);
                uwsgi
                    .args(["--plugin", "python3", "--die-on-term", "--need-app"])
                    .args(["--http-socket", &address.to_string(), "--wsgi-file"])
                    .arg(python_example("wsgi.py"));
                uwsgi
            }
            "express" => {
                let mut node = Command::new(program::need(&["node"])?);
                node.arg(readers().join("node/examples/express.js"))
                    .arg(&port)
                    .arg(stage.page());
                node
            }
            _ => {
                let program = match name {
                    "nethttp" => go(temp, "./examples/nethttp", name)?,
                    "admit" => c_program(temp, name)?,
                    _ => rust_example(name)?,
                };
                let mut command = Command::new(program);
                command.arg(&port).arg(stage.page());
                command
            }
        };
        let process = Process::start(name, command.env("TAILBACK_PAGE", stage.page()))?;
        let example = Self {
            name,
            process,
            address,
        };
        wait::until("a response from the example", DEADLINE, || {
            example.process.check_running()?;
            Ok(example.is_admitted("").ok())
        })?;
        Ok(example)
    }

    /// Whether a request with these additional headers is admitted.
    fn is_admitted(&self, headers: &str) -> Result<bool> {
        self.read_response(self.send(headers)?)
    }

    fn send(&self, headers: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // In one write: a small server reads only once.
        let request =
            format!("GET / HTTP/1.1\r\nHost: tailback\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes())?;
        Ok(stream)
    }

    /// Sends requests while the server is stopped for [`LONG_WAIT`], then resumes it.
    fn send_while_stopped(&self, requests: u32) -> Result<Vec<TcpStream>> {
        self.process.freeze_group()?;
        let waiting = (0..requests).map(|_| self.send("")).collect();
        thread::sleep(LONG_WAIT);
        self.process.signal_group(Signal::CONT)?;
        waiting
    }

    /// Reads the response: true for 200, false for 503 with a valid Retry-After, else an error.
    fn read_response(&self, mut stream: TcpStream) -> Result<bool> {
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let head = response.split("\r\n\r\n").next().unwrap_or_default();
        if head.contains(" 200 ") {
            return Ok(true);
        }
        let head = head.to_lowercase();
        let seconds = head
            .lines()
            .find_map(|line| line.strip_prefix("retry-after: "));
        let seconds: u64 = seconds
            .with_context(|| format!("{}: no Retry-After in {head}", self.name))?
            .trim()
            .parse()?;
        ensure!(
            head.contains(" 503 ") && (1..=30).contains(&seconds),
            "{}: {head}",
            self.name
        );
        Ok(false)
    }

    /// How many of [`REQUESTS`] new requests are admitted, in the best of a few rounds: on a busy machine some are delayed on the way.
    /// By the admit ratio alone it would be one.
    fn most_admitted(&self, headers: impl Fn() -> Result<String>) -> Result<u32> {
        const ROUNDS: u32 = 10;
        let mut most = 0;
        for _ in 0..ROUNDS {
            let mut admitted = 0;
            for _ in 0..REQUESTS {
                admitted += u32::from(self.is_admitted(&headers()?)?);
            }
            most = most.max(admitted);
            if most >= REQUESTS / 2 {
                break;
            }
        }
        Ok(most)
    }

    /// How many of `requests` sequential requests are admitted.
    fn admitted_of(&self, requests: u32, headers: &str) -> Result<u32> {
        let mut admitted = 0;
        for _ in 0..requests {
            admitted += u32::from(self.is_admitted(headers)?);
        }
        Ok(admitted)
    }
}

/// A service that accepts nothing, and an agent whose page sheds its load. `more` extends `[signal]`.
fn stage(more: &str) -> Result<(tailback_tests::service::Service, Stage)> {
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), more)?;
    stage.wait("the floor of the admit ratio", |pressure| {
        pressure.admit_ratio <= 0.05 && pressure.max_queue_wait.is_some_and(|max| max < LONG_WAIT)
    })?;
    Ok((service, stage))
}

/// An X-Request-Start header from `ago`, with `units` per second (1 for seconds, 1e3 for ms).
fn request_start(ago: Duration, units: f64) -> Result<String> {
    let start = (SystemTime::now() - ago).duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(format!(
        "X-Request-Start: t={:.3}\r\n",
        start.as_secs_f64() * units
    ))
}

#[test]
fn a_reader_without_queue_wait_admits_by_the_admit_ratio() -> Result<()> {
    const TEST: &str = "a_reader_without_queue_wait_admits_by_the_admit_ratio";
    if !needs::met(TEST, &NEEDS) {
        return Ok(());
    }
    let temp = TempDir::new("examples")?;
    let (_service, stage) = stage(LONG_TTL)?;
    // With TLS the wait on the connection is unknown: gunicorn trusts this header from a proxy on the same machine.
    let tls = "X-Forwarded-Proto: https\r\n";
    let examples = [
        ("wsgi", ""),
        ("wsgi in gunicorn", tls),
        ("asgi", ""),
        ("express", ""),
    ];
    for (name, headers) in examples {
        let admitted = Example::start(name, &stage, &temp)?.admitted_of(200, headers)?;
        println!("{name}: {admitted} of 200 admitted at an admit ratio of 0.05");
        // Every 20th request; the phase is random.
        ensure!(
            (9..=11).contains(&admitted),
            "{name}: {admitted} of 200 admitted"
        );
    }
    Ok(())
}

#[test]
fn a_reader_with_a_request_start_header_sheds_requests_that_waited_too_long() -> Result<()> {
    const TEST: &str = "a_reader_with_a_request_start_header_sheds_requests_that_waited_too_long";
    if !needs::met(TEST, &NEEDS) {
        return Ok(());
    }
    let temp = TempDir::new("examples")?;
    let (_service, stage) = stage(LONG_TTL)?;
    for name in ["asgi", "express"] {
        let example = Example::start(name, &stage, &temp)?;
        // Seconds, milliseconds, microseconds.
        for units in [1.0, 1e3, 1e6] {
            for _ in 0..REQUESTS {
                let admitted = example.is_admitted(&request_start(LONG_WAIT, units)?)?;
                ensure!(
                    !admitted,
                    "{name}: admitted after {LONG_WAIT:?}, with {units} units per second"
                );
            }
        }
        let admitted = example.most_admitted(|| request_start(Duration::ZERO, 1e3))?;
        println!("{name}: {admitted} of {REQUESTS} new requests admitted");
        ensure!(admitted >= REQUESTS / 2, "{name}: {admitted}");
        // An invalid time: the admit ratio applies.
        let admitted = example.admitted_of(200, "X-Request-Start: t=9e99\r\n")?;
        ensure!(
            (9..=11).contains(&admitted),
            "{name}: invalid time, {admitted} admitted"
        );
    }
    Ok(())
}

#[test]
fn a_reader_that_measures_the_wait_on_the_connection_sheds_requests_that_waited_too_long()
-> Result<()> {
    const TEST: &str =
        "a_reader_that_measures_the_wait_on_the_connection_sheds_requests_that_waited_too_long";
    if !needs::met(TEST, &NEEDS) {
        return Ok(());
    }
    let temp = TempDir::new("examples")?;
    let (_service, stage) = stage(LONG_TTL)?;
    for name in [
        "wsgi in uWSGI",
        "wsgi in gunicorn",
        "nethttp",
        "admit",
        "tower",
    ] {
        let example = Example::start(name, &stage, &temp)?;
        let admitted = example.most_admitted(|| Ok(String::new()))?;
        println!("{name}: {admitted} of {REQUESTS} new requests admitted");
        ensure!(admitted >= REQUESTS / 2, "{name}: {admitted}");
        let waiting = example.send_while_stopped(5)?;
        for stream in waiting {
            ensure!(
                !example.read_response(stream)?,
                "{name}: admitted after {LONG_WAIT:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn readers_admit_everything_when_the_agent_is_gone() -> Result<()> {
    const TEST: &str = "readers_admit_everything_when_the_agent_is_gone";
    if !needs::met(TEST, &NEEDS) {
        return Ok(());
    }
    let temp = TempDir::new("examples")?;
    let (_service, stage) = stage("")?;
    let example = Example::start("admit", &stage, &temp)?;
    stage.agent.process().signal(Signal::KILL)?;
    stage.wait("a stale page", |pressure| !pressure.alive)?;
    for stream in example.send_while_stopped(1)? {
        ensure!(
            example.read_response(stream)?,
            "shed by an agent that is gone"
        );
    }
    ensure!(
        example.admitted_of(50, "")? == 50,
        "shed by an agent that is gone"
    );
    Ok(())
}
