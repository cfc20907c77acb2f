//! Delivery of spans to a collector: OTLP/HTTP with protobuf, or OTLP/gRPC.
//!
//! [`Exporter::send`] puts spans into a bounded spool and returns; a thread empties the spool. An unreachable collector
//! costs time, not spans, until the spool is full. Then new spans are dropped, counted and reported. Order is kept, so a
//! trace in the collector never lacks a parent.
//!
//! # Why `opentelemetry-otlp` only encodes, under our own HTTP client
//!
//! `opentelemetry-otlp` builds and compresses the requests, for both protocols. `client` sends them, as the exporter's
//! `HttpClient`, because the delivery needs facts that `SpanExporter::export` does not return (versions 0.33 of
//! `opentelemetry-otlp`, 0.14.9 of tonic):
//!
//! - The result of an export is an error text. It has neither the status, nor `Retry-After` or gRPC's `RetryInfo`, nor the
//!   number of rejected spans of a partial success. The spool needs them to decide: retry, drop with all children, or
//!   count as rejected.
//! - The exporter's own retries end with its timeout of 10 s. A collector may be away for ten minutes.
//! - tonic's client panics on a response whose status details are not valid base64 (`Status::from_header_map`). Therefore
//!   gRPC uses the same HTTP client with its own framing (`grpc`).

#![forbid(unsafe_code)]

mod backoff;
mod client;
mod config;
mod delivery;
mod grpc;
mod notices;
mod response;
mod spool;
mod stats;
mod tls;

use std::{
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use self::{
    backoff::Backoff,
    client::{Wire, lock},
    config::invalid_setting,
    delivery::{Delivery, Shared},
};
pub use self::{
    config::{ConfigError, OtlpConfig, Protocol, Retry, TlsFiles},
    spool::Reason,
    stats::{OtlpStats, Summary},
};
use crate::{emit::spans::Batch, sample::Notice};

/// How long after its deadline the thread may take to end before it is abandoned.
const JOIN_GRACE: Duration = Duration::from_millis(200);

/// A running delivery. [`Exporter::shutdown`] ends it gracefully; dropping it ends it at once.
pub struct Exporter {
    collector: String,
    shared: Arc<Shared>,
    stop: watch::Sender<Option<tokio::time::Instant>>,
    /// Disconnected when the thread has ended.
    ended: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts the delivery thread. It connects when the first span arrives.
    ///
    /// # Errors
    ///
    /// Names the invalid setting.
    pub fn start(config: &OtlpConfig) -> Result<Self, ConfigError> {
        let wire = Arc::new(Wire::new(config)?);
        let exporter = delivery::exporter(config, Arc::clone(&wire));
        let exporter = exporter
            .map_err(|e| invalid_setting("OTLP endpoint", format!("{}: {e}", config.endpoint)))?;
        let cannot_run = |e| {
            invalid_setting(
                "OTLP delivery",
                format!("cannot start the delivery thread: {e}"),
            )
        };
        let runtime = delivery::runtime().map_err(cannot_run)?;
        let shared = Arc::new(Shared::new(config));
        let (stop, stop_requested) = watch::channel(None);
        let (end, ended) = mpsc::channel();
        let delivery = Delivery {
            shared: Arc::clone(&shared),
            wire,
            exporter,
            backoff: Backoff::new(config.retry),
            stop: stop_requested,
        };
        let run = move || {
            let _end = end;
            runtime.block_on(delivery.run());
            // A DNS lookup may block for long: do not wait for it.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new()
            .name("tailback-otlp".to_owned())
            .spawn(run)
            .map_err(cannot_run)?;
        let collector = config.endpoint.to_string();
        Ok(Self {
            collector,
            shared,
            stop,
            ended,
            thread: Some(thread),
        })
    }

    /// Queues spans for delivery. Never blocks on the collector.
    pub fn send(&self, batch: Batch) {
        let now = self.shared.now();
        let mut state = lock(&self.shared.state);
        let state = &mut *state;
        state.stats.submitted += batch.spans.len() as u64;
        for reason in state.spool.push(batch) {
            state.stats.drop_spans(reason, 1);
            let remedy = match reason {
                Reason::SpoolFull => "the spool is full; queued spans are kept, new ones are lost",
                Reason::TooLarge => "a single span exceeds the request limit of 4 MiB",
                _ => continue,
            };
            let notice = state.reporter.dropped(now, reason.name(), remedy);
            state.add_notice(notice);
        }
        self.shared.wake.notify_one();
    }

    /// The counters so far.
    pub fn stats(&self) -> OtlpStats {
        let state = lock(&self.shared.state);
        let mut stats = state.stats.clone();
        stats.waiting = state.spool.len() as u64;
        stats.waiting_bytes = state.spool.bytes() as u64;
        stats
    }

    /// Takes the notices since the last call: the first problem of each kind, and its end.
    pub fn notices(&self) -> Vec<Notice> {
        lock(&self.shared.state).take_notices()
    }

    /// Delivers queued spans for at most `within`, then ends. Spans left in the spool count as dropped.
    pub fn shutdown(mut self, within: Duration) -> Summary {
        let began = Instant::now();
        self.end(within);
        Summary {
            collector: self.collector.clone(),
            stats: self.stats(),
            took: began.elapsed(),
        }
    }

    fn end(&mut self, within: Duration) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.stop
            .send_replace(Some(tokio::time::Instant::now() + within));
        if self.ended.recv_timeout(within + JOIN_GRACE) == Err(mpsc::RecvTimeoutError::Disconnected)
        {
            // It has ended; a panic has already been printed.
            let _ = thread.join();
        }
        let mut state = lock(&self.shared.state);
        let left = state.spool.clear();
        state.stats.drop_spans(Reason::Shutdown, left);
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}
