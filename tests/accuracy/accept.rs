//! TCP and unix accept queues: connections that are complete but not yet accepted.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tailback_tests::{lines::unix_ns, sockets, temp::TempDir};

use crate::{
    course::Course,
    report::Report,
    sampling::{self, compare_age, compare_steady},
    sys,
};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn measure(report: &mut Report) -> Result<()> {
    // The kernel counts arrivals per network namespace: the agent does not report them where other processes listen too.
    let shared = sys::own_network()?;
    waiting(report)?;
    match &shared {
        None => {
            rates(report)?;
            losses(report)?;
        }
        Some(why) => report.skip(why, |row| {
            matches!(row, "arrivals" | "departures" | "losses")
        }),
    }
    waiting_at_unix_path(report)
}

fn waiting(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 16;
    let listener = sockets::listen(LOCAL, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let mut arrived = Vec::new();
    for _ in 0..7 {
        let stream = TcpStream::connect(address).context("connect")?;
        arrived.push((unix_ns(), stream));
        // Ages must differ by more than a sampling interval.
        thread::sleep(Duration::from_millis(150));
    }
    for accepted in [0, 4] {
        for _ in 0..accepted {
            listener.accept().context("accept")?;
        }
        let left = arrived.split_off(accepted);
        let since_ns = unix_ns();
        let samples = sampling::steady(Duration::from_millis(1000))?;
        let queue = samples.queue("accept", |name| name == address.to_string());
        let keys = [
            ("depth", "depth", left.len() as f64),
            ("limit", "limit", f64::from(BACKLOG)),
        ];
        compare_steady(report, &queue, since_ns, &keys);
        compare_age(report, &queue, (left[0].0, unix_ns()), "oldest");
        arrived = left;
    }
    Ok(())
}

fn rates(report: &mut Report) -> Result<()> {
    let listener = sockets::listen(LOCAL, 64, false)?;
    let address = listener.local_addr()?;
    let duration = Duration::from_millis(3000);
    let (samples, (arrived, departed)) = sampling::during(duration, || {
        let (mut arrived, mut departed) = (Course::default(), Course::default());
        let end = Instant::now() + duration;
        let mut made = 0.0;
        while Instant::now() < end {
            let client = TcpStream::connect(address).context("connect")?;
            sockets::reset_on_close(&client)?;
            made += 1.0;
            arrived.note(made);
            // Paces the load.
            thread::sleep(Duration::from_millis(4));
            listener.accept().context("accept")?;
            departed.note(made);
        }
        Ok((arrived, departed))
    })?;
    let queue = samples.queue("accept", |name| name == address.to_string());
    sampling::compare_rate(report, &queue, &arrived, ("arrivals", "arrivals_per_s"));
    sampling::compare_rate(
        report,
        &queue,
        &departed,
        ("departures", "departures_per_s"),
    );
    Ok(())
}

/// Overflows the queue: each caller gives up at once, so each is lost exactly once.
fn losses(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 4;
    const CALLERS: usize = 40;
    let listener: TcpListener = sockets::listen(LOCAL, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let overflows = || sys::network_counter("TcpExt", "ListenOverflows");
    let before = overflows()?;
    let (samples, callers) = sampling::during(Duration::from_millis(1500), || {
        let mut callers = Vec::new();
        for _ in 0..=BACKLOG {
            callers.push(TcpStream::connect(address).context("connect")?);
        }
        for _ in 0..CALLERS {
            drop(sockets::begin_connect(address)?);
            // Paces the load.
            thread::sleep(Duration::from_millis(10));
        }
        Ok(callers)
    })?;
    let lost = overflows()? - before;
    anyhow::ensure!(
        lost >= CALLERS as f64,
        "only {lost} of {CALLERS} connections were lost"
    );
    drop(callers);
    let queue = samples.queue("accept", |name| name == address.to_string());
    report_losses(report, "losses", lost, &queue);
    Ok(())
}

/// Compares the sum of the losses that the samples report, each since the sample before.
pub fn report_losses(
    report: &mut Report,
    quantity: &str,
    truth: f64,
    queue: &sampling::Sampled<'_>,
) {
    match queue {
        Ok(queue) => {
            let reported = queue
                .samples
                .iter()
                .filter_map(|line| line["losses"].as_f64());
            let note = format!("sum of the losses in {} samples", queue.samples.len());
            report.compare(quantity, truth, Some(reported.sum()), &note);
        }
        Err(reason) => report.compare(quantity, truth, None, reason),
    }
}

fn waiting_at_unix_path(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 9;
    const CALLERS: usize = 4;
    let directory = TempDir::new("accept")?;
    let path = directory.path().join("listener");
    let listener = UnixListener::bind(&path).context("listen on a unix socket")?;
    // A second listen(2) changes the backlog.
    rustix::net::listen(&listener, BACKLOG).context("set the backlog")?;
    let duration = Duration::from_millis(2000);
    let (samples, (since_ns, _callers)) = sampling::during(duration, || {
        let since_ns = unix_ns();
        let callers: std::io::Result<Vec<UnixStream>> =
            (0..CALLERS).map(|_| UnixStream::connect(&path)).collect();
        Ok((since_ns, callers.context("connect")?))
    })?;
    let path = path.display().to_string();
    let queue = samples.queue("accept", |name| name.contains(&path));
    let keys = [
        ("unix depth", "depth", CALLERS as f64),
        ("unix limit", "limit", f64::from(BACKLOG)),
    ];
    compare_steady(report, &queue, since_ns + sampling::SETTLED_NS, &keys);
    compare_age(report, &queue, (since_ns, unix_ns()), "unix oldest");
    Ok(())
}
