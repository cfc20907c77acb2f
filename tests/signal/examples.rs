//! The examples under `deploy/readers`, each a real server, at a real page.

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
    stage::{FOR_LONG, SOON, Stage, jam},
};

const NEEDS: [&str; 5] = ["gcc", "go", "node", "python3", "uwsgi-core"];
/// A server that is stopped for so long leaves what comes meanwhile for longer than the page says is fine.
const LONG: Duration = Duration::from_millis(500);
const REQUESTS: u32 = 20;

/// An example, serving.
struct Example {
    name: &'static str,
    process: Process,
    at: SocketAddr,
}

impl Example {
    fn start(name: &'static str, stage: &Stage, temp: &TempDir) -> Result<Self> {
        let at = ports::local(ports::free()?);
        let port = at.port().to_string();
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
                    .args(["-m", "gunicorn", "--bind", &at.to_string()])
                    .arg("--chdir")
                    .arg(readers().join("python/examples"))
                    .arg("wsgi:application");
                gunicorn
            }
            "wsgi in uWSGI" => {
                let mut uwsgi = Command::new(program::need(&["uwsgi-core", "uwsgi"])?);
                uwsgi
                    .args(["--plugin", "python3", "--die-on-term", "--need-app"])
                    .args(["--http-socket", &at.to_string(), "--wsgi-file"])
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
        let example = Self { name, process, at };
        wait::until("an answer of the example", SOON, || {
            example.process.check_running()?;
            Ok(example.is_admitted("").ok())
        })?;
        Ok(example)
    }

    /// Whether a request with these headers more is admitted.
    fn is_admitted(&self, headers: &str) -> Result<bool> {
        self.answer(self.ask(headers)?)
    }

    fn ask(&self, headers: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&self.at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // At once: a small server reads once.
        let request =
            format!("GET / HTTP/1.1\r\nHost: tailback\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes())?;
        Ok(stream)
    }

    /// Requests that come while nobody takes any.
    fn hold(&self, requests: u32) -> Result<Vec<TcpStream>> {
        self.process.freeze_group()?;
        let waiting = (0..requests).map(|_| self.ask("")).collect();
        thread::sleep(LONG);
        self.process.signal_group(Signal::CONT)?;
        waiting
    }

    /// 200; or 503, with a time to come again.
    fn answer(&self, mut stream: TcpStream) -> Result<bool> {
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let head = answer.split("\r\n\r\n").next().unwrap_or_default();
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

    fn admitted_of(&self, requests: u32, headers: &str) -> Result<u32> {
        let mut admitted = 0;
        for _ in 0..requests {
            admitted += u32::from(self.is_admitted(headers)?);
        }
        Ok(admitted)
    }
}

/// A service that takes nothing, and a page that says so; `more` is of `[signal]`.
fn stage(more: &str) -> Result<(tailback_tests::service::Service, Stage)> {
    let service = jam("127.0.0.1:0", 20)?;
    let stage = Stage::start(service.address().port(), more)?;
    stage.wait("the least to be admitted", |pressure| {
        pressure.admit <= 0.05 && pressure.max_queue_wait.is_some_and(|most| most < LONG)
    })?;
    Ok((service, stage))
}

/// A header as a proxy sets it, of so long ago, in these units of a second.
fn started(ago: Duration, units: f64) -> Result<String> {
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
    let (_service, stage) = stage(FOR_LONG)?;
    // With TLS, nobody can know by the connection: gunicorn believes this header of a proxy on the same machine.
    let tls = "X-Forwarded-Proto: https\r\n";
    let examples = [
        ("wsgi", ""),
        ("wsgi in gunicorn", tls),
        ("asgi", ""),
        ("express", ""),
    ];
    for (name, headers) in examples {
        let admitted = Example::start(name, &stage, &temp)?.admitted_of(200, headers)?;
        println!("{name}: {admitted} of 200 admitted at a share of 0.05");
        // One in twenty, evenly; where one begins in the turn is chance.
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
    let (_service, stage) = stage(FOR_LONG)?;
    for name in ["asgi", "express"] {
        let example = Example::start(name, &stage, &temp)?;
        // Seconds, milliseconds, microseconds.
        for units in [1.0, 1e3, 1e6] {
            for _ in 0..REQUESTS {
                let old = example.is_admitted(&started(LONG, units)?)?;
                ensure!(!old, "{name}: admitted after {LONG:?}, in {units} a second");
            }
        }
        let mut admitted = 0;
        for _ in 0..REQUESTS {
            admitted += u32::from(example.is_admitted(&started(Duration::ZERO, 1e3)?)?);
        }
        println!("{name}: {admitted} of {REQUESTS} admitted that just came");
        // Some may be held up on their way here; by the share it would be one.
        ensure!(admitted >= REQUESTS / 2, "{name}: {admitted}");
        // No time at all: by the share.
        let admitted = example.admitted_of(200, "X-Request-Start: t=9e99\r\n")?;
        ensure!((9..=11).contains(&admitted), "{name}: nonsense, {admitted}");
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
    let (_service, stage) = stage(FOR_LONG)?;
    for name in [
        "wsgi in uWSGI",
        "wsgi in gunicorn",
        "nethttp",
        "admit",
        "tower",
    ] {
        let example = Example::start(name, &stage, &temp)?;
        let admitted = example.admitted_of(REQUESTS, "")?;
        println!("{name}: {admitted} of {REQUESTS} admitted that just came");
        ensure!(admitted >= REQUESTS / 2, "{name}: {admitted}");
        let waiting = example.hold(5)?;
        for stream in waiting {
            ensure!(!example.answer(stream)?, "{name}: admitted after {LONG:?}");
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
    for stream in example.hold(1)? {
        ensure!(
            example.answer(stream)?,
            "turned away by an agent that is gone"
        );
    }
    ensure!(
        example.admitted_of(50, "")? == 50,
        "turned away by an agent that is gone"
    );
    Ok(())
}
