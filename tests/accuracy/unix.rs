//! What waits in unix sockets.

use std::{
    io::Write as _,
    os::unix::net::{UnixDatagram, UnixListener, UnixStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::net::sockopt::socket_send_buffer_size;
use tailback_tests::{lines::unix_ns, temp::TempDir};

use crate::{
    look::{self, SETTLED_NS, age, standing},
    report::Report,
    sys,
};

const LONG: Duration = Duration::from_millis(1800);

pub fn measure(report: &mut Report) -> Result<()> {
    let folder = TempDir::new("unix")?;
    stream(report, &folder)?;
    datagrams(report, &folder)
}

fn stream(report: &mut Report, folder: &TempDir) -> Result<()> {
    let path = folder.path().join("stream");
    let listener = UnixListener::bind(&path).context("listen at a path")?;
    let mut client = UnixStream::connect(&path).context("connect")?;
    let (_server, _) = listener.accept().context("accept")?;
    let (looks, since_ns) = look::during(LONG, || {
        let since_ns = unix_ns();
        for _ in 0..6 {
            client.write_all(&[0; 5_000]).context("write")?;
        }
        Ok(since_ns)
    })?;
    let path = path.display().to_string();
    let queue = looks.queue("unix", |name| name.contains(&path));
    let buffer = socket_send_buffer_size(&client).context("SO_SNDBUF")?;
    let keys = [
        ("stream depth", "depth", sys::outgoing(&client)?),
        ("stream limit", "limit", buffer as f64),
    ];
    standing(report, &queue, since_ns + SETTLED_NS, &keys);
    age(report, &queue, (since_ns, unix_ns()), "stream oldest");
    Ok(())
}

fn datagrams(report: &mut Report, folder: &TempDir) -> Result<()> {
    const SENT: usize = 4;
    let path = folder.path().join("datagrams");
    let _receiver = UnixDatagram::bind(&path).context("bind to a path")?;
    let sender = UnixDatagram::unbound().context("make a socket")?;
    let (looks, since_ns) = look::during(LONG, || {
        let since_ns = unix_ns();
        for _ in 0..SENT {
            sender
                .send_to(&[0; 100], &path)
                .context("send a datagram")?;
        }
        Ok(since_ns)
    })?;
    let path = path.display().to_string();
    let queue = looks.queue("unix", |name| name.contains(&path));
    let limit = sys::number_in("/proc/sys/net/unix/max_dgram_qlen")?;
    let keys = [
        ("datagram depth", "depth", SENT as f64),
        ("datagram limit", "limit", limit),
    ];
    standing(report, &queue, since_ns + SETTLED_NS, &keys);
    age(report, &queue, (since_ns, unix_ns()), "datagram oldest");
    Ok(())
}
