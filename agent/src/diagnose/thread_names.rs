//! Names by which runtimes distinguish their own threads (`/proc/PID/task/TID/comm`, at most 15 bytes).
//!
//! Like a [title](super::titles), a name is what a process publishes about itself, and this table is the only place that
//! interprets it. A runtime is recognized by a set of names that it alone gives, whatever the program is called.

use crate::sample::VM_THREAD;

/// The threads of one runtime.
struct Runtime {
    /// Names that a process has if it runs in this runtime; all of them.
    marks: &'static [&'static str],
    /// Beginnings of the names of threads that collect garbage while all others are stopped.
    collectors: &'static [&'static str],
}

const RUNTIMES: &[Runtime] = &[
    // HotSpot. Its VM thread runs the serial collector itself, and otherwise waits for the workers.
    Runtime {
        marks: &[VM_THREAD, "VM Periodic Tas"],
        collectors: &[VM_THREAD, "GC Thread#"],
    },
];

/// Whether a thread collects garbage while all other threads are stopped. `all`: the names of all threads of its process.
pub(super) fn is_collector(name: &str, all: &[&str]) -> bool {
    RUNTIMES.iter().any(|runtime| {
        let mut collectors = runtime.collectors.iter();
        let mut marks = runtime.marks.iter();
        collectors.any(|beginning| name.starts_with(beginning))
            && marks.all(|mark| all.contains(mark))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_needs_the_other_threads_of_its_runtime() {
        let java = [
            "java",
            "VM Thread",
            "VM Periodic Tas",
            "GC Thread#0",
            "G1 Conc#0",
        ];
        let is = |name: &str, all: &[&'static str]| is_collector(name, all);
        assert!(is("VM Thread", &java));
        assert!(is("GC Thread#1", &java));
        assert!(!is("G1 Conc#0", &java), "others run meanwhile");
        assert!(!is("java", &java));
        assert!(!is("VM Thread", &["VM Thread"]));
        assert!(!is("", &java));
    }

    #[test]
    fn an_anonymized_recording_keeps_these_names() {
        let names = RUNTIMES.iter().flat_map(|runtime| {
            let all = runtime.marks.iter().chain(runtime.collectors);
            all.copied()
        });
        for name in names {
            assert!(crate::sample::anonymize::is_of_a_runtime(name), "{name}");
        }
    }
}
