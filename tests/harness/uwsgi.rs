//! uWSGI with a small Python application that calls Redis.
//!
//! It prints "listen queue … full" when it is too late; its stats server shows the queue: an independent truth.

use std::{
    fs,
    io::Read as _,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{http, lines::Line, ports, process::Process, program, temp::TempDir, wait};

const START: Duration = Duration::from_secs(20);

/// What is served, and by how many.
#[derive(Clone, Debug)]
pub struct Options {
    pub workers: u32,
    /// `--listen`: connections that may wait to be accepted.
    pub backlog: u32,
    pub redis_port: u16,
    /// Calls to Redis in each request.
    pub calls: u32,
    /// The request's own work: the worker sleeps.
    pub work: Duration,
}

/// Running, and ready for requests.
pub struct Uwsgi {
    process: Process,
    port: u16,
    stats_port: u16,
    _temp: TempDir,
}

/// An application of one's own, and how it is served.
#[derive(Clone, Debug)]
pub struct App<'a> {
    /// The WSGI file's text.
    pub text: &'a str,
    pub env: Vec<(&'static str, String)>,
    pub workers: u32,
    pub backlog: u32,
    /// Further arguments of uWSGI.
    pub args: Vec<String>,
    /// What starts uWSGI, where it does not start by itself: `taskset -c 1`.
    pub before: Vec<String>,
    /// A FIFO or file that it writes to instead of to us.
    pub output: Option<PathBuf>,
    /// A log that it opens itself.
    pub log: Option<PathBuf>,
}

impl Options {
    /// The usual application.
    fn app(&self, log: Option<&Path>) -> App<'static> {
        App {
            text: include_str!("uwsgi/app.py"),
            env: vec![
                ("APP_REDIS_PORT", self.redis_port.to_string()),
                ("APP_CALLS", self.calls.to_string()),
                ("APP_WORK_MS", (self.work.as_secs_f64() * 1e3).to_string()),
            ],
            workers: self.workers,
            backlog: self.backlog,
            args: vec!["--disable-logging".to_owned()],
            before: Vec::new(),
            output: None,
            log: log.map(Path::to_owned),
        }
    }
}

impl Uwsgi {
    pub fn start(options: &Options) -> Result<Self> {
        Self::start_app(&options.app(None))
    }

    /// As [`Uwsgi::start`]; all that it says goes to a file. It opens that file anew when [`reopen_file`] is touched.
    pub fn start_logging_to(options: &Options, log: &Path) -> Result<Self> {
        Self::start_app(&options.app(Some(log)))
    }

    pub fn start_app(app: &App<'_>) -> Result<Self> {
        check_backlog(app.backlog)?;
        let program = program::need(&["uwsgi-core", "uwsgi"])?;
        let temp = TempDir::new("uwsgi")?;
        let file = temp.write("app.py", app.text)?;
        let (port, stats_port) = (ports::free()?, ports::free()?);
        let mut words = app.before.clone();
        if let Some(output) = &app.output {
            let redirect = "out=$1; shift; exec \"$@\" >\"$out\" 2>&1";
            words.extend(["sh", "-c", redirect, "sh"].map(str::to_owned));
            words.push(output.display().to_string());
        }
        words.push(program.display().to_string());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args([
                "--plugin",
                "python3",
                "--master",
                "--need-app",
                "--die-on-term",
                "--no-orphans",
            ])
            .args(["--http-socket", &ports::local(port).to_string()])
            .args(["--stats", &ports::local(stats_port).to_string()])
            .args(["--workers", &app.workers.to_string()])
            .args(["--listen", &app.backlog.to_string()])
            .args(&app.args)
            .arg("--wsgi-file")
            .arg(&file)
            .envs(app.env.iter().map(|(name, value)| (name, value)))
            .current_dir(temp.path());
        if let Some(log) = &app.log {
            let reopen = reopen_file(log);
            fs::write(&reopen, "").with_context(|| format!("write {}", reopen.display()))?;
            command.arg("--logto").arg(log);
            command.arg("--touch-logreopen").arg(reopen);
        }
        let process = Process::start("uWSGI", &mut command)?;
        for worker in 1..=app.workers {
            let text = format!("spawned uWSGI worker {worker} ");
            match (&app.log, &app.output) {
                (Some(log), _) => wait::until("uWSGI's workers", START, || {
                    process.check_running()?;
                    let said = fs::read_to_string(log).unwrap_or_default();
                    Ok(said.contains(&text).then_some(()))
                })?,
                (None, None) => process.wait_line(&text, START).map(|_| ())?,
                // What it says goes to whoever the caller chose.
                (None, Some(_)) => {}
            }
        }
        let uwsgi = Self {
            process,
            port,
            stats_port,
            _temp: temp,
        };
        let answer = wait::until("an answer of uWSGI", START, || {
            uwsgi.process.check_running()?;
            Ok(http::get(uwsgi.address(), "/", START).ok())
        })?;
        if answer.status != 200 {
            bail!("the application in uWSGI answers {}", answer.status);
        }
        Ok(uwsgi)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn address(&self) -> SocketAddr {
        ports::local(self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its own account, from its stats server: `listen_queue`, `workers`, …
    pub fn stats(&self) -> Result<Value> {
        let ask = || -> Result<Value> {
            let mut stream =
                TcpStream::connect_timeout(&ports::local(self.stats_port), Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(serde_json::from_str(&text)?)
        };
        ask().context("ask uWSGI's stats server")
    }
}

/// The file that is touched so that uWSGI opens its log anew.
pub fn reopen_file(log: &Path) -> PathBuf {
    log.with_extension("reopen")
}

/// Whether this is uWSGI saying that its listen queue is full.
pub fn says_full(line: &Line) -> bool {
    is_full(&line.text)
}

/// As [`says_full`], of a line in its log.
pub fn is_full(line: &str) -> bool {
    line.contains("uWSGI listen queue of socket") && line.contains("full !!!")
}

/// The kernel would cut the backlog silently, and uWSGI would refuse to start.
fn check_backlog(backlog: u32) -> Result<()> {
    const FILE: &str = "/proc/sys/net/core/somaxconn";
    let allowed: u32 = fs::read_to_string(FILE)
        .with_context(|| format!("read {FILE}"))?
        .trim()
        .parse()
        .with_context(|| format!("read the number in {FILE}"))?;
    if backlog > allowed {
        bail!(
            "a listen queue of {backlog} is above net.core.somaxconn = {allowed}: \
             run `sysctl net.core.somaxconn={backlog}`"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::{Load, Plan, Request, Spacing},
        redis::Redis,
        skip::skip,
    };

    #[test]
    fn uwsgi_says_itself_that_its_queue_is_full() {
        let test = "uwsgi_says_itself_that_its_queue_is_full";
        if let Err(missing) =
            program::need(&["uwsgi-core", "uwsgi"]).and(program::need(&["redis-server"]))
        {
            return skip(test, &missing.to_string());
        }
        let redis = Redis::start().unwrap();
        let uwsgi = Uwsgi::start(&Options {
            workers: 2,
            backlog: 5,
            redis_port: redis.port(),
            calls: 1,
            work: Duration::from_millis(200),
        })
        .unwrap();
        assert_eq!(uwsgi.stats().unwrap()["listen_queue"], 0);
        let load = Load::start(Plan {
            to: uwsgi.address(),
            path: "/".to_owned(),
            per_s: 50.0,
            spacing: Spacing::Even,
            lasts: Duration::from_secs(30),
            timeout: Duration::from_secs(10),
            at_once: 100,
        })
        .unwrap();
        let lines = uwsgi.process().lines();
        let full = lines.wait("uWSGI to say that it is full", 0, START, |line| {
            says_full(line).then(|| line.clone())
        });
        assert!(full.unwrap().text.contains(&uwsgi.port().to_string()));
        assert!(load.stop().unwrap().iter().any(Request::ok));
    }
}
