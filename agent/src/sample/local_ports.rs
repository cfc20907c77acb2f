//! Local ports that are in use towards one remote address.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The local ports of connections from one address of a network namespace to one remote address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPorts {
    /// Inode of the network namespace.
    pub netns: u32,
    pub remote: SocketAddr,
    /// The lowest and the highest of them.
    pub lowest: u16,
    pub highest: u16,
    pub used: u32,
    /// Those of connections that are closed and kept for a minute (TIME_WAIT).
    pub time_wait: u32,
}

impl LocalPorts {
    /// The ports from the lowest to the highest.
    pub fn span(&self) -> u32 {
        u32::from(self.highest.saturating_sub(self.lowest)) + 1
    }
}
