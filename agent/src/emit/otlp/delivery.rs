//! The thread that empties the spool: one request in flight, oldest spans first, retried until it is accepted or refused.

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
use tracing::{debug, trace};

use super::{
    backoff::Backoff,
    client::{Wire, lock},
    config::{OtlpConfig, Protocol},
    grpc,
    notices::{Lost, Reporter},
    response::{ExportOutcome, Problem},
    spool::{MAX_REQUEST_BYTES, Reason, Spool},
    stats::OtlpStats,
};
use crate::sample::Notice;

/// Maximum number of notices that wait to be collected.
const MAX_NOTICES: usize = 64;

/// State shared between the agent and the delivery thread. Locked only briefly: never while encoding, sending or waiting.
pub struct Shared {
    pub state: Mutex<State>,
    /// Signalled when spans enter the spool.
    pub wake: Notify,
    began: Instant,
}

pub struct State {
    pub spool: Spool,
    pub stats: OtlpStats,
    pub reporter: Reporter,
    notices: Vec<Notice>,
}

impl Shared {
    pub fn new(config: &OtlpConfig) -> Self {
        let state = State {
            spool: Spool::new(config.spool_spans, config.spool_bytes),
            stats: OtlpStats::default(),
            reporter: Reporter::new(config.endpoint.to_string()),
            notices: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
            wake: Notify::new(),
            began: Instant::now(),
        }
    }

    /// The time that [`Reporter`] takes as `now`.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

impl State {
    pub fn add_notice(&mut self, notice: Option<Notice>) {
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

/// The exporter of opentelemetry-otlp on top of our client, with its own retries disabled (see the parent module).
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

/// The deadline of a shutdown; `None` while none is requested.
pub type Stop = watch::Receiver<Option<tokio::time::Instant>>;

/// Empties one spool until a stop is requested.
pub struct Delivery {
    pub shared: Arc<Shared>,
    pub wire: Arc<Wire>,
    pub exporter: SpanExporter,
    pub backoff: Backoff,
    pub stop: Stop,
}

impl Delivery {
    /// Runs until a stop is requested and the spool is empty or the deadline has passed.
    pub async fn run(mut self) {
        let mut stop = self.stop.clone();
        let deadline = async move {
            let requested = stop.wait_for(Option::is_some).await.map(|at| *at);
            // If the exporter is gone, stop at once.
            if let Ok(Some(at)) = requested {
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
            trace!(spans = count, "exporting");
            let exported = self.exporter.export(spans).await;
            let outcome = self.wire.take_outcome().unwrap_or_else(|| {
                let why = exported.err().map_or_else(String::new, |e| e.to_string());
                ExportOutcome::Refused(Problem::new("unsent", format!("was not contacted: {why}")))
            });
            if !self.settle(count, outcome).await {
                return;
            }
        }
    }

    /// Acts on the outcome of sending the oldest `count` spans; `false` means give up.
    async fn settle(&mut self, count: usize, outcome: ExportOutcome) -> bool {
        let now = self.shared.now();
        let (asked, wait) = {
            let mut state = lock(&self.shared.state);
            let state = &mut *state;
            state.stats.requests += 1;
            match outcome {
                ExportOutcome::Accepted { rejected, message } => {
                    self.backoff.reset();
                    let recovered = state.reporter.accepted(now, state.spool.len());
                    state.add_notice(recovered);
                    let partial = state.reporter.partial(now, rejected, &message);
                    state.add_notice(partial);
                    state.spool.delivered(count);
                    debug!(spans = count, rejected, "spans accepted");
                    state.stats.accept_spans(count, rejected);
                    return true;
                }
                ExportOutcome::Refused(why) => {
                    self.backoff.reset();
                    refuse(state, now, Reason::Refused, &why, count);
                    return true;
                }
                ExportOutcome::Invalid(why) => {
                    self.backoff.reset();
                    refuse(state, now, Reason::InvalidResponse, &why, count);
                    return true;
                }
                ExportOutcome::Retry { after, why } => {
                    if self.stop.borrow().is_some() && after.is_none() {
                        self.backoff.reset();
                    }
                    let wait = self.backoff.next(after, random());
                    debug!(kind = why.kind, ?wait, "export failed, retrying");
                    state.stats.retries += 1;
                    let notice = state.reporter.retrying(now, &why, wait, state.spool.len());
                    state.add_notice(notice);
                    state.stats.last_error = Some(why.text);
                    (after, wait)
                }
            }
        };
        self.pause(wait, asked.is_some()).await
    }

    /// Waits before a retry; `false` means that no time is left for one. A stop request ends our own backoff, but not a
    /// wait that the collector asked for.
    async fn pause(&mut self, wait: Duration, is_requested: bool) -> bool {
        let until = tokio::time::Instant::now() + wait;
        if self.stop.borrow().is_none() {
            let mut stop = self.stop.clone();
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                _ = stop.wait_for(Option::is_some) => {}
            }
            if !is_requested {
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

fn refuse(state: &mut State, now: Duration, reason: Reason, why: &Problem, count: usize) {
    let orphans = state.spool.refused(count);
    debug!(kind = why.kind, spans = count, orphans, "export refused");
    state.stats.drop_spans(reason, count);
    state.stats.drop_spans(Reason::ParentLost, orphans);
    let notice = state.reporter.refused(
        now,
        why,
        Lost {
            spans: count,
            orphans,
        },
    );
    state.add_notice(notice);
    state.stats.last_error = Some(why.text.clone());
}

/// A random number from 0 to 1 for jitter; its quality does not matter.
fn random() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}
