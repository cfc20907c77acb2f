//! Losses, arrivals and departures of accept queues, compared with `nstat` and the clients' own counts.

use std::{
    fs,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tailback_tests::{
    lines::unix_ns,
    needs,
    sample::{Sample, number},
    service::Service,
    sockets,
    temp::TempDir,
    wait,
};

use crate::{DEADLINE, SUBJECT, alone, connect, watched::Watched};

/// Overflows the queue of a stopped service. A client that gives up at once is lost once; otherwise its SYN is retransmitted
/// and lost again.
fn lose_connections(clients: u64, gap: Duration, give_up: bool) -> Result<()> {
    const BACKLOG: u64 = 5;
    let watched = Watched::start(&["--backlog", &BACKLOG.to_string()], &[])?;
    let before = watched.network.counters()?;
    watched.service.process().freeze()?;
    let to = watched.service.address();
    let begun = Instant::now();
    let connecting = watched.network.inside(|| {
        let mut connecting = Vec::new();
        for _ in 0..clients {
            let stream = sockets::begin_connect(to)?;
            if !give_up {
                connecting.push(stream);
            }
            // Paces the load.
            thread::sleep(gap);
        }
        Ok(connecting)
    })?;
    let rounds = if give_up { 1 } else { 2 };
    wait::until("lost connections", DEADLINE, || {
        let lost = watched.counted(&before, "TcpExtListenOverflows")?;
        Ok((lost >= rounds * (clients - BACKLOG - 1)).then_some(()))
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    drop(connecting);
    watched.service.process().thaw()?;
    let episode = watched.episode()?;
    let ours = number(&episode.value, "losses")?;
    let overflows = watched.counted(&before, "TcpExtListenOverflows")?;
    let drops = watched.counted(&before, "TcpExtListenDrops")?;
    let error = ours as i64 - overflows as i64;
    println!(
        "at {:.0}/s: agent {ours} losses, nstat {overflows} overflows and {drops} drops: error {error:+}",
        overflows as f64 / seconds
    );
    ensure!(episode.text("level_max") == "full", "{}", episode.value);
    ensure!(ours == overflows, "{error:+} losses: {}", episode.value);
    Ok(())
}

#[test]
fn losses_of_an_accept_queue_match_nstat() -> Result<()> {
    const TEST: &str = "losses_of_an_accept_queue_match_nstat";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    lose_connections(60, Duration::from_millis(7), false)
}

#[test]
fn every_loss_is_counted_at_over_1000_per_second() -> Result<()> {
    const TEST: &str = "every_loss_is_counted_at_over_1000_per_second";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    lose_connections(4_000, Duration::from_micros(600), true)
}

/// Connects to a service that is stopped, then resumed. The episode must count each connection once.
fn count_connections(gap: Duration, while_stopped: u64, while_served: u64) -> Result<()> {
    /// Connections that open the episode.
    const FIRST: u64 = 3;
    let directory = TempDir::new("count")?;
    // The episode must outlast the load, on a slow machine too.
    let config = directory.write("tailback.toml", "[detect.accept]\nclear_after = \"9s\"\n")?;
    let config = config.display().to_string();
    let watched = Watched::start(&["--backlog", "4000"], &["--config", &config])?;
    let to = watched.service.address();
    let load = |count: u64| {
        watched.network.inside(|| {
            for _ in 0..count {
                TcpStream::connect(to).context("connect")?;
                // Paces the load.
                thread::sleep(gap);
            }
            Ok(())
        })
    };
    // The first connections open the episode; it counts only later arrivals.
    watched.service.process().freeze()?;
    load(FIRST)?;
    let opened = watched
        .agent
        .wait_for("that the queue leaves ok", DEADLINE, |event| {
            event.is("level")
        })?;
    let before = watched.network.counters()?;
    let begun = Instant::now();
    load(while_stopped)?;
    watched.service.process().thaw()?;
    load(while_served)?;
    let took = begun.elapsed();
    let opens = watched.counted(&before, "TcpPassiveOpens")?;
    let episode = watched.episode()?;
    let made = while_stopped + while_served;
    let (arrivals, departures) = (
        number(&episode.value, "arrivals")?,
        number(&episode.value, "departures")?,
    );
    println!(
        "at {:.0}/s: agent {arrivals} arrivals, clients {made} connections (nstat {opens}): error {:+}",
        made as f64 / took.as_secs_f64(),
        arrivals as i64 - made as i64
    );
    println!(
        "agent {departures} departures, service accepted {}: error {:+}",
        made + FIRST,
        departures as i64 - (made + FIRST) as i64
    );
    ensure!(
        opened.number("depth") == Some(FIRST as f64),
        "{}",
        opened.value
    );
    ensure!(opens == made, "another client connected");
    ensure!(arrivals == made, "{}", episode.value);
    ensure!(departures == made + FIRST, "{}", episode.value);
    Ok(())
}

#[test]
fn arrivals_and_departures_of_an_accept_queue_match_the_clients_counts() -> Result<()> {
    const TEST: &str = "arrivals_and_departures_of_an_accept_queue_match_the_clients_counts";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    count_connections(Duration::from_millis(4), 150, 300)
}

#[test]
fn arrivals_are_counted_once_at_over_1000_per_second() -> Result<()> {
    const TEST: &str = "arrivals_are_counted_once_at_over_1000_per_second";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    count_connections(Duration::from_micros(600), 3_900, 1_000)
}

/// Four connections wait at a stopped service, in a network where every handshake uses SYN cookies. Returns the time since
/// which they wait too, ns since 1970.
fn queue_by_cookie() -> Result<(Watched, Vec<TcpStream>, u64)> {
    let watched = Watched::start(&["--backlog", "100"], &[])?;
    let to = watched.service.address();
    let before = watched.network.counters()?;
    watched.service.process().freeze()?;
    let clients = watched.network.inside(|| {
        let file = "/proc/sys/net/ipv4/tcp_syncookies";
        fs::write(file, "2").with_context(|| format!("write {file}"))?;
        connect(to, 4)
    })?;
    let waiting_since_ns = unix_ns();
    ensure!(
        watched.counted(&before, "TcpExtSyncookiesRecv")? == 4,
        "the handshakes did not use cookies"
    );
    Ok((watched, clients, waiting_since_ns))
}

#[test]
fn connections_from_syn_cookies_have_no_wrong_age() -> Result<()> {
    const TEST: &str = "connections_from_syn_cookies_have_no_wrong_age";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let (watched, _clients, since_ns) = queue_by_cookie()?;
    let sample = Sample::of_process(watched.service.pid())?;
    let queue = sample.queue("accept", &watched.service.address().to_string())?;
    let longest_ns = number(queue, "time_unix_ns")? - since_ns + 50_000_000;
    println!(
        "{} waiting for {:.3} s at most; agent's oldest_age_ns: {}",
        queue["depth"],
        longest_ns as f64 / 1e9,
        queue["oldest_age_ns"]
    );
    ensure!(number(queue, "depth")? == 4, "{queue}");
    // The kernel does not record their times: an unknown age is correct.
    for key in ["oldest_age_ns", "wait_ns"] {
        ensure!(
            queue[key]
                .as_u64()
                .is_none_or(|age_ns| age_ns <= longest_ns),
            "{key}: {queue}"
        );
    }
    Ok(())
}

#[test]
fn connections_from_syn_cookies_that_wait_are_detected() -> Result<()> {
    const TEST: &str = "connections_from_syn_cookies_that_wait_are_detected";
    if !needs::met(TEST, &["ip", "nstat", "nsenter", "unshare"]) {
        return Ok(());
    }
    let (watched, _clients, _) = queue_by_cookie()?;
    let begun = Instant::now();
    let level = watched
        .agent
        .wait_for("that the queue leaves ok", DEADLINE, |event| {
            event.is("level")
        })?;
    println!(
        "{} {:?} after the connections arrived",
        level.text("to"),
        begun.elapsed()
    );
    ensure!(
        level.value["oldest_age_ns"]
            .as_u64()
            .is_none_or(|age_ns| age_ns <= begun.elapsed().as_nanos() as u64 + 100_000_000),
        "reported with a wrong age: {}",
        level.value
    );
    Ok(())
}

#[test]
fn connections_to_a_neighbour_are_not_counted() -> Result<()> {
    const TEST: &str = "connections_to_a_neighbour_are_not_counted";
    if !needs::met(TEST, &["ip", "nsenter", "unshare"]) {
        return Ok(());
    }
    let _alone = alone();
    const OURS: u64 = 40;
    const THEIRS: u64 = 1_000;
    let directory = TempDir::new("neighbour")?;
    // The episode must outlast the load, on a slow machine too.
    let config = directory.write("tailback.toml", "[detect.accept]\nclear_after = \"9s\"\n")?;
    let config = config.display().to_string();
    let watched = Watched::start(&["--backlog", "100"], &["--config", &config])?;
    let neighbour = ["take", "--listen", "127.0.0.1:0", "--backlog", "100"];
    let neighbour = Service::start(&mut watched.network.command(SUBJECT)?, &neighbour)?;
    let (ours, theirs) = (watched.service.address(), neighbour.address());
    watched.service.process().freeze()?;
    watched.network.inside(|| connect(ours, 1).map(drop))?;
    watched
        .agent
        .wait_for("that the queue leaves ok", DEADLINE, |event| {
            event.is("level")
        })?;
    // While our service is stopped, and while it serves.
    for half in 0..2 {
        if half == 1 {
            watched.service.process().thaw()?;
        }
        watched.network.inside(|| {
            for round in 0..THEIRS / 2 {
                connect(theirs, 1)?;
                if round % (THEIRS / OURS) == 0 {
                    connect(ours, 1)?;
                }
                // Paces the load.
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })?;
    }
    let episode = watched.episode()?;
    let arrivals = episode.value["arrivals"].as_u64();
    println!(
        "{OURS} connections to the service, {THEIRS} to a neighbour; agent {arrivals:?} arrivals"
    );
    // An unknown count may be absent; a reported one must be right.
    ensure!(
        arrivals.is_none_or(|arrivals| arrivals == OURS),
        "{}",
        episode.value
    );
    Ok(())
}
