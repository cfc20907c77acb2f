//! Connection tracking.

use serde::{Deserialize, Serialize};

/// The connection tracking table of a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conntrack {
    /// Inode of the network namespace.
    pub netns: u32,
    /// It is the namespace of the host, which the packets of all containers pass.
    pub is_of_host: bool,
    /// Connections in the table.
    pub entries: u64,
    /// Maximum number of connections in it (net.netfilter.nf_conntrack_max).
    pub limit: u64,
    /// Packets dropped while it was observed to be full. The first packet of a connection is dropped if the table has no room for it.
    pub drops: u64,
}

impl Conntrack {
    /// Whether the table has no room.
    pub fn is_full(&self) -> bool {
        /// From 95% of the limit on, the kernel removes connections that are being closed (gc_worker in nf_conntrack_core.c), so
        /// the number of entries may be just below the limit.
        const FULL_PERCENT: u64 = 95;
        let entries = self.entries.saturating_mul(100);
        entries >= self.limit.saturating_mul(FULL_PERCENT)
    }
}
