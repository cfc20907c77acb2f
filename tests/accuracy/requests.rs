//! Requests that were read and are not answered, from both sides of the same connections.

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
    look::{self, Looks, Queue, age, standing},
    lossy::{self, End},
    report::Report,
};

const CONNECTIONS: usize = 8;
const REQUESTS: usize = 5;
const ANSWERED: usize = 2;
/// Longer than the tick of any kernel's timer: its stamps of what came and what went differ.
const THINKING: Duration = Duration::from_millis(40);

pub fn measure_inflight(report: &mut Report) -> Result<()> {
    let mut stage = Stage::new()?;
    let name = format!(":{}", stage.listener.local_addr()?.port());
    stage.play(|looks, begun, since_ns| {
        let queue = looks.queue("inflight", |queue| queue == name);
        standing(
            report,
            &queue,
            since_ns,
            &[("depth", "depth", begun.len() as f64)],
        );
        age(report, &queue, (begun[0], unix_ns()), "oldest");
    })?;
    answers(report)?;
    lossy::measure(report, End::Server)
}

/// One connection carries many requests between two looks, of one segment each; answers are longer.
fn answers(report: &mut Report) -> Result<()> {
    const ANSWER: usize = 20_000;
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let name = format!(":{}", listener.local_addr()?.port());
    let mut client = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (mut server, _) = listener.accept().context("accept")?;
    let duration = Duration::from_millis(3000);
    let (looks, course) = look::during(duration, || {
        let mut course = Course::default();
        let (end, mut made) = (Instant::now() + duration, 0.0);
        while Instant::now() < end {
            client.write_all(&[1; 100]).context("send a request")?;
            server.read_exact(&mut [0; 100]).context("read a request")?;
            // The load's own spacing.
            thread::sleep(Duration::from_millis(1));
            server.write_all(&[2; ANSWER]).context("send an answer")?;
            client
                .read_exact(&mut [0; ANSWER])
                .context("read an answer")?;
            made += 1.0;
            course.note(made);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(course)
    })?;
    let queue = looks.queue("inflight", |queue| queue == name);
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
    report.compare("answers", truth, measured, "responses_per_s of all looks");
    Ok(())
}

pub fn measure_downstream(report: &mut Report) -> Result<()> {
    let mut stage = Stage::new()?;
    let name = format!("-> {}", stage.listener.local_addr()?);
    stage.play(|looks, begun, since_ns| {
        let queue = looks.queue("downstream", |queue| queue == name);
        let keys = [
            ("depth", "depth", begun.len() as f64),
            ("limit", "limit", CONNECTIONS as f64),
        ];
        standing(report, &queue, since_ns, &keys);
        age(report, &queue, (begun[0], unix_ns()), "oldest");
    })?;
    lossy::measure(report, End::Client)
}

/// Connections of which each has carried one request and its answer.
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
            stage.ask(at)?;
        }
        thread::sleep(THINKING);
        for at in 0..CONNECTIONS {
            stage.answer(at)?;
        }
        thread::sleep(THINKING);
        Ok(stage)
    }

    /// Some requests are read and none is answered; then some are. `told` is given the looks, since when each of those
    /// in flight is, and since when it is just these.
    fn play(&mut self, mut told: impl FnMut(&Looks, &[u64], u64)) -> Result<()> {
        let mut begun = Vec::new();
        for at in 0..REQUESTS {
            begun.push(unix_ns());
            self.ask(at)?;
            // Their ages shall differ by more than a tick.
            thread::sleep(Duration::from_millis(150));
        }
        for answered in [0, ANSWERED] {
            for at in 0..answered {
                self.answer(at)?;
            }
            begun.drain(..answered);
            let since_ns = unix_ns();
            let looks = look::at(Duration::from_millis(1000))?;
            told(&looks, &begun, since_ns);
        }
        Ok(())
    }

    fn ask(&mut self, at: usize) -> Result<()> {
        let (client, server) = &mut self.pairs[at];
        client.write_all(&[1; 100]).context("send a request")?;
        server.read_exact(&mut [0; 100]).context("read a request")
    }

    fn answer(&mut self, at: usize) -> Result<()> {
        let (client, server) = &mut self.pairs[at];
        server.write_all(&[2; 300]).context("send an answer")?;
        client.read_exact(&mut [0; 300]).context("read an answer")
    }
}
