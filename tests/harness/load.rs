//! An open-loop load generator: requests are sent on schedule, whether or not earlier ones have completed.
//!
//! A closed loop slows down with the server and so hides its queues.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{sleep_until, timeout},
};

use crate::{http, random::Random};

/// Inter-arrival times.
#[derive(Clone, Copy, Debug)]
pub enum Spacing {
    /// Constant gaps.
    Even,
    /// Exponential gaps (Poisson arrivals), as from many independent clients. The same seed gives the same gaps.
    Poisson { seed: u64 },
}

/// What to send. Each request uses a new connection.
#[derive(Clone, Debug)]
pub struct Plan {
    pub to: SocketAddr,
    pub path: String,
    /// Requests per second.
    pub per_s: f64,
    pub spacing: Spacing,
    /// Total duration.
    pub duration: Duration,
    /// Timeout of each request.
    pub timeout: Duration,
    /// With this many requests in flight, further ones are not sent but recorded as failed.
    pub max_in_flight: usize,
}

/// One request and its outcome.
#[derive(Clone, Debug)]
pub struct Request {
    /// Scheduled send time.
    pub due: Instant,
    /// When connecting began.
    pub started: Instant,
    /// When the connection was established.
    pub connected: Option<Instant>,
    /// When the response was complete or the request had failed.
    pub ended: Instant,
    /// HTTP status, or the error.
    pub response: Result<u16, String>,
}

impl Request {
    /// Whether the status is 200.
    pub fn ok(&self) -> bool {
        self.response == Ok(200)
    }

    /// Latency from the scheduled send time, so that a late start counts as waiting.
    pub fn took(&self) -> Duration {
        self.ended - self.due
    }
}

struct Shared {
    stop: AtomicBool,
    /// Bits of `per_s`.
    rate: AtomicU64,
    done: Mutex<Vec<Request>>,
}

/// A running load, until it is stopped or its duration is over.
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Load {
    pub fn start(plan: Plan) -> Result<Self> {
        check_rate(plan.per_s)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            rate: AtomicU64::new(plan.per_s.to_bits()),
            done: Mutex::default(),
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("load".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .context("start the load's runtime")?;
                runtime.block_on(send(&plan, &theirs));
                Ok(())
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Changes the rate from the next request on.
    pub fn set_rate(&self, per_s: f64) -> Result<()> {
        check_rate(per_s)?;
        self.shared.rate.store(per_s.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Completed and failed requests so far, in order of completion.
    pub fn done(&self) -> Vec<Request> {
        self.shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops sending, abandons requests in flight, and returns the finished ones.
    pub fn stop(mut self) -> Result<Vec<Request>> {
        self.finish()?;
        Ok(self.done())
    }

    /// Waits for the end of the plan and the last response.
    pub fn finish_plan(mut self) -> Result<Vec<Request>> {
        self.join()?;
        Ok(self.done())
    }

    fn finish(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            Some(Err(_)) => bail!("the load thread panicked"),
            None => Ok(()),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

fn check_rate(per_s: f64) -> Result<()> {
    if !(per_s > 0.0 && per_s <= 1e5) {
        bail!("invalid rate of {per_s} requests/s: must be more than 0 and at most 100,000");
    }
    Ok(())
}

async fn send(plan: &Plan, shared: &Arc<Shared>) {
    /// A stop is noticed within this time.
    const STOP_CHECK: Duration = Duration::from_millis(20);

    let stopped = || shared.stop.load(Ordering::Relaxed);
    let bytes: Arc<str> = http::request(plan.to, &plan.path).into();
    let mut gaps = Gaps::new(plan.spacing);
    let mut in_flight = JoinSet::new();
    let mut due = Instant::now();
    let end = due + plan.duration;
    while due < end && !stopped() {
        let now = Instant::now();
        if due > now {
            sleep_until(due.min(now + STOP_CHECK).into()).await;
            continue;
        }
        while in_flight.try_join_next().is_some() {}
        if in_flight.len() < plan.max_in_flight {
            let (to, limit, bytes, shared) = (plan.to, plan.timeout, bytes.clone(), shared.clone());
            in_flight.spawn(async move {
                let request = request(to, &bytes, due, limit).await;
                shared
                    .done
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(request);
            });
        } else {
            let request = Request {
                due,
                started: now,
                connected: None,
                ended: now,
                response: Err(format!(
                    "not sent: {} requests in flight",
                    plan.max_in_flight
                )),
            };
            shared
                .done
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(request);
        }
        due += gaps.next(f64::from_bits(shared.rate.load(Ordering::Relaxed)));
    }
    while !in_flight.is_empty() && !stopped() {
        let _ = timeout(STOP_CHECK, in_flight.join_next()).await;
    }
}

async fn request(to: SocketAddr, bytes: &str, due: Instant, limit: Duration) -> Request {
    let started = Instant::now();
    let mut connected = None;
    let exchange = async {
        let mut stream = TcpStream::connect(to)
            .await
            .map_err(|error| format!("connect: {error}"))?;
        connected = Some(Instant::now());
        stream
            .write_all(bytes.as_bytes())
            .await
            .map_err(|error| format!("send: {error}"))?;
        let mut response = Vec::new();
        stream
            .read_to_end(&mut response)
            .await
            .map_err(|error| format!("receive: {error}"))?;
        http::status(&response).ok_or_else(|| "the response is not HTTP".to_owned())
    };
    let response = timeout(limit, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("no response within {limit:?}")));
    Request {
        due,
        started,
        connected,
        ended: Instant::now(),
        response,
    }
}

/// Generates the gaps between requests.
struct Gaps {
    random: Option<Random>,
}

impl Gaps {
    fn new(spacing: Spacing) -> Self {
        let random = match spacing {
            Spacing::Even => None,
            Spacing::Poisson { seed } => Some(Random::new(seed)),
        };
        Self { random }
    }

    fn next(&mut self, per_s: f64) -> Duration {
        let means = self
            .random
            .as_mut()
            .map_or(1.0, |random| -(1.0 - random.fraction()).ln());
        Duration::from_secs_f64(means / per_s)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    use super::*;

    fn plan(to: SocketAddr) -> Plan {
        Plan {
            to,
            path: "/".to_owned(),
            per_s: 200.0,
            spacing: Spacing::Even,
            duration: Duration::from_millis(500),
            timeout: Duration::from_secs(20),
            max_in_flight: 1000,
        }
    }

    #[test]
    fn requests_are_sent_on_schedule_without_responses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let load = Load::start(plan(to)).unwrap();
        // The first response waits for the last request: a closed loop would never send the second.
        let waiting: Vec<_> = (0..100).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in waiting {
            // Read the whole request: closing with unread bytes would send a reset.
            let mut request = vec![0; http::request(to, "/").len()];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").unwrap();
        }
        let done = load.finish_plan().unwrap();
        assert_eq!(done.len(), 100);
        assert!(
            done.iter().all(Request::ok),
            "{:?}",
            done.iter().find(|request| !request.ok())
        );
        let mut due: Vec<Instant> = done.iter().map(|request| request.due).collect();
        due.sort();
        assert_eq!(due[99] - due[0], Duration::from_millis(495));
    }

    #[test]
    fn a_request_without_response_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let plan = Plan {
            duration: Duration::from_millis(1),
            timeout: Duration::from_millis(50),
            ..plan(to)
        };
        let done = Load::start(plan).unwrap().finish_plan().unwrap();
        assert_eq!(done.len(), 1);
        assert!(done[0].connected.is_some());
        assert_eq!(done[0].response, Err("no response within 50ms".to_owned()));
    }

    #[test]
    fn requests_beyond_the_in_flight_limit_are_recorded_but_not_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let plan = Plan {
            max_in_flight: 3,
            ..plan(to)
        };
        let load = Load::start(plan).unwrap();
        // The three wait until the listener is closed, however long the machine pauses.
        crate::wait::until("the other requests", Duration::from_secs(10), || {
            Ok((load.done().len() >= 97).then_some(()))
        })
        .unwrap();
        drop(listener);
        let done = load.finish_plan().unwrap();
        assert_eq!(done.len(), 100);
        assert_eq!(
            done.iter()
                .filter(|request| request.connected.is_some())
                .count(),
            3
        );
    }

    #[test]
    fn poisson_gaps_have_the_requested_mean_and_are_reproducible() {
        let gaps = |seed| -> Vec<Duration> {
            let mut gaps = Gaps::new(Spacing::Poisson { seed });
            (0..10_000).map(|_| gaps.next(100.0)).collect()
        };
        assert_eq!(gaps(7), gaps(7));
        assert_ne!(gaps(7), gaps(8));
        let mean = gaps(7).iter().sum::<Duration>().as_secs_f64() / 10_000.0;
        assert!((mean - 0.01).abs() < 0.0005, "{mean}");
    }
}
