//! Requests in flight and calls outstanding, told from sequence numbers, against servers and clients that log their own
//! times. Every test prints its error.

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

/// Tests that measure time must not disturb each other.
static ALONE: Mutex<()> = Mutex::new(());
const CONNECTIONS: u32 = 16;
const WORK: Duration = Duration::from_millis(200);
const THINK: Duration = Duration::from_millis(200);
const LASTS: Duration = Duration::from_secs(12);
/// A look is not of one moment.
const MARGIN_NS: u64 = MAX_OUTPUT_DELAY.as_nanos() as u64;
/// When something came or went the kernel notes in ticks of its timer, which are no longer than this.
const TICK_NS: u64 = 10_000_000;

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

/// Looks at two queues until the time is over: what the server has in flight, and what its caller has outstanding. Looks that
/// were held up are left out.
fn sample_for(
    lasts: Duration,
    args: &[String],
    (inflight, downstream): (&str, &str),
) -> Result<[Vec<Seen>; 2]> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut seen = [Vec::new(), Vec::new()];
    let end = Instant::now() + lasts;
    while Instant::now() < end {
        let sample = Sample::of(&args)?;
        if !sample.is_prompt()? {
            continue;
        }
        seen[0].push(Seen::of(sample.queue("inflight", inflight)?)?);
        seen[1].push(Seen::of(sample.queue("downstream", downstream)?)?);
    }
    Ok(seen)
}

/// Compares with what was logged on both sides of the queue, and prints how far off it is. The server's span begins when a
/// request was read and ends before it is answered; the caller's begins before it is sent and ends when its answer was read: the
/// queue has it for the one at least and for the other at most, however late the two come to note it.
fn compare(what: &str, seen: &[Seen], served: &[Span], called: &[Span]) -> Result<()> {
    let (mut wrong, mut outside, mut unknown, mut truly, mut told) = (0, 0, 0, 0.0, 0.0);
    let mut age_error_ns = 0;
    for sample in seen {
        let (from, to) = (sample.at_ns - MARGIN_NS, sample.at_ns + MARGIN_NS);
        let surely = |span: &&Span| span.began_ns <= from && to <= span.responded_ns;
        let maybe = |span: &&Span| span.began_ns <= to && from <= span.responded_ns;
        let surely = || served.iter().filter(|span| !span.hidden).filter(surely);
        let maybe = || called.iter().filter(maybe);
        let (least, most) = (surely().count() as u64, maybe().count() as u64);
        let off =
            least.saturating_sub(sample.depth + sample.unknown) + sample.depth.saturating_sub(most);
        wrong += u64::from(off > 0);
        outside = outside.max(off);
        unknown += sample.unknown;
        truly += (least + most) as f64 / 2.0;
        told += sample.depth as f64;
        // The oldest is one of those that are under way beyond doubt, or an older one that is about to be answered.
        let age = |span: &Span| sample.at_ns.saturating_sub(span.began_ns);
        let (young, old) = (surely().map(age).max(), maybe().map(age).max());
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
        "{what}: {} samples, mean {:.2} told, {:.2} logged; {wrong} outside of what the log allows, by {outside} at \
         most; {unknown} unknown; error of the oldest's age at most {age_error_ms:.1} ms",
        seen.len(),
        told / samples,
        truly / samples,
    );
    ensure!(seen.len() >= 5, "{what}: only {} looks", seen.len());
    ensure!(truly > 0.0, "{what}: nothing was ever under way");
    ensure!(wrong == 0, "{what}: {wrong} looks were wrong: {seen:?}");
    ensure!(
        unknown as f64 <= samples * f64::from(CONNECTIONS) / 50.0,
        "{what}: {unknown} unknown"
    );
    ensure!(
        age_error_ns <= MARGIN_NS + TICK_NS,
        "{what}: the oldest's age is off by {age_error_ms:.1} ms"
    );
    Ok(())
}

fn talk(test: &str, mode: Mode, tls: bool) -> Result<()> {
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
    let client = Talk::load(mode, address, CONNECTIONS, THINK, LASTS, tls)?;
    let port = address.port();
    let (inflight, downstream) = (format!(":{port}"), format!("-> {address}"));
    wait_for_requests(&client)?;
    let pids = [server.pid(), client.pid()].map(|pid| pid.to_string());
    let args = ["--pid", &pids[0], "--pid", &pids[1]].map(str::to_owned);
    let seen = sample_for(LASTS * 3 / 4, &args, (&inflight, &downstream))?;
    client.wait_done(LASTS * 3)?;
    let (served, called) = (server.spans(), client.spans());
    compare("in flight", &seen[0], &served, &called)?;
    compare("calls outstanding", &seen[1], &served, &called)
}

/// Until each connection has had a request.
fn wait_for_requests(client: &Talk) -> Result<()> {
    let enough = || Ok((client.spans().len() >= 2 * CONNECTIONS as usize).then_some(()));
    tailback_tests::wait::until("the first requests", Duration::from_secs(10), enough)
}

#[test]
fn requests_of_a_closed_loop_are_those_that_server_and_client_logged() -> Result<()> {
    let test = "requests_of_a_closed_loop_are_those_that_server_and_client_logged";
    talk(test, Mode::Plain, false)
}

#[test]
fn requests_with_tls_are_those_that_server_and_client_logged() -> Result<()> {
    let test = "requests_with_tls_are_those_that_server_and_client_logged";
    talk(test, Mode::Plain, true)
}

#[test]
fn large_bodies_and_answers_do_not_deceive() -> Result<()> {
    talk(
        "large_bodies_and_answers_do_not_deceive",
        Mode::Large,
        false,
    )
}

#[test]
fn a_streamed_answer_ends_the_request_with_its_first_byte() -> Result<()> {
    let test = "a_streamed_answer_ends_the_request_with_its_first_byte";
    talk(test, Mode::Streamed, false)
}

#[test]
fn pipelined_requests_are_at_least_one() -> Result<()> {
    talk(
        "pipelined_requests_are_at_least_one",
        Mode::Pipelined,
        false,
    )
}

#[test]
fn a_proxy_has_in_flight_what_its_callers_wait_for_and_calls_who_is_named() -> Result<()> {
    let test = "a_proxy_has_in_flight_what_its_callers_wait_for_and_calls_who_is_named";
    if !needs::met(test, &["python3", "nginx"]) {
        return Ok(());
    }
    let _alone = alone();
    let (upstream, behind) = Talk::serve(Mode::Plain, WORK, None)?;
    let nginx = Nginx::start_proxy(2, behind)?;
    let to = nginx.address();
    let client = Talk::load(Mode::Plain, to, CONNECTIONS, THINK, LASTS, None)?;
    wait_for_requests(&client)?;
    let args = ["--pid".to_owned(), nginx.process().pid().to_string()];
    let names = (format!(":{}", to.port()), format!("-> {behind}"));
    let sample = Sample::of(&["--pid", &args[1]])?;
    let worst = &sample.queue("downstream", &names.1)?["worst"];
    let worst = worst.as_str().context("nobody is named")?;
    println!("the proxy calls: {worst}");
    ensure!(
        worst.contains(&format!("({}) on this node", upstream.pid())),
        "{worst} does not name {}",
        upstream.pid()
    );
    let seen = sample_for(LASTS * 3 / 4, &args, (&names.0, &names.1))?;
    client.wait_done(LASTS * 3)?;
    let (served, called) = (upstream.spans(), client.spans());
    compare("in flight at the proxy", &seen[0], &served, &called)?;
    compare("outstanding at the upstream", &seen[1], &served, &called)
}
