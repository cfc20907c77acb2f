//! Connections of other address families and protocols, half-closed ones, and sequence numbers that wrap.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept, bind, connect, ipproto, listen, socket_with,
};
use tailback_tests::{
    needs, ports,
    process::Process,
    program,
    sample::{Sample, number},
    skip::skip,
    sockets, wait,
};

use crate::{DEADLINE, sample_this_process, unread};

#[test]
fn ipv6_and_dual_stack_connections_have_conventional_names() -> Result<()> {
    const TEST: &str = "ipv6_and_dual_stack_connections_have_conventional_names";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let v4 = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    type Address = fn(u16) -> SocketAddr;
    let cases: [(Address, Address, usize); 3] = [(v6, v6, 600), (any, v4, 700), (any, v6, 800)];
    let mut kept = Vec::new();
    for (local, to, bytes) in cases {
        let listener = sockets::listen(local(ports::free()?), 10, false)?;
        let to = to(listener.local_addr()?.port());
        let pair = unread(&listener, to, bytes)?;
        kept.push((listener, to, bytes as u64, pair));
    }
    let sample = sample_this_process()?;
    for (listener, to, bytes, (client, _)) in &kept {
        let (address, from) = (listener.local_addr()?, client.local_addr()?);
        println!("{address}, from {from}: {bytes} unread");
        sample.queue("accept", &address.to_string())?;
        let recv = sample.queue("recv", &format!(":{}", to.port()))?;
        ensure!(number(recv, "depth")? == *bytes, "{recv}");
        let worst = recv["worst"].as_str().unwrap_or_default();
        ensure!(worst.ends_with(&format!("with {from}")), "{recv}");
        // The connecting end is named by the address that it connected to.
        let opened = sample.queue("send", &format!("-> {to}"))?;
        ensure!(number(opened, "depth")? == 0, "{opened}");
    }
    Ok(())
}

#[test]
fn an_mptcp_listener_is_sampled_and_its_connections_are_right_or_absent() -> Result<()> {
    const TEST: &str = "an_mptcp_listener_is_sampled_and_its_connections_are_right_or_absent";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let socket = || {
        socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            Some(ipproto::MPTCP),
        )
    };
    let listener = match socket() {
        Ok(listener) => listener,
        Err(error) => {
            skip(TEST, &format!("this kernel has no MPTCP: {error}"));
            return Ok(());
        }
    };
    let address = ports::local(ports::free()?);
    bind(&listener, &address)?;
    listen(&listener, 10)?;
    // The first connection is plain TCP, accepted, with unread bytes. Three more wait, two of them with MPTCP.
    let mut first = TcpStream::connect(address)?;
    let server = TcpStream::from(accept(&listener)?);
    first.write_all(&[0; 5_000])?;
    let began = Instant::now();
    let waiting = [socket()?, socket()?];
    for client in &waiting {
        connect(client, &address)?;
    }
    let _third = TcpStream::connect(address)?;
    let mut byte = [0];
    wait::until("the bytes", DEADLINE, || {
        Ok((server.peek(&mut byte).context("peek")? == 1).then_some(()))
    })?;
    thread::sleep(Duration::from_millis(200));
    let sample = sample_this_process()?;
    let backlog = sample.queue("accept", &format!("127.0.0.1:{}", address.port()))?;
    ensure!(
        number(backlog, "depth")? == 3 && number(backlog, "limit")? == 10,
        "{backlog}"
    );
    let oldest = Duration::from_nanos(number(backlog, "oldest_age_ns")?);
    ensure!(
        (Duration::from_millis(195)..began.elapsed()).contains(&oldest),
        "{backlog}"
    );
    let recv = sample.queue("recv", &format!(":{}", address.port()))?;
    ensure!(number(recv, "depth")? == 5_000, "{recv}");

    // The outer socket of an MPTCP connection has no sequence numbers, so its bytes are not counted.
    let multipath = TcpStream::from(accept(&listener)?);
    let mut client = TcpStream::from(waiting.into_iter().next().context("a client")?);
    client.write_all(&[0; 700])?;
    wait::until("the bytes", DEADLINE, || {
        Ok((multipath.peek(&mut byte).context("peek")? == 1).then_some(()))
    })?;
    let sample = sample_this_process()?;
    let recv = sample.queue("recv", &format!(":{}", address.port()))?;
    ensure!(
        number(recv, "depth")? == 5_000 && number(recv, "total_bytes")? == 5_000,
        "{recv}"
    );
    Ok(())
}

#[test]
fn a_ktls_connection_has_a_plausible_depth() -> Result<()> {
    const TEST: &str = "a_ktls_connection_has_a_plausible_depth";
    if !needs::met(TEST, &["python3"]) {
        return Ok(());
    }
    let (python, first) = python("ktls.py", &[])?;
    if let Some(why) = first.strip_prefix("none: ") {
        skip(TEST, &format!("this kernel has no kTLS: {why}"));
        return Ok(());
    }
    let port = first.rsplit(' ').next().unwrap_or_default().to_owned();
    let sample = Sample::of_process(python.pid())?;
    let mut found = 0;
    let queues = ["recv", "send"]
        .into_iter()
        .flat_map(|kind| sample.queues(kind));
    for queue in queues.filter(|queue| {
        queue["name"]
            .as_str()
            .is_some_and(|name| name.ends_with(&port))
    }) {
        println!("{queue}");
        found += 1;
        // Each record of up to 16 kB adds a header and a tag; some records may be decrypted already.
        ensure!(number(queue, "depth")? <= 5_000 + 100, "{queue}");
    }
    ensure!(found > 0, "no queue of port {port} is reported");
    Ok(())
}

#[test]
fn the_fin_of_a_half_closed_connection_is_not_counted_as_a_byte() -> Result<()> {
    const TEST: &str = "the_fin_of_a_half_closed_connection_is_not_counted_as_a_byte";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let listen = || sockets::listen(ports::local(0), 10, false);
    // Three cases: bytes before the FIN are unread; nothing is unread; the buffers are full, so that the FIN has to wait.
    let (some, none, full) = (listen()?, listen()?, listen()?);
    let some_pair = unread(&some, some.local_addr()?, 1_000)?;
    let none_pair = unread(&none, none.local_addr()?, 0)?;
    let (mut full_client, full_server) = unread(&full, full.local_addr()?, 0)?;
    full_client.set_nonblocking(true)?;
    let mut sent = 0;
    loop {
        match full_client.write(&[0; 65_536]) {
            Ok(more) => sent += more as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("fill a connection"),
        }
    }
    for client in [&some_pair.0, &none_pair.0, &full_client] {
        client.shutdown(Shutdown::Write)?;
    }
    // The FIN has arrived when a read would return end of file.
    none_pair.1.peek(&mut [0]).context("wait for the FIN")?;
    let name = |kind: &str, listener: &TcpListener| -> Result<String> {
        let address = listener.local_addr()?;
        Ok(match kind {
            "recv" => format!(":{}", address.port()),
            _ => format!("-> {address}"),
        })
    };
    let sample = sample_this_process()?;
    for (kind, listener, truth) in [
        ("recv", &some, 1_000),
        ("send", &some, 0),
        ("recv", &none, 0),
        ("send", &none, 0),
    ] {
        let name = name(kind, listener)?;
        let queue = sample.queue(kind, &name)?;
        println!("{kind} {name}: {} of {truth}", queue["depth"]);
        ensure!(number(queue, "depth")? == truth, "{truth}: {queue}");
    }
    // The window may open a little during the sample: unread and unacknowledged bytes sum to the bytes sent.
    let unread_full = number(sample.queue("recv", &name("recv", &full)?)?, "depth")?;
    let unacknowledged = number(sample.queue("send", &name("send", &full)?)?, "depth")?;
    println!("{sent} sent: {unread_full} unread, {unacknowledged} unacknowledged");
    ensure!(unread_full + unacknowledged == sent);
    drop(full_server);
    // Both directions are closed, the descriptors still open: the state is LAST_ACK or TIME_WAIT, and nothing is queued.
    let mut server = &some_pair.1;
    server.read_exact(&mut [0; 1_000])?;
    server.shutdown(Shutdown::Write)?;
    none_pair.1.shutdown(Shutdown::Both)?;
    let sample = sample_this_process()?;
    for listener in [&some, &none] {
        for kind in ["recv", "send"] {
            let (port, to) = (
                format!(":{}", listener.local_addr()?.port()),
                format!("-> {}", listener.local_addr()?),
            );
            for queue in sample.queues(kind) {
                let ours = queue["name"] == *port || queue["name"] == *to;
                ensure!(!ours || number(queue, "depth")? == 0, "{queue}");
            }
        }
    }
    Ok(())
}

/// Starts a Python program of the harness and returns its first line.
fn python(file: &str, args: &[&str]) -> Result<(Process, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("harness")
        .join(file);
    let mut command = Command::new(program::need(&["python3"])?);
    let python = Process::start("python", command.arg(file).args(args))?;
    let first = python
        .lines()
        .wait("the first line of python", 0, DEADLINE, |line| {
            Some(line.text.clone())
        })?;
    Ok((python, first))
}

#[test]
fn depths_are_right_across_a_sequence_number_wrap() -> Result<()> {
    const TEST: &str = "depths_are_right_across_a_sequence_number_wrap";
    if !needs::met(TEST, &["python3"]) {
        return Ok(());
    }
    // (bytes before the wrap, bytes sent, bytes read): reading ends before, at and after the wrap; the last three exceed the
    // buffers.
    let cases = [
        "0,5000,0",
        "1,5000,0",
        "1,5000,1",
        "1000,5000,999",
        "1000,5000,1000",
        "1000,5000,1001",
        "5000,5000,0",
        "70000,60000,30000",
        "1000,9000000,0",
        "100000,9000000,50000",
        "3000000,9000000,0",
    ];
    let (python, _) = python("wrap.py", &cases)?;
    python.wait_line("ready", DEADLINE)?;
    let sample = Sample::of_process(python.pid())?;
    let mut checked = 0;
    for line in python.lines().all() {
        let numbers: Vec<u64> = line.text.split(' ').flat_map(str::parse).collect();
        let [port, before, unread, unacknowledged] = numbers[..] else {
            continue;
        };
        let recv = sample.queue("recv", &format!(":{port}"))?;
        let send = sample.queue("send", &format!("-> 127.0.0.1:{port}"))?;
        println!(
            "from {before} before the wrap: unread {} (SIOCINQ {unread}), unacknowledged {} (SIOCOUTQ {unacknowledged})",
            recv["depth"], send["depth"]
        );
        ensure!(number(recv, "depth")? == unread, "{unread}: {recv}");
        ensure!(
            number(send, "depth")? == unacknowledged,
            "{unacknowledged}: {send}"
        );
        for queue in [recv, send] {
            // Nothing moves; a miscounted wrap would give about 4 GB.
            for key in ["arrivals_per_s", "departures_per_s"] {
                ensure!(queue[key].as_f64().unwrap_or(0.0) == 0.0, "{queue}");
            }
        }
        checked += 1;
    }
    ensure!(checked == cases.len(), "{checked} of {} cases", cases.len());
    Ok(())
}
