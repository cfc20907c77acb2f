//! The quantities that are compared with a truth known by other means, and the error allowed for each. They are the rows
//! of the table that `cargo xtask accuracy` prints, and the tests of the kernel matrix. `tests/accuracy` measures them.

use serde_json::{Value, json};

/// One quantity of one kind of queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: &'static str,
    pub quantity: &'static str,
    pub unit: Unit,
    /// Where the truth comes from.
    pub truth: &'static str,
}

impl Row {
    /// The largest allowed error, in the unit of the row. Limits, losses and yes-or-no answers have to be exact. Depths
    /// and rates may be 5% off. Ages may be 5% or one sampling interval off, because an arrival between two samples is
    /// seen at the second. 1% of the samples may report a wrong state: over a lossy link, sequence numbers sometimes
    /// show a change late.
    pub fn allowed(&self, truth: f64, interval_ns: u64) -> f64 {
        /// For depths, rates and ages.
        const RELATIVE_ERROR: f64 = 0.05;
        /// For rows that count correct samples.
        const WRONG_SAMPLES: f64 = 0.01;
        /// For waits that hooks measure, ns: the kernel's own account reads its clock when it begins to switch, they read
        /// theirs when it has chosen the next thread, some µs later with cold caches.
        const HOOK_ERROR_NS: f64 = 20_000.0;
        let is = |last: &str| self.quantity.rsplit(' ').next() == Some(last);
        let relative = truth.abs() * RELATIVE_ERROR;
        if is("limit") || is("losses") || self.unit == Unit::Truth {
            0.0
        } else if is("oldest") {
            relative.max(interval_ns as f64)
        } else if is("samples") {
            truth * WRONG_SAMPLES
        } else if self.kind == "hooks" && self.unit == Unit::Nanoseconds {
            relative.max(HOOK_ERROR_NS)
        } else {
            relative
        }
    }
}

/// What a row's numbers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Count,
    Bytes,
    PerSecond,
    Nanoseconds,
    /// 1 for true.
    Truth,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::PerSecond => "1/s",
            Self::Nanoseconds => "ns",
            Self::Truth => "truth",
        }
    }
}

/// How a measurement compares with its truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// The error exceeds the allowed one, or the workload itself failed.
    Off,
    /// The agent does not report it.
    Absent,
    /// The state cannot be set up here.
    Skipped,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Off => "off",
            Self::Absent => "absent",
            Self::Skipped => "skipped",
        }
    }
}

/// One measurement and its truth, both in the row's unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    pub kind: String,
    pub quantity: String,
    pub unit: String,
    pub truth: Option<f64>,
    pub measured: Option<f64>,
    /// The largest allowed error.
    pub allowed: Option<f64>,
    pub verdict: Verdict,
    pub note: String,
}

impl Finding {
    /// For a row without a measurement.
    pub fn without_numbers(row: &Row, verdict: Verdict, note: &str) -> Self {
        Self {
            kind: row.kind.to_owned(),
            quantity: row.quantity.to_owned(),
            unit: row.unit.name().to_owned(),
            truth: None,
            measured: None,
            allowed: None,
            verdict,
            note: note.to_owned(),
        }
    }

    /// `measured - truth`.
    pub fn error(&self) -> Option<f64> {
        Some(self.measured? - self.truth?)
    }

    pub fn is_of(&self, row: &Row) -> bool {
        self.kind == row.kind && self.quantity == row.quantity
    }

    /// As one line of JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "type": "accuracy",
            "kind": self.kind,
            "quantity": self.quantity,
            "unit": self.unit,
            "truth": self.truth,
            "measured": self.measured,
            "error": self.error(),
            "allowed": self.allowed,
            "verdict": self.verdict.name(),
            "note": self.note,
        })
    }

    /// `None` for a line of another type.
    pub fn from_json(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        if value["type"] != "accuracy" {
            return None;
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let all = [Verdict::Ok, Verdict::Off, Verdict::Absent, Verdict::Skipped];
        Some(Self {
            kind: text("kind")?,
            quantity: text("quantity")?,
            unit: text("unit")?,
            truth: value["truth"].as_f64(),
            measured: value["measured"].as_f64(),
            allowed: value["allowed"].as_f64(),
            verdict: all
                .into_iter()
                .find(|verdict| value["verdict"] == verdict.name())?,
            note: text("note")?,
        })
    }
}

const fn row(kind: &'static str, quantity: &'static str, unit: Unit, truth: &'static str) -> Row {
    Row {
        kind,
        quantity,
        unit,
        truth,
    }
}

/// All rows by kind, in the order in which a request passes the queues.
pub const ROWS: &[Row] = {
    use Unit::{Bytes, Count, Nanoseconds, PerSecond, Truth};
    &[
        row(
            "syn",
            "depth",
            Count,
            "handshakes begun and never completed",
        ),
        row("syn", "limit", Count, "the requested backlog"),
        row("syn", "losses", Count, "TCPReqQFullDrop"),
        row(
            "accept",
            "depth",
            Count,
            "connections established, not accepted",
        ),
        row("accept", "limit", Count, "the requested backlog"),
        row("accept", "oldest", Nanoseconds, "the clients' clock"),
        row(
            "accept",
            "arrivals",
            PerSecond,
            "connections established, by the clients' clock",
        ),
        row(
            "accept",
            "departures",
            PerSecond,
            "connections accepted, by the service's clock",
        ),
        row("accept", "losses", Count, "ListenOverflows"),
        row(
            "accept",
            "unix depth",
            Count,
            "connections established, not accepted",
        ),
        row("accept", "unix limit", Count, "the requested backlog"),
        row("accept", "unix oldest", Nanoseconds, "the clients' clock"),
        row("recv", "depth", Bytes, "SIOCINQ"),
        row("recv", "limit", Bytes, "SO_RCVBUF"),
        row("recv", "oldest", Nanoseconds, "the writer's clock"),
        row(
            "recv",
            "arrivals",
            PerSecond,
            "bytes written, by the writer's clock",
        ),
        row(
            "recv",
            "departures",
            PerSecond,
            "bytes read, by the reader's clock",
        ),
        row("recv", "ktls depth", Bytes, "plain bytes sent, not read"),
        row("udp", "depth", Bytes, "SO_MEMINFO"),
        row("udp", "datagrams", Count, "datagrams sent, not read"),
        row("udp", "limit", Bytes, "SO_RCVBUF"),
        row("udp", "oldest", Nanoseconds, "the sender's clock"),
        row("udp", "losses", Count, "SO_MEMINFO"),
        row("unix", "stream depth", Bytes, "SIOCOUTQ of the writer"),
        row("unix", "stream limit", Bytes, "SO_SNDBUF of the writer"),
        row("unix", "stream oldest", Nanoseconds, "the writer's clock"),
        row("unix", "datagram depth", Count, "datagrams sent, not read"),
        row("unix", "datagram limit", Count, "net.unix.max_dgram_qlen"),
        row("unix", "datagram oldest", Nanoseconds, "the sender's clock"),
        row("pipe", "depth", Count, "FIONREAD, whole pages"),
        row("pipe", "limit", Count, "F_GETPIPE_SZ"),
        row("pipe", "oldest", Nanoseconds, "the writer's clock"),
        row(
            "pipe",
            "holder",
            Truth,
            "the process that holds the other end",
        ),
        row(
            "pipe",
            "arrivals",
            PerSecond,
            "pages written, by the writer's clock",
        ),
        row(
            "pipe",
            "departures",
            PerSecond,
            "pages read, by the reader's clock",
        ),
        row("pipe", "fifo depth", Count, "FIONREAD, whole pages"),
        row(
            "inflight",
            "depth",
            Count,
            "requests read, not responded to",
        ),
        row("inflight", "oldest", Nanoseconds, "the clients' clock"),
        row(
            "inflight",
            "responses",
            PerSecond,
            "responses received on one connection, about 400/s",
        ),
        row(
            "inflight",
            "with loss depth",
            Count,
            "requests read, not responded to, by the servers' clocks",
        ),
        row(
            "inflight",
            "with loss correct samples",
            Count,
            "all samples, by the servers' clocks, except within 30 ms of a change",
        ),
        row(
            "inflight",
            "with loss oldest",
            Nanoseconds,
            "the servers' clocks",
        ),
        row("workers", "depth", Count, "threads with work"),
        row("workers", "limit", Count, "threads started"),
        row("eventloop", "oldest", Nanoseconds, "the handler's clock"),
        row(
            "runqueue",
            "run delay",
            PerSecond,
            "schedstat of the threads",
        ),
        row("runqueue", "wait", Nanoseconds, "schedstat of the threads"),
        row("hooks", "run queue waits", Count, "dispatches in schedstat"),
        row("hooks", "run queue wait", Nanoseconds, "schedstat"),
        row(
            "hooks",
            "blocked time",
            Nanoseconds,
            "the requested time of most sleeps",
        ),
        row("lock", "depth", Count, "threads started that wait for it"),
        row(
            "lock",
            "oldest",
            Nanoseconds,
            "the clock of the first waiter",
        ),
        row("lock", "holder", Truth, "the thread that holds it"),
        row("disk", "depth", Count, "threads in state D of /proc"),
        row("disk", "oldest", Nanoseconds, "the writers' clock"),
        row("memory", "depth", Bytes, "the cgroup's own files"),
        row("memory", "limit", Bytes, "the requested limit"),
        row("downstream", "depth", Count, "calls made, no response yet"),
        row("downstream", "limit", Count, "connections opened"),
        row("downstream", "oldest", Nanoseconds, "the clients' clock"),
        row(
            "downstream",
            "with loss depth",
            Count,
            "calls made, no response yet, by the clients' clocks",
        ),
        row(
            "downstream",
            "with loss correct samples",
            Count,
            "all samples, by the clients' clocks, except within 30 ms of a change",
        ),
        row(
            "downstream",
            "with loss oldest",
            Nanoseconds,
            "the clients' clocks",
        ),
        row("send", "depth", Bytes, "SIOCOUTQ"),
        row("send", "limit", Bytes, "SO_SNDBUF"),
        row("send", "oldest", Nanoseconds, "the writer's clock"),
        row(
            "send",
            "ktls depth",
            Bytes,
            "plain bytes written, not arrived",
        ),
        row("fd", "depth", Count, "/proc/self/fd"),
        row("fd", "limit", Count, "RLIMIT_NOFILE"),
        row("uring", "sq depth", Count, "entries written, not submitted"),
        row("uring", "sq limit", Count, "requested entries"),
        row(
            "uring",
            "sq losses",
            Count,
            "the ring's counter of dropped entries",
        ),
        row("uring", "cq depth", Count, "completions not consumed"),
        row("uring", "cq limit", Count, "entries granted by the kernel"),
    ]
};

/// All kinds, in the order of the rows.
pub fn kinds() -> Vec<&'static str> {
    let mut kinds: Vec<&str> = ROWS.iter().map(|row| row.kind).collect();
    kinds.dedup();
    kinds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_kind_and_unique() {
        let kinds = kinds();
        for (at, kind) in kinds.iter().enumerate() {
            assert!(!kinds[..at].contains(kind), "{kind} is listed twice");
        }
        for (at, row) in ROWS.iter().enumerate() {
            let before = &ROWS[..at];
            let known = |one: &Row| (one.kind, one.quantity) == (row.kind, row.quantity);
            assert!(!before.iter().any(known), "{row:?} is listed twice");
        }
    }

    #[test]
    fn limits_are_exact_and_ages_may_be_one_sampling_interval_off() {
        let row = |quantity: &str| ROWS.iter().find(|row| row.quantity == quantity);
        let allowed = |quantity: &str, truth| {
            row(quantity).map_or(f64::NAN, |row| row.allowed(truth, 100_000_000))
        };
        assert_eq!(allowed("limit", 128.0), 0.0);
        assert_eq!(allowed("unix limit", 128.0), 0.0);
        assert_eq!(allowed("depth", 100.0), 5.0);
        assert_eq!(allowed("oldest", 1e9), 1e8);
        assert_eq!(allowed("oldest", 4e9), 2e8);
        assert_eq!(allowed("wait", 1e6), 5e4);
        assert_eq!(allowed("with loss correct samples", 2e3), 20.0);
    }

    #[test]
    fn a_finding_survives_a_json_round_trip() {
        let mut finding = Finding::without_numbers(&ROWS[0], Verdict::Absent, "no such queue");
        assert_eq!(
            Finding::from_json(&finding.to_json().to_string()).as_ref(),
            Some(&finding)
        );
        (finding.truth, finding.measured, finding.allowed) = (Some(4.0), Some(3.5), Some(0.2));
        assert_eq!(finding.error(), Some(-0.5));
        assert_eq!(
            Finding::from_json(&finding.to_json().to_string()),
            Some(finding)
        );
        assert_eq!(Finding::from_json("{\"type\":\"queue\"}"), None);
    }
}
