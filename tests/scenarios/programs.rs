//! The servers and callers that several scenarios share.

use std::{net::SocketAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    process::Process,
    program, python,
    temp::TempDir,
    uwsgi::{App, Uwsgi},
};

pub const SOON: Duration = Duration::from_secs(20);

/// uWSGI with the application whose work is in the path.
pub fn app(workers: u32, backlog: u32) -> App<'static> {
    App {
        text: include_str!("apps/app.py"),
        env: Vec::new(),
        workers,
        backlog,
        args: vec!["--disable-logging".to_owned()],
        before: Vec::new(),
        output: None,
        log: None,
    }
}

/// Whether this is uWSGI saying that its listen queue is full.
pub fn uwsgi_is_full(line: &str) -> bool {
    line.contains("uWSGI listen queue of socket") && line.contains("full !!!")
}

/// Requests that do not wait for answers, as of many independent callers.
pub fn load(to: SocketAddr, path: &str, per_s: f64) -> Result<Load> {
    spaced_load(to, path, per_s, Spacing::Poisson { seed: 7 })
}

/// The same at equal distances.
pub fn steady_load(to: SocketAddr, path: &str, per_s: f64) -> Result<Load> {
    spaced_load(to, path, per_s, Spacing::Even)
}

fn spaced_load(to: SocketAddr, path: &str, per_s: f64, spacing: Spacing) -> Result<Load> {
    Load::start(Plan {
        to,
        path: path.to_owned(),
        per_s,
        spacing,
        lasts: Duration::from_secs(90),
        timeout: Duration::from_secs(30),
        at_once: 2000,
    })
}

/// A program that lies in a folder of its own.
pub struct Program {
    pub process: Process,
    _folder: TempDir,
}

impl Program {
    /// In Python, with these modules.
    pub fn python(name: &str, text: &str, modules: &[&str], args: &[&str]) -> Result<Self> {
        let folder = TempDir::new("program")?;
        let file = folder.write(&format!("{name}.py"), text)?;
        let mut command = Command::new(python::with(modules)?);
        let process = Process::start(name, command.arg(file).args(args))?;
        Ok(Self {
            process,
            _folder: folder,
        })
    }

    /// In C; `before` is what starts it, where it does not start by itself.
    pub fn c(name: &str, text: &str, before: &[&str], args: &[&str]) -> Result<Self> {
        let folder = TempDir::new("program")?;
        let source = folder.write(&format!("{name}.c"), text)?;
        let binary = folder.path().join(name);
        let mut gcc = Command::new(program::need(&["gcc"])?);
        let built = gcc
            .args(["-O1", "-g", "-pthread", "-Wall", "-Werror", "-o"])
            .arg(&binary)
            .arg(source)
            .output()
            .context("start gcc")?;
        anyhow::ensure!(
            built.status.success(),
            "gcc {name}.c: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        let mut words: Vec<PathBuf> = before.iter().map(PathBuf::from).collect();
        words.push(binary);
        let mut command = Command::new(&words[0]);
        let process = Process::start(name, command.args(&words[1..]).args(args))?;
        Ok(Self {
            process,
            _folder: folder,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The number in the first line that begins with `word`.
    pub fn number(&self, word: &str) -> Result<u32> {
        self.process
            .lines()
            .wait(&format!("{word:?} and a number"), 0, SOON, |line| {
                let (first, rest) = line.text.split_once(' ')?;
                (first == word).then(|| rest.trim().parse().ok())?
            })
    }
}

/// A session of a PostgreSQL, which ends with the result.
pub struct Session {
    _program: Program,
    /// The server's process for it.
    pub backend: u32,
}

impl Session {
    pub fn open(port: u16, commands: &[&str]) -> Result<Self> {
        let port = port.to_string();
        let args: Vec<&str> = [port.as_str()].iter().chain(commands).copied().collect();
        let text = include_str!("apps/session.py");
        let program = Program::python("session", text, &["psycopg2"], &args)?;
        let backend = program.number("done")?;
        Ok(Self {
            _program: program,
            backend,
        })
    }
}

/// uWSGI's own pid and its workers'.
pub fn family(uwsgi: &Uwsgi) -> Result<Vec<u32>> {
    with_children(uwsgi.process().pid())
}

pub fn with_children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let children = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    Ok([pid].into_iter().chain(children).collect())
}
