//! The closed list of queue kinds: one row each.
//!
//! To add a kind: add a row, with the next free wire number; add the module that reads it from samples to
//! [`super::Model`]'s sources; and add its name to the five page readers in `deploy/readers`, which a test compares
//! with this table.

use serde::{Deserialize, Serialize};

/// What makes a queue of a kind count as saturated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    /// Its standing delay, and its fill: at the limit, work is lost or a sender blocks.
    DelayAndFill,
    /// Its standing delay alone. Being full does no harm.
    Delay,
    /// Its standing delay compared with its own baseline. Having requests in flight is normal.
    AgainstBaseline,
    /// Never by itself. It shows what the service is busy with, which explains the queues that fill.
    Context,
}

/// The properties of one kind.
struct Row {
    name: &'static str,
    wire: u16,
    unit: &'static str,
    criterion: Criterion,
    losses: &'static str,
    advice: &'static str,
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident {
        name: $name:literal, wire: $wire:literal, unit: $unit:literal, criterion: $criterion:ident, losses: $losses:literal,
        advice: $advice:literal $(,)?
    })*) => {
        /// What a queue holds. Declared, and therefore listed and sorted, in the order in which work passes the
        /// queues.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Kind { $($(#[$meta])* $kind,)* }

        impl Kind {
            /// All kinds, in the order in which they are listed.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];

            fn row(self) -> Row {
                match self {
                    $(Self::$kind => Row {
                        name: $name,
                        wire: $wire,
                        unit: $unit,
                        criterion: Criterion::$criterion,
                        losses: $losses,
                        advice: $advice,
                    },)*
                }
            }
        }
    };
}

kinds! {
    /// TCP handshakes in progress.
    Syn {
        name: "syn", wire: 0, unit: "handshakes", criterion: DelayAndFill, losses: "handshakes dropped",
        advice: "More handshakes are in progress than the backlog allows: a burst of clients, clients that never \
                 complete them (a SYN flood), or a lossy path to them. Compare with the accept queue of the same address.",
    }
    /// Established connections that the service has not accepted, TCP and unix.
    Accept {
        name: "accept", wire: 1, unit: "connections", criterion: DelayAndFill, losses: "connections refused or dropped",
        advice: "The service accepts connections more slowly than they arrive: find out what its workers wait for.",
    }
    /// Bytes received on TCP connections and not read.
    Recv {
        name: "recv", wire: 2, unit: "bytes", criterion: DelayAndFill, losses: "segments dropped",
        advice: "The service does not read data that has arrived: find out what the thread serving the worst \
                 connection waits for.",
    }
    /// UDP datagrams received and not read.
    Udp {
        name: "udp", wire: 3, unit: "bytes", criterion: DelayAndFill, losses: "datagrams dropped",
        advice: "Datagrams arrive faster than the service reads them: find out what its reader waits for. A larger \
                 receive buffer (SO_RCVBUF, net.core.rmem_max) only helps against bursts.",
    }
    /// Data written to unix sockets and not read.
    Unix {
        name: "unix", wire: 4, unit: "bytes", criterion: DelayAndFill, losses: "items lost",
        advice: "The process at the reading end does not read. Its senders block or fail when the limit is reached.",
    }
    /// Buffers of pipes and FIFOs.
    Pipe {
        name: "pipe", wire: 5, unit: "buffers", criterion: DelayAndFill, losses: "items lost",
        advice: "The process at the read end does not read. Its writers block when the pipe is full.",
    }
    /// Requests on accepted connections that are not answered.
    Inflight {
        name: "inflight", wire: 6, unit: "requests", criterion: AgainstBaseline, losses: "answers never sent",
        advice: "Requests arrive and are not answered: find out what the service waits for.",
    }
    /// Pools of threads with similar names.
    Workers {
        name: "workers", wire: 7, unit: "threads", criterion: Context, losses: "items lost",
        advice: "All workers are busy: find out what they wait for before adding more.",
    }
    /// Events that an event loop has not taken: a thread that waits for events in epoll_wait.
    Eventloop {
        name: "eventloop", wire: 8, unit: "events", criterion: Delay, losses: "items lost",
        advice: "One turn of the event loop delays all of its connections: find the handler that computes or \
                 blocks, and move it off the loop.",
    }
    /// Runnable threads that wait for a CPU.
    Runqueue {
        name: "runqueue", wire: 9, unit: "threads", criterion: Delay, losses: "items lost",
        advice: "Threads are runnable and wait for a CPU: find what else runs on these CPUs, or raise the quota \
                 or the number of CPUs.",
    }
    /// Threads blocked on one lock.
    Lock {
        name: "lock", wire: 10, unit: "threads", criterion: Delay, losses: "items lost",
        advice: "Threads wait for a lock: find out what its holder does while holding it.",
    }
    /// Threads blocked on a disk.
    Disk {
        name: "disk", wire: 11, unit: "threads", criterion: Delay, losses: "items lost",
        advice: "Threads wait for the disk: fewer or batched fsyncs, a faster device, or another place for the file.",
    }
    /// Memory of a control group, or of the machine.
    Memory {
        name: "memory", wire: 12, unit: "bytes", criterion: DelayAndFill, losses: "processes killed by the OOM killer",
        advice: "Threads stall on memory reclaim: raise the limit, or find what grew.",
    }
    /// Calls to other services.
    Downstream {
        name: "downstream", wire: 13, unit: "calls", criterion: Context, losses: "calls that timed out",
        advice: "Calls to this endpoint take longer than their baseline: investigate that service.",
    }
    /// Bytes written to TCP connections and not acknowledged.
    Send {
        name: "send", wire: 14, unit: "bytes", criterion: Delay, losses: "items lost",
        advice: "The peer of the worst connection does not read the data sent to it: investigate that peer.",
    }
    /// Open file descriptors of a process.
    Fd {
        name: "fd", wire: 15, unit: "files", criterion: DelayAndFill, losses: "items lost",
        advice: "The process is about to run out of file descriptors: find what it leaves open (`ls -l /proc/PID/fd`), \
                 or raise RLIMIT_NOFILE.",
    }
    /// Submission and completion rings of io_uring.
    Uring {
        name: "uring", wire: 16, unit: "entries", criterion: DelayAndFill, losses: "completions dropped",
        advice: "The process does not consume completions from its ring: inspect the thread that owns it.",
    }
    /// Queues inside the service, as the service reports them.
    App {
        name: "app", wire: 17, unit: "items", criterion: DelayAndFill, losses: "items lost or rejected",
        advice: "Items wait inside the service, or in the broker, longer than they take to be processed: find out what \
                 its consumers wait for, and whether it has any.",
    }
}

impl Kind {
    /// The name used in every output and in the configuration.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The number of this kind in the shared-memory page. It is stable and never reused, because readers and agent are
    /// upgraded independently.
    pub fn wire(self) -> u16 {
        self.row().wire
    }

    /// The unit of depth and limit, unless [`super::Reading::unit`] overrides it: the unit that the kernel limits by.
    pub fn unit(self) -> &'static str {
        self.row().unit
    }

    /// What makes such a queue count as saturated.
    pub fn criterion(self) -> Criterion {
        self.row().criterion
    }

    /// Whether reaching the limit loses work or blocks a sender, so that the fill itself counts.
    pub fn is_cliff(self) -> bool {
        self.criterion() == Criterion::DelayAndFill
    }

    /// What such a queue loses, as a plural noun for messages.
    pub fn losses(self) -> &'static str {
        self.row().losses
    }

    /// Advice for when the cause of the saturation is unknown.
    pub fn advice(self) -> &'static str {
        self.row().advice
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Kind;

    #[test]
    fn wire_numbers_are_the_ones_that_were_published() {
        let published = [
            (Kind::Syn, 0),
            (Kind::Accept, 1),
            (Kind::Recv, 2),
            (Kind::Udp, 3),
            (Kind::Unix, 4),
            (Kind::Pipe, 5),
            (Kind::Inflight, 6),
            (Kind::Workers, 7),
            (Kind::Eventloop, 8),
            (Kind::Runqueue, 9),
            (Kind::Lock, 10),
            (Kind::Disk, 11),
            (Kind::Memory, 12),
            (Kind::Downstream, 13),
            (Kind::Send, 14),
            (Kind::Fd, 15),
            (Kind::Uring, 16),
            (Kind::App, 17),
        ];
        for (kind, number) in published {
            assert_eq!(kind.wire(), number, "{}", kind.name());
        }
        let numbers: BTreeSet<u16> = Kind::ALL.iter().map(|kind| kind.wire()).collect();
        assert_eq!(numbers.len(), Kind::ALL.len(), "two kinds share a number");
    }

    #[test]
    fn every_page_reader_knows_each_kind_by_its_number_and_name() {
        // The table of names in each reader's source: the text before it, and the text after it.
        let readers = [
            ("rust/src/lib.rs", "pub const KINDS: [&str; ", "];"),
            (
                "c/tailback_page.h",
                "tailback_kind_name(uint32_t kind)",
                "};",
            ),
            ("go/page.go", "func (k Kind) String() string {", "}"),
            ("node/tailback_page.js", "const KINDS =", ";"),
            ("python/tailback_page.py", "\nKINDS = (", "\n)"),
        ];
        for (file, start, end) in readers {
            let path = format!("{}/../deploy/readers/{file}", env!("CARGO_MANIFEST_DIR"));
            let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            let (_, table) = source.split_once(start).expect(file);
            let (table, _) = table.split_once(end).expect(file);
            // The odd pieces are the quoted texts: one name each, or all names in one.
            let quoted = table.split(['"', '\'']).skip(1).step_by(2);
            let names: Vec<&str> = quoted.flat_map(str::split_whitespace).collect();
            assert_eq!(names.len(), Kind::ALL.len(), "{file}: {names:?}");
            for kind in Kind::ALL {
                let name = names.get(usize::from(kind.wire())).copied();
                assert_eq!(name, Some(kind.name()), "{file}: number {}", kind.wire());
            }
        }
    }
}
