//! What each adapter said, and to whom: for `tailback status`.

use std::{
    io::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};

use crate::collect::unix_ns;

/// One adapter.
#[derive(Debug)]
pub struct AdapterStats {
    /// The word in the configuration: `haproxy`.
    pub kind: &'static str,
    /// Where it is found: an address, a file.
    pub at: String,
    pub target: Option<String>,
    /// Those who asked keep what they heard last: HAProxy alone. The others ask again, see the end of the connection, or forget.
    pub is_kept: bool,
    said: Mutex<String>,
    count: AtomicU64,
    last_unix_ns: AtomicU64,
    listeners: AtomicU64,
    refused: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl AdapterStats {
    pub fn new(kind: &'static str, at: String, target: Option<String>) -> Arc<Self> {
        Arc::new(Self {
            kind,
            at,
            target,
            is_kept: kind == "haproxy",
            said: Mutex::default(),
            count: AtomicU64::new(0),
            last_unix_ns: AtomicU64::new(0),
            listeners: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            failure: Mutex::default(),
        })
    }

    /// How often it said something.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Who is connected.
    pub fn listeners(&self) -> u64 {
        self.listeners.load(Ordering::Relaxed)
    }

    /// Who could not be served.
    pub fn refusals(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// It said this.
    pub fn said(&self, what: &str) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.last_unix_ns.store(unix_ns(), Ordering::Relaxed);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        what.trim_end().clone_into(&mut said);
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// It could not say it. Told on standard error when it is another reason than before.
    pub fn failed(&self, why: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.as_deref() != Some(why) {
            // Nobody may read it any more.
            let _ = writeln!(
                std::io::stderr(),
                "tailback adapters: {} {}: {why}",
                self.kind,
                self.at
            );
            *failure = Some(why.to_owned());
        }
    }

    /// Another one wants to be served than there is room for, or does not take what is said.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// One who is connected, for as long as the answer lives.
    pub fn listener(self: &Arc<Self>) -> Listener {
        self.listeners.fetch_add(1, Ordering::Relaxed);
        Listener(Arc::clone(self))
    }

    pub fn object(&self) -> Value {
        let said = self
            .said
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
            "last_reply": said,
            "replies": self.count(),
            "connections": self.listeners(),
            "rejected": self.refusals(),
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
        object
    }
}

pub struct Listener(Arc<AdapterStats>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, Ordering::Relaxed);
    }
}
