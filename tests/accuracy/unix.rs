//! Unix sockets: unread bytes and datagrams.

use std::{
    io::Write as _,
    os::unix::net::{UnixDatagram, UnixListener, UnixStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::net::sockopt::socket_send_buffer_size;
use tailback_tests::{lines::unix_ns, temp::TempDir};

use crate::{
    report::Report,
    sampling::{self, SETTLED_NS, compare_age, compare_steady},
    sys,
};

const SAMPLED_FOR: Duration = Duration::from_millis(1800);

pub fn measure(report: &mut Report) -> Result<()> {
    let directory = TempDir::new("unix")?;
    stream(report, &directory)?;
    datagrams(report, &directory)
}

fn stream(report: &mut Report, directory: &TempDir) -> Result<()> {
    let path = directory.path().join("stream");
    let listener = UnixListener::bind(&path).context("listen on a unix socket")?;
    let mut client = UnixStream::connect(&path).context("connect")?;
    let (_server, _) = listener.accept().context("accept")?;
    let (samples, since_ns) = sampling::during(SAMPLED_FOR, || {
        let since_ns = unix_ns();
        for _ in 0..6 {
            client.write_all(&[0; 5_000]).context("write")?;
        }
        Ok(since_ns)
    })?;
    let path = path.display().to_string();
    let queue = samples.queue("unix", |name| name.contains(&path));
    let buffer = socket_send_buffer_size(&client).context("SO_SNDBUF")?;
    let keys = [
        ("stream depth", "depth", sys::outgoing(&client)?),
        ("stream limit", "limit", buffer as f64),
    ];
    compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "stream oldest");
    Ok(())
}

fn datagrams(report: &mut Report, directory: &TempDir) -> Result<()> {
    const SENT: usize = 4;
    let path = directory.path().join("datagrams");
    let _receiver = UnixDatagram::bind(&path).context("bind a unix socket")?;
    let sender = UnixDatagram::unbound().context("create a socket")?;
    let (samples, since_ns) = sampling::during(SAMPLED_FOR, || {
        let since_ns = unix_ns();
        for _ in 0..SENT {
            sender
                .send_to(&[0; 100], &path)
                .context("send a datagram")?;
        }
        Ok(since_ns)
    })?;
    let path = path.display().to_string();
    let queue = samples.queue("unix", |name| name.contains(&path));
    let limit = sys::number_in("/proc/sys/net/unix/max_dgram_qlen")?;
    let keys = [
        ("datagram depth", "depth", SENT as f64),
        ("datagram limit", "limit", limit),
    ];
    compare_steady(report, &queue, since_ns + SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "datagram oldest");
    Ok(())
}
