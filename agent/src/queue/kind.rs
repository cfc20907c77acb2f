//! The closed list of queue kinds.

use serde::{Deserialize, Serialize};

/// What a queue is made of. Adding a kind means adding a row here and the module that reads it from samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Accept,
    Recv,
    Send,
    Pipe,
    Runqueue,
}

impl Kind {
    /// All kinds, in the order of the path that work takes.
    pub const ALL: [Self; 5] = [
        Self::Accept,
        Self::Recv,
        Self::Send,
        Self::Pipe,
        Self::Runqueue,
    ];

    /// The word used in every output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Recv => "recv",
            Self::Send => "send",
            Self::Pipe => "pipe",
            Self::Runqueue => "runqueue",
        }
    }

    /// What depth and limit count: the unit the kernel limits by.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Accept => "connections",
            Self::Recv | Self::Send => "bytes",
            Self::Pipe => "buffers",
            Self::Runqueue => "threads",
        }
    }

    /// Whether reaching the limit loses work or stops somebody, so that the fill itself counts.
    pub fn is_cliff(self) -> bool {
        match self {
            Self::Accept | Self::Recv | Self::Pipe => true,
            // A full send buffer is the normal state of a bulk transfer; more threads than CPUs is of any batch.
            Self::Send | Self::Runqueue => false,
        }
    }
}
