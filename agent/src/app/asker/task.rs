//! One process that is asked again and again.

mod request;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};
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
        transport::{Endpoint, LoginRefused},
    },
    sample::AppAnswer,
    text::harmless,
};

/// How long a late answer is waited for, before the connection is closed.
const LATE_LIMIT: Duration = Duration::from_secs(30);
/// The interval is at least this many times the time that an answer took: 2% of the time of a service with one thread.
const PACE_PER_COST: u32 = 50;
/// Longest interval, however slow the answers are.
const MAX_PACE: Duration = Duration::from_mins(10);
/// A process that failed this often in a row is left alone.
const MAX_FAILURES: u32 = 3;
/// For this time.
const REST: Duration = Duration::from_mins(10);
/// Time between attempts to find the listener of a process that has just been recognized: it may not listen yet.
pub(super) const SEARCH_INTERVAL: Duration = Duration::from_secs(10);

/// What a task needs.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) shared: Arc<Shared>,
    pub(super) logins: Arc<BTreeMap<String, Login>>,
    /// CLOCK_MONOTONIC.
    pub(super) now_ns: fn() -> u64,
}

pub(super) struct Task {
    process: Process,
    pub(super) focus: watch::Sender<bool>,
    handle: JoinHandle<()>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Task {
    pub(super) fn start(context: Context, process: &Process) -> Self {
        let (focus, focused) = watch::channel(process.is_focused);
        let asked = Asked {
            context,
            process: process.clone(),
            names: process.preset.names(),
            found: None,
            kept: Mutex::default(),
            failures: 0,
            has_queues: false,
        };
        Self {
            process: process.clone(),
            focus,
            handle: tokio::task::spawn_local(asked.run(focused)),
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
    found: Option<Session>,
    kept: Mutex<Kept>,
    failures: u32,
    /// The last answer that was delivered has queues.
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
            // Until the task is replaced: its listeners change.
            return std::future::pending().await;
        }
        loop {
            let began = Instant::now();
            let is_known = self.found.is_some();
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
                    let rests = self.failures >= MAX_FAILURES || error.is::<LoginRefused>();
                    let pace = match rests {
                        true => REST,
                        false => self.pace(false, took).max(SEARCH_INTERVAL),
                    };
                    if is_known {
                        self.deliver_absence(took);
                    }
                    let why = harmless(&format!("{error:#}"));
                    let why = match rests {
                        true => format!("{why}; not asked for {} min", REST.as_secs() / 60),
                        false => why,
                    };
                    self.report(|report| {
                        report.failure = Some(why);
                        report.took = took;
                        report.pace = pace;
                        report.is_asked = true;
                    });
                    if rests {
                        self.failures = 0;
                        self.found = None;
                        self.deliver_end(took);
                    }
                    pace
                }
            };
            self.rest(pace, took, &mut focus).await;
        }
    }

    /// Waits until the next request is due: sooner if the service comes into focus meanwhile.
    async fn rest(&self, pace: Duration, took: Duration, focus: &mut watch::Receiver<bool>) {
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
            let result = self.within(self.ask_at(&endpoint, path, client)).await;
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
        let mut failure = None;
        for endpoint in &self.process.endpoints {
            for path in 0..paths(&self.process.preset) {
                match self.within(self.ask_at(endpoint, path, Client::None)).await {
                    Ok(proved) => return Ok(proved),
                    // Its other listeners want the same password, or are for something else.
                    Err(error) if error.is::<LoginRefused>() => return Err(error),
                    Err(error) => {
                        let error = error.context(format!("at {endpoint}"));
                        // The first listener is the likeliest.
                        failure.get_or_insert(error);
                    }
                }
            }
        }
        Err(failure.unwrap_or_else(|| anyhow::anyhow!("it has no listener")))
    }

    /// Bounds the time. After the limit the absence is reported, and the answer is waited for.
    async fn within(&self, answer: impl Future<Output = Result<Proved>>) -> Result<Proved> {
        let mut answer = std::pin::pin!(answer);
        let began = Instant::now();
        if let Ok(answer) = timeout(TIME_LIMIT, &mut answer).await {
            return answer;
        }
        if self.is_proved() {
            self.deliver_absence(began.elapsed());
        }
        self.report(|report| {
            report.failure = Some(format!("no answer within {TIME_LIMIT:?}"));
            report.is_asked = true;
        });
        match timeout(LATE_LIMIT, answer).await {
            Ok(answer) => answer,
            Err(_) => bail!("no answer within {LATE_LIMIT:?}"),
        }
    }

    fn is_proved(&self) -> bool {
        let key = self.key();
        let reports = lock(&self.context.shared.reports);
        reports
            .get(&key)
            .is_some_and(|report| report.endpoint.is_some())
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

    /// It is left alone: what it said before is too old.
    fn deliver_end(&mut self, took: Duration) {
        lock(&self.context.shared.clients).remove(&self.key());
        if std::mem::take(&mut self.has_queues) {
            self.push(AppAnswer {
                queues: Some(Vec::new()),
                ..self.answer(took)
            });
        }
    }

    /// It did not answer: that is evidence about the service.
    fn deliver_absence(&self, took: Duration) {
        self.push(self.answer(took));
    }

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
