//! Delivery of spans to a collector: OTLP/HTTP with protobuf, or OTLP/gRPC.
//!
//! [`Exporter::send`] puts spans into a bounded spool and returns; a thread of its own empties it. A collector that is
//! away costs time, not spans, until the spool is full; then new spans are dropped, counted, and said to be. Order is
//! kept, so a trace in the collector never lacks a parent. `opentelemetry-otlp` encodes and sends; see `client` for
//! what lies under it.

#![forbid(unsafe_code)]

mod answer;
mod backoff;
mod client;
mod config;
mod delivery;
mod grpc;
mod notices;
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
    config::wrong,
    delivery::{Delivery, Shared},
};
pub use self::{
    config::{ConfigError, OtlpConfig, Protocol, Retry, TlsFiles},
    spool::Reason,
    stats::{OtlpStats, Summary},
};
use crate::{emit::spans::Batch, sample::Notice};

/// How much longer than its deadline the thread may take to end before it is left behind.
const GRACE: Duration = Duration::from_millis(200);

/// A running delivery; ends with [`Exporter::shutdown`], or at once when dropped.
pub struct Exporter {
    collector: String,
    shared: Arc<Shared>,
    stop: watch::Sender<Option<tokio::time::Instant>>,
    /// Closed when the thread has ended.
    ended: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts the thread; connects with the first span.
    ///
    /// # Errors
    ///
    /// Names the setting that cannot be used.
    pub fn start(config: &OtlpConfig) -> Result<Self, ConfigError> {
        let wire = Arc::new(Wire::new(config)?);
        let exporter = delivery::exporter(config, Arc::clone(&wire));
        let exporter =
            exporter.map_err(|e| wrong("OTLP endpoint", format!("{}: {e}", config.endpoint)))?;
        let cannot_run = |e| wrong("OTLP delivery", format!("cannot start its thread: {e}"));
        let runtime = delivery::runtime().map_err(cannot_run)?;
        let shared = Arc::new(Shared::new(config));
        let (stop, told) = watch::channel(None);
        let (end, ended) = mpsc::channel();
        let delivery = Delivery {
            shared: Arc::clone(&shared),
            wire,
            exporter,
            backoff: Backoff::new(config.retry),
            stop: told,
        };
        let run = move || {
            let _end = end;
            runtime.block_on(delivery.run());
            // Looking up a name may block for long; nobody waits for that.
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

    /// Hands spans over; never waits for the collector.
    pub fn send(&self, batch: Batch) {
        let now = self.shared.now();
        let mut state = lock(&self.shared.state);
        let state = &mut *state;
        state.stats.handed += batch.spans.len() as u64;
        for reason in state.spool.push(batch) {
            state.stats.drop_spans(reason, 1);
            let remedy = match reason {
                Reason::SpoolFull => {
                    "too many wait for it already; what comes now is lost, what waits is not"
                }
                Reason::TooLarge => "one alone is larger than the 4 MiB that a request may have",
                _ => continue,
            };
            let notice = state.voice.dropped(now, reason.name(), remedy);
            state.say(notice);
        }
        self.shared.wake.notify_one();
    }

    pub fn stats(&self) -> OtlpStats {
        let state = lock(&self.shared.state);
        let mut stats = state.stats.clone();
        stats.waiting = state.spool.len() as u64;
        stats.waiting_bytes = state.spool.bytes() as u64;
        stats
    }

    /// What there is to say since the last call: the first trouble of each kind, and its end.
    pub fn notices(&self) -> Vec<Notice> {
        lock(&self.shared.state).take_notices()
    }

    /// Delivers what waits, for `within` at most, and ends. What is left then is counted as dropped.
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
        if self.ended.recv_timeout(within + GRACE) == Err(mpsc::RecvTimeoutError::Disconnected) {
            // It has ended; if by a panic, that was told by the panic itself.
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
