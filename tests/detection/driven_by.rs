//! Whether an episode is attributed to its producer or its consumer.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tailback_tests::{
    load::{Load, Plan, Spacing},
    needs,
    network::Network,
    service::{Pace, Service},
    ss, wait,
};

use crate::{DEADLINE, SUBJECT, alone, stop, watch};

/// The fault planted after ten healthy seconds.
enum Fault {
    /// Arrival rate, requests per second.
    Surge(f64),
    /// Service time of each request.
    Slow(Duration),
}

/// Loads a service with a capacity of 50 requests/s with 25/s, then plants the fault until 70 requests wait, then loads it
/// with 15/s. Returns `driven_by` of its episode.
fn driven_by(fault: &Fault) -> Result<String> {
    /// Healthy service time.
    const SERVICE_TIME: Duration = Duration::from_millis(20);
    // Its own network, where no other connections are counted.
    let network = Network::new()?;
    let pace = Pace::new(SERVICE_TIME)?;
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
    wait::until("250 responses", DEADLINE, || {
        Ok((load.done().len() >= 250).then_some(()))
    })?;
    ensure!(
        !agent
            .events()?
            .iter()
            .any(|event| event.is("level") && event.text("kind") == "accept"),
        "the queue left ok before the fault"
    );
    match *fault {
        Fault::Surge(per_s) => load.set_rate(per_s)?,
        Fault::Slow(work) => pace.set(work)?,
    }
    let begun = Instant::now();
    let warned = agent.wait_for("that the accept queue leaves ok", DEADLINE, |event| {
        event.is("level") && event.text("kind") == "accept"
    })?;
    println!(
        "{} {:?} after the fault: depth {}, arrivals {}/s, departures {}/s",
        warned.text("to"),
        warned.at - begun,
        warned.value["depth"],
        warned.value["arrivals_per_s"],
        warned.value["departures_per_s"],
    );
    ss::wait_for(
        Some(&network),
        service.address().port(),
        "70 waiting connections",
        |waiting| waiting >= 70,
    )?;
    pace.set(SERVICE_TIME)?;
    load.set_rate(15.0)?;
    let episode = agent.wait_for("the end of the episode", DEADLINE, |event| {
        event.is("episode")
            && event.text("kind") == "accept"
            && event.value.get("ongoing").is_none()
    })?;
    println!(
        "driven by {}: {}",
        episode.text("driven_by"),
        episode.text("evidence")
    );
    stop(&agent)?;
    Ok(episode.text("driven_by").to_owned())
}

#[test]
fn a_surge_is_attributed_to_the_producer() -> Result<()> {
    const TEST: &str = "a_surge_is_attributed_to_the_producer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    wait::unless_paused(|| {
        let driver = driven_by(&Fault::Surge(75.0))?;
        ensure!(driver == "producer", "driven by {driver}");
        Ok(())
    })
}

#[test]
fn a_slow_service_is_attributed_to_the_consumer() -> Result<()> {
    const TEST: &str = "a_slow_service_is_attributed_to_the_consumer";
    if !needs::met(TEST, &["ip", "nsenter", "ss", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    wait::unless_paused(|| {
        let driver = driven_by(&Fault::Slow(Duration::from_millis(80)))?;
        ensure!(driver == "consumer", "driven by {driver}");
        Ok(())
    })
}
