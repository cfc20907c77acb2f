//! Requests in service, seen from both ends of the same connections.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tailback_tests::lines::unix_ns;

use crate::{
    course::Course,
    lossy::{self, End},
    report::Report,
    sampling::{self, Queue, Samples, compare_age, compare_steady},
};

const CONNECTIONS: usize = 8;
const REQUESTS: usize = 5;
const RESPONDED: usize = 2;
/// Longer than a timer tick of any kernel, so that the timestamps of request and response differ.
const SERVICE_TIME: Duration = Duration::from_millis(40);

pub fn measure_inflight(report: &mut Report) -> Result<()> {
    let mut stage = Stage::new()?;
    let name = format!(":{}", stage.listener.local_addr()?.port());
    stage.play(|samples, begun, since_ns| {
        let queue = samples.queue("inflight", |queue| queue == name);
        compare_steady(
            report,
            &queue,
            since_ns,
            &[("depth", "depth", begun.len() as f64)],
        );
        compare_age(report, &queue, (begun[0], unix_ns()), "oldest");
    })?;
    responses(report)?;
    lossy::measure(report, End::Server)
}

/// One connection carries many requests between two samples. Requests fit one segment; responses are longer.
fn responses(report: &mut Report) -> Result<()> {
    const RESPONSE_BYTES: usize = 20_000;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let name = format!(":{}", listener.local_addr()?.port());
    let mut client = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (mut server, _) = listener.accept().context("accept")?;
    let duration = Duration::from_millis(3000);
    let (samples, course) = sampling::during(duration, || {
        let mut course = Course::default();
        let (end, mut made) = (Instant::now() + duration, 0.0);
        while Instant::now() < end {
            client.write_all(&[1; 100]).context("send a request")?;
            server.read_exact(&mut [0; 100]).context("read a request")?;
            // Paces the load.
            thread::sleep(Duration::from_millis(1));
            server
                .write_all(&[2; RESPONSE_BYTES])
                .context("send a response")?;
            client
                .read_exact(&mut [0; RESPONSE_BYTES])
                .context("read a response")?;
            made += 1.0;
            course.note(made);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(course)
    })?;
    let queue = samples.queue("inflight", |queue| queue == name);
    let (from, to) = course.range_ns();
    let windows: Vec<(&Value, u64, u64)> = queue.iter().flat_map(Queue::windows).collect();
    let within = windows
        .iter()
        .filter(|(_, since, at)| *since >= from && *at <= to);
    let (mut counted, mut span) = (0.0, (u64::MAX, 0));
    for (line, since, at) in within {
        counted += line["responses_per_s"].as_f64().unwrap_or(0.0) * (at - since) as f64 / 1e9;
        span = (span.0.min(*since), span.1.max(*at));
    }
    let seconds = span.1.saturating_sub(span.0) as f64 / 1e9;
    let measured = (seconds > 1.0).then(|| counted / seconds);
    let truth = course.per_second(span.0.min(to), span.1.max(from));
    report.compare(
        "responses",
        truth,
        measured,
        "responses_per_s of all samples",
    );
    Ok(())
}

pub fn measure_downstream(report: &mut Report) -> Result<()> {
    let mut stage = Stage::new()?;
    let name = format!("-> {}", stage.listener.local_addr()?);
    stage.play(|samples, begun, since_ns| {
        let queue = samples.queue("downstream", |queue| queue == name);
        let keys = [
            ("depth", "depth", begun.len() as f64),
            ("limit", "limit", CONNECTIONS as f64),
        ];
        compare_steady(report, &queue, since_ns, &keys);
        compare_age(report, &queue, (begun[0], unix_ns()), "oldest");
    })?;
    lossy::measure(report, End::Client)
}

/// Connections that have each carried one request and its response.
struct Stage {
    listener: TcpListener,
    pairs: Vec<(TcpStream, TcpStream)>,
}

impl Stage {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
        let mut pairs = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = TcpStream::connect(listener.local_addr()?).context("connect")?;
            let (server, _) = listener.accept().context("accept")?;
            pairs.push((client, server));
        }
        let mut stage = Self { listener, pairs };
        for at in 0..CONNECTIONS {
            stage.request(at)?;
        }
        thread::sleep(SERVICE_TIME);
        for at in 0..CONNECTIONS {
            stage.respond(at)?;
        }
        thread::sleep(SERVICE_TIME);
        Ok(stage)
    }

    /// Sends requests without responding, then responds to some. Calls `compare` after each step with the samples, the start
    /// times of the requests in service, and the time since which these are in service.
    fn play(&mut self, mut compare: impl FnMut(&Samples, &[u64], u64)) -> Result<()> {
        let mut begun = Vec::new();
        for at in 0..REQUESTS {
            begun.push(unix_ns());
            self.request(at)?;
            // Ages must differ by more than a sampling interval.
            thread::sleep(Duration::from_millis(150));
        }
        for responded in [0, RESPONDED] {
            for at in 0..responded {
                self.respond(at)?;
            }
            begun.drain(..responded);
            let since_ns = unix_ns();
            let samples = sampling::steady(Duration::from_millis(1000))?;
            compare(&samples, &begun, since_ns);
        }
        Ok(())
    }

    fn request(&mut self, at: usize) -> Result<()> {
        let (client, server) = &mut self.pairs[at];
        client.write_all(&[1; 100]).context("send a request")?;
        server.read_exact(&mut [0; 100]).context("read a request")
    }

    fn respond(&mut self, at: usize) -> Result<()> {
        let (client, server) = &mut self.pairs[at];
        server.write_all(&[2; 300]).context("send a response")?;
        client.read_exact(&mut [0; 300]).context("read a response")
    }
}
