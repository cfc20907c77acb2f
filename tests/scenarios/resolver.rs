//! A resolver that stops answering, or becomes slow. No connection shows what requests wait for.

use std::{
    path::PathBuf,
    process::{self, Command},
};

use anyhow::Result;
use rustix::process::Signal;
use tailback_tests::{load::Load, ports, process::Process, program, python, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, Program, go, load},
};

/// The resolver never answers.
const NEVER_MS: u32 = 0;

/// Go's own resolver: a socket for each query.
pub fn of_go(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("lookup")?;
    let binary = go(&directory, "lookup", include_str!("apps/lookup.go"))?;
    fails(play, NEVER_MS, 20.0, |port, address| {
        let args = [port.to_string(), address.to_owned()];
        Process::start("lookup", Command::new(&binary).args(args))
    })
}

/// glibc's in each thread.
pub fn of_threads(play: &mut Play) -> Result<()> {
    let glibc = Glibc::new("lookup.py", include_str!("apps/lookup.py"))?;
    let python = python::with(&["socket"])?;
    fails(play, NEVER_MS, 20.0, |port, address| {
        glibc.start(address, python, &[&port.to_string(), "8"])
    })
}

/// glibc's in the few threads that Node gives to it. Half a second each is too long for two threads.
pub fn of_node(play: &mut Play) -> Result<()> {
    let glibc = Glibc::new("lookup.js", include_str!("apps/lookup.js"))?;
    let node = program::need(&["node"])?;
    fails(play, 500, 20.0, |port, address| {
        glibc.start(address, node, &[&port.to_string()])
    })
}

/// A program with a resolv.conf of its own.
struct Glibc {
    directory: TempDir,
    source: PathBuf,
}

impl Glibc {
    fn new(name: &str, text: &str) -> Result<Self> {
        let directory = TempDir::new("lookup")?;
        let source = directory.write(name, text)?;
        directory.write("nsswitch.conf", "hosts: files dns\n")?;
        Ok(Self { directory, source })
    }

    fn start(&self, resolver: &str, interpreter: PathBuf, args: &[&str]) -> Result<Process> {
        let text = format!("nameserver {resolver}\n");
        self.directory.write("resolv.conf", &text)?;
        let mount = "for file in resolv.conf nsswitch.conf; do \
                     mount --bind \"$1/$file\" \"/etc/$file\" || exit; done; shift; exec \"$@\"";
        let mut command = Command::new(program::need(&["unshare"])?);
        command
            .args(["--mount", "--", "sh", "-c", mount, "sh"])
            .arg(self.directory.path())
            .arg(interpreter)
            .arg(&self.source)
            .args(args);
        Process::start("lookup", &mut command)
    }
}

/// `start` starts the service with its port and the address of the resolver. Once the fault is planted, the resolver answers
/// `late_ms` later, or never ([`NEVER_MS`]).
fn fails(
    play: &mut Play,
    late_ms: u32,
    per_s: f64,
    start: impl FnOnce(u16, &str) -> Result<Process>,
) -> Result<()> {
    let [.., high, low] = process::id().to_be_bytes();
    let address = format!("127.53.{high}.{}", low.max(1));
    let text = include_str!("apps/resolver.py");
    let args = [address.as_str(), &late_ms.to_string()];
    let resolver = Program::python("resolver", text, &["socket"], &args)?;
    resolver.process.wait_line("listening", DEADLINE)?;
    let port = ports::free()?;
    let service = start(port, &address)?;
    service.wait_line("listening", DEADLINE)?;
    let load: Load = load(ports::local(port), "/", per_s)?;
    play.watch_pid(service.pid())?;
    play.healthy()?;
    let culprit = Culprit::process(resolver.pid()).or(&format!("{address}:53"));
    play.planted(culprit);
    resolver.process.signal(Signal::USR1)?;
    play.hold()?;
    play.removing(Some(&load));
    resolver.process.signal(Signal::USR2)?;
    play.recover()
}
