//! DET

mod driven_by;
mod healthy;
mod incidents;
mod replay;

use std::{
    collections::BTreeMap,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tailback_tests::{
    agent::{Agent, Event},
    process::End,
    service::Service,
};

const SUBJECT: &str = env!("CARGO_BIN_EXE_tailback-subject");
const SOON: Duration = Duration::from_secs(20);

/// The loads must not disturb each other.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent on one service. It has looked once.
fn watch(pid: u32, args: &[&str]) -> Result<Agent> {
    let pid = pid.to_string();
    let agent = Agent::run(["--pid", &pid].iter().chain(args))?;
    agent.wait_for("whom it watches", SOON, |event| event.is("target"))?;
    Ok(agent)
}

fn service(args: &[&str]) -> Result<Service> {
    Service::start(&mut Command::new(SUBJECT), args)
}

/// Ends the agent, and returns all that it said.
fn ended(agent: &Agent) -> Result<Vec<Event>> {
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(SOON)?;
    ensure!(end == End::Code(0), "the agent ended with {end:?}");
    let events = agent.events()?;
    check_order(&events)?;
    Ok(events)
}

/// What holds of every stream: a level begins where the last one ended, within an episode that is told in the end.
fn check_order(events: &[Event]) -> Result<()> {
    let mut levels: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut last_ns = 0;
    for event in events {
        if let Some(ns) = event.value["time_unix_ns"].as_u64() {
            ensure!(ns >= last_ns, "told out of order: {}", event.value);
            last_ns = ns;
        }
        if !event.is("level") {
            continue;
        }
        let queue = (event.text("kind").to_owned(), event.text("name").to_owned());
        let before = levels.insert(queue, event.text("to").to_owned());
        ensure!(
            before.as_deref().unwrap_or("ok") == event.text("from"),
            "it comes from where it was not: {}",
            event.value
        );
        let episode = event.text("episode");
        ensure!(
            events
                .iter()
                .any(|event| event.is("episode") && event.text("id") == episode),
            "no episode {episode}, though {}",
            event.value
        );
    }
    Ok(())
}

/// No queue of these left ok.
fn check_silence(events: &[Event], kinds: &[&str]) -> Result<()> {
    let levels: Vec<&Event> = events.iter().filter(|event| event.is("level")).collect();
    let loud = levels
        .iter()
        .filter(|event| kinds.contains(&event.text("kind")));
    let loud: Vec<String> = loud.map(|event| event.value.to_string()).collect();
    println!(
        "levels told of {}: {}; of other kinds: {}",
        kinds.join(", "),
        loud.len(),
        levels.len() - loud.len()
    );
    ensure!(loud.is_empty(), "{}", loud.join("\n"));
    Ok(())
}

/// Those that a busy machine cannot make wait.
const NOT_RUNQUEUE: [&str; 4] = ["accept", "recv", "send", "pipe"];
