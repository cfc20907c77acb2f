//! UDP receive queues: unread datagrams and drops.

use std::{net::UdpSocket, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::net::sockopt::{set_socket_recv_buffer_size, socket_recv_buffer_size};
use tailback_tests::lines::unix_ns;

use crate::{
    accept::report_losses,
    report::Report,
    sampling::{self, SETTLED_NS, compare_age, compare_steady},
    sys,
};

/// Payload of each datagram.
const DATAGRAM_BYTES: usize = 500;

pub fn measure(report: &mut Report) -> Result<()> {
    const SENT: usize = 20;
    let (sender, receiver) = pair()?;
    let (samples, since_ns) = sampling::during(Duration::from_millis(1800), || {
        let since_ns = unix_ns();
        send(&sender, SENT)?;
        Ok(since_ns)
    })?;
    let name = receiver.local_addr()?.to_string();
    let queue = samples.queue("udp", |queue| queue == name);
    let buffer = socket_recv_buffer_size(&receiver).context("SO_RCVBUF")?;
    let keys = [
        (
            "depth",
            "depth",
            f64::from(sys::memory(&receiver)?.received),
        ),
        ("datagrams", "datagrams", SENT as f64),
        ("limit", "limit", buffer as f64),
    ];
    compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "oldest");
    losses(report)
}

fn losses(report: &mut Report) -> Result<()> {
    const SENT: usize = 200;
    let (sender, receiver) = pair()?;
    set_socket_recv_buffer_size(&receiver, 16_384).context("set SO_RCVBUF")?;
    let (samples, ()) = sampling::during(Duration::from_millis(1200), || {
        // The first sample with queues must come before the losses.
        thread::sleep(Duration::from_millis(400));
        send(&sender, SENT)
    })?;
    let lost = sys::memory(&receiver)?.drops;
    ensure!(lost > 0, "none of {SENT} datagrams was lost");
    let name = receiver.local_addr()?.to_string();
    let queue = samples.queue("udp", |queue| queue == name);
    report_losses(report, "losses", f64::from(lost), &queue);
    Ok(())
}

fn pair() -> Result<(UdpSocket, UdpSocket)> {
    let receiver = UdpSocket::bind("127.0.0.1:0").context("create a socket")?;
    let sender = UdpSocket::bind("127.0.0.1:0").context("create a socket")?;
    sender.connect(receiver.local_addr()?).context("connect")?;
    Ok((sender, receiver))
}

fn send(sender: &UdpSocket, count: usize) -> Result<()> {
    for _ in 0..count {
        sender
            .send(&[0; DATAGRAM_BYTES])
            .context("send a datagram")?;
    }
    Ok(())
}
