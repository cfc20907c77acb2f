//! Who gets the name of a service, and with it its page: a process of another user does not, although it calls itself the same.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_page::{Page, Pressure};
use tailback_tests::{
    agent::Agent, needs, process::Process, program, service::Service, temp::TempDir, wait,
};

use crate::DEADLINE;

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
/// A system user, and two persons.
const SYSTEM: u32 = 33;
const PERSON: u32 = 4_711;
const OTHER: u32 = 4_712;

/// Programs of one name, one for each user who runs it. Tests that run at the same time use different names.
struct Shops {
    directory: TempDir,
    name: &'static str,
}

impl Shops {
    fn new(name: &'static str) -> Result<Self> {
        let directory = TempDir::new("shops")?;
        Ok(Self { directory, name })
    }

    fn command(&self, user: u32) -> Result<Command> {
        let directory = self.directory.path().join(user.to_string());
        let program = directory.join(self.name);
        if !program.exists() {
            std::fs::create_dir(&directory)?;
            program::copy(Path::new(SUBJECT), &program)?;
        }
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={user}"))
            .arg("--clear-groups")
            .arg(program);
        Ok(command)
    }

    /// A service that accepts nothing, with 20 connections that wait.
    fn jammed(&self, user: u32) -> Result<Service> {
        Service::jammed(&mut self.command(user)?, 20)
    }

    /// A process that does nothing.
    fn idle(&self, user: u32) -> Result<Process> {
        let mut command = self.command(user)?;
        Process::start("the stranger", command.args(["park", "--threads", "1"]))
    }
}

/// An agent that watches all processes of a name.
struct Watch {
    agent: Agent,
    directory: PathBuf,
}

impl Watch {
    fn start(temp: &TempDir, name: &str) -> Result<Self> {
        let directory = temp.path().join("run");
        let text = format!(
            "[signal]\ndirectory = \"{}\"\nttl = \"10s\"\n",
            directory.display()
        );
        let config = temp.write("tailback.toml", &text)?;
        let config = config.display().to_string();
        let agent = Agent::run(["--name", name, "--config", &config])?;
        Ok(Self { agent, directory })
    }

    fn pressure(&self, name: &str) -> Pressure {
        Page::open(self.directory.join(name).join("page")).pressure()
    }

    fn wait(&self, what: &str, name: &str, is_it: impl Fn(&Pressure) -> bool) -> Result<()> {
        wait::until(what, DEADLINE, || {
            self.agent.process().check_running()?;
            Ok(is_it(&self.pressure(name)).then_some(()))
        })
    }
}

/// Starts a stranger and a service in this order, restarts the service, and checks at each step who has the page.
fn check(
    name: &'static str,
    service_user: u32,
    stranger_user: u32,
    stranger_first: bool,
) -> Result<()> {
    let shops = Shops::new(name)?;
    let temp = TempDir::new("names")?;
    let mut stranger = None;
    if stranger_first {
        stranger = Some(shops.idle(stranger_user)?);
    }
    let service = shops.jammed(service_user)?;
    let watch = Watch::start(&temp, name)?;
    let pid = service.pid();
    let has_page = |pid: u32| move |pressure: &Pressure| pressure.pid == pid && pressure.level > 0;
    watch.wait("the page of the service", name, has_page(pid))?;
    let stranger = match stranger {
        Some(stranger) => stranger,
        None => shops.idle(stranger_user)?,
    };
    let own = format!("{name}~{}", stranger.pid());
    watch.wait("the page of the stranger", &own, |page| {
        page.pid == stranger.pid()
    })?;

    service.into_process().signal(Signal::KILL)?;
    watch.wait("no pressure without the service", name, |page| {
        page.level == 0
    })?;
    // A later agent does not mistake the stranger for the service, either.
    drop(watch);
    let watch = Watch::start(&temp, name)?;
    watch.wait("the page of the stranger", &own, |page| {
        page.pid == stranger.pid()
    })?;
    let left = watch.pressure(name);
    ensure!(
        left.pid != stranger.pid(),
        "the stranger has the page: {left:?}"
    );

    let service = shops.jammed(service_user)?;
    watch.wait("the page of the new service", name, has_page(service.pid()))?;
    let page = watch.pressure(&own);
    println!("{service_user} has {name}, {stranger_user} has {own}");
    ensure!(page.pid == stranger.pid() && page.level == 0, "{page:?}");
    watch.agent.process().check_running()
}

#[test]
fn an_idle_older_stranger_does_not_mask_a_system_service() -> Result<()> {
    if !needs::met(
        "an_idle_older_stranger_does_not_mask_a_system_service",
        &["setpriv"],
    ) {
        return Ok(());
    }
    check("system-shop", SYSTEM, PERSON, true)
}

#[test]
fn a_stranger_does_not_take_the_page_of_a_service_that_restarts() -> Result<()> {
    if !needs::met(
        "a_stranger_does_not_take_the_page_of_a_service_that_restarts",
        &["setpriv"],
    ) {
        return Ok(());
    }
    check("persons-shop", PERSON, OTHER, false)
}
