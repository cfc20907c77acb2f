//! Depth, limit and ages of accept queues, compared with `ss` and the clients' clocks.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process, thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    lines::unix_ns,
    needs, ports,
    random::Random,
    sample::{MAX_OUTPUT_DELAY, Sample, number},
    skip::skip,
    sockets, ss,
};

use crate::{alone, connect, sample_this_process};

#[test]
fn depth_and_backlog_of_an_accept_queue_match_ss() -> Result<()> {
    const TEST: &str = "depth_and_backlog_of_an_accept_queue_match_ss";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    const BACKLOG: i32 = 12;
    let v4 = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    // The kernel queues one connection more than the backlog.
    let depths = [0, 1, 7, 12, 13];
    type Address = fn(u16) -> SocketAddr;
    let families: [(&str, Address, Address); 4] = [
        ("IPv4", v4, v4),
        ("IPv6", v6, v6),
        ("dual stack, IPv4 clients", any, v4),
        ("dual stack, IPv6 clients", any, v6),
    ];
    let mut cases = Vec::new();
    for (family, local, to) in families {
        for depth in depths {
            let listener = sockets::listen(local(0), BACKLOG, false)?;
            let port = listener.local_addr()?.port();
            let clients = connect(to(port), depth)?;
            cases.push((family, depth, local(port), listener, clients));
        }
    }
    for (_, depth, address, ..) in &cases {
        wait_for_depth(address.port(), *depth)?;
    }
    let sample = sample_this_process()?;
    let mut wrong = 0;
    for (family, depth, address, ..) in &cases {
        let queue = sample.queue("accept", &address.to_string())?;
        let ours = (number(queue, "depth")?, number(queue, "limit")?);
        let theirs = ss::sums(None, address.port())?;
        println!("{family}, {depth:2} waiting: agent {ours:?}, ss {theirs:?}");
        wrong += u32::from(ours != theirs);
        let full = ours.0 >= ours.1;
        ensure!(
            full == (queue["time_to_full_ns"] == 0),
            "time_to_full_ns is 0 for a queue that is not full, or not 0 for a full one: {queue}"
        );
    }
    println!("{} queues, {wrong} differ from ss: error 0", cases.len());
    ensure!(wrong == 0, "{wrong} queues differ from ss");
    Ok(())
}

/// A waiting connection, with the times at which connect() began and returned, ns since 1970.
struct Waiting {
    began_ns: u64,
    returned_ns: u64,
    stream: Option<TcpStream>,
}

/// Compares the age of each connection with the client's clock, while the service accepts `step` at a time. Returns the
/// errors, ms: how far each age lies outside the range that the client's two timestamps allow.
fn age_errors(listener: &TcpListener, mut waiting: Vec<Waiting>, step: usize) -> Result<Vec<f64>> {
    let name = listener.local_addr()?.to_string();
    let mut all = Vec::new();
    while !waiting.is_empty() {
        let sample = Sample::prompt_of_process(process::id())?;
        let queue = sample.queue("accept", &name)?;
        let ages = queue["ages_ns"]
            .as_array()
            .context("the queue has no ages")?;
        let ages: Vec<u64> = ages.iter().filter_map(Value::as_u64).collect();
        ensure!(number(queue, "depth")? == waiting.len() as u64, "{queue}");
        ensure!(
            ages.len() == waiting.len(),
            "{} ages for {} waiting connections",
            ages.len(),
            waiting.len()
        );
        ensure!(number(queue, "oldest_age_ns")? == ages[0], "{queue}");
        let now_ns = number(queue, "time_unix_ns")?;
        let error = |(age_ns, client): (&u64, &Waiting)| {
            let age = *age_ns as f64 / 1e6;
            let max = (now_ns - client.began_ns) as f64 / 1e6;
            let min = (now_ns - client.returned_ns) as f64 / 1e6;
            (age - max).max(0.0) + (age - min).min(0.0)
        };
        let errors: Vec<f64> = ages.iter().zip(&waiting).map(error).collect();
        let min = errors.iter().copied().fold(f64::INFINITY, f64::min);
        let max = errors.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        println!(
            "{} waiting, the oldest for {:.3} ms: errors from {min:+.3} to {max:+.3} ms",
            waiting.len(),
            ages[0] as f64 / 1e6,
        );
        all.extend(errors.into_iter().map(f64::abs));
        for _ in waiting.drain(..step.min(waiting.len())) {
            listener.accept().context("accept")?;
        }
    }
    Ok(all)
}

/// Waits until `depth` connections are queued: the last ACK of a handshake may be in transit when connect() returns.
fn wait_for_depth(port: u16, depth: usize) -> Result<()> {
    let what = format!("{depth} waiting connections");
    ss::wait_for(None, port, &what, |waiting| waiting == depth as u64).map(drop)
}

fn queue_connections(
    to: SocketAddr,
    count: usize,
    mut gap: impl FnMut() -> Duration,
) -> Result<Vec<Waiting>> {
    let mut waiting = Vec::with_capacity(count);
    for _ in 0..count {
        let began_ns = unix_ns();
        let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
        waiting.push(Waiting {
            began_ns,
            returned_ns: unix_ns(),
            stream: Some(stream),
        });
        // Paces the load; it waits for nothing.
        thread::sleep(gap());
    }
    Ok(waiting)
}

fn check_ages(mut errors: Vec<f64>) -> Result<()> {
    errors.sort_unstable_by(f64::total_cmp);
    let (median, max) = (errors[errors.len() / 2], errors[errors.len() - 1]);
    println!(
        "error of {} ages: median {median:.3} ms, largest {max:.3} ms",
        errors.len()
    );
    // The agent reads the queue a little after the reported time.
    ensure!(
        median <= 2.0 && max <= MAX_OUTPUT_DELAY.as_secs_f64() * 1e3,
        "the ages are off by {median:.3} ms, the worst by {max:.3} ms"
    );
    Ok(())
}

#[test]
fn the_age_of_each_waiting_connection_matches_the_clients_clock() -> Result<()> {
    const TEST: &str = "the_age_of_each_waiting_connection_matches_the_clients_clock";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    let listener = sockets::listen(ports::local(0), 100, false)?;
    let mut random = Random::new(40);
    let waiting = queue_connections(listener.local_addr()?, 40, || {
        Duration::from_micros(2_000 + random.below(20_000) as u64)
    })?;
    wait_for_depth(listener.local_addr()?.port(), 40)?;
    check_ages(age_errors(&listener, waiting, 15)?)
}

#[test]
fn ages_are_right_in_a_queue_of_300() -> Result<()> {
    const TEST: &str = "ages_are_right_in_a_queue_of_300";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    if sockets::longest_backlog()? < 512 {
        skip(TEST, "net.core.somaxconn is below 512");
        return Ok(());
    }
    let _alone = alone();
    let listener = sockets::listen(ports::local(0), 512, false)?;
    let waiting = queue_connections(listener.local_addr()?, 300, || Duration::from_micros(500))?;
    wait_for_depth(listener.local_addr()?.port(), 300)?;
    check_ages(age_errors(&listener, waiting, 150)?)
}

#[test]
fn a_waiting_connection_keeps_its_age_when_its_client_resets_it() -> Result<()> {
    const TEST: &str = "a_waiting_connection_keeps_its_age_when_its_client_resets_it";
    if !needs::met(TEST, &["ss"]) {
        return Ok(());
    }
    let _alone = alone();
    let listener = sockets::listen(ports::local(0), 100, false)?;
    let mut waiting = queue_connections(listener.local_addr()?, 20, || Duration::from_millis(20))?;
    wait_for_depth(listener.local_addr()?.port(), 20)?;
    // The oldest clients give up, as after a timeout. Their connections stay in the queue.
    for waiting in &mut waiting[..10] {
        let stream = waiting
            .stream
            .take()
            .context("its stream was taken before")?;
        sockets::reset_on_close(&stream)?;
    }
    check_ages(age_errors(&listener, waiting, 5)?)
}
