//! What must be detected, and what must not: planted faults on real servers, and healthy servers.

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
/// Deadline of each wait.
const DEADLINE: Duration = Duration::from_secs(20);

/// Serializes tests with a load.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the agent on one process and waits for its first sample.
fn watch(pid: u32, args: &[&str]) -> Result<Agent> {
    let pid = pid.to_string();
    let agent = Agent::run(["--pid", &pid].iter().chain(args))?;
    agent.wait_for("its target", DEADLINE, |event| event.is("target"))?;
    Ok(agent)
}

fn service(args: &[&str]) -> Result<Service> {
    Service::start(&mut Command::new(SUBJECT), args)
}

/// Stops the agent and returns all of its events.
fn stop(agent: &Agent) -> Result<Vec<Event>> {
    agent.process().signal(Signal::TERM)?;
    let end = agent.process().wait_end(DEADLINE)?;
    ensure!(end == End::Code(0), "the agent ended with {end:?}");
    // It may end before its last line is read.
    agent.process().lines().wait_end(DEADLINE)?;
    let events = agent.events()?;
    check_order(&events)?;
    Ok(events)
}

/// Checks the invariants of every event stream: times are in order, each level change starts at the previous level, and
/// belongs to an episode that is reported.
fn check_order(events: &[Event]) -> Result<()> {
    let mut levels: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut last_ns = 0;
    for event in events {
        if let Some(ns) = event.value["time_unix_ns"].as_u64() {
            ensure!(ns >= last_ns, "out of order: {}", event.value);
            last_ns = ns;
        }
        if !event.is("level") {
            continue;
        }
        let queue = (event.text("kind").to_owned(), event.text("name").to_owned());
        let before = levels.insert(queue, event.text("to").to_owned());
        ensure!(
            before.as_deref().unwrap_or("ok") == event.text("from"),
            "it does not start at the previous level: {}",
            event.value
        );
        let episode = event.text("episode");
        ensure!(
            events
                .iter()
                .any(|event| event.is("episode") && event.text("id") == episode),
            "episode {episode} is missing: {}",
            event.value
        );
    }
    Ok(())
}

/// Checks that no queue of these kinds left ok.
fn check_all_ok(events: &[Event], kinds: &[&str]) -> Result<()> {
    let levels: Vec<&Event> = events.iter().filter(|event| event.is("level")).collect();
    let unhealthy = levels
        .iter()
        .filter(|event| kinds.contains(&event.text("kind")));
    let unhealthy: Vec<String> = unhealthy.map(|event| event.value.to_string()).collect();
    println!(
        "level changes of {}: {}; of other kinds: {}",
        kinds.join(", "),
        unhealthy.len(),
        levels.len() - unhealthy.len()
    );
    ensure!(unhealthy.is_empty(), "{}", unhealthy.join("\n"));
    Ok(())
}

/// Kinds that do not fill just because the machine is busy, unlike run queues.
const NOT_RUNQUEUE: [&str; 4] = ["accept", "recv", "send", "pipe"];
