//! SYN queues: handshakes that callers begin and never complete.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect, socket_with},
};
use tailback_tests::{lines::unix_ns, sockets};

use crate::{
    accept::report_losses,
    report::Report,
    sampling::{self, compare_steady},
    sys,
};

const BACKLOG: i32 = 16;

pub fn measure(report: &mut Report) -> Result<()> {
    if let Some(why) = sys::own_network()? {
        report.skip(&why, |_| true);
        return Ok(());
    }
    // With SYN cookies a full queue loses nothing.
    let file = "/proc/sys/net/ipv4/tcp_syncookies";
    fs::write(file, "0").with_context(|| format!("write {file}"))?;
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = sockets::listen(local, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let is_ours = |name: &str| name == address.to_string();

    const CALLERS: usize = 7;
    let callers = begin(address, CALLERS)?;
    // connect() sends the SYN; over loopback the request is queued when it returns.
    let since_ns = unix_ns();
    let samples = sampling::steady(Duration::from_millis(600))?;
    let keys = [
        ("depth", "depth", CALLERS as f64),
        ("limit", "limit", f64::from(BACKLOG)),
    ];
    compare_steady(report, &samples.queue("syn", is_ours), since_ns, &keys);

    // Requests beyond the limit are dropped; each is retransmitted after a second and dropped again.
    const EXCESS: usize = 30;
    let dropped = || sys::network_counter("TcpExt", "TCPReqQFullDrop");
    let before = dropped()?;
    let (samples, more) = sampling::during(Duration::from_millis(2500), || {
        let more = begin(address, EXCESS)?;
        // Callers stop well before the last sample.
        thread::sleep(Duration::from_millis(1500));
        Ok((dropped()?, drop(more)).0)
    })?;
    let lost = more - before;
    let room = BACKLOG as usize - CALLERS;
    ensure!(
        lost >= (EXCESS - room) as f64 && dropped()? == more,
        "{lost} were dropped; the queue has room for {room} of {EXCESS}"
    );
    report_losses(report, "losses", lost, &samples.queue("syn", is_ours));
    drop((callers, listener));
    Ok(())
}

/// Starts handshakes whose SYN-ACK is dropped, so that they never complete.
fn begin(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket: OwnedFd = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
                .context("create a socket")?;
            sys::drop_all_input(&socket)?;
            match connect(&socket, &to) {
                Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
                other => anyhow::bail!("connect() returned {other:?}"),
            }
        })
        .collect()
}
