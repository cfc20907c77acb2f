//! An open-loop load: requests come at their times, whether or not earlier ones have been answered.
//!
//! Loads that wait for answers slow down with the server and so hide its queues.

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

use crate::{chance::Chance, http};

/// When the next request comes.
#[derive(Clone, Copy, Debug)]
pub enum Spacing {
    /// All gaps are equal.
    Even,
    /// Gaps are exponential, as of many independent clients. The same seed gives the same gaps.
    Poisson { seed: u64 },
}

/// What to send. A new connection for each request.
#[derive(Clone, Debug)]
pub struct Plan {
    pub to: SocketAddr,
    pub path: String,
    pub per_s: f64,
    pub spacing: Spacing,
    /// It ends by itself after so long.
    pub lasts: Duration,
    /// A request is given up after so long.
    pub timeout: Duration,
    /// With so many under way, further ones are not sent, but counted as failed.
    pub at_once: usize,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it was to be sent.
    pub due: Instant,
    /// When connecting began.
    pub started: Instant,
    /// When the server's kernel had taken the connection.
    pub connected: Option<Instant>,
    /// When all of the answer was there, or the request had failed.
    pub ended: Instant,
    /// The status, or what went wrong.
    pub answer: Result<u16, String>,
}

impl Request {
    pub fn ok(&self) -> bool {
        self.answer == Ok(200)
    }

    /// From the moment at which it was due: a late start is waiting, too.
    pub fn took(&self) -> Duration {
        self.ended - self.due
    }
}

struct Shared {
    stop: AtomicBool,
    /// `per_s`, as bits.
    rate: AtomicU64,
    done: Mutex<Vec<Request>>,
}

/// A load that runs until it is stopped, or its time is over.
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

    /// From the next request on.
    pub fn set_rate(&self, per_s: f64) -> Result<()> {
        check_rate(per_s)?;
        self.shared.rate.store(per_s.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// The requests that have ended so far, in the order in which they ended.
    pub fn done(&self) -> Vec<Request> {
        self.shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sends no more, gives up those under way, and returns all that had ended.
    pub fn stop(mut self) -> Result<Vec<Request>> {
        self.finish()?;
        Ok(self.done())
    }

    /// Waits for the planned end and the last answer.
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
            Some(Err(_)) => bail!("the thread of the load panicked"),
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
        bail!("a load of {per_s} requests a second: want more than 0 and at most 100,000");
    }
    Ok(())
}

async fn send(plan: &Plan, shared: &Arc<Shared>) {
    /// A stop is seen after at most so long.
    const LOOK: Duration = Duration::from_millis(20);

    let stopped = || shared.stop.load(Ordering::Relaxed);
    let bytes: Arc<str> = http::request(plan.to, &plan.path).into();
    let mut gaps = Gaps::new(plan.spacing);
    let mut under_way = JoinSet::new();
    let mut due = Instant::now();
    let end = due + plan.lasts;
    while due < end && !stopped() {
        let now = Instant::now();
        if due > now {
            sleep_until(due.min(now + LOOK).into()).await;
            continue;
        }
        while under_way.try_join_next().is_some() {}
        if under_way.len() < plan.at_once {
            let (to, limit, bytes, shared) = (plan.to, plan.timeout, bytes.clone(), shared.clone());
            under_way.spawn(async move {
                let request = ask(to, &bytes, due, limit).await;
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
                answer: Err(format!("not sent: {} are under way", plan.at_once)),
            };
            shared
                .done
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(request);
        }
        due += gaps.next(f64::from_bits(shared.rate.load(Ordering::Relaxed)));
    }
    while !under_way.is_empty() && !stopped() {
        let _ = timeout(LOOK, under_way.join_next()).await;
    }
}

async fn ask(to: SocketAddr, bytes: &str, due: Instant, limit: Duration) -> Request {
    let started = Instant::now();
    let mut connected = None;
    let talk = async {
        let mut stream = TcpStream::connect(to)
            .await
            .map_err(|error| format!("connect: {error}"))?;
        connected = Some(Instant::now());
        stream
            .write_all(bytes.as_bytes())
            .await
            .map_err(|error| format!("send: {error}"))?;
        let mut answer = Vec::new();
        stream
            .read_to_end(&mut answer)
            .await
            .map_err(|error| format!("receive: {error}"))?;
        http::status(&answer).ok_or_else(|| "the answer is not HTTP".to_owned())
    };
    let answer = timeout(limit, talk)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {limit:?}")));
    Request {
        due,
        started,
        connected,
        ended: Instant::now(),
        answer,
    }
}

/// The gaps between requests.
struct Gaps {
    chance: Option<Chance>,
}

impl Gaps {
    fn new(spacing: Spacing) -> Self {
        let chance = match spacing {
            Spacing::Even => None,
            Spacing::Poisson { seed } => Some(Chance::new(seed)),
        };
        Self { chance }
    }

    fn next(&mut self, per_s: f64) -> Duration {
        let means = self
            .chance
            .as_mut()
            .map_or(1.0, |chance| -(1.0 - chance.share()).ln());
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
            lasts: Duration::from_millis(500),
            timeout: Duration::from_secs(20),
            at_once: 1000,
        }
    }

    #[test]
    fn requests_come_at_their_times_though_nobody_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let load = Load::start(plan(to)).unwrap();
        // The first answer waits until all have come: a load that waited for it would never send the second.
        let waiting: Vec<_> = (0..100).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in waiting {
            // All of the request: what is closed with bytes unread is reset.
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
    fn a_request_that_is_not_answered_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let plan = Plan {
            lasts: Duration::from_millis(1),
            timeout: Duration::from_millis(50),
            ..plan(to)
        };
        let done = Load::start(plan).unwrap().finish_plan().unwrap();
        assert_eq!(done.len(), 1);
        assert!(done[0].connected.is_some());
        assert_eq!(done[0].answer, Err("no answer within 50ms".to_owned()));
    }

    #[test]
    fn more_than_the_bound_are_not_sent_but_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let plan = Plan {
            at_once: 3,
            timeout: Duration::from_secs(1),
            ..plan(to)
        };
        let done = Load::start(plan).unwrap().finish_plan().unwrap();
        assert_eq!(done.len(), 100);
        assert_eq!(
            done.iter()
                .filter(|request| request.connected.is_some())
                .count(),
            3
        );
    }

    #[test]
    fn poisson_gaps_have_the_mean_that_was_asked_for_and_repeat() {
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
