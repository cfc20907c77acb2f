//! Statistics of each adapter, for `tailback status` and the metrics.

use std::{
    io::Write as _,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};

use super::warning::{Consumers, Warning};
use crate::collect::unix_ns;

/// Statistics of one adapter.
#[derive(Debug)]
pub struct AdapterStats {
    /// Its name in the configuration, such as `haproxy`.
    pub kind: &'static str,
    /// Its address or file.
    pub at: String,
    /// The service it reports, if only one.
    pub target: Option<String>,
    /// Whether clients keep the last reply after the process is gone. Only HAProxy does; others poll, see the connection
    /// close, or let the value expire.
    pub keeps_last_reply: bool,
    last_reply: Mutex<String>,
    replies: AtomicU64,
    last_unix_ns: AtomicU64,
    connections: AtomicU64,
    rejected: AtomicU64,
    closed: AtomicU64,
    failure: Mutex<Option<String>>,
    consumers: OnceLock<Arc<dyn Consumers>>,
}

impl AdapterStats {
    pub fn new(kind: &'static str, at: String, target: Option<String>) -> Arc<Self> {
        Arc::new(Self {
            kind,
            at,
            target,
            keeps_last_reply: kind == "haproxy",
            last_reply: Mutex::default(),
            replies: AtomicU64::new(0),
            last_unix_ns: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            failure: Mutex::default(),
            consumers: OnceLock::new(),
        })
    }

    /// Sets what is known about the consumers.
    pub fn set_consumers(&self, consumers: Arc<dyn Consumers>) {
        // There is one task per adapter, which sets it once.
        let _ = self.consumers.set(consumers);
    }

    /// What is wrong with the consumers.
    pub fn warnings(&self) -> Vec<Warning> {
        let consumers = self.consumers.get();
        consumers.map_or_else(Vec::new, |consumers| consumers.warnings())
    }

    /// Replies sent.
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    /// Clients connected now.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Clients rejected because there were too many, and pressure socket notifications that a client did not read.
    pub fn rejections(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// Connections closed to make room for others, or because the client sent no request or did not read.
    pub fn closed_connections(&self) -> u64 {
        self.closed.load(Ordering::Relaxed)
    }

    /// 1 if the adapter cannot listen or write its file, else 0.
    pub fn failures(&self) -> u64 {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        u64::from(failure.is_some())
    }

    /// The adapter can work again: clears the failure.
    pub fn recovered(&self) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Counts a reply and keeps its text. Clears the failure.
    pub fn replied(&self, reply: &str) {
        self.replies.fetch_add(1, Ordering::Relaxed);
        self.last_unix_ns.store(unix_ns(), Ordering::Relaxed);
        let mut last_reply = self
            .last_reply
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        reply.trim_end().clone_into(&mut last_reply);
        self.recovered();
    }

    /// Records a failure. Prints it on standard error if the reason is new.
    pub fn failed(&self, reason: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.as_deref() != Some(reason) {
            // An error is ignored: standard error may be closed.
            let _ = writeln!(
                std::io::stderr(),
                "tailback adapters: {} {}: {reason}",
                self.kind,
                self.at
            );
            *failure = Some(reason.to_owned());
        }
    }

    /// Counts a client rejected because there were too many, or a pressure socket notification that a client did not read.
    pub fn rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that is closed to make room, or because the client sent no request or did not read.
    pub fn closed(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection until the result is dropped.
    pub fn connection(self: &Arc<Self>) -> Connection {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connection(Arc::clone(self))
    }

    pub fn to_json(&self) -> Value {
        let last_reply = self
            .last_reply
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let failure = self
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut object = json!({
            "adapter": self.kind,
            "at": self.at,
            "last_reply": last_reply,
            "replies": self.replies(),
            "connections": self.connections(),
            "rejected": self.rejections(),
            "closed": self.closed_connections(),
        });
        let last = self.last_unix_ns.load(Ordering::Relaxed);
        if last > 0 {
            object["last_unix_ns"] = last.into();
        }
        if let Some(target) = &self.target {
            object["target"] = target.as_str().into();
        }
        if let Some(failure) = failure {
            object["failure"] = failure.into();
        }
        if let Some(consumers) = self.consumers.get() {
            consumers.describe(&mut object);
        }
        object
    }
}

/// A counted connection.
pub struct Connection(Arc<AdapterStats>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
