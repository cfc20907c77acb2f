//! What a thread's wall time goes into.

use serde::Serialize;

macro_rules! activities {
    ($($(#[$meta:meta])* $activity:ident $name:literal $words:literal,)*) => {
        /// What one thread does at one look.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Activity { $($(#[$meta])* $activity,)* }

        impl Activity {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$activity,)*];

            /// The word used in outputs for programs.
            pub fn name(self) -> &'static str {
                match self { $(Self::$activity => $name,)* }
            }

            /// The words used in outputs for people.
            pub fn words(self) -> &'static str {
                match self { $(Self::$activity => $words,)* }
            }
        }
    };
}

activities! {
    /// Waits for work.
    Idle "idle" "idle",
    OnCpu "on_cpu" "on CPU",
    /// Wants a CPU that threads of its own service have.
    RunnableOwn "runnable_own" "waiting for a CPU behind own threads",
    /// Wants a CPU that others have.
    RunnableForeign "runnable_foreign" "waiting for a CPU behind others",
    /// May not run: its control group's quota is used up.
    Throttled "throttled" "throttled by its CPU quota",
    /// Wants a CPU that the hypervisor has taken.
    Stolen "stolen" "waiting for a CPU of the hypervisor",
    /// Waits for an answer on a connection that its service opened.
    Downstream "downstream" "waiting for another service",
    /// Waits until a client reads.
    PeerRead "peer_read" "waiting for a peer to read",
    /// Waits until a client sends what it began.
    PeerSend "peer_send" "waiting for a peer to send",
    Lock "lock" "waiting for a lock",
    Disk "disk" "waiting for a disk",
    /// Waits until somebody reads a pipe, a terminal or a unix socket.
    Output "output" "waiting for its output to be read",
    Memory "memory" "waiting for memory",
    /// Sleeps by its own wish.
    Asleep "asleep" "asleep by its own wish",
    /// Works on requests, by waiting for something that is not seen.
    Inside "inside" "waiting for something of its own",
    Stopped "stopped" "stopped",
    Unknown "unknown" "not known",
}

/// The share of an activity; 0 where it is none of them.
pub fn share_of(shares: &[(Activity, f64)], activity: Activity) -> f64 {
    let found = shares.iter().find(|(one, _)| *one == activity);
    found.map_or(0.0, |(_, share)| *share)
}
