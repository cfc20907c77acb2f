//! Recognizes log lines that report a full queue or an exhausted resource, by one table of patterns.
//!
//! A message is evidence in addition to what the kernel shows. No rule of a diagnosis depends on one. A pattern is plain text
//! anywhere in a line, without regard to ASCII case; `*` matches anything.
#![forbid(unsafe_code)]

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, AhoCorasickKind, MatchKind};
use anyhow::{Context as _, Result, bail, ensure};

use crate::cause::Cause;

/// Bytes of a line that are searched; the rest is ignored.
pub const MAX_LINE: usize = 4096;
/// Patterns that a configuration may add.
pub const MAX_OWN: usize = 64;
/// Longest pattern, bytes.
const MAX_PATTERN: usize = 200;
/// Longest name, bytes.
const MAX_NAME: usize = 40;
/// Shortest allowed length of a pattern's longest piece between two `*`, bytes. Shorter ones match nearly every line.
const MIN_PIECE: usize = 4;

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Name of the message. Several patterns may have the same name.
    pub name: &'static str,
    pub pattern: &'static str,
    /// The cause that it supports. `None`: it reports that something is full, but not why.
    pub supports: Option<Cause>,
    /// The programs that write it.
    pub seen: &'static str,
}

macro_rules! known {
    ($($name:ident $supports:expr => { $($pattern:literal $seen:literal,)* })*) => {
        /// The table. The first row that matches a line counts, so specific patterns come before general ones.
        pub const KNOWN: &[Known] = &[$($(Known {
            name: stringify!($name),
            pattern: $pattern,
            supports: $supports,
            seen: $seen,
        },)*)*];
    };
}

known! {
    listen_queue_full None => {
        "listen queue*full" "uWSGI",
        "listen queue*overflow" "kernels and servers of BSD descent",
        "accept queue*full" "application servers",
    }
    syn_flood None => {
        "possible SYN flooding" "Linux, in a syslog daemon's file",
        "SYN flooding on port" "Linux before 6.3, in a syslog daemon's file",
    }
    pool_exhausted Some(Cause::PoolExhausted) => {
        "QueuePool limit" "SQLAlchemy",
        "pool exhausted" "redis-py, jedis, commons-pool, many",
        "timeout waiting for connection from pool" "Apache HttpClient, the AWS SDK for Java",
        "connection is not available, request timed out" "HikariCP",
        "could not obtain a connection from the pool" "ActiveRecord",
        "could not obtain a database connection within" "ActiveRecord before 5",
        "timeout waiting for idle object" "commons-dbcp",
        "couldn't get a connection after" "psycopg_pool",
        "connection pool timeout" "go-redis",
        "PoolTimeout" "httpx, psycopg_pool",
        "query_wait_timeout" "PgBouncer",
        "no connections available in the pool" "many",
        "connection pool is full" "urllib3",
    }
    too_many_connections Some(Cause::UndersizedLimit) => {
        "too many connections" "MySQL, MariaDB, memcached, ClickHouse",
        "too many clients already" "PostgreSQL",
        "remaining connection slots are reserved" "PostgreSQL",
        "no more connections allowed" "PgBouncer",
        "max number of clients reached" "Redis, Valkey",
        "client closed*max number of clients" "Redis, Valkey",
        "maxclients reached" "Redis",
        "too many open connections" "memcached",
        "worker_connections are not enough" "nginx",
        "maxconn*reached" "HAProxy",
        "reached*maxconn" "HAProxy",
        "table full, dropping packet" "nf_conntrack, in a syslog daemon's file",
    }
    workers_exhausted Some(Cause::UndersizedLimit) => {
        "server reached pm.max_children" "PHP-FPM",
        "seems busy (you may need to increase" "PHP-FPM",
        "reached*setting, consider raising" "Apache httpd, PHP-FPM",
        "all workers are busy" "application servers",
        "all threads*are currently busy" "Tomcat",
        "maximum number of threads*created for connector" "Tomcat",
        "low on threads" "Jetty",
        "RejectedExecutionException" "java.util.concurrent",
        "bulkhead*is full" "resilience4j",
        "task queue depth is" "waitress",
    }
    fd_exhausted Some(Cause::FdExhausted) => {
        "too many open files" "EMFILE and ENFILE in words: nginx, Java, Go, Python, Redis",
        "EMFILE" "Node.js, libuv",
        "ENFILE" "Node.js, libuv",
        "no file descriptors" "many",
        "out of file descriptors" "PostgreSQL",
        "reached*FD limit" "HAProxy",
    }
    upstream_refused Some(Cause::DownstreamSlow) => {
        "connection refused by upstream" "proxies",
        "connection refused) while connecting to upstream" "nginx",
        "temporarily unavailable) while connecting to upstream" "nginx, to a unix socket whose backlog is full",
    }
    upstream_timeout Some(Cause::DownstreamSlow) => {
        "upstream timed out" "nginx",
        "upstream request timeout" "Envoy",
        "client.timeout exceeded while awaiting" "net/http of Go",
        "context deadline exceeded" "Go, gRPC",
        "read timed out" "Java, requests of Python",
        "expiring*record(s) for" "Kafka producers",
    }
    upstream_unavailable Some(Cause::DownstreamSlow) => {
        "no live upstreams" "nginx",
        "has no server available" "HAProxy",
        "no server is available" "HAProxy",
        "upstream connect error or disconnect" "Envoy",
        "CircuitBreaker*is OPEN" "resilience4j",
    }
    lock_wait Some(Cause::LockContention) => {
        "still waiting for*lock on" "PostgreSQL with log_lock_waits",
        "lock wait timeout exceeded" "MySQL, MariaDB",
        "canceling statement due to lock timeout" "PostgreSQL",
        "database is locked" "SQLite",
    }
    disk_slow Some(Cause::DiskSlow) => {
        "fsync is taking too long" "Redis, Valkey",
        "slow fdatasync" "etcd",
        "checkpoints are occurring too frequently" "PostgreSQL",
    }
    memory_short Some(Cause::MemoryStalled) => {
        "cannot allocate memory" "ENOMEM in words",
        "OutOfMemoryError" "Java",
        "OOM command not allowed" "Redis",
        "memory resource limit alarm" "RabbitMQ",
        "vm_memory_high_watermark set" "RabbitMQ",
    }
    peer_not_reading Some(Cause::PeerNotReading) => {
        "overcoming of output buffer limits" "Redis, Valkey",
        "outgoing messages are being dropped" "Mosquitto",
        "slow consumer" "NATS, ActiveMQ",
    }
    producers_blocked None => {
        "publishers will be blocked" "RabbitMQ",
        "blocked by flow control" "RabbitMQ clients",
        "disk resource limit alarm" "RabbitMQ",
        "failed to allocate memory within the configured max blocking time" "Kafka producers",
    }
    worker_timeout None => {
        "worker timeout (pid" "gunicorn",
        "*** HARAKIRI" "uWSGI",
    }
    limited None => {
        "limiting requests, excess" "nginx",
        "limiting connections by zone" "nginx",
        "429 too many requests" "clients of HTTP services",
        "server is likely overloaded" "etcd",
    }
    queue_full None => {
        "queue full" "rsyslog, Mosquitto, many",
        "queue is full" "many",
        "queue_full" "many",
        "queue*is full" "many",
        "QueueFull" "asyncio and others of Python",
        "channel is full" "many",
    }
    ports_exhausted None => {
        "cannot assign requested address" "EADDRNOTAVAIL in words: no local ports left",
        "EADDRNOTAVAIL" "Node.js",
    }
    buffers_exhausted None => {
        "no buffer space available" "ENOBUFS in words",
    }
    try_again None => {
        "resource temporarily unavailable" "EAGAIN in words: a unix socket's backlog, a limit on processes",
    }
}

/// The patterns, compiled for one pass over a line.
pub struct Table {
    rows: Vec<Row>,
    /// Finds the longest piece of each row. The pattern's number is the row's index.
    finder: AhoCorasick,
}

struct Row {
    name: String,
    /// The pieces between the `*`, in lower case.
    pieces: Vec<Vec<u8>>,
}

impl Table {
    /// The user's own patterns, each with its name, then the table. An own pattern may have a name of the table.
    pub fn new<'a>(own: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut rows = Vec::new();
        for (index, (name, pattern)) in own.into_iter().enumerate() {
            ensure!(
                index < MAX_OWN,
                "more than {MAX_OWN} [[logs.pattern]] entries"
            );
            check_name(name)?;
            let row = Row::new(name, pattern)
                .with_context(|| format!("invalid pattern of message {name}"))?;
            rows.push(row);
        }
        for known in KNOWN {
            rows.push(Row::new(known.name, known.pattern)?);
        }
        let finder = AhoCorasickBuilder::new()
            .ascii_case_insensitive(true)
            .match_kind(MatchKind::Standard)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(rows.iter().map(Row::longest))
            .context("cannot compile the message patterns")?;
        Ok(Self { rows, finder })
    }

    /// The name of the message that a line contains. Any bytes are allowed; the first [`MAX_LINE`] are searched.
    pub fn find(&self, line: &[u8]) -> Option<&str> {
        let line = line.get(..MAX_LINE).unwrap_or(line);
        let mut lower = Vec::new();
        // A piece may occur many times in a line, but its row is tried once.
        let mut tried: Vec<usize> = Vec::new();
        let mut first: Option<usize> = None;
        for found in self.finder.find_overlapping_iter(line) {
            let index = found.pattern().as_usize();
            let Some(row) = self.rows.get(index) else {
                continue;
            };
            if first.is_some_and(|first| first <= index) || tried.contains(&index) {
                continue;
            }
            tried.push(index);
            if lower.is_empty() {
                lower = line.to_ascii_lowercase();
            }
            if row.matches(&lower) {
                first = Some(index);
            }
        }
        Some(self.rows.get(first?)?.name.as_str())
    }
}

impl Row {
    fn new(name: &str, pattern: &str) -> Result<Self> {
        ensure!(
            pattern.len() <= MAX_PATTERN,
            "{} bytes long, at most {MAX_PATTERN} are allowed",
            pattern.len()
        );
        if let Some(control) = pattern.chars().find(|letter| letter.is_control()) {
            bail!("contains {control:?}, which no log line does: give the text of one line");
        }
        let pieces: Vec<Vec<u8>> = pattern
            .split('*')
            .filter(|piece| !piece.is_empty())
            .map(|piece| piece.as_bytes().to_ascii_lowercase())
            .collect();
        let row = Self {
            name: name.to_owned(),
            pieces,
        };
        ensure!(
            row.longest().trim_ascii().len() >= MIN_PIECE,
            "{pattern:?} matches nearly every line: at least {MIN_PIECE} characters in a row are needed (`*` matches anything)"
        );
        Ok(row)
    }

    fn longest(&self) -> &[u8] {
        let longest = self.pieces.iter().max_by_key(|piece| piece.len());
        longest.map_or(&[], Vec::as_slice)
    }

    /// Whether the pieces occur in the line in this order. Each is matched as early as possible, which leaves most room for
    /// the others.
    fn matches(&self, line: &[u8]) -> bool {
        let mut rest = line;
        self.pieces.iter().all(|piece| {
            let at = rest
                .windows(piece.len())
                .position(|window| window == piece.as_slice());
            at.and_then(|at| rest.get(at + piece.len()..))
                .is_some_and(|after| {
                    rest = after;
                    true
                })
        })
    }
}

fn check_name(name: &str) -> Result<()> {
    let is_word = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    ensure!(
        !name.is_empty()
            && name.len() <= MAX_NAME
            && name.chars().all(|letter| is_word(letter) || letter == '_'),
        "invalid message name {name:?}: 1 to {MAX_NAME} lower-case letters, digits and _"
    );
    Ok(())
}

#[cfg(test)]
#[path = "messages/tests.rs"]
mod tests;
