//! Requests over a link that delays and loses, one after the other on each connection: what the agent tells of each
//! connection at each look, beside what its client and its server noted themselves.
//!
//! Each connection has a listener of its own, so that the agent tells each alone.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use tailback_tests::{chance::Chance, lines::unix_ns};

use crate::{
    link,
    look::{self, Looks, Queue, heard_ns, time_ns},
    report::Report,
};

const CONNECTIONS: usize = 16;
const DELAY: Duration = Duration::from_millis(20);
/// 5%.
const LOST_ONE_IN: u32 = 20;
const LOOKED_FOR: Duration = Duration::from_secs(15);
/// Left out around what clients and servers note: they wake up late where there is one emulated CPU.
const MARGIN_NS: u64 = 30_000_000;
/// Else there was no loss to speak of.
const LEAST_SENT_AGAIN: f64 = 20.0;
const LEAST_LOOKS: usize = 200;

/// At which end it is looked.
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
    let before = link::sent_again()?;
    let (looks, waits, stalls) = talk(pairs, end)?;
    let again = link::sent_again()? - before;
    ensure!(
        again >= LEAST_SENT_AGAIN,
        "only {again} segments were sent again: the link does not lose"
    );
    compare(report, &looks, end, &ports, &waits, &stalls)
}

struct Pair {
    /// For the agent: who accepted a connection is told by its port.
    _listener: TcpListener,
    port: u16,
    client: TcpStream,
    server: TcpStream,
}

/// All at once: a handshake that loses a packet takes a second.
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

/// From when to when one end waits, request by request: the server from its first byte read to before its answer is
/// written; the client from before its request is written to the first byte of the answer read.
type Waits = Vec<(u64, u64)>;

/// Clients and servers talk while the agent looks. Answers with what the asked end of each connection noted.
fn talk(pairs: Vec<Pair>, end: End) -> Result<(Looks, Vec<Waits>, Waits)> {
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
        let looked = look::at(LOOKED_FOR);
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
        Ok((looked?, waits, joined(stalls.join())?))
    })
}

/// Of each request: its own length, the answer's, and how long it takes to be answered.
const HEAD: usize = 12;

fn ask(mut stream: TcpStream, seed: u64, done: &AtomicBool) -> Result<Waits> {
    let mut chance = Chance::new(seed);
    let mut waits = Waits::new();
    let mut between = |least: u32, most: u32| least + chance.below((most - least) as usize) as u32;
    while !done.load(Ordering::Relaxed) {
        // The load's own spacing.
        thread::sleep(Duration::from_millis(between(100, 500).into()));
        // Some take several segments.
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
            .context("read an answer")?;
        waits.push((since_ns, unix_ns()));
        stream
            .read_exact(&mut buffer[1..])
            .context("read an answer")?;
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
        // The work.
        thread::sleep(Duration::from_millis(number(8).into()));
        waits.push((since_ns, unix_ns()));
        stream
            .write_all(&vec![2; number(4) as usize])
            .context("send an answer")?;
    }
}

/// Since when it waits at a look between these two moments; `None` too near to a change.
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

/// While this runs, the times in which all threads stood still: who notes something then notes it late.
fn stalls(done: &AtomicBool) -> Waits {
    const NAP: Duration = Duration::from_millis(5);
    const LATE_NS: u64 = 20_000_000;
    let mut stalls = Waits::new();
    while !done.load(Ordering::Relaxed) {
        let before_ns = unix_ns();
        thread::sleep(NAP);
        let after_ns = unix_ns();
        if after_ns - before_ns > LATE_NS {
            stalls.push((before_ns, after_ns));
        }
    }
    stalls
}

fn compare(
    report: &mut Report,
    looks: &Looks,
    end: End,
    ports: &[u16],
    waits: &[Waits],
    stalls: &Waits,
) -> Result<()> {
    let (mut compared, mut waiting, mut told) = (0_usize, 0.0, 0.0);
    let mut wrong: Vec<String> = Vec::new();
    for (port, waits) in ports.iter().zip(waits) {
        let name = end.name(*port);
        let queue = looks.queue(end.kind(), |queue| queue == name);
        let queue = match queue {
            Ok(queue) => queue,
            Err(said) => {
                for quantity in [
                    "with loss depth",
                    "with loss right looks",
                    "with loss oldest",
                ] {
                    report.absent(quantity, &said);
                }
                return Ok(());
            }
        };
        // Before the first request and after the last there is nothing to tell.
        let range = waits.first().zip(waits.last());
        let ((from_ns, _), (_, to_ns)) = range.context("a connection carried no request")?;
        for line in queue.within(*from_ns, *to_ns) {
            let (look_ns, heard_ns) = (time_ns(line), heard_ns(line));
            let is_late = |(from, to): &(u64, u64)| {
                *from <= heard_ns.saturating_add(MARGIN_NS) && look_ns - MARGIN_NS <= *to
            };
            let Some(since_ns) = at(waits, look_ns, heard_ns) else {
                continue;
            };
            if stalls.iter().any(is_late) {
                continue;
            }
            let depth = line["depth"].as_f64().unwrap_or(f64::NAN);
            let truth = f64::from(u8::from(since_ns.is_some()));
            compared += 1;
            waiting += truth;
            told += depth;
            if depth != truth {
                wrong.push(around(line, &queue, waits));
                continue;
            }
            // What was sent before the first look may have been sent again since: the kernel keeps the last time.
            let Some(since_ns) = since_ns.filter(|since_ns| *since_ns > looks.began_ns()) else {
                continue;
            };
            // The request before this one, taken for it.
            let told_ns = look_ns.saturating_sub(line["oldest_age_ns"].as_u64().unwrap_or(0));
            if waits
                .iter()
                .any(|(_, until)| (told_ns..since_ns).contains(until))
            {
                wrong.push(around(line, &queue, waits));
                continue;
            }
            let age_ns = look_ns.saturating_sub(since_ns) as f64;
            report.key(
                "with loss oldest",
                age_ns,
                line,
                "oldest_age_ns",
                queue.tick_ns(since_ns),
            );
        }
    }
    ensure!(
        compared >= LEAST_LOOKS,
        "only {compared} looks can be compared"
    );
    // Of all connections, over all looks.
    let mean = |sum: f64| sum / compared as f64 * CONNECTIONS as f64;
    let said = format!("mean of {compared} looks");
    report.compare("with loss depth", mean(waiting), Some(mean(told)), &said);
    let said = format!("wrong: {}", wrong.join("; "));
    let (all, right) = (compared as f64, (compared - wrong.len()) as f64);
    report.compare("with loss right looks", all, Some(right), &said);
    Ok(())
}

/// A wrong look, with the looks before it and what was noted meanwhile: ms before it.
fn around(line: &Value, queue: &Queue<'_>, waits: &Waits) -> String {
    const BEFORE_NS: u64 = 4_000_000_000;
    let look_ns = time_ns(line);
    let ms = |at_ns: u64| look_ns.abs_diff(at_ns) / 1_000_000;
    let within = look_ns.saturating_sub(BEFORE_NS)..=look_ns;
    let looks = queue.within(*within.start(), *within.end());
    let looks: Vec<String> = looks
        .iter()
        .map(|line| {
            let age_ms = line["oldest_age_ns"].as_u64().map(|ns| ns / 1_000_000);
            format!("{}: {} {age_ms:?}", ms(time_ns(line)), line["depth"])
        })
        .collect();
    let noted = waits.iter().filter(|(_, until)| within.contains(until));
    let noted: Vec<String> = noted
        .map(|(since, until)| format!("{}-{}", ms(*since), ms(*until)))
        .collect();
    let (looks, noted) = (looks.join(", "), noted.join(", "));
    format!("{line}; looks {looks}; noted {noted}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_to_a_change_is_left_out() {
        const MS: u64 = 1_000_000;
        let waits = vec![(100 * MS, 300 * MS), (500 * MS, 700 * MS)];
        let told =
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
        assert_eq!(told, expected);
        // A look that took so long.
        assert_eq!(at(&waits, 400 * MS, 480 * MS), None);
    }
}
