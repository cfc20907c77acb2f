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
    /// Arrivals exceed their baseline, and the service is no slower than before.
    ProducerSurge "producer_surge" "more work arrives than it can serve",
    /// Its threads want a CPU that other processes or the hypervisor have.
    CpuStarved "cpu_starved" "other processes have the CPU it needs",
    /// Its control group's quota is used up.
    CpuThrottled "cpu_throttled" "its CPU quota is used up",
    /// It computes, and has the CPU to do so.
    CpuBound "cpu_bound" "it is busy computing",
    /// Its threads wait for a lock whose holder works.
    LockContention "lock_contention" "its threads wait for a lock",
    /// It waits for responses of another service.
    DownstreamSlow "downstream_slow" "it waits for another service",
    /// All its connections to another service are in use, and work waits for one.
    PoolExhausted "pool_exhausted" "its connection pool is exhausted",
    /// One of its own limits is smaller than the work needs: workers, backlog.
    UndersizedLimit "undersized_limit" "one of its own limits is too small",
    /// It is stopped or deadlocked, or takes no work.
    ConsumerStalled "consumer_stalled" "it makes no progress",
    /// One turn of its event loop keeps all other requests waiting.
    EventLoopBlocked "event_loop_blocked" "one task blocks its event loop",
    /// It waits for a disk.
    DiskSlow "disk_slow" "it waits for a disk",
    /// It waits until another process reads its output: a log pipe, a terminal.
    OutputBlocked "output_blocked" "its output is not read",
    /// It waits for memory.
    MemoryStalled "memory_stalled" "it waits for memory",
    /// It waits for an accelerator, such as a GPU.
    AcceleratorBound "accelerator_bound" "it waits for an accelerator",
    /// The process at the other end of a connection does not read.
    PeerNotReading "peer_not_reading" "a peer does not read",
    /// The process at the other end of a connection sends only part of a request, or nothing.
    PeerNotSending "peer_not_sending" "a peer does not send",
    /// The network path carries less than is sent.
    NetworkLimited "network_limited" "the network path is saturated",
    /// Most or all of its file descriptors are in use.
    FdExhausted "fd_exhausted" "it runs out of file descriptors",
    /// It has no local ports left for connections to an address.
    PortsExhausted "ports_exhausted" "it has no local ports left",
    /// The evidence is insufficient.
    Unknown "unknown" "the cause is unknown",
}
