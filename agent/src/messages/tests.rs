use std::{collections::BTreeSet, fs, path::Path};

use super::*;

fn table() -> Table {
    Table::new([]).unwrap()
}

/// Lines as these programs write them.
#[test]
fn log_lines_of_real_programs_are_recognized() {
    let lines = [
        (
            "Tue Nov 10 11:00:00 2026 - *** uWSGI listen queue of socket \"127.0.0.1:40539\" (fd: 3) full !!! (100/100) ***",
            "listen_queue_full",
        ),
        (
            "2026-11-10 11:00:00.000 UTC [812] FATAL:  sorry, too many clients already",
            "too_many_connections",
        ),
        (
            "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
            "too_many_connections",
        ),
        (
            "sqlalchemy.exc.TimeoutError: QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00",
            "pool_exhausted",
        ),
        (
            "java.sql.SQLTransientConnectionException: HikariPool-1 - Connection is not available, request timed out after 30000ms.",
            "pool_exhausted",
        ),
        (
            "2026/11/10 11:00:00 [alert] 7#7: 512 worker_connections are not enough",
            "too_many_connections",
        ),
        (
            "2026/11/10 11:00:00 [crit] 7#7: accept4() failed (24: Too many open files)",
            "fd_exhausted",
        ),
        (
            "[10-Nov-2026 11:00:00] WARNING: [pool www] server reached pm.max_children setting (5), consider raising it",
            "workers_exhausted",
        ),
        (
            "[mpm_event:error] [pid 9] AH00484: server reached MaxRequestWorkers setting, consider raising the MaxRequestWorkers setting",
            "workers_exhausted",
        ),
        (
            "2026/11/10 [error] 7#7: *1 upstream timed out (110: Connection timed out) while reading response header from upstream",
            "upstream_timeout",
        ),
        (
            "2026/11/10 [error] 7#7: *9 connect() to unix:/run/app.sock failed (11: Resource temporarily unavailable) while connecting to upstream",
            "upstream_refused",
        ),
        ("fork failed: Resource temporarily unavailable", "try_again"),
        (
            "2026-11-10 11:00:00 [warning] <0.1.0> memory resource limit alarm set on node rabbit@a.",
            "memory_short",
        ),
        (
            "LOG:  process 9 still waiting for ShareLock on transaction 77 after 1000.1 ms",
            "lock_wait",
        ),
        (
            "9:M 10 Nov 2026 # Client id=7 addr=… scheduled to be closed ASAP for overcoming of output buffer limits.",
            "peer_not_reading",
        ),
        ("WORKS QUEUE_FULL", "queue_full"),
        ("asyncio.queues.QueueFull", "queue_full"),
        ("the jobs queue of tenant 7 is full", "queue_full"),
    ];
    let table = table();
    for (line, name) in lines {
        assert_eq!(table.find(line.as_bytes()), Some(name), "{line}");
    }
}

#[test]
fn ordinary_log_lines_are_not_recognized() {
    let table = table();
    for line in [
        "",
        "GET /queue/full-report 200",
        "listening on 127.0.0.1:8080, backlog 128",
        "your server socket listen backlog is limited to 100 connections",
        "maxconn 4096",
        "spawned uWSGI worker 1 (pid: 7, cores: 1)",
        "full vacuum of the listen table",
        "*** Operational MODE: preforking ***",
    ] {
        assert_eq!(table.find(line.as_bytes()), None, "{line}");
    }
}

#[test]
fn every_row_finds_its_own_pattern_unless_an_earlier_one_does() {
    let table = table();
    for (index, row) in KNOWN.iter().enumerate() {
        let line = row.pattern.replace('*', " 17 ").to_ascii_uppercase();
        let found = table.find(line.as_bytes()).unwrap();
        let at = KNOWN.iter().position(|known| known.name == found).unwrap();
        assert!(at <= index, "{}: {found}", row.pattern);
        assert!(!row.seen.is_empty());
    }
    let names: BTreeSet<&str> = KNOWN.iter().map(|row| row.name).collect();
    for name in names {
        check_name(name).unwrap();
        let causes: BTreeSet<_> = KNOWN
            .iter()
            .filter(|row| row.name == name)
            .map(|row| row.supports)
            .collect();
        assert_eq!(causes.len(), 1, "{name} speaks for two causes");
    }
}

#[test]
fn pieces_match_in_order_and_without_overlap() {
    let table = Table::new([("own", "aabb*bbcc")]).unwrap();
    assert_eq!(table.find(b"aabbbbcc"), Some("own"));
    assert_eq!(table.find(b"xx AABB then BBCC"), Some("own"));
    assert_eq!(table.find(b"aabbcc"), None);
    assert_eq!(table.find(b"bbcc aabb"), None);
}

#[test]
fn own_patterns_come_before_the_table_and_may_add_to_it() {
    let table = Table::new([
        ("mine", "uWSGI listen queue"),
        ("pool_exhausted", "Verbindungen vergriffen: ü"),
    ])
    .unwrap();
    assert_eq!(table.find(b"uwsgi listen queue full"), Some("mine"));
    let line = "alle verbindungen vergriffen: ü";
    assert_eq!(table.find(line.as_bytes()), Some("pool_exhausted"));
}

#[test]
fn invalid_patterns_are_rejected_with_the_reason() {
    let long = "x".repeat(MAX_PATTERN + 1);
    for (name, pattern, reason) in [
        ("own", "", "matches nearly every line"),
        ("own", "***", "matches nearly every line"),
        ("own", "a*b*c", "matches nearly every line"),
        ("own", "        ", "matches nearly every line"),
        ("own", long.as_str(), "201 bytes"),
        ("own", "two\nlines", "which no log line does"),
        ("", "queue", "invalid message name"),
        ("Own Name", "queue", "invalid message name"),
        (long.as_str(), "queue", "invalid message name"),
    ] {
        let error = format!("{:#}", Table::new([(name, pattern)]).err().unwrap());
        assert!(error.contains(reason), "{pattern:?}: {error}");
    }
    let many = vec![("own", "some text"); MAX_OWN];
    assert!(Table::new(many.iter().copied()).is_ok());
    let many = vec![("own", "some text"); MAX_OWN + 1];
    let error = format!("{:#}", Table::new(many).err().unwrap());
    assert!(error.contains("more than 64"), "{error}");
}

#[test]
fn only_the_beginning_of_a_long_line_is_searched() {
    let mut line = vec![b'x'; MAX_LINE - 10];
    line.extend(b"queue full");
    assert_eq!(table().find(&line), Some("queue_full"));
    line.insert(0, b'x');
    assert_eq!(table().find(&line), None);
}

#[test]
fn the_documents_name_every_cause_and_every_message() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    let causes = fs::read_to_string(docs.join("causes/README.md")).unwrap();
    for cause in Cause::ALL {
        let (name, title) = (cause.name(), cause.title());
        let row = format!("| [`{name}`]({name}.md) | {title} |");
        assert!(
            causes.contains(&row),
            "docs/reference/causes/README.md: {row}"
        );
        let page = fs::read_to_string(docs.join(format!("causes/{name}.md")));
        let page = page.unwrap_or_else(|error| panic!("docs/reference/causes/{name}.md: {error}"));
        assert!(page.starts_with(&format!("# {name}\n")), "{name}");
    }
    let configuration = fs::read_to_string(docs.join("configuration.md")).unwrap();
    for row in KNOWN {
        let name = format!("`{}`", row.name);
        let line = configuration
            .lines()
            .find(|line| line.starts_with('|') && line.contains(&name));
        let line = line.unwrap_or_else(|| panic!("docs/reference/configuration.md: {name}"));
        let cause = row.supports.map_or("", Cause::name);
        assert!(line.contains(cause), "{line}");
    }
}

/// One pass finds the same as a naive search for each row, on lines made of pieces of the patterns and of random bytes,
/// valid text or not.
#[test]
fn one_pass_agrees_with_matching_each_row_on_random_lines() {
    fn obvious(line: &[u8]) -> Option<&'static str> {
        let line = line.get(..MAX_LINE).unwrap_or(line).to_ascii_lowercase();
        let fits = |row: &&Known| {
            let mut from = 0;
            row.pattern.split('*').all(|piece| {
                let piece = piece.to_ascii_lowercase();
                let found = (from..=line.len()).find(|at| {
                    line.get(*at..)
                        .is_some_and(|rest| rest.starts_with(piece.as_bytes()))
                });
                found.is_some_and(|at| {
                    from = at + piece.len();
                    true
                })
            })
        };
        KNOWN.iter().find(fits).map(|row| row.name)
    }
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = move |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as usize
    };
    let table = table();
    let mut known = 0;
    for _ in 0..1_500 {
        let mut line = Vec::new();
        for _ in 0..next(6) {
            match next(4) {
                0 => {
                    for _ in 0..next(40) {
                        line.push(next(256) as u8);
                    }
                }
                1 => line.extend(vec![next(256) as u8; next(900)]),
                _ => {
                    let pattern = KNOWN[next(KNOWN.len())].pattern.as_bytes();
                    let from = if next(3) == 0 { next(pattern.len()) } else { 0 };
                    let to = if next(3) == 0 {
                        from + next(pattern.len() - from)
                    } else {
                        pattern.len()
                    };
                    line.extend(&pattern[from..to]);
                }
            }
        }
        let found = table.find(&line);
        known += usize::from(found.is_some());
        assert_eq!(found, obvious(&line), "{}", line.escape_ascii());
    }
    assert!((150..1_350).contains(&known), "{known} of 1,500 are known");
}
