//! Receive and send queues of TCP connections, compared with the sockets' ioctls.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _},
    process,
};

use anyhow::{Context as _, Result, ensure};
use rustix::io::ioctl_fionread;
use tailback_tests::{
    needs, ports,
    sample::{float, number},
    sockets, wait,
};

use crate::{DEADLINE, sample_this_process};

/// Both ends of a connection, and the listener that accepted the server's end.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    listener: TcpListener,
}

impl Pair {
    fn new() -> Result<Self> {
        Self::with_recv_buffer(None)
    }

    fn with_recv_buffer(bytes: Option<usize>) -> Result<Self> {
        let listener = sockets::listen_with(ports::local(0), 10, false, bytes)?;
        let client = TcpStream::connect(listener.local_addr()?).context("connect")?;
        let (server, _) = listener.accept().context("accept")?;
        Ok(Self {
            client,
            server,
            listener,
        })
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Queue name of the accepted end.
    fn served(&self) -> Result<String> {
        Ok(format!(":{}", self.address()?.port()))
    }

    /// Queue name of the connecting end.
    fn opened(&self) -> Result<String> {
        Ok(format!("-> {}", self.address()?))
    }
}

/// Unread bytes.
fn siocinq(socket: impl AsFd) -> Result<u64> {
    // SIOCINQ equals FIONREAD.
    ioctl_fionread(socket).context("ioctl SIOCINQ")
}

/// Unacknowledged bytes.
fn siocoutq(socket: impl AsFd) -> Result<u64> {
    // SIOCOUTQ equals TIOCOUTQ (include/uapi/linux/sockios.h).
    const SIOCOUTQ: rustix::ioctl::Opcode = 0x5411;
    // SAFETY: SIOCOUTQ writes one int.
    let getter = unsafe { rustix::ioctl::Getter::<SIOCOUTQ, i32>::new() };
    // SAFETY: as above; the descriptor is open.
    let bytes = unsafe { rustix::ioctl::ioctl(socket, getter) }.context("ioctl SIOCOUTQ")?;
    Ok(u64::try_from(bytes)?)
}

/// Writes up to `bytes`, as many as the buffers accept. Returns their number.
fn fill(stream: &mut TcpStream, bytes: usize) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let mut written = 0;
    let chunk = vec![b'x'; bytes.clamp(1, 65_536)];
    while written < bytes {
        match stream.write(&chunk[..chunk.len().min(bytes - written)]) {
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("write"),
        }
    }
    stream.set_nonblocking(false)?;
    Ok(written)
}

fn wait_for_unread(socket: &TcpStream, bytes: u64) -> Result<()> {
    wait::until(&format!("{bytes} unread bytes"), DEADLINE, || {
        Ok((siocinq(socket)? == bytes).then_some(()))
    })
}

#[test]
fn unread_bytes_match_siocinq() -> Result<()> {
    const TEST: &str = "unread_bytes_match_siocinq";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    /// What happens to the connection after its bytes were sent.
    #[derive(Clone, Copy, Debug)]
    enum Action {
        Nothing,
        PartIsRead(usize),
        SenderShutsDown,
        ReaderShutsDown,
        BothShutDown,
        SenderResets,
    }
    let cases = [
        (0, Action::Nothing),
        (1, Action::Nothing),
        (1_448, Action::Nothing),
        (65_536, Action::Nothing),
        (100_000, Action::PartIsRead(33_333)),
        (0, Action::SenderShutsDown),
        (1, Action::SenderShutsDown),
        (50_000, Action::SenderShutsDown),
        (50_000, Action::ReaderShutsDown),
        (50_000, Action::BothShutDown),
        (1_000, Action::SenderResets),
    ];
    let mut pairs = Vec::new();
    // Each case for both ends: unread at the accepting and at the connecting end.
    for (bytes, then) in cases {
        for accepted in [true, false] {
            let mut pair = Pair::new()?;
            let peer = format!("-> {}", pair.server.peer_addr()?);
            let closed = matches!(then, Action::BothShutDown | Action::SenderResets);
            let name = match (accepted, closed) {
                (true, false) => pair.served()?,
                // A closed socket has released its port: first sampled then, it is named by its peer.
                (true, true) => peer,
                (false, _) => pair.opened()?,
            };
            let (mut writer, mut reader) = if accepted {
                (pair.client, pair.server)
            } else {
                (pair.server, pair.client)
            };
            ensure!(
                fill(&mut writer, bytes)? == bytes,
                "the buffers hold less than {bytes} bytes"
            );
            wait_for_unread(&reader, bytes as u64)?;
            match then {
                Action::Nothing => {}
                Action::PartIsRead(part) => reader.read_exact(&mut vec![0; part])?,
                Action::SenderShutsDown => writer.shutdown(Shutdown::Write)?,
                Action::ReaderShutsDown => reader.shutdown(Shutdown::Write)?,
                Action::BothShutDown => {
                    reader.shutdown(Shutdown::Write)?;
                    writer.shutdown(Shutdown::Write)?;
                }
                Action::SenderResets => {
                    sockets::reset_on_close(&writer)?;
                    writer = reader.try_clone()?;
                }
            }
            pair.client = writer;
            pair.server = reader;
            pairs.push((bytes, then, name, pair));
        }
    }
    let sample = sample_this_process()?;
    let mut wrong = Vec::new();
    for (bytes, then, name, pair) in &pairs {
        let truth = siocinq(&pair.server)?;
        let ours = number(sample.queue("recv", name)?, "depth")?;
        let result = format!("{bytes} bytes, {then:?}, {name}: agent {ours}, SIOCINQ {truth}");
        println!("{result}");
        // For a closed connection the agent cannot distinguish a FIN, which takes a sequence number, from a reset, which
        // takes none.
        let error = u64::from(matches!(then, Action::SenderResets));
        if ours.abs_diff(truth) > error {
            wrong.push(result);
        }
    }
    println!(
        "{} queues, {} differ from SIOCINQ",
        pairs.len(),
        wrong.len()
    );
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn unacknowledged_bytes_match_siocoutq() -> Result<()> {
    const TEST: &str = "unacknowledged_bytes_match_siocoutq";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let mut pairs = Vec::new();
    for (bytes, half_closed) in [
        (0, false),
        (1, false),
        (20_000, false),
        (200_000, false),
        (1_000_000, false),
        // More than any buffer holds.
        (100_000_000, false),
        (0, true),
        (200_000, true),
    ] {
        for accepted in [true, false] {
            let mut pair = Pair::with_recv_buffer(accepted.then_some(4_096).or(Some(4_096)))?;
            let name = if accepted {
                pair.served()?
            } else {
                pair.opened()?
            };
            let writer = if accepted {
                &mut pair.server
            } else {
                &mut pair.client
            };
            let written = fill(writer, bytes)?;
            if half_closed {
                writer.shutdown(Shutdown::Write)?;
            }
            pairs.push((written, half_closed, accepted, name, pair));
        }
    }
    let truths = || -> Result<Vec<u64>> {
        pairs
            .iter()
            .map(|(.., accepted, _, pair)| {
                siocoutq(if *accepted {
                    &pair.server
                } else {
                    &pair.client
                })
            })
            .collect()
    };
    // Until the windows are closed: the truth is the same before and after the sample.
    let (sample, truth) = wait::until("stable send queues", DEADLINE, || {
        let before = truths()?;
        let sample = sample_this_process()?;
        Ok((before == truths()?).then_some((sample, before)))
    })?;
    let mut wrong = Vec::new();
    let mut nonempty = 0;
    for ((written, half_closed, _, name, _), truth) in pairs.iter().zip(truth) {
        let queue = sample.queue("send", name)?;
        let ours = number(queue, "depth")?;
        // SIOCOUTQ counts a queued FIN as a byte, because it takes a sequence number; the agent does not.
        let fin = u64::from(*half_closed && truth > 0);
        println!(
            "{written} bytes{}, {name}: agent {ours}, SIOCOUTQ {truth}, limit {}, {}",
            if *half_closed { ", then FIN" } else { "" },
            queue["limit"],
            queue["worst"],
        );
        if ours + fin != truth {
            wrong.push(format!(
                "{written} bytes, {name}: agent {ours}, SIOCOUTQ {truth}"
            ));
        }
        nonempty += u32::from(truth > 0);
    }
    println!(
        "{} queues, {nonempty} with bytes, {} differ from SIOCOUTQ",
        pairs.len(),
        wrong.len()
    );
    ensure!(nonempty >= 6, "only {nonempty} queues have bytes");
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn the_worst_of_many_connections_is_named() -> Result<()> {
    const TEST: &str = "the_worst_of_many_connections_is_named";
    if !needs::met(TEST, &[]) {
        return Ok(());
    }
    let listener = sockets::listen(ports::local(0), 100, false)?;
    let address = listener.local_addr()?;
    let mut pairs = Vec::new();
    let mut total = 0;
    for index in 0..30_u64 {
        let mut client = TcpStream::connect(address)?;
        let (server, peer) = listener.accept()?;
        // Number 17 has the most bytes; even numbers have none.
        let bytes = if index % 2 == 0 {
            0
        } else {
            1_000 + 100 * (17 - index.abs_diff(17))
        };
        fill(&mut client, bytes as usize)?;
        wait_for_unread(&server, bytes)?;
        total += bytes;
        pairs.push((client, server, peer));
    }
    let sample = sample_this_process()?;
    let queue = sample.queue("recv", &format!(":{}", address.port()))?;
    let (_, server, peer) = &pairs[17];
    let expected = format!(
        "process {} fd {} with {peer}",
        process::id(),
        server.as_raw_fd()
    );
    println!("named: {}; the worst is {expected}", queue["worst"]);
    ensure!(
        queue["worst"] == expected.as_str(),
        "named {} instead of {expected}",
        queue["worst"]
    );
    ensure!(number(queue, "depth")? == siocinq(server)?, "{queue}");
    ensure!(
        float(queue, "total_bytes")? == total as f64,
        "{queue} should sum up to {total}"
    );
    ensure!(float(queue, "connections")? == 30.0, "{queue}");
    println!("depth, sum and number of connections: error 0");
    Ok(())
}
