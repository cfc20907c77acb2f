//! The closed list of queue kinds: one row each.
//!
//! To add a kind: add a row, with the next free wire number; add the module that reads it from samples to
//! [`super::Model`]'s sources; and add its name to the five page readers in `deploy/readers`, which a test compares
//! with this table.

use serde::{Deserialize, Serialize};

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
    wire: u16,
    unit: &'static str,
    judged: Judged,
    losses: &'static str,
    advice: &'static str,
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident {
        name: $name:literal, wire: $wire:literal, unit: $unit:literal, judged: $judged:ident, losses: $losses:literal,
        advice: $advice:literal $(,)?
    })*) => {
        /// What a queue is made of. The order of declaration is the order in which queues are listed: that of the path
        /// that work takes.
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
                        judged: Judged::$judged,
                        losses: $losses,
                        advice: $advice,
                    },)*
                }
            }
        }
    };
}

kinds! {
    /// TCP handshakes under way.
    Syn {
        name: "syn", wire: 0, unit: "handshakes", judged: DelayAndFill, losses: "handshakes dropped",
        advice: "More handshakes are under way than the backlog allows: a burst of callers, callers that never \
                 finish (a SYN flood), or a lossy path to them. Compare with the accept queue of the same address.",
    }
    /// Connections complete and not accepted, TCP and unix.
    Accept {
        name: "accept", wire: 1, unit: "connections", judged: DelayAndFill, losses: "connections refused or dropped",
        advice: "The service does not accept as fast as connections come: look at what its workers wait for.",
    }
    /// Bytes received and not read.
    Recv {
        name: "recv", wire: 2, unit: "bytes", judged: DelayAndFill, losses: "segments dropped",
        advice: "The service does not read what has arrived: look at what the thread that serves the worst \
                 connection waits for.",
    }
    /// Datagrams received and not read.
    Udp {
        name: "udp", wire: 3, unit: "bytes", judged: DelayAndFill, losses: "datagrams dropped",
        advice: "Datagrams come faster than the service reads them: look at what its reader waits for; a larger \
                 receive buffer (SO_RCVBUF, net.core.rmem_max) helps against bursts alone.",
    }
    /// What waits in unix sockets.
    Unix {
        name: "unix", wire: 4, unit: "bytes", judged: DelayAndFill, losses: "items lost",
        advice: "The process at the reading end does not read; its senders block or fail when the limit is reached.",
    }
    /// Buffers between two processes.
    Pipe {
        name: "pipe", wire: 5, unit: "buffers", judged: DelayAndFill, losses: "items lost",
        advice: "Whoever holds the read end does not read: its writer will block when the pipe is full.",
    }
    /// Requests read and not yet answered.
    Inflight {
        name: "inflight", wire: 6, unit: "requests", judged: AgainstUsual, losses: "answers never sent",
        advice: "Requests are read and not answered: look at what the service waits for.",
    }
    /// Groups of like threads.
    Workers {
        name: "workers", wire: 7, unit: "threads", judged: Context, losses: "items lost",
        advice: "All workers are busy: look at what they wait for before adding more.",
    }
    /// Turns of a thread that lives in epoll_wait.
    Eventloop {
        name: "eventloop", wire: 8, unit: "turns", judged: Delay, losses: "items lost",
        advice: "One turn of the event loop keeps all its connections waiting: find the handler that computes or \
                 blocks, and move it off the loop.",
    }
    /// Threads that want a CPU and have none.
    Runqueue {
        name: "runqueue", wire: 9, unit: "threads", judged: Delay, losses: "items lost",
        advice: "Threads are ready to run and wait for a CPU: find what else runs on these CPUs, or raise the quota \
                 or the number of CPUs.",
    }
    /// Threads that wait for one lock.
    Lock {
        name: "lock", wire: 10, unit: "threads", judged: Delay, losses: "items lost",
        advice: "Threads wait for a lock: look at what its holder does while it holds it.",
    }
    /// Threads that wait for a disk.
    Disk {
        name: "disk", wire: 11, unit: "threads", judged: Delay, losses: "items lost",
        advice: "Threads wait for the disk: fewer or batched fsyncs, a faster device, or another place for the file.",
    }
    /// Memory of a control group or of the machine.
    Memory {
        name: "memory", wire: 12, unit: "bytes", judged: DelayAndFill, losses: "processes killed for want of memory",
        advice: "Threads stall for memory: raise the limit, or find what grew.",
    }
    /// Calls on other services.
    Downstream {
        name: "downstream", wire: 13, unit: "calls", judged: Context, losses: "calls that timed out",
        advice: "Calls on this endpoint are not answered as they usually are: look there.",
    }
    /// Bytes written and not acknowledged.
    Send {
        name: "send", wire: 14, unit: "bytes", judged: Delay, losses: "items lost",
        advice: "The peer of the worst connection does not read what is sent to it: look there.",
    }
    /// Open files of a process.
    Fd {
        name: "fd", wire: 15, unit: "files", judged: DelayAndFill, losses: "items lost",
        advice: "The process is about to run out of file descriptors: find what it leaves open (`ls -l /proc/PID/fd`), \
                 or raise RLIMIT_NOFILE.",
    }
    /// Submissions and completions of io_uring.
    Uring {
        name: "uring", wire: 16, unit: "entries", judged: DelayAndFill, losses: "completions dropped",
        advice: "The process does not take completions from its ring: look at the thread that owns it.",
    }
}

impl Kind {
    /// The word used in every output.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The number of this kind in the shared-memory page. Stable, and never reused: readers of other versions know it.
    pub fn wire(self) -> u16 {
        self.row().wire
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
            // The odd pieces are what stands between quotes: one name each, or all of them.
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
