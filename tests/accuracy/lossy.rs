//! Sequential requests on each of several connections over a link with delay and loss. Compares what the agent reports for
//! each connection in each sample with the times that client and server recorded.
//!
//! Each connection has its own listener, so that the agent reports it as a queue of its own.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use tailback_tests::{lines::unix_ns, random::Random};

use crate::{
    link,
    report::Report,
    sampling::{self, Queue, Samples, received_ns, time_ns},
};

const CONNECTIONS: usize = 16;
const DELAY: Duration = Duration::from_millis(20);
/// One packet in this many is lost: 5%.
const LOST_ONE_IN: u32 = 20;
const SAMPLED_FOR: Duration = Duration::from_secs(15);
/// Samples this close to a recorded change are skipped, ns: clients and servers wake up late on one emulated CPU.
const MARGIN_NS: u64 = 30_000_000;
/// Fewer retransmissions mean that the link did not lose packets.
const MIN_RETRANSMISSIONS: f64 = 20.0;
const MIN_SAMPLES: usize = 200;

/// The end of the connection that the agent reports on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Server,
    Client,
}

impl End {
    fn kind(self) -> &'static str {
        match self {
            Self::Server => "inflight",
            Self::Client => "downstream",
        }
    }

    fn name(self, port: u16) -> String {
        match self {
            Self::Server => format!(":{port}"),
            Self::Client => format!("-> 127.0.0.1:{port}"),
        }
    }
}

pub fn measure(report: &mut Report, end: End) -> Result<()> {
    if let Some(why) = link::lossy(DELAY, LOST_ONE_IN)? {
        report.skip(&why, |quantity| quantity.starts_with("with loss"));
        return Ok(());
    }
    let pairs = connect()?;
    let ports: Vec<u16> = pairs.iter().map(|pair| pair.port).collect();
    let before = link::retransmissions()?;
    let (samples, waits, stalls) = talk(pairs, end)?;
    let retransmitted = link::retransmissions()? - before;
    ensure!(
        retransmitted >= MIN_RETRANSMISSIONS,
        "only {retransmitted} segments were retransmitted: the link does not lose packets"
    );
    compare(report, &samples, end, &ports, &waits, &stalls)
}

struct Pair {
    /// Kept open: the agent recognizes an accepted connection by its listening port.
    _listener: TcpListener,
    port: u16,
    client: TcpStream,
    server: TcpStream,
}

/// In parallel, because a handshake that loses a packet takes a second.
fn connect() -> Result<Vec<Pair>> {
    thread::scope(|scope| {
        let connecting: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                scope.spawn(|| -> Result<Pair> {
                    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
                    let address = listener.local_addr()?;
                    let client = TcpStream::connect(address).context("connect")?;
                    let (server, _) = listener.accept().context("accept")?;
                    Ok(Pair {
                        _listener: listener,
                        port: address.port(),
                        client,
                        server,
                    })
                })
            })
            .collect();
        let joined = connecting.into_iter().map(|one| joined(one.join()));
        joined.collect()
    })
}

fn joined<T>(ended: thread::Result<Result<T>>) -> Result<T> {
    ended.unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
}

/// (start, end) of each request in ns since 1970. Server: from the first byte read until just before the response is
/// written. Client: from just before the request is written until the first byte of the response is read.
type Waits = Vec<(u64, u64)>;

/// Lets clients and servers exchange requests while the agent samples. Returns what end `end` of each connection recorded.
fn talk(pairs: Vec<Pair>, end: End) -> Result<(Samples, Vec<Waits>, Waits)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let done = &done;
        let talking: Vec<_> = pairs
            .into_iter()
            .enumerate()
            .map(|(seed, pair)| {
                let (client, server) = (pair.client, pair.server);
                let client = scope.spawn(move || ask(client, seed as u64, done));
                let server = scope.spawn(move || serve(server));
                (pair._listener, client, server)
            })
            .collect();
        let stalls = scope.spawn(|| Ok(stalls(done)));
        let sampled = sampling::steady(SAMPLED_FOR);
        done.store(true, Ordering::Relaxed);
        let mut waits = Vec::new();
        for (_listener, client, server) in talking {
            let (client, server) = (joined(client.join()), joined(server.join()));
            let (client, server) = (client.context("a client")?, server.context("a server")?);
            waits.push(match end {
                End::Client => client,
                End::Server => server,
            });
        }
        Ok((sampled?, waits, joined(stalls.join())?))
    })
}

/// Request header: its own length, the response length, and the service time in ms, u32 each.
const HEAD: usize = 12;

fn ask(mut stream: TcpStream, seed: u64, done: &AtomicBool) -> Result<Waits> {
    let mut random = Random::new(seed);
    let mut waits = Waits::new();
    let mut between = |min: u32, max: u32| min + random.below((max - min) as usize) as u32;
    while !done.load(Ordering::Relaxed) {
        // Paces the load.
        thread::sleep(Duration::from_millis(between(100, 500).into()));
        // Some messages need several segments.
        let (length, answer) = (between(100, 6_000), between(100, 10_000));
        let work_ms = between(100, 600);
        let mut request = vec![1; length as usize];
        for (at, number) in [length, answer, work_ms].into_iter().enumerate() {
            request[at * 4..][..4].copy_from_slice(&number.to_ne_bytes());
        }
        let since_ns = unix_ns();
        stream.write_all(&request).context("send a request")?;
        let mut buffer = vec![0; answer as usize];
        stream
            .read_exact(&mut buffer[..1])
            .context("read a response")?;
        waits.push((since_ns, unix_ns()));
        stream
            .read_exact(&mut buffer[1..])
            .context("read a response")?;
    }
    Ok(waits)
}

fn serve(mut stream: TcpStream) -> Result<Waits> {
    let mut waits = Waits::new();
    loop {
        let mut head = [0; HEAD];
        if stream.read(&mut head[..1]).context("read a request")? == 0 {
            return Ok(waits);
        }
        let since_ns = unix_ns();
        stream
            .read_exact(&mut head[1..])
            .context("read a request")?;
        let number =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut rest = vec![0; number(0) as usize - HEAD];
        stream.read_exact(&mut rest).context("read a request")?;
        // Service time.
        thread::sleep(Duration::from_millis(number(8).into()));
        waits.push((since_ns, unix_ns()));
        stream
            .write_all(&vec![2; number(4) as usize])
            .context("send a response")?;
    }
}

/// Start of the request that waits between the two moments, if any. The outer `None` means too close to a change.
fn at(waits: &Waits, from_ns: u64, to_ns: u64) -> Option<Option<u64>> {
    let around = from_ns.saturating_sub(MARGIN_NS)..to_ns.saturating_add(MARGIN_NS);
    let mut edges = waits.iter().flat_map(|(since, until)| [since, until]);
    if edges.any(|edge| around.contains(edge)) {
        return None;
    }
    let mut current = waits.iter();
    let current = current.find(|(since, until)| (since..until).contains(&&from_ns));
    Some(current.map(|(since, _)| *since))
}

/// Periods in which this process was not scheduled, until `done`: times recorded then are late.
fn stalls(done: &AtomicBool) -> Waits {
    const SLEEP: Duration = Duration::from_millis(5);
    /// A longer sleep than this is a stall.
    const STALL_NS: u64 = 20_000_000;
    let mut stalls = Waits::new();
    while !done.load(Ordering::Relaxed) {
        let before_ns = unix_ns();
        thread::sleep(SLEEP);
        let after_ns = unix_ns();
        if after_ns - before_ns > STALL_NS {
            stalls.push((before_ns, after_ns));
        }
    }
    stalls
}

fn compare(
    report: &mut Report,
    samples: &Samples,
    end: End,
    ports: &[u16],
    waits: &[Waits],
    stalls: &Waits,
) -> Result<()> {
    let (mut compared, mut waiting, mut reported) = (0_usize, 0.0, 0.0);
    let mut wrong: Vec<String> = Vec::new();
    for (port, waits) in ports.iter().zip(waits) {
        let name = end.name(*port);
        let queue = samples.queue(end.kind(), |queue| queue == name);
        let queue = match queue {
            Ok(queue) => queue,
            Err(reason) => {
                for quantity in [
                    "with loss depth",
                    "with loss correct samples",
                    "with loss oldest",
                ] {
                    report.absent(quantity, &reason);
                }
                return Ok(());
            }
        };
        // Before the first request and after the last nothing is recorded.
        let range = waits.first().zip(waits.last());
        let ((from_ns, _), (_, to_ns)) = range.context("a connection carried no request")?;
        for line in queue.within(*from_ns, *to_ns) {
            let (sample_ns, received_ns) = (time_ns(line), received_ns(line));
            let is_late = |(from, to): &(u64, u64)| {
                *from <= received_ns.saturating_add(MARGIN_NS) && sample_ns - MARGIN_NS <= *to
            };
            let Some(since_ns) = at(waits, sample_ns, received_ns) else {
                continue;
            };
            if stalls.iter().any(is_late) {
                continue;
            }
            let depth = line["depth"].as_f64().unwrap_or(f64::NAN);
            let truth = f64::from(u8::from(since_ns.is_some()));
            compared += 1;
            waiting += truth;
            reported += depth;
            if depth != truth {
                wrong.push(around(line, &queue, waits));
                continue;
            }
            // A request sent before the first sample may have been retransmitted: the kernel keeps only the last time.
            let Some(since_ns) = since_ns.filter(|since_ns| *since_ns > samples.began_ns()) else {
                continue;
            };
            // The agent must not have taken the request before this one for it.
            let reported_ns = sample_ns.saturating_sub(line["oldest_age_ns"].as_u64().unwrap_or(0));
            if waits
                .iter()
                .any(|(_, until)| (reported_ns..since_ns).contains(until))
            {
                wrong.push(around(line, &queue, waits));
                continue;
            }
            let age_ns = sample_ns.saturating_sub(since_ns) as f64;
            report.key(
                "with loss oldest",
                age_ns,
                line,
                "oldest_age_ns",
                queue.interval_ns(since_ns),
            );
        }
    }
    ensure!(
        compared >= MIN_SAMPLES,
        "only {compared} samples can be compared"
    );
    // Over all connections and all samples.
    let mean = |sum: f64| sum / compared as f64 * CONNECTIONS as f64;
    let note = format!("mean of {compared} samples");
    report.compare(
        "with loss depth",
        mean(waiting),
        Some(mean(reported)),
        &note,
    );
    let note = format!("wrong: {}", wrong.join("; "));
    let (all, correct) = (compared as f64, (compared - wrong.len()) as f64);
    report.compare("with loss correct samples", all, Some(correct), &note);
    Ok(())
}

/// Describes a wrong sample with the samples and the recorded requests before it, in ms before it.
fn around(line: &Value, queue: &Queue<'_>, waits: &Waits) -> String {
    const BEFORE_NS: u64 = 4_000_000_000;
    let sample_ns = time_ns(line);
    let ms = |at_ns: u64| sample_ns.abs_diff(at_ns) / 1_000_000;
    let within = sample_ns.saturating_sub(BEFORE_NS)..=sample_ns;
    let samples = queue.within(*within.start(), *within.end());
    let samples: Vec<String> = samples
        .iter()
        .map(|line| {
            let age_ms = line["oldest_age_ns"].as_u64().map(|ns| ns / 1_000_000);
            format!("{}: {} {age_ms:?}", ms(time_ns(line)), line["depth"])
        })
        .collect();
    let recorded = waits.iter().filter(|(_, until)| within.contains(until));
    let recorded: Vec<String> = recorded
        .map(|(since, until)| format!("{}-{}", ms(*since), ms(*until)))
        .collect();
    let (samples, recorded) = (samples.join(", "), recorded.join(", "));
    format!("{line}; samples {samples}; recorded {recorded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_close_to_a_change_are_skipped() {
        const MS: u64 = 1_000_000;
        let waits = vec![(100 * MS, 300 * MS), (500 * MS, 700 * MS)];
        let found =
            [0, 80, 120, 150, 290, 310, 400, 490, 600, 800].map(|ms| at(&waits, ms * MS, ms * MS));
        let (none, waiting) = (Some(None), |since: u64| Some(Some(since * MS)));
        let expected = [
            none,
            None,
            None,
            waiting(100),
            None,
            None,
            none,
            None,
            waiting(500),
            none,
        ];
        assert_eq!(found, expected);
        // A sample that took from 400 to 480 ms.
        assert_eq!(at(&waits, 400 * MS, 480 * MS), None);
    }
}
