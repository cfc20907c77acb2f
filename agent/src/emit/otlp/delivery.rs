//! The thread that empties the spool: one request in flight, the oldest first, again until its fate is known.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use opentelemetry_otlp::{
    Compression, ExporterBuildError, Protocol as Encoding, RetryPolicy, SpanExporter,
    WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Notify, watch},
};

use super::{
    answer::{Answer, Trouble},
    backoff::Backoff,
    client::{Wire, lock},
    config::{OtlpConfig, Protocol},
    grpc,
    notices::{Lost, Voice},
    spool::{MAX_REQUEST_BYTES, Reason, Spool},
    stats::OtlpStats,
};
use crate::sample::Notice;

/// Notices that wait to be taken.
const MAX_NOTICES: usize = 64;

/// What both threads see. Locked for moments: never while anything is sent, encoded or waited for.
pub struct Shared {
    pub state: Mutex<State>,
    /// Something came into the spool.
    pub wake: Notify,
    began: Instant,
}

pub struct State {
    pub spool: Spool,
    pub stats: OtlpStats,
    pub voice: Voice,
    notices: Vec<Notice>,
}

impl Shared {
    pub fn new(config: &OtlpConfig) -> Self {
        let state = State {
            spool: Spool::new(config.spool_spans, config.spool_bytes),
            stats: OtlpStats::default(),
            voice: Voice::new(config.endpoint.to_string()),
            notices: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
            wake: Notify::new(),
            began: Instant::now(),
        }
    }

    /// What [`Voice`] calls now.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

impl State {
    pub fn say(&mut self, notice: Option<Notice>) {
        if let Some(notice) = notice {
            if self.notices.len() < MAX_NOTICES {
                self.notices.push(notice);
            } else {
                self.stats.notices_dropped += 1;
            }
        }
    }

    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }
}

/// The exporter of opentelemetry-otlp, with our client under it. Retries are ours: its own end with its timeout.
pub fn exporter(config: &OtlpConfig, wire: Arc<Wire>) -> Result<SpanExporter, ExporterBuildError> {
    let url = match config.protocol {
        Protocol::HttpProtobuf => config.endpoint.to_string(),
        Protocol::Grpc => match grpc::export_url(&config.endpoint) {
            Ok(url) => url.to_string(),
            Err(e) => return Err(ExporterBuildError::InvalidConfiguration(e.to_string())),
        },
    };
    let builder = SpanExporter::builder()
        .with_http()
        .with_shared_http_client(wire)
        .with_endpoint(url)
        .with_protocol(Encoding::HttpBinary)
        .with_timeout(config.timeout)
        .with_retry_policy(RetryPolicy::disabled())
        .with_max_request_body_size(MAX_REQUEST_BYTES);
    if config.gzip {
        builder.with_compression(Compression::Gzip).build()
    } else {
        builder.build()
    }
}

pub fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// When to be gone, once that is known.
pub type Stop = watch::Receiver<Option<tokio::time::Instant>>;

/// Sees to one spool until told to stop.
pub struct Delivery {
    pub shared: Arc<Shared>,
    pub wire: Arc<Wire>,
    pub exporter: SpanExporter,
    pub backoff: Backoff,
    pub stop: Stop,
}

impl Delivery {
    /// Until the spool is empty after being told to stop, or the deadline given then has passed.
    pub async fn run(mut self) {
        let mut stop = self.stop.clone();
        let deadline = async move {
            let told = stop.wait_for(Option::is_some).await.map(|at| *at);
            // Without anyone left to tell: now.
            if let Ok(Some(at)) = told {
                tokio::time::sleep_until(at).await;
            }
        };
        let shared = Arc::clone(&self.shared);
        tokio::select! {
            () = self.deliver() => {}
            () = deadline => {}
        }
        let mut state = lock(&shared.state);
        let left = state.spool.clear();
        state.stats.drop_spans(Reason::Shutdown, left);
    }

    async fn deliver(&mut self) {
        let mut resource: Option<Arc<Resource>> = None;
        loop {
            let head = lock(&self.shared.state).spool.head();
            let Some(request) = head else {
                let mut stop = self.stop.clone();
                tokio::select! {
                    () = self.shared.wake.notified() => continue,
                    _ = stop.wait_for(Option::is_some) => {}
                }
                if lock(&self.shared.state).spool.len() == 0 {
                    return;
                }
                continue;
            };
            if !resource
                .as_ref()
                .is_some_and(|set| Arc::ptr_eq(set, &request.resource))
            {
                self.exporter.set_resource(&request.resource);
                resource = Some(request.resource);
            }
            let count = request.spans.len();
            let spans = request
                .spans
                .iter()
                .map(|span| SpanData::clone(span))
                .collect();
            let exported = self.exporter.export(spans).await;
            let answer = self.wire.take_answer().unwrap_or_else(|| {
                let why = exported.err().map_or_else(String::new, |e| e.to_string());
                Answer::Refused(Trouble::new("unsent", format!("was sent nothing: {why}")))
            });
            if !self.settle(count, answer).await {
                return;
            }
        }
    }

    /// Does what the answer to the oldest `count` spans asks for; false: give up.
    async fn settle(&mut self, count: usize, answer: Answer) -> bool {
        let now = self.shared.now();
        let (asked, wait) = {
            let mut state = lock(&self.shared.state);
            let state = &mut *state;
            state.stats.requests += 1;
            match answer {
                Answer::Taken { rejected, said } => {
                    self.backoff.reset();
                    let again = state.voice.taken(now, state.spool.len());
                    state.say(again);
                    let partial = state.voice.partial(now, rejected, &said);
                    state.say(partial);
                    state.spool.delivered(count);
                    state.stats.take_spans(count, rejected);
                    return true;
                }
                Answer::Refused(why) => {
                    self.backoff.reset();
                    refuse(state, now, Reason::Refused, &why, count);
                    return true;
                }
                Answer::Garbage(why) => {
                    self.backoff.reset();
                    refuse(state, now, Reason::Garbage, &why, count);
                    return true;
                }
                Answer::Later { after, why } => {
                    if self.stop.borrow().is_some() && after.is_none() {
                        self.backoff.reset();
                    }
                    let wait = self.backoff.next(after, chance());
                    state.stats.retries += 1;
                    let notice = state.voice.later(now, &why, wait, state.spool.len());
                    state.say(notice);
                    state.stats.last_error = Some(why.text);
                    (after, wait)
                }
            }
        };
        self.pause(wait, asked.is_some()).await
    }

    /// Waits; false: there will be no time left to try again. Being told to stop ends a wait of our own, but not one
    /// that the collector asked for.
    async fn pause(&mut self, wait: Duration, asked: bool) -> bool {
        let until = tokio::time::Instant::now() + wait;
        if self.stop.borrow().is_none() {
            let mut stop = self.stop.clone();
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                _ = stop.wait_for(Option::is_some) => {}
            }
            if !asked {
                return true;
            }
        }
        let deadline = *self.stop.borrow();
        if deadline.is_none_or(|deadline| until >= deadline) {
            return false;
        }
        tokio::time::sleep_until(until).await;
        true
    }
}

fn refuse(state: &mut State, now: Duration, reason: Reason, why: &Trouble, count: usize) {
    let orphans = state.spool.refused(count);
    state.stats.drop_spans(reason, count);
    state.stats.drop_spans(Reason::ParentLost, orphans);
    let notice = state.voice.refused(
        now,
        why,
        Lost {
            spans: count,
            orphans,
        },
    );
    state.say(notice);
    state.stats.last_error = Some(why.text.clone());
}

/// From 0 to 1; nothing hangs on its quality.
fn chance() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}
