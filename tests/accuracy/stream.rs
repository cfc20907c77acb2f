//! TCP connections: unread bytes and unacknowledged bytes.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::net::sockopt::{socket_recv_buffer_size, socket_send_buffer_size};
use tailback_tests::lines::unix_ns;

use crate::{
    course::Course,
    ktls,
    report::Report,
    sampling::{self, SETTLED_NS, compare_age, compare_steady},
    sys,
};

/// A connection with both ends in this process.
pub struct Pair {
    _listener: TcpListener,
    pub client: TcpStream,
    pub server: TcpStream,
    /// The name that the agent gives the accepted end.
    pub name: String,
}

impl Pair {
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
        let client = TcpStream::connect(listener.local_addr()?).context("connect")?;
        let (server, _) = listener.accept().context("accept")?;
        client.set_nodelay(true).context("set TCP_NODELAY")?;
        Ok(Self {
            name: format!(":{}", listener.local_addr()?.port()),
            _listener: listener,
            client,
            server,
        })
    }
}

pub fn measure_recv(report: &mut Report) -> Result<()> {
    for bytes in [1_000, 40_000] {
        let mut pair = Pair::new()?;
        let duration = Duration::from_millis(1800);
        let (samples, since_ns) = sampling::during(duration, || {
            let since_ns = unix_ns();
            pair.client.write_all(&vec![0; bytes]).context("write")?;
            Ok(since_ns)
        })?;
        let queue = samples.queue("recv", |name| name == pair.name);
        let unread = sys::readable(&pair.server)?;
        let buffer = socket_recv_buffer_size(&pair.server).context("SO_RCVBUF")?;
        let keys = [
            ("depth", "depth", unread),
            ("limit", "limit", buffer as f64),
        ];
        compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
        compare_age(report, &queue, (since_ns, unix_ns()), "oldest");
    }
    recv_rates(report)?;
    ktls::measure_recv(report)
}

fn recv_rates(report: &mut Report) -> Result<()> {
    let mut pair = Pair::new()?;
    let duration = Duration::from_millis(3000);
    let (samples, (written, read)) = sampling::during(duration, || {
        let (mut written, mut read) = (Course::default(), Course::default());
        let end = Instant::now() + duration;
        let mut buffer = [0; 1000];
        let mut bytes = 0.0;
        while Instant::now() < end {
            pair.client.write_all(&buffer).context("write")?;
            bytes += buffer.len() as f64;
            written.note(bytes);
            // Paces the load.
            thread::sleep(Duration::from_millis(3));
            pair.server.read_exact(&mut buffer).context("read")?;
            read.note(bytes);
        }
        Ok((written, read))
    })?;
    let queue = samples.queue("recv", |name| name == pair.name);
    sampling::compare_rate(report, &queue, &written, ("arrivals", "arrivals_per_s"));
    sampling::compare_rate(report, &queue, &read, ("departures", "departures_per_s"));
    Ok(())
}

/// Fills the send queue of a peer that does not read.
pub fn measure_send(report: &mut Report) -> Result<()> {
    let mut pair = Pair::new()?;
    let (samples, since_ns) = sampling::during(Duration::from_millis(2500), || {
        pair.server
            .set_nonblocking(true)
            .context("set O_NONBLOCK")?;
        let (mut since_ns, mut unacknowledged) = (unix_ns(), 0.0);
        // The peer's buffer grows for a while and acknowledgements come late: write until nothing changes for 500 ms.
        let mut quiet = Instant::now();
        while quiet.elapsed() < Duration::from_millis(500) {
            match pair.server.write(&[0; 65_536]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error).context("write"),
            }
            let before = std::mem::replace(&mut unacknowledged, sys::outgoing(&pair.server)?);
            if unacknowledged != before {
                (since_ns, quiet) = (unix_ns(), Instant::now());
            }
        }
        Ok(since_ns)
    })?;
    let unacknowledged = sys::outgoing(&pair.server)?;
    ensure!(unacknowledged > 0.0, "the peer acknowledged every byte");
    let buffer = socket_send_buffer_size(&pair.server).context("SO_SNDBUF")?;
    let queue = samples.queue("send", |name| name == pair.name);
    let keys = [
        ("depth", "depth", unacknowledged),
        ("limit", "limit", buffer as f64),
    ];
    compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "oldest");
    ktls::measure_send(report)
}
