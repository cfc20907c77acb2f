//! Requests in flight and calls outstanding, which the agent infers from sequence numbers, compared with the logs of servers
//! and clients. Every test prints its error.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tailback_tests::{
    needs,
    nginx::Nginx,
    sample::{MAX_OUTPUT_DELAY, Sample, float, number},
    talk::{Certificate, Mode, Span, Talk},
};

/// Serializes the tests, which measure time.
static ALONE: Mutex<()> = Mutex::new(());
const CONNECTIONS: u32 = 16;
/// Mean service time.
const WORK: Duration = Duration::from_millis(200);
/// Mean pause of a client between requests.
const THINK: Duration = Duration::from_millis(200);
/// Duration of the load.
const DURATION: Duration = Duration::from_secs(12);
/// Samples that are compared, at least.
const MIN_SAMPLES: usize = 5;
/// Samples are not instantaneous: tolerance around the time of a sample, ns.
const MARGIN_NS: u64 = MAX_OUTPUT_DELAY.as_nanos() as u64;
/// Longest timer tick of a kernel (HZ=100), ns: the resolution of its socket timestamps.
const JIFFY_NS: u64 = 10_000_000;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One reading of one queue.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at_ns: u64,
    depth: u64,
    unknown: u64,
    oldest_age_ns: Option<u64>,
}

impl Seen {
    fn of(queue: &Value) -> Result<Self> {
        Ok(Self {
            at_ns: number(queue, "time_unix_ns")?,
            depth: number(queue, "depth")?,
            unknown: float(queue, "unknown")? as u64,
            oldest_age_ns: queue["oldest_age_ns"].as_u64(),
        })
    }
}

/// Samples two queues while the load runs, which began after `begun`: requests in flight at the server, and calls outstanding at the
/// client. Late samples are dropped; if that leaves too few, it goes on for longer.
fn sample_since(
    begun: Instant,
    args: &[String],
    (inflight, downstream): (&str, &str),
) -> Result<[Vec<Seen>; 2]> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut seen = [Vec::new(), Vec::new()];
    let (end, latest) = (begun + DURATION * 3 / 4, begun + DURATION * 17 / 20);
    while Instant::now() < end || seen[0].len() < MIN_SAMPLES && Instant::now() < latest {
        let sample = Sample::of(&args)?;
        if !sample.is_prompt()? {
            continue;
        }
        seen[0].push(Seen::of(sample.queue("inflight", inflight)?)?);
        seen[1].push(Seen::of(sample.queue("downstream", downstream)?)?);
    }
    Ok(seen)
}

/// Compares the samples with the logs of both sides and prints the errors. The server's span runs from reading the request to
/// just before responding; the client's from just before sending to reading the response. The request is in the queue at
/// least during the server's span and at most during the client's, however late the two log it.
fn compare(what: &str, seen: &[Seen], server: &[Span], client: &[Span]) -> Result<()> {
    let (mut wrong, mut worst, mut unknown, mut logged, mut reported) = (0, 0, 0, 0.0, 0.0);
    let mut age_error_ns = 0;
    for sample in seen {
        let (from, to) = (sample.at_ns - MARGIN_NS, sample.at_ns + MARGIN_NS);
        let certain = |span: &&Span| span.began_ns <= from && to <= span.responded_ns;
        let possible = |span: &&Span| span.began_ns <= to && from <= span.responded_ns;
        let certain = || server.iter().filter(|span| !span.hidden).filter(certain);
        let possible = || client.iter().filter(possible);
        let (min, max) = (certain().count() as u64, possible().count() as u64);
        let off =
            min.saturating_sub(sample.depth + sample.unknown) + sample.depth.saturating_sub(max);
        wrong += u64::from(off > 0);
        worst = worst.max(off);
        unknown += sample.unknown;
        logged += (min + max) as f64 / 2.0;
        reported += sample.depth as f64;
        // The oldest is one of the requests certainly in flight, or an older one that may be in flight.
        let age = |span: &Span| sample.at_ns.saturating_sub(span.began_ns);
        let (young, old) = (certain().map(age).max(), possible().map(age).max());
        if let (Some(ours), Some(young), Some(old)) = (sample.oldest_age_ns, young, old)
            && sample.unknown == 0
        {
            let off = young.saturating_sub(ours).max(ours.saturating_sub(old));
            age_error_ns = age_error_ns.max(off);
        }
    }
    let samples = seen.len().max(1) as f64;
    let age_error_ms = age_error_ns as f64 / 1e6;
    println!(
        "{what}: {} samples, mean {:.2} reported, {:.2} logged; {wrong} outside the range of the logs, by at most \
         {worst}; {unknown} unknown; error of the oldest age at most {age_error_ms:.1} ms",
        seen.len(),
        reported / samples,
        logged / samples,
    );
    ensure!(
        seen.len() >= MIN_SAMPLES,
        "{what}: only {} samples",
        seen.len()
    );
    ensure!(logged > 0.0, "{what}: there were no requests");
    ensure!(wrong == 0, "{what}: {wrong} samples were wrong: {seen:?}");
    ensure!(
        unknown as f64 <= samples * f64::from(CONNECTIONS) / 50.0,
        "{what}: {unknown} unknown"
    );
    ensure!(
        age_error_ns <= MARGIN_NS + JIFFY_NS,
        "{what}: the oldest age is off by {age_error_ms:.1} ms"
    );
    Ok(())
}

fn compare_with_logs(test: &str, mode: Mode, tls: bool) -> Result<()> {
    let programs: &[&str] = if tls {
        &["python3", "openssl"]
    } else {
        &["python3"]
    };
    if !needs::met(test, programs) {
        return Ok(());
    }
    let _alone = alone();
    let certificate = tls.then(Certificate::new).transpose()?;
    let tls = certificate.as_ref();
    let (server, address) = Talk::serve(mode, WORK, tls)?;
    let begun = Instant::now();
    let client = Talk::load(mode, address, CONNECTIONS, THINK, DURATION, tls)?;
    let port = address.port();
    let (inflight, downstream) = (format!(":{port}"), format!("-> {address}"));
    wait_for_requests(&client)?;
    let pids = [server.pid(), client.pid()].map(|pid| pid.to_string());
    let args = ["--pid", &pids[0], "--pid", &pids[1]].map(str::to_owned);
    let seen = sample_since(begun, &args, (&inflight, &downstream))?;
    client.wait_done(DURATION * 3)?;
    let (served, called) = (server.spans(), client.spans());
    compare("in flight", &seen[0], &served, &called)?;
    compare("calls outstanding", &seen[1], &served, &called)
}

/// Waits for two requests per connection on average.
fn wait_for_requests(client: &Talk) -> Result<()> {
    let enough = || Ok((client.spans().len() >= 2 * CONNECTIONS as usize).then_some(()));
    tailback_tests::wait::until("the first requests", Duration::from_secs(10), enough)
}

#[test]
fn closed_loop_requests_match_the_logs_of_server_and_client() -> Result<()> {
    let test = "closed_loop_requests_match_the_logs_of_server_and_client";
    compare_with_logs(test, Mode::Plain, false)
}

#[test]
fn tls_requests_match_the_logs_of_server_and_client() -> Result<()> {
    let test = "tls_requests_match_the_logs_of_server_and_client";
    compare_with_logs(test, Mode::Plain, true)
}

#[test]
fn requests_with_large_bodies_and_responses_match_the_logs() -> Result<()> {
    compare_with_logs(
        "requests_with_large_bodies_and_responses_match_the_logs",
        Mode::Large,
        false,
    )
}

#[test]
fn a_streamed_response_ends_the_request_with_its_first_byte() -> Result<()> {
    let test = "a_streamed_response_ends_the_request_with_its_first_byte";
    compare_with_logs(test, Mode::Streamed, false)
}

#[test]
fn pipelined_requests_count_as_at_least_one() -> Result<()> {
    compare_with_logs(
        "pipelined_requests_count_as_at_least_one",
        Mode::Pipelined,
        false,
    )
}

#[test]
fn a_proxy_shows_its_requests_in_flight_and_names_its_upstream() -> Result<()> {
    let test = "a_proxy_shows_its_requests_in_flight_and_names_its_upstream";
    if !needs::met(test, &["python3", "nginx"]) {
        return Ok(());
    }
    let _alone = alone();
    let (upstream, behind) = Talk::serve(Mode::Plain, WORK, None)?;
    let nginx = Nginx::start_proxy(2, behind)?;
    let to = nginx.address();
    let begun = Instant::now();
    let client = Talk::load(Mode::Plain, to, CONNECTIONS, THINK, DURATION, None)?;
    wait_for_requests(&client)?;
    let args = ["--pid".to_owned(), nginx.process().pid().to_string()];
    let names = (format!(":{}", to.port()), format!("-> {behind}"));
    let sample = Sample::of(&["--pid", &args[1]])?;
    let worst = &sample.queue("downstream", &names.1)?["worst"];
    let worst = worst.as_str().context("no upstream is named")?;
    println!("upstream: {worst}");
    ensure!(
        worst.contains(&format!("({}) on this node", upstream.pid())),
        "{worst} does not name {}",
        upstream.pid()
    );
    let seen = sample_since(begun, &args, (&names.0, &names.1))?;
    client.wait_done(DURATION * 3)?;
    let (served, called) = (upstream.spans(), client.spans());
    compare("in flight at the proxy", &seen[0], &served, &called)?;
    compare("outstanding at the upstream", &seen[1], &served, &called)
}
