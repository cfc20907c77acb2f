//! uWSGI, by default with a small Python application that calls Redis.
//!
//! uWSGI prints "listen queue … full" once the queue has overflowed. Its stats server reports the queue: a truth independent
//! of the agent.

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

use crate::{lines::Line, ports, process::Process, program, temp::TempDir, wait};

/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Settings of the default application.
#[derive(Clone, Debug)]
pub struct Options {
    pub workers: u32,
    /// Accept backlog (`--listen`).
    pub backlog: u32,
    pub redis_port: u16,
    /// Redis calls per request.
    pub calls: u32,
    /// Service time without the Redis calls; the worker sleeps.
    pub work: Duration,
}

/// A running uWSGI that serves requests.
pub struct Uwsgi {
    process: Process,
    port: u16,
    stats_port: u16,
    _temp: TempDir,
}

/// An application and how it is served.
#[derive(Clone, Debug)]
pub struct App<'a> {
    /// The WSGI file's text.
    pub text: &'a str,
    pub env: Vec<(&'static str, String)>,
    pub workers: u32,
    pub backlog: u32,
    /// Further arguments of uWSGI.
    pub args: Vec<String>,
    /// Command prefix that starts uWSGI, for example `taskset -c 1`.
    pub before: Vec<String>,
    /// FIFO or file for its output, instead of a pipe to us.
    pub output: Option<PathBuf>,
    /// Log file that uWSGI opens itself.
    pub log: Option<PathBuf>,
}

impl Options {
    /// The default application.
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

    /// Like [`Uwsgi::start`], logging to a file. uWSGI reopens the file when [`reopen_file`] is touched.
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
                (Some(log), _) => wait::until("uWSGI's workers", START_DEADLINE, || {
                    process.check_running()?;
                    let text_so_far = fs::read_to_string(log).unwrap_or_default();
                    Ok(text_so_far.contains(&text).then_some(()))
                })?,
                (None, None) => process.wait_line(&text, START_DEADLINE).map(|_| ())?,
                // The output goes to the caller's file.
                (None, Some(_)) => {}
            }
        }
        let uwsgi = Self {
            process,
            port,
            stats_port,
            _temp: temp,
        };
        let response = uwsgi
            .process
            .wait_response(uwsgi.address(), START_DEADLINE)?;
        if response.status != 200 {
            bail!("the application in uWSGI responded {}", response.status);
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

    /// Output of the stats server: `listen_queue`, `workers`, …
    pub fn stats(&self) -> Result<Value> {
        let ask = || -> Result<Value> {
            let mut stream =
                TcpStream::connect_timeout(&ports::local(self.stats_port), Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(serde_json::from_str(&text)?)
        };
        ask().context("read uWSGI's stats server")
    }
}

/// Touching this file makes uWSGI reopen its log.
pub fn reopen_file(log: &Path) -> PathBuf {
    log.with_extension("reopen")
}

/// Whether this output line reports a full listen queue.
pub fn reports_full(line: &Line) -> bool {
    is_full(&line.text)
}

/// Like [`reports_full`], for the text of a log line.
pub fn is_full(line: &str) -> bool {
    line.contains("uWSGI listen queue of socket") && line.contains("full !!!")
}

/// Fails with advice if the backlog exceeds somaxconn, in which case uWSGI refuses to start.
fn check_backlog(backlog: u32) -> Result<()> {
    const FILE: &str = "/proc/sys/net/core/somaxconn";
    let allowed: u32 = fs::read_to_string(FILE)
        .with_context(|| format!("read {FILE}"))?
        .trim()
        .parse()
        .with_context(|| format!("read the number in {FILE}"))?;
    if backlog > allowed {
        bail!(
            "a backlog of {backlog} exceeds net.core.somaxconn = {allowed}: \
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
    fn uwsgi_itself_reports_its_full_queue() {
        let test = "uwsgi_itself_reports_its_full_queue";
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
            duration: Duration::from_secs(30),
            timeout: Duration::from_secs(10),
            max_in_flight: 100,
        })
        .unwrap();
        let lines = uwsgi.process().lines();
        let full = lines.wait("uWSGI to report a full queue", 0, START_DEADLINE, |line| {
            reports_full(line).then(|| line.clone())
        });
        assert!(full.unwrap().text.contains(&uwsgi.port().to_string()));
        assert!(load.stop().unwrap().iter().any(Request::ok));
    }
}
