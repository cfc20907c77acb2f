//! Handshakes under way: callers that begin, and then are silent for good.

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
    look::{self, standing},
    report::Report,
    sys,
};

const BACKLOG: i32 = 16;

pub fn measure(report: &mut Report) -> Result<()> {
    if let Some(why) = sys::own_network()? {
        report.skip(&why, |_| true);
        return Ok(());
    }
    // Else a full queue answers with cookies, and nothing is lost.
    let file = "/proc/sys/net/ipv4/tcp_syncookies";
    fs::write(file, "0").with_context(|| format!("write {file}"))?;
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = sockets::listen(local, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let is_ours = |name: &str| name == address.to_string();

    const CALLERS: usize = 7;
    let callers = begin(address, CALLERS)?;
    // The first SYN is sent within connect(), and the request is there when it returns.
    let since_ns = unix_ns();
    let looks = look::at(Duration::from_millis(600))?;
    let keys = [
        ("depth", "depth", CALLERS as f64),
        ("limit", "limit", f64::from(BACKLOG)),
    ];
    standing(report, &looks.queue("syn", is_ours), since_ns, &keys);

    // Those beyond the limit are dropped; each comes again after a second, and is dropped again.
    const MORE: usize = 30;
    let dropped = || sys::network_counter("TcpExt", "TCPReqQFullDrop");
    let before = dropped()?;
    let (looks, more) = look::during(Duration::from_millis(2500), || {
        let more = begin(address, MORE)?;
        // Well before the last look, nobody calls any more.
        thread::sleep(Duration::from_millis(1500));
        Ok((dropped()?, drop(more)).0)
    })?;
    let lost = more - before;
    let room = BACKLOG as usize - CALLERS;
    ensure!(
        lost >= (MORE - room) as f64 && dropped()? == more,
        "{lost} were dropped, and the queue has room for {room} of {MORE}"
    );
    report_losses(report, "losses", lost, &looks.queue("syn", is_ours));
    drop((callers, listener));
    Ok(())
}

/// Callers that send a SYN and never see the answer.
fn begin(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket: OwnedFd = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
                .context("make a socket")?;
            sys::drop_all_input(&socket)?;
            match connect(&socket, &to) {
                Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
                other => anyhow::bail!("connect() answered {other:?}"),
            }
        })
        .collect()
}
