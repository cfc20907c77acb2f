//! A resolver that stops answering. The service resolves names in its event loop: no connection shows what requests wait for.

use std::process::{self, Command};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_tests::{load::Load, ports, process::Process, program, temp::TempDir};

use crate::{
    play::{Culprit, Play},
    programs::{DEADLINE, Program, load},
};

const REQUESTS_PER_S: f64 = 20.0;

/// Go's own resolver: a socket for each query.
pub fn of_go(play: &mut Play) -> Result<()> {
    let directory = TempDir::new("lookup")?;
    let source = directory.write("lookup.go", include_str!("apps/lookup.go"))?;
    let binary = directory.path().join("lookup");
    let mut go = Command::new(program::need(&["go"])?);
    let built = go.args(["build", "-o"]).arg(&binary).arg(source).output();
    let built = built.context("start go")?;
    ensure!(
        built.status.success(),
        "go build: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    stops_answering(play, |arguments| {
        Process::start("lookup", Command::new(&binary).args(arguments))
    })
}

/// `start` starts the service, from its port and the address of the resolver.
fn stops_answering(
    play: &mut Play,
    start: impl FnOnce(&[String]) -> Result<Process>,
) -> Result<()> {
    let [.., high, low] = process::id().to_be_bytes();
    let address = format!("127.53.{high}.{}", low.max(1));
    let text = include_str!("apps/resolver.py");
    let resolver = Program::python("resolver", text, &["socket"], &[&address])?;
    resolver.process.wait_line("listening", DEADLINE)?;
    let port = ports::free()?;
    let service = start(&[port.to_string(), address.clone()])?;
    service.wait_line("listening", DEADLINE)?;
    let load: Load = load(ports::local(port), "/", REQUESTS_PER_S)?;
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
