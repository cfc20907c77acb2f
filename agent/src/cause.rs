//! The closed list of causes.
#![forbid(unsafe_code)]

use serde::Serialize;

macro_rules! causes {
    ($($(#[$meta:meta])* $cause:ident $name:literal $title:literal,)*) => {
        /// Why a queue fills.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Cause { $($(#[$meta])* $cause,)* }

        impl Cause {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$cause,)*];

            /// The word used in every output.
            pub fn name(self) -> &'static str {
                match self { $(Self::$cause => $name,)* }
            }

            /// The words that a report begins with.
            pub fn title(self) -> &'static str {
                match self { $(Self::$cause => $title,)* }
            }
        }
    };
}

causes! {
    /// More work comes than usual, and the consumer does what it always does.
    ProducerSurge "producer_surge" "more work comes than it can carry",
    /// Its threads want a CPU that others have.
    CpuStarved "cpu_starved" "others have the CPU that it needs",
    /// Its control group's quota is used up.
    CpuThrottled "cpu_throttled" "its CPU quota is used up",
    /// It computes, and has the CPU to do so.
    CpuBound "cpu_bound" "it is busy computing",
    /// Its threads wait for a lock whose holder works.
    LockContention "lock_contention" "its threads wait for a lock",
    /// It waits for answers of another service.
    DownstreamSlow "downstream_slow" "it waits for another service",
    /// All its connections to another service are in use, and work waits for one.
    PoolExhausted "pool_exhausted" "its pool of connections is used up",
    /// A limit of its own is smaller than the work needs: workers, backlog.
    UndersizedLimit "undersized_limit" "a limit of its own is too small",
    /// It is stopped, or its threads wait for each other.
    ConsumerStalled "consumer_stalled" "it does not work at all",
    /// One turn of its event loop keeps everybody waiting.
    EventLoopBlocked "event_loop_blocked" "its event loop is kept busy by one piece of work",
    /// It waits for a disk.
    DiskSlow "disk_slow" "it waits for a disk",
    /// It waits until somebody reads what it writes: a log pipe, a terminal.
    OutputBlocked "output_blocked" "nobody reads what it writes",
    /// It waits for memory.
    MemoryStalled "memory_stalled" "it waits for memory",
    /// The process at the other end of a connection does not read.
    PeerNotReading "peer_not_reading" "a peer does not read",
    /// The process at the other end of a connection does not send what was begun.
    PeerNotSending "peer_not_sending" "a peer does not send what it has begun",
    /// The network between takes less than is sent.
    NetworkLimited "network_limited" "the network carries no more",
    /// It has no file descriptors left.
    FdExhausted "fd_exhausted" "it has no file descriptors left",
    /// The evidence does not carry.
    Unknown "unknown" "the cause is not seen",
}
