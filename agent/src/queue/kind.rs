//! The closed list of queue kinds: one row each.

use serde::{Deserialize, Serialize};

use super::{
    Source, accept, conversations, disk, eventloop, fd, lock, memory, pipe, runqueue, stream, syn,
    udp, unix, uring, workers,
};

/// What makes a queue of a kind saturated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// Its standing delay; and at the limit work is lost or somebody stops, so that the fill counts as well.
    DelayAndFill,
    /// Its standing delay alone: to be full is nothing bad.
    Delay,
    /// Its standing delay against what it usually is: work in it takes the time that it takes.
    AgainstUsual,
    /// Nothing by itself: it shows what the service is busy with, and explains the queues that fill.
    Context,
}

/// What is to be said of one kind.
struct Row {
    name: &'static str,
    unit: &'static str,
    judged: Judged,
    losses: &'static str,
    advice: &'static str,
    /// Reads the queues of this kind from samples; `None` where another kind's source yields them too.
    source: Option<fn() -> Box<dyn Source>>,
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident {
        name: $name:literal, unit: $unit:literal, judged: $judged:ident, losses: $losses:literal,
        source: $source:expr, advice: $advice:literal $(,)?
    })*) => {
        /// What a queue is made of. Adding a kind means adding a row here and the module that reads it from samples.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Kind { $($(#[$meta])* $kind,)* }

        impl Kind {
            /// All kinds, in the order of the path that work takes.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            fn row(self) -> Row {
                match self {
                    $(Self::$kind => Row {
                        name: $name,
                        unit: $unit,
                        judged: Judged::$judged,
                        losses: $losses,
                        advice: $advice,
                        source: $source,
                    },)*
                }
            }
        }
    };
}

kinds! {
    /// TCP handshakes under way.
    Syn {
        name: "syn", unit: "handshakes", judged: DelayAndFill, losses: "handshakes dropped",
        source: Some(|| Box::<syn::Syn>::default()),
        advice: "More handshakes are under way than the backlog allows: a burst of callers, callers that never \
                 finish (a SYN flood), or a lossy path to them. Compare with the accept queue of the same address.",
    }
    /// Connections complete and not accepted, TCP and unix.
    Accept {
        name: "accept", unit: "connections", judged: DelayAndFill, losses: "connections refused or dropped",
        source: Some(|| Box::<accept::Accept>::default()),
        advice: "The service does not accept as fast as connections come: look at what its workers wait for.",
    }
    /// Bytes received and not read.
    Recv {
        name: "recv", unit: "bytes", judged: DelayAndFill, losses: "segments dropped",
        source: Some(|| Box::<stream::Streams>::default()),
        advice: "The service does not read what has arrived: look at what the thread that serves the worst \
                 connection waits for.",
    }
    /// Datagrams received and not read.
    Udp {
        name: "udp", unit: "bytes", judged: DelayAndFill, losses: "datagrams dropped",
        source: Some(|| Box::<udp::Udp>::default()),
        advice: "Datagrams come faster than the service reads them: look at what its reader waits for; a larger \
                 receive buffer (SO_RCVBUF, net.core.rmem_max) helps against bursts alone.",
    }
    /// What waits in unix sockets.
    Unix {
        name: "unix", unit: "bytes", judged: DelayAndFill, losses: "items lost",
        source: Some(|| Box::<unix::Unix>::default()),
        advice: "The process at the reading end does not read; its senders block or fail when the limit is reached.",
    }
    /// Buffers between two processes.
    Pipe {
        name: "pipe", unit: "buffers", judged: DelayAndFill, losses: "items lost",
        source: Some(|| Box::<pipe::Pipes>::default()),
        advice: "Whoever holds the read end does not read: its writer will block when the pipe is full.",
    }
    /// Requests read and not yet answered.
    Inflight {
        name: "inflight", unit: "requests", judged: AgainstUsual, losses: "answers never sent",
        source: Some(|| Box::<conversations::Conversations>::default()),
        advice: "Requests are read and not answered: look at what the service waits for.",
    }
    /// Groups of like threads.
    Workers {
        name: "workers", unit: "threads", judged: Context, losses: "items lost",
        source: Some(|| Box::<workers::Workers>::default()),
        advice: "All workers are busy: look at what they wait for before adding more.",
    }
    /// Turns of a thread that lives in epoll_wait.
    Eventloop {
        name: "eventloop", unit: "turns", judged: Delay, losses: "items lost",
        source: Some(|| Box::<eventloop::EventLoops>::default()),
        advice: "One turn of the event loop keeps all its connections waiting: find the handler that computes or \
                 blocks, and move it off the loop.",
    }
    /// Threads that want a CPU and have none.
    Runqueue {
        name: "runqueue", unit: "threads", judged: Delay, losses: "items lost",
        source: Some(|| Box::<runqueue::RunQueues>::default()),
        advice: "Threads are ready to run and wait for a CPU: find what else runs on these CPUs, or raise the quota \
                 or the number of CPUs.",
    }
    /// Threads that wait for one lock.
    Lock {
        name: "lock", unit: "threads", judged: Delay, losses: "items lost",
        source: Some(|| Box::<lock::Locks>::default()),
        advice: "Threads wait for a lock: look at what its holder does while it holds it.",
    }
    /// Threads that wait for a disk.
    Disk {
        name: "disk", unit: "threads", judged: Delay, losses: "items lost",
        source: Some(|| Box::<disk::Disk>::default()),
        advice: "Threads wait for the disk: fewer or batched fsyncs, a faster device, or another place for the file.",
    }
    /// Memory of a control group or of the machine.
    Memory {
        name: "memory", unit: "bytes", judged: DelayAndFill, losses: "processes killed for want of memory",
        source: Some(|| Box::<memory::Memory>::default()),
        advice: "Threads stall for memory: raise the limit, or find what grew.",
    }
    /// Calls on other services.
    Downstream {
        name: "downstream", unit: "calls", judged: Context, losses: "calls that timed out",
        // Read together with the requests in flight.
        source: None,
        advice: "Calls on this endpoint are not answered as they usually are: look there.",
    }
    /// Bytes written and not acknowledged.
    Send {
        name: "send", unit: "bytes", judged: Delay, losses: "items lost",
        // Read together with what is received.
        source: None,
        advice: "The peer of the worst connection does not read what is sent to it: look there.",
    }
    /// Open files of a process.
    Fd {
        name: "fd", unit: "files", judged: DelayAndFill, losses: "items lost",
        source: Some(|| Box::<fd::Files>::default()),
        advice: "The process is about to run out of file descriptors: find what it leaves open (`ls -l /proc/PID/fd`), \
                 or raise RLIMIT_NOFILE.",
    }
    /// Submissions and completions of io_uring.
    Uring {
        name: "uring", unit: "entries", judged: DelayAndFill, losses: "completions dropped",
        source: Some(|| Box::<uring::Uring>::default()),
        advice: "The process does not take completions from its ring: look at the thread that owns it.",
    }
}

impl Kind {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// What depth and limit count, unless a reading says otherwise: the unit the kernel limits by.
    pub fn unit(self) -> &'static str {
        self.row().unit
    }

    /// What makes such a queue saturated.
    pub fn judged(self) -> Judged {
        self.row().judged
    }

    /// Whether reaching the limit loses work or stops somebody, so that the fill itself counts.
    pub fn is_cliff(self) -> bool {
        self.judged() == Judged::DelayAndFill
    }

    /// What it means that such a queue lost something.
    pub fn losses(self) -> &'static str {
        self.row().losses
    }

    /// What to do, where nothing more is known than that such a queue is saturated.
    pub fn advice(self) -> &'static str {
        self.row().advice
    }

    pub(super) fn source(self) -> Option<Box<dyn Source>> {
        self.row().source.map(|make| make())
    }
}
