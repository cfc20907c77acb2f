//! Queues that services keep in their own memory, as the services report them.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// What one process answered, or that it did not, since the previous sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppAnswer {
    /// The process that was asked.
    pub tgid: u32,
    /// Name of the preset that recognized it.
    pub preset: String,
    /// CLOCK_MONOTONIC when the answer was complete, or when its absence was noticed, ns.
    pub at_ns: u64,
    /// From the request to the complete answer, ns.
    pub took_ns: u64,
    /// All queues that the process reports. `None`: it did not answer, which says nothing about its queues.
    pub queues: Option<Vec<AppQueue>>,
}

/// One queue inside a service. `None`: the service does not report it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AppQueue {
    /// Unique within an answer: `redis orders`, `pool shop/web`.
    pub name: String,
    pub unit: AppUnit,
    /// Items that wait.
    pub depth: u64,
    /// Most items that may wait.
    pub limit: Option<u64>,
    /// Reaching the limit loses work or blocks a producer.
    pub limit_rejects: bool,
    /// Items that have left the queue and are in service.
    pub serving: Option<u64>,
    /// Maximum number of items in service: connections of a pool, threads, permits.
    pub slots: Option<u64>,
    /// Since some moment that does not change: items that entered, left, and were lost.
    pub entered: Option<u64>,
    pub left: Option<u64>,
    pub lost: Option<u64>,
    /// Total time that items waited, ns, and their number, since the same moment.
    pub waited_ns: Option<u64>,
    pub waits: Option<u64>,
    /// Age of the oldest waiting item, ns.
    pub oldest_ns: Option<u64>,
    /// Processes or connections that take items from the queue.
    pub consumers: Option<u64>,
    /// Further values that are shown as evidence: name and value.
    pub context: Vec<(String, f64)>,
    /// The processes of this machine that take items from the queue, as far as the service names their connections.
    pub consumer_tgids: Vec<u32>,
    /// Of a queue of a proxy or of a connection pool: ends of the connections over which its items are served, local or remote ones, as
    /// the process names them. Empty: it names none. `None`: the queue is served otherwise. Recorded behind the samples' `app`.
    #[serde(skip)]
    pub served_on: Option<Vec<SocketAddr>>,
}

macro_rules! units {
    ($($unit:ident $name:literal,)*) => {
        /// What such a queue counts: a closed list.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub enum AppUnit {
            #[default]
            $($unit,)*
        }

        impl AppUnit {
            pub const ALL: &'static [Self] = &[$(Self::$unit,)*];

            /// The plural noun, in every output and in rows of presets.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$unit => $name,)*
                }
            }
        }
    };
}

units! {
    Items "items",
    Messages "messages",
    Jobs "jobs",
    Tasks "tasks",
    Requests "requests",
    Clients "clients",
    Connections "connections",
    Threads "threads",
    Bytes "bytes",
}
