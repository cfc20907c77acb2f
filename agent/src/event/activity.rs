//! What a thread's wall time goes into.

use serde::Serialize;

macro_rules! activities {
    ($($(#[$meta:meta])* $activity:ident $name:literal $words:literal,)*) => {
        /// What one thread was doing in one sample.
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
    /// Waits for a CPU that other threads of its own service have.
    RunnableOwn "runnable_own" "waiting for a CPU behind own threads",
    /// Waits for a CPU that other services have.
    RunnableForeign "runnable_foreign" "waiting for a CPU behind others",
    /// Waits because its control group's CPU quota is used up.
    Throttled "throttled" "throttled by its CPU quota",
    /// Waits for a CPU that the hypervisor has taken (steal time).
    Stolen "stolen" "waiting for a CPU behind the hypervisor",
    /// Waits for a response on a connection that its service opened.
    Downstream "downstream" "waiting for another service",
    /// Waits until the peer of a connection reads.
    PeerRead "peer_read" "waiting for a peer to read",
    /// Waits until a client sends the rest of a request.
    PeerSend "peer_send" "waiting for a peer to send",
    Lock "lock" "waiting for a lock",
    Disk "disk" "waiting for a disk",
    /// Waits until another process reads a pipe, a terminal or a unix socket.
    Output "output" "waiting for its output to be read",
    /// Waits for an accelerator, such as a GPU: spins in its library, or waits for its device.
    Accelerator "accelerator" "waiting for an accelerator",
    /// Sleeps for a time of its own choice: nanosleep(2).
    Asleep "asleep" "sleeping (nanosleep)",
    /// Has requests in service, and waits for something that cannot be seen from outside the process.
    Inside "inside" "blocked on something unidentified in-process",
    Stopped "stopped" "stopped",
    Unknown "unknown" "unknown",
}

impl Activity {
    /// The thread uses a CPU, or waits for one.
    pub const NEEDS_CPU: &'static [Self] = &[
        Self::OnCpu,
        Self::RunnableOwn,
        Self::RunnableForeign,
        Self::Throttled,
        Self::Stolen,
    ];
}

/// The share of an activity; 0 if it is not among them.
pub fn share_of(shares: &[(Activity, f64)], activity: Activity) -> f64 {
    let found = shares.iter().find(|(one, _)| *one == activity);
    found.map_or(0.0, |(_, share)| *share)
}
