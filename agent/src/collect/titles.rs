//! What processes say of themselves in the place of their command lines. Pure but for the reading.
//!
//! A command line may hold secrets, and is not told. A title is what a process has written over it: told when nothing of
//! the arguments is left, and when the first words change.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fs::File, io::Read as _, path::Path};

use crate::{sample::Title, target::ProcessSeen, text::bounded};

/// Bytes of a title that are read, and told.
const MAX_TITLE: usize = 256;
/// Titles that are read at one look; the others' turn is next.
const MAX_LOOKS: usize = 256;
/// One process is asked at most so often.
const APART_NS: u64 = 250_000_000;

#[derive(Default)]
pub(super) struct Titles {
    known: BTreeMap<u32, Known>,
    /// Where the next look goes on.
    next: u32,
}

struct Known {
    start_ns: u64,
    exec_id: u64,
    looked_ns: u64,
    /// What stood there at first.
    first: Vec<u8>,
    told: Option<String>,
}

impl Titles {
    /// Reads what is due of `processes`, which come in the order of their tgids; answers titles that are new or others
    /// than before.
    pub(super) fn look(
        &mut self,
        processes: &[&ProcessSeen],
        now_ns: u64,
        read: impl Fn(u32) -> Option<Vec<u8>>,
    ) -> Vec<Title> {
        self.known.retain(|tgid, known| {
            let found = processes.binary_search_by_key(tgid, |process| process.tgid);
            found.is_ok_and(|index| known.is(processes[index]))
        });
        let from = processes.partition_point(|process| process.tgid < self.next);
        let (before, after) = processes.split_at(from);
        let is_due = |process: &ProcessSeen| {
            let known = self.known.get(&process.tgid);
            known.is_none_or(|known| now_ns >= known.looked_ns + APART_NS)
        };
        let due = after.iter().chain(before).filter(|process| is_due(process));
        let due: Vec<&ProcessSeen> = due.take(MAX_LOOKS).copied().collect();
        let mut told = Vec::new();
        for process in due {
            self.next = process.tgid.wrapping_add(1);
            // It has ended.
            let Some(line) = read(process.pid) else {
                continue;
            };
            let known = self.known.entry(process.tgid).or_insert_with(|| Known {
                start_ns: process.start_ns,
                exec_id: process.exec_id,
                looked_ns: 0,
                first: words(&line).to_owned(),
                told: None,
            });
            known.looked_ns = now_ns;
            let Some(title) = title(&line, &known.first) else {
                continue;
            };
            if known.told.as_ref() != Some(&title) {
                known.told = Some(title.clone());
                told.push(Title {
                    tgid: process.tgid,
                    title,
                });
            }
        }
        told
    }

    /// Nobody is looked at closely any more: whoever is again is told anew.
    pub(super) fn forget(&mut self) {
        self.known.clear();
    }
}

impl Known {
    fn is(&self, process: &ProcessSeen) -> bool {
        self.start_ns == process.start_ns && self.exec_id == process.exec_id
    }
}

/// The beginning of a command line, or of what stands in its place.
pub(super) fn read(pid: u32) -> Option<Vec<u8>> {
    let path = Path::new("/proc").join(pid.to_string()).join("cmdline");
    let mut line = Vec::with_capacity(MAX_TITLE);
    let file = File::open(path).ok()?;
    file.take(MAX_TITLE as u64).read_to_end(&mut line).ok()?;
    Some(line)
}

/// Up to the first NUL: of a command line the program's own name, of a title all of it.
fn words(line: &[u8]) -> &[u8] {
    line.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The title that a process has given to itself; `None` where this may be the command line that it was started with.
///
/// The kernel shows arguments with a NUL behind each of them. Whoever overwrites them leaves one text, with blanks, and
/// nothing but NULs up to the end of the area. Where more is left than that, the text before the first NUL is a title if it is
/// another than it was at `first`; what follows may be left-over arguments and is never told.
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
    fn a_command_line_is_not_told() {
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
    fn what_was_written_over_the_arguments_is_told() {
        let line = b"postgres: bob shop [local] UPDATE waiting\0\0\0\0";
        let title = first_title(line);
        assert_eq!(
            title.as_deref(),
            Some("postgres: bob shop [local] UPDATE waiting")
        );
        // Padded with blanks, and without any room left for a NUL.
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
    fn a_title_that_leaves_some_arguments_standing_is_told_without_them() {
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

    fn process(tgid: u32, exec_id: u64) -> ProcessSeen {
        ProcessSeen {
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
    fn a_title_is_told_at_first_and_when_it_changes_and_not_asked_too_often() {
        let mut titles = Titles::default();
        let process = process(7, 1);
        let mut look = |now_ns, line: &str| {
            let line = line.as_bytes().to_vec();
            let told = titles.look(&[&process], now_ns, |_| Some(line.clone()));
            told.into_iter()
                .map(|title| title.title)
                .collect::<Vec<_>>()
        };
        assert_eq!(look(SECOND, "db: idle\0"), ["db: idle"]);
        assert!(look(SECOND + APART_NS / 2, "db: busy\0").is_empty());
        assert_eq!(look(SECOND + APART_NS, "db: busy\0"), ["db: busy"]);
        assert!(look(SECOND + 2 * APART_NS, "db: busy\0").is_empty());
    }

    #[test]
    fn a_process_that_executes_something_else_begins_anew() {
        let mut titles = Titles::default();
        let told = titles.look(&[&process(7, 1)], SECOND, |_| Some(b"sh\0".to_vec()));
        assert!(told.is_empty());
        let line = |_| Some(b"mysql\0-psecret\0".to_vec());
        assert!(titles.look(&[&process(7, 2)], 2 * SECOND, line).is_empty());
    }

    #[test]
    fn where_there_are_many_they_take_turns() {
        let mut titles = Titles::default();
        let all: Vec<ProcessSeen> = (1..=600).map(|tgid| process(tgid, 1)).collect();
        let all: Vec<&ProcessSeen> = all.iter().collect();
        let line = |pid| Some(format!("worker {pid}\0").into_bytes());
        let told = [1, 2, 3].map(|at| titles.look(&all, at * SECOND, line).len());
        assert_eq!(told, [MAX_LOOKS, MAX_LOOKS, 600 - 2 * MAX_LOOKS]);
    }
}
