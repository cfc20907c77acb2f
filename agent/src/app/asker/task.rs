//! One process that is asked again and again.

mod request;

use std::{
    collections::BTreeMap,
    error, fmt,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use request::{Client, Kept, paths};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{Login, MAX_ANSWERS, Process, Report, Shared, TIME_LIMIT, lock};
use crate::{
    app::{
        mapping::{self, Mapped},
        series::{Names, SeriesSet},
        transport::{Endpoint, LoginRefused, Origin},
    },
    sample::AppAnswer,
    text::harmless,
};

/// The interval is at least this many times the time that an answer took: 2% of the time of a service with one thread.
const PACE_PER_COST: u32 = 50;
/// Longest interval, however slow the answers are.
const MAX_PACE: Duration = Duration::from_mins(10);
/// After this number of failures in a row, polling is suspended.
const MAX_FAILURES: u32 = 3;

/// What follows an attempt that fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// How long a late answer is waited for, before the connection is closed.
    pub(super) late: Duration,
    /// Time until the next attempt. A process that has just been recognized may not listen yet.
    pub(super) retry: Duration,
    /// The same, after [`MAX_FAILURES`].
    pub(super) suspension: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            late: Duration::from_secs(30),
            retry: Duration::from_secs(10),
            suspension: Duration::from_mins(10),
        }
    }
}

/// No answer came within this time. The request may still wait in the service.
#[derive(Debug)]
struct NoAnswer(Duration);

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no answer within {:?}", self.0)
    }
}

impl error::Error for NoAnswer {}

/// What a task needs.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) shared: Arc<Shared>,
    pub(super) logins: Arc<BTreeMap<String, Login>>,
    /// CLOCK_MONOTONIC.
    pub(super) now_ns: fn() -> u64,
    pub(super) timing: Timing,
}

pub(super) struct Task {
    process: Process,
    pub(super) focus: watch::Sender<bool>,
    handle: JoinHandle<()>,
    origin: Origin,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Task {
    /// `before`: the task that it replaces, whose queues may have to be ended.
    pub(super) fn start(context: Context, process: &Process, before: Option<&Self>) -> Self {
        let (focus, focused) = watch::channel(process.is_focused);
        let origin = before.map(|before| before.origin.clone());
        let origin = origin.unwrap_or_else(|| Origin::new(&context.shared.own));
        let asked = Asked {
            context,
            process: process.clone(),
            names: process.preset.names(),
            origin: origin.clone(),
            found: None,
            next: 0,
            kept: Mutex::default(),
            failures: 0,
            has_queues: before.is_some(),
        };
        Self {
            process: process.clone(),
            focus,
            handle: tokio::task::spawn_local(asked.run(focused)),
            origin,
        }
    }

    /// Whether it asks this process, at the same listeners.
    pub(super) fn is_of(&self, process: &Process) -> bool {
        let same = Process {
            is_focused: self.process.is_focused,
            ..process.clone()
        };
        self.process == same
    }
}

/// A process, and the listener that answers.
struct Asked {
    context: Context,
    process: Process,
    names: Names,
    origin: Origin,
    found: Option<Session>,
    /// Where the search for the listener goes on after an attempt without an answer.
    next: usize,
    kept: Mutex<Kept>,
    failures: u32,
    /// The last answer that was delivered, perhaps by the task before, may have queues.
    has_queues: bool,
}

/// A listener that had the proof, and the connection to it.
struct Session {
    endpoint: Endpoint,
    /// Which of several paths.
    path: usize,
    client: Client,
}

/// An answer with its proof.
struct Proved {
    session: Session,
    answer: SeriesSet,
}

impl Asked {
    async fn run(mut self, mut focus: watch::Receiver<bool>) {
        if self.process.endpoints.is_empty() {
            let why = self.process.unreachable.clone();
            let why = why.unwrap_or_else(|| "it has no listener that may be asked".to_owned());
            self.report(|report| {
                report.failure = Some(why);
                report.is_asked = true;
            });
            self.deliver_end(Duration::ZERO);
            // Until the task is replaced: its listeners change.
            return std::future::pending().await;
        }
        loop {
            let began = Instant::now();
            let result = self.ask().await;
            let took = began.elapsed();
            let pace = match result {
                Ok(Proved { session, answer }) => {
                    self.failures = 0;
                    self.found = Some(session);
                    let pace = self.pace(*focus.borrow(), took);
                    self.has_queues = self.deliver(&answer, took, pace) > 0;
                    pace
                }
                Err(error) => {
                    self.failures += 1;
                    let is_suspended = self.failures >= MAX_FAILURES || error.is::<LoginRefused>();
                    let Timing {
                        retry, suspension, ..
                    } = self.context.timing;
                    let pace = match is_suspended {
                        true => suspension,
                        false => self.pace(false, took).max(retry),
                    };
                    let why = harmless(&format!("{error:#}"));
                    let why = match is_suspended {
                        true => format!("{why}; next attempt in {} min", suspension.as_secs() / 60),
                        false => why,
                    };
                    self.report(|report| {
                        report.failure = Some(why);
                        report.took = took;
                        report.pace = pace;
                        report.is_asked = true;
                    });
                    if is_suspended {
                        self.failures = 0;
                        self.found = None;
                        self.deliver_end(took);
                    }
                    pace
                }
            };
            self.wait(pace, took, &mut focus).await;
        }
    }

    /// Waits until the next request is due: sooner if the service comes into focus meanwhile.
    async fn wait(&self, pace: Duration, took: Duration, focus: &mut watch::Receiver<bool>) {
        let until = Instant::now() + pace;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(changed) = timeout(left, focus.changed()).await else {
                return;
            };
            if changed.is_err() {
                return std::future::pending().await;
            }
            if self.failures == 0 && self.found.is_some() && *focus.borrow() {
                return sleep(self.pace(true, took).min(left)).await;
            }
        }
    }

    fn pace(&self, is_focused: bool, took: Duration) -> Duration {
        let preset = &self.process.preset;
        let pace = match is_focused {
            true => preset.focused_pace,
            false => preset.pace,
        };
        pace.max(took * PACE_PER_COST).min(MAX_PACE.max(pace))
    }

    /// One answer: of the known listener, else of the first one with the proof.
    async fn ask(&mut self) -> Result<Proved> {
        if let Some(session) = self.found.take() {
            let Session {
                endpoint,
                path,
                client,
            } = session;
            let client = client.if_open();
            let answer = self.ask_at(&endpoint, path, client);
            let result = self.within(answer, true).await;
            if result.is_err() {
                // The next attempt is at the same listener, on another connection.
                self.found = Some(Session {
                    endpoint,
                    path,
                    client: Client::None,
                });
            }
            return result;
        }
        let paths = paths(&self.process.preset);
        let count = self.process.endpoints.len() * paths;
        let mut failure = None;
        for at in std::mem::take(&mut self.next)..count {
            let endpoint = &self.process.endpoints[at / paths];
            let path = at % paths;
            let answer = self.ask_at(endpoint, path, Client::None);
            match self.within(answer, false).await {
                Ok(proved) => return Ok(proved),
                // Its other listeners want the same password, or are for something else.
                Err(error) if error.is::<LoginRefused>() => return Err(error),
                // The service may hang: another request would wait beside this one. The next attempt is elsewhere, if it can be.
                Err(error) if error.is::<NoAnswer>() => {
                    let error = error.context(format!("at {endpoint}"));
                    self.next = (at + 1) % count;
                    return Err(error);
                }
                Err(error) => {
                    let error = error.context(format!("at {endpoint}"));
                    // The first listener is the likeliest.
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| anyhow::anyhow!("it has no listener")))
    }

    /// Bounds the time. After the limit the absence is reported, and the answer is waited for. `is_known`: this listener has
    /// answered before.
    async fn within(
        &self,
        answer: impl Future<Output = Result<Proved>>,
        is_known: bool,
    ) -> Result<Proved> {
        let mut answer = std::pin::pin!(answer);
        let began = Instant::now();
        let in_time = timeout(TIME_LIMIT, &mut answer).await;
        if is_known && !matches!(in_time, Ok(Ok(_))) {
            self.push(self.answer(began.elapsed()));
        }
        if let Ok(answer) = in_time {
            return answer;
        }
        self.report(|report| {
            report.failure = Some(format!("no answer within {TIME_LIMIT:?}"));
            report.is_asked = true;
        });
        let late = self.context.timing.late;
        match timeout(late, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(NoAnswer(late).into()),
        }
    }

    /// Returns the number of queues.
    fn deliver(&self, answer: &SeriesSet, took: Duration, pace: Duration) -> usize {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix_ns = now.map_or(0, |now| now.as_nanos() as u64);
        let process = &self.process;
        let Mapped {
            queues,
            left_out,
            clients,
        } = mapping::queues(&process.preset, answer, &process.program, unix_ns);
        lock(&self.context.shared.clients).insert(self.key(), clients);
        let count = queues.len();
        self.push(AppAnswer {
            queues: Some(queues),
            ..self.answer(took)
        });
        self.report(|report| {
            report.queues = count;
            report.left_out = left_out + answer.left_out;
            report.malformed = answer.malformed;
            report.took = took;
            report.pace = pace;
            report.failure = None;
            report.is_asked = true;
        });
        count
    }

    /// Polling is suspended: ends its queues.
    fn deliver_end(&mut self, took: Duration) {
        lock(&self.context.shared.clients).remove(&self.key());
        if std::mem::take(&mut self.has_queues) {
            self.push(AppAnswer {
                queues: Some(Vec::new()),
                ..self.answer(took)
            });
        }
    }

    /// That there is no answer.
    fn answer(&self, took: Duration) -> AppAnswer {
        AppAnswer {
            tgid: self.process.tgid,
            preset: self.process.preset.name.clone(),
            at_ns: (self.context.now_ns)(),
            took_ns: took.as_nanos() as u64,
            queues: None,
        }
    }

    fn push(&self, answer: AppAnswer) {
        let mut answers = lock(&self.context.shared.answers);
        if answers.len() >= MAX_ANSWERS {
            // No sample has taken them: the oldest is worth least.
            answers.remove(0);
        }
        answers.push(answer);
        self.context
            .shared
            .has_answers
            .store(true, Ordering::Release);
    }

    fn key(&self) -> (u32, String) {
        (self.process.tgid, self.process.preset.name.clone())
    }

    fn report(&self, update: impl FnOnce(&mut Report)) {
        let mut reports = lock(&self.context.shared.reports);
        let report = reports.entry(self.key()).or_insert_with(|| Report {
            tgid: self.process.tgid,
            preset: self.process.preset.name.clone(),
            exe: harmless(&self.process.program.exe),
            proof: self.process.preset.proof.clone(),
            ..Report::default()
        });
        update(report);
        if report.failure.is_none()
            && let Some(found) = &self.found
        {
            report.endpoint = Some(found.endpoint.to_string());
        }
    }
}
