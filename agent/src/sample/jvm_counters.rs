//! What a JVM itself counts of its garbage collections.

use serde::{Deserialize, Serialize};

/// The thread of HotSpot that stops all others: every HotSpot JVM has one of this name.
pub const VM_THREAD: &str = "VM Thread";

/// Counters of a HotSpot JVM, since its start. They only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JvmCounters {
    pub tgid: u32,
    /// Time of complete collections, of all collectors together, ns.
    pub collector_ns: u64,
    /// Collections that were begun.
    pub collections: u64,
    /// A collection is in progress: it counts in `collections`, and not yet in `collector_ns`.
    pub is_collecting: bool,
    /// Time for which all other threads were stopped, for collections and anything else, ns. Without the present stop.
    pub safepoint_ns: u64,
    /// Stops of all other threads.
    pub safepoints: u64,
}
