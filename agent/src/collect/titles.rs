//! Process titles: what a process wrote over its command line, as PostgreSQL and nginx do.
//!
//! A command line may hold secrets and is never reported. Text in its place is reported if no argument can be left in it:
//! when it fills the whole area, or when its first words have changed.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::{
    sample::Title,
    target::{ProcessInfo, read_process_file},
    text::bounded,
};

/// Longest title that is read and reported, bytes.
const MAX_TITLE: usize = 256;
/// Maximum number of titles read in one poll; the next poll continues from there.
const MAX_READS: usize = 256;
/// Shortest time between two reads of one process's title, ns.
const MIN_INTERVAL_NS: u64 = 250_000_000;

#[derive(Default)]
pub(super) struct Titles {
    known: BTreeMap<u32, Known>,
    /// The tgid at which the next poll begins.
    next: u32,
}

struct Known {
    start_ns: u64,
    exec_id: u64,
    read_ns: u64,
    /// The first words at the first read.
    first: Vec<u8>,
    reported: Option<String>,
}

impl Titles {
    /// Reads the titles that are due and returns those that are new or have changed. `processes` are in the order of their
    /// tgids; `read` returns the command line of a pid.
    pub(super) fn poll(
        &mut self,
        processes: &[&ProcessInfo],
        now_ns: u64,
        read: impl Fn(u32) -> Option<Vec<u8>>,
    ) -> Vec<Title> {
        self.known.retain(|tgid, known| {
            let found = processes.binary_search_by_key(tgid, |process| process.tgid);
            found.is_ok_and(|index| known.is(processes[index]))
        });
        let from = processes.partition_point(|process| process.tgid < self.next);
        let (before, after) = processes.split_at(from);
        let is_due = |process: &ProcessInfo| {
            let known = self.known.get(&process.tgid);
            known.is_none_or(|known| now_ns >= known.read_ns + MIN_INTERVAL_NS)
        };
        let due = after.iter().chain(before).filter(|process| is_due(process));
        let due: Vec<&ProcessInfo> = due.take(MAX_READS).copied().collect();
        let mut changed = Vec::new();
        for process in due {
            self.next = process.tgid.wrapping_add(1);
            // `None`: it has ended.
            let Some(line) = read(process.pid) else {
                continue;
            };
            let known = self.known.entry(process.tgid).or_insert_with(|| Known {
                start_ns: process.start_ns,
                exec_id: process.exec_id,
                read_ns: 0,
                first: words(&line).to_owned(),
                reported: None,
            });
            known.read_ns = now_ns;
            let Some(title) = title(&line, &known.first) else {
                continue;
            };
            if known.reported.as_ref() != Some(&title) {
                known.reported = Some(title.clone());
                changed.push(Title {
                    tgid: process.tgid,
                    title,
                });
            }
        }
        changed
    }

    /// Forgets all titles, so that the next poll reports them again: no target is focused any more.
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }
}

impl Known {
    fn is(&self, process: &ProcessInfo) -> bool {
        self.start_ns == process.start_ns && self.exec_id == process.exec_id
    }
}

/// The first [`MAX_TITLE`] bytes of a process's command line, or of the title in its place.
pub(super) fn read(pid: u32) -> Option<Vec<u8>> {
    read_process_file(pid, "cmdline", MAX_TITLE as u64)
}

/// Up to the first NUL: the program's name in a command line, all of a title.
fn words(line: &[u8]) -> &[u8] {
    line.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The title that a process has given itself; `None` where this may be the command line it was started with.
///
/// The kernel shows arguments with a NUL behind each. A process that overwrites them leaves one text with blanks, and only
/// NULs up to the end of the area. If more is left than that, the text before the first NUL is a title only if it differs
/// from `first`; what follows may be left-over arguments and is never reported.
fn title(line: &[u8], first: &[u8]) -> Option<String> {
    let words = words(line);
    let is_all = line[words.len()..].iter().all(|byte| *byte == 0);
    let is_overwritten = is_all && words.trim_ascii_end().contains(&b' ');
    if words.is_empty() || !is_overwritten && words == first {
        return None;
    }
    let text = String::from_utf8_lossy(words.trim_ascii_end());
    Some(bounded(&text, MAX_TITLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_title(line: &[u8]) -> Option<String> {
        title(line, words(line))
    }

    #[test]
    fn a_command_line_is_not_reported() {
        for line in [
            &b"/usr/bin/python3\0app.py\0--password=secret\0"[..],
            b"redis-server\0",
            b"/usr/sbin/cron",
            b"",
            b"\0\0",
        ] {
            assert_eq!(first_title(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_title_written_over_the_arguments_is_reported() {
        let line = b"postgres: bob shop [local] UPDATE waiting\0\0\0\0";
        let title = first_title(line);
        assert_eq!(
            title.as_deref(),
            Some("postgres: bob shop [local] UPDATE waiting")
        );
        // Padded with blanks, then without room for a NUL.
        let title = first_title(b"nginx: worker process   \0");
        assert_eq!(title.as_deref(), Some("nginx: worker process"));
        let title = first_title(b"sshd: bob [priv]");
        assert_eq!(title.as_deref(), Some("sshd: bob [priv]"));
    }

    #[test]
    fn a_name_padded_with_blanks_alone_has_no_title() {
        assert_eq!(first_title(b"server   \0\0"), None);
    }

    #[test]
    fn arguments_left_behind_a_title_are_not_reported() {
        let first = b"worker";
        assert_eq!(title(b"worker\0--key=secret\0", first), None);
        let changed = title(b"busy\0r\0--key=secret\0", first);
        assert_eq!(changed.as_deref(), Some("busy"));
    }

    #[test]
    fn control_characters_are_escaped_and_the_length_is_bounded() {
        assert_eq!(first_title(b"a \x1b[2J\0").as_deref(), Some("a \\u{1b}[2J"));
        let long = [b"x ".repeat(200), vec![0]].concat();
        assert!(first_title(&long).unwrap().len() <= MAX_TITLE);
    }

    fn process(tgid: u32, exec_id: u64) -> ProcessInfo {
        ProcessInfo {
            tgid,
            pid: tgid,
            parent: 1,
            start_ns: 1,
            exec_id,
            kernel: false,
            comm: String::new(),
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_title_is_reported_first_and_on_change_and_read_at_most_every_interval() {
        let mut titles = Titles::default();
        let process = process(7, 1);
        let mut poll = |now_ns, line: &str| {
            let line = line.as_bytes().to_vec();
            let reported = titles.poll(&[&process], now_ns, |_| Some(line.clone()));
            reported
                .into_iter()
                .map(|title| title.title)
                .collect::<Vec<_>>()
        };
        assert_eq!(poll(SECOND, "db: idle\0"), ["db: idle"]);
        assert!(poll(SECOND + MIN_INTERVAL_NS / 2, "db: busy\0").is_empty());
        assert_eq!(poll(SECOND + MIN_INTERVAL_NS, "db: busy\0"), ["db: busy"]);
        assert!(poll(SECOND + 2 * MIN_INTERVAL_NS, "db: busy\0").is_empty());
    }

    #[test]
    fn after_exec_a_title_starts_over() {
        let mut titles = Titles::default();
        let reported = titles.poll(&[&process(7, 1)], SECOND, |_| Some(b"sh\0".to_vec()));
        assert!(reported.is_empty());
        let line = |_| Some(b"mysql\0-psecret\0".to_vec());
        assert!(titles.poll(&[&process(7, 2)], 2 * SECOND, line).is_empty());
    }

    #[test]
    fn beyond_the_limit_processes_take_turns() {
        let mut titles = Titles::default();
        let all: Vec<ProcessInfo> = (1..=600).map(|tgid| process(tgid, 1)).collect();
        let all: Vec<&ProcessInfo> = all.iter().collect();
        let line = |pid| Some(format!("worker {pid}\0").into_bytes());
        let reported = [1, 2, 3].map(|at| titles.poll(&all, at * SECOND, line).len());
        assert_eq!(reported, [MAX_READS, MAX_READS, 600 - 2 * MAX_READS]);
    }
}
