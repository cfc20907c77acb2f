//! DRIVEN

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    needs,
    network::Network,
    service::{Pace, Service},
    ss, wait,
};

use crate::{SOON, SUBJECT, alone, ended, watch};

/// What happens after ten quiet seconds.
enum Trouble {
    /// Requests come at this rate, a second.
    Surge(f64),
    /// A request takes so long.
    Slow(Duration),
}

/// A service that can do 50 requests a second gets 25, then `trouble` until 70 wait, then 15. Answers what its episode is
/// said to be driven by.
fn driven_by(trouble: &Trouble) -> Result<String> {
    const USUAL: Duration = Duration::from_millis(20);
    // Where nobody else's connections count.
    let network = Network::new()?;
    let pace = Pace::new(USUAL)?;
    let pace_file = pace.file().display().to_string();
    let service = Service::start(
        &mut network.command(SUBJECT)?,
        &[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--backlog",
            "400",
            "--pace",
            &pace_file,
        ],
    )?;
    let agent = watch(service.pid(), &[])?;
    let load = network.inside(|| {
        Load::start(Plan {
            to: service.address(),
            path: "/".to_owned(),
            per_s: 25.0,
            spacing: Spacing::Even,
            duration: Duration::from_secs(60),
            timeout: Duration::from_secs(30),
            max_in_flight: 1000,
        })
    })?;
    wait::until("250 answers", SOON, || {
        Ok((load.done().len() >= 250).then_some(()))
    })?;
    ensure!(
        !agent
            .events()?
            .iter()
            .any(|event| event.is("level") && event.text("kind") == "accept"),
        "it was in trouble before the trouble"
    );
    match *trouble {
        Trouble::Surge(per_s) => load.set_rate(per_s)?,
        Trouble::Slow(work) => pace.set(work)?,
    }
    let begun = Instant::now();
    let warned = agent.wait_for("that the accept queue is in trouble", SOON, |event| {
        event.is("level") && event.text("kind") == "accept"
    })?;
    println!(
        "{} {:?} after the trouble began: depth {}, in {}/s, out {}/s",
        warned.text("to"),
        warned.at - begun,
        warned.value["depth"],
        warned.value["arrivals_per_s"],
        warned.value["departures_per_s"],
    );
    ss::wait_for(
        Some(&network),
        service.address().port(),
        "70 to wait",
        |waiting| waiting >= 70,
    )?;
    pace.set(USUAL)?;
    load.set_rate(15.0)?;
    let episode = agent.wait_for("the end of the episode", SOON, |event| {
        event.is("episode")
            && event.text("kind") == "accept"
            && event.value.get("ongoing").is_none()
    })?;
    println!(
        "driven by {}: {}",
        episode.text("driven_by"),
        episode.text("evidence")
    );
    ended(&agent)?;
    Ok(episode.text("driven_by").to_owned())
}

#[test]
fn a_surge_is_told_to_be_driven_by_the_producer() -> Result<()> {
    const TEST: &str = "a_surge_is_told_to_be_driven_by_the_producer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    let by = driven_by(&Trouble::Surge(75.0))?;
    ensure!(by == "producer", "it is said to be driven by {by}");
    Ok(())
}

#[test]
fn a_slow_service_is_told_to_be_driven_by_the_consumer() -> Result<()> {
    const TEST: &str = "a_slow_service_is_told_to_be_driven_by_the_consumer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    let by = driven_by(&Trouble::Slow(Duration::from_millis(80)))?;
    ensure!(by == "consumer", "it is said to be driven by {by}");
    Ok(())
}
