//! Small Python and C programs that run inside or beside real servers.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::DEADLINE;
use crate::{process::Process, program, python, temp::TempDir, uwsgi::App};

/// The WSGI application whose work is encoded in the request path.
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

/// A program in a temporary directory.
pub struct Program {
    pub process: Process,
    _directory: TempDir,
}

impl Program {
    /// Starts a Python program that needs these modules.
    pub fn python(name: &str, text: &str, modules: &[&str], args: &[&str]) -> Result<Self> {
        Self::python_in(&[], name, text, modules, args)
    }

    /// The same; `before` is a command prefix.
    pub fn python_in(
        before: &[String],
        name: &str,
        text: &str,
        modules: &[&str],
        args: &[&str],
    ) -> Result<Self> {
        let directory = TempDir::new("program")?;
        let file = directory.write(&format!("{name}.py"), text)?;
        let mut words: Vec<PathBuf> = before.iter().map(PathBuf::from).collect();
        words.extend([python::with(modules)?, file]);
        let mut command = Command::new(&words[0]);
        let process = Process::start(name, command.args(&words[1..]).args(args))?;
        Ok(Self {
            process,
            _directory: directory,
        })
    }

    /// Compiles and starts a C program; `before` is a command prefix.
    pub fn c(name: &str, text: &str, before: &[&str], args: &[&str]) -> Result<Self> {
        let directory = TempDir::new("program")?;
        let source = directory.write(&format!("{name}.c"), text)?;
        let binary = directory.path().join(name);
        let mut gcc = Command::new(program::need(&["gcc"])?);
        gcc.args(["-O1", "-g", "-pthread", "-Wall", "-Werror", "-o"]);
        compile(gcc.arg(&binary).arg(source))?;
        let mut words: Vec<PathBuf> = before.iter().map(PathBuf::from).collect();
        words.push(binary);
        let mut command = Command::new(&words[0]);
        let process = Process::start(name, command.args(&words[1..]).args(args))?;
        Ok(Self {
            process,
            _directory: directory,
        })
    }

    /// Compiles and starts an OCaml program that uses threads.
    pub fn ocaml(name: &str, text: &str, args: &[&str]) -> Result<Self> {
        let directory = TempDir::new("program")?;
        let source = directory.write(&format!("{name}.ml"), text)?;
        let binary = directory.path().join(name);
        let mut ocaml = Command::new(program::need(&["ocamlopt"])?);
        ocaml.args(["-I", "+threads", "unix.cmxa", "threads.cmxa", "-o"]);
        compile(ocaml.arg(&binary).arg(source))?;
        let process = Process::start(name, Command::new(binary).args(args))?;
        Ok(Self {
            process,
            _directory: directory,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for the first line that starts with `word` and returns the number after it.
    pub fn number(&self, word: &str) -> Result<u32> {
        self.process
            .lines()
            .wait(&format!("{word:?} and a number"), 0, DEADLINE, |line| {
                let (first, rest) = line.text.split_once(' ')?;
                (first == word).then(|| rest.trim().parse().ok())?
            })
    }
}

fn compile(compiler: &mut Command) -> Result<()> {
    let name = compiler.get_program().display().to_string();
    let built = compiler.output();
    let built = built.with_context(|| format!("start {name}"))?;
    let errors = String::from_utf8_lossy(&built.stderr);
    ensure!(built.status.success(), "{name}: {errors}");
    Ok(())
}

/// A PostgreSQL session that ends on drop.
pub struct Session {
    _program: Program,
    /// Pid of its server process.
    pub backend: u32,
}

impl Session {
    /// Opens a session and runs these commands in one transaction.
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
