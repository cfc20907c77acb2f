//! Connections complete and not accepted.

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
    look::{self, age, standing},
    report::Report,
    sys,
};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn measure(report: &mut Report) -> Result<()> {
    // Arrivals are counted for a network namespace as a whole: where strangers listen as well, they are not told.
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
    waiting_at_a_path(report)
}

fn waiting(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 16;
    let listener = sockets::listen(LOCAL, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let mut came = Vec::new();
    for _ in 0..7 {
        let stream = TcpStream::connect(address).context("connect")?;
        came.push((unix_ns(), stream));
        // Their ages shall differ by more than a tick.
        thread::sleep(Duration::from_millis(150));
    }
    for accepted in [0, 4] {
        for _ in 0..accepted {
            listener.accept().context("accept")?;
        }
        let left = came.split_off(accepted);
        let since_ns = unix_ns();
        let looks = look::at(Duration::from_millis(1000))?;
        let queue = looks.queue("accept", |name| name == address.to_string());
        let keys = [
            ("depth", "depth", left.len() as f64),
            ("limit", "limit", f64::from(BACKLOG)),
        ];
        standing(report, &queue, since_ns, &keys);
        age(report, &queue, (left[0].0, unix_ns()), "oldest");
        came = left;
    }
    Ok(())
}

fn rates(report: &mut Report) -> Result<()> {
    let listener = sockets::listen(LOCAL, 64, false)?;
    let address = listener.local_addr()?;
    let duration = Duration::from_millis(3000);
    let (looks, (arrived, departed)) = look::during(duration, || {
        let (mut arrived, mut departed) = (Course::default(), Course::default());
        let end = Instant::now() + duration;
        let mut made = 0.0;
        while Instant::now() < end {
            let client = TcpStream::connect(address).context("connect")?;
            sockets::reset_on_close(&client)?;
            made += 1.0;
            arrived.note(made);
            // The load's own spacing.
            thread::sleep(Duration::from_millis(4));
            listener.accept().context("accept")?;
            departed.note(made);
        }
        Ok((arrived, departed))
    })?;
    let queue = looks.queue("accept", |name| name == address.to_string());
    look::rate(report, &queue, &arrived, ("arrivals", "arrivals_per_s"));
    look::rate(
        report,
        &queue,
        &departed,
        ("departures", "departures_per_s"),
    );
    Ok(())
}

/// More come than the queue holds; each gives up at once and is lost once.
fn losses(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 4;
    const CALLERS: usize = 40;
    let listener: TcpListener = sockets::listen(LOCAL, BACKLOG, false)?;
    let address = listener.local_addr()?;
    let overflows = || sys::network_counter("TcpExt", "ListenOverflows");
    let before = overflows()?;
    let (looks, callers) = look::during(Duration::from_millis(1500), || {
        let mut callers = Vec::new();
        for _ in 0..=BACKLOG {
            callers.push(TcpStream::connect(address).context("connect")?);
        }
        for _ in 0..CALLERS {
            drop(sockets::begin_connect(address)?);
            // The load's own spacing.
            thread::sleep(Duration::from_millis(10));
        }
        Ok(callers)
    })?;
    let lost = overflows()? - before;
    anyhow::ensure!(lost >= CALLERS as f64, "only {lost} of {CALLERS} were lost");
    drop(callers);
    let queue = looks.queue("accept", |name| name == address.to_string());
    report_losses(report, "losses", lost, &queue);
    Ok(())
}

/// The sum of what each look tells to be lost since the one before.
pub fn report_losses(report: &mut Report, quantity: &str, truth: f64, queue: &look::Seen<'_>) {
    match queue {
        Ok(queue) => {
            let told = queue
                .looks
                .iter()
                .filter_map(|line| line["losses"].as_f64());
            let said = format!("the sum of losses of {} looks", queue.looks.len());
            report.compare(quantity, truth, Some(told.sum()), &said);
        }
        Err(said) => report.compare(quantity, truth, None, said),
    }
}

fn waiting_at_a_path(report: &mut Report) -> Result<()> {
    const BACKLOG: i32 = 9;
    const CALLERS: usize = 4;
    let folder = TempDir::new("accept")?;
    let path = folder.path().join("listener");
    let listener = UnixListener::bind(&path).context("listen at a path")?;
    // A second listen changes the backlog.
    rustix::net::listen(&listener, BACKLOG).context("set the backlog")?;
    let duration = Duration::from_millis(2000);
    let (looks, (since_ns, _callers)) = look::during(duration, || {
        let since_ns = unix_ns();
        let callers: std::io::Result<Vec<UnixStream>> =
            (0..CALLERS).map(|_| UnixStream::connect(&path)).collect();
        Ok((since_ns, callers.context("connect")?))
    })?;
    let path = path.display().to_string();
    let queue = looks.queue("accept", |name| name.contains(&path));
    let keys = [
        ("unix depth", "depth", CALLERS as f64),
        ("unix limit", "limit", f64::from(BACKLOG)),
    ];
    standing(report, &queue, since_ns + look::SETTLED_NS, &keys);
    age(report, &queue, (since_ns, unix_ns()), "unix oldest");
    Ok(())
}
