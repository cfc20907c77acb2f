use super::super::{
    Kind, Reading,
    watched::{PID, TICK, Watched, extra},
};
use crate::sample::{Holder, Sample, UnixSocket, UnixStyle};

const SNDBUF: u32 = 1_000;

fn socket(inode: u64) -> UnixSocket {
    UnixSocket {
        inode,
        peer: Some(inode + 100),
        tgid: PID,
        fd: inode as u32,
        netns: 1,
        style: UnixStyle::Stream,
        listening: false,
        path: None,
        peer_path: None,
        queued: 0,
        limit: 10,
        head: 0,
        unread_by_peer: 0,
        sndbuf: SNDBUF,
        unread: 0,
        peer_sndbuf: SNDBUF,
    }
}

fn accepted(inode: u64, unread: u32, head: u64) -> UnixSocket {
    UnixSocket {
        path: Some("/run/app".to_owned()),
        unread,
        head,
        ..socket(inode)
    }
}

fn opened(unread_by_peer: u32) -> UnixSocket {
    UnixSocket {
        peer_path: Some("/run/log".to_owned()),
        unread_by_peer,
        ..socket(5)
    }
}

fn scan(watched: &mut Watched, unix: Vec<UnixSocket>) -> Vec<(String, Reading)> {
    let sample = Sample {
        unix,
        ..Sample::default()
    };
    watched.scan(Kind::Unix, sample)
}

fn only(queues: &[(String, Reading)], name: &str) -> Reading {
    let mut found = queues.iter().filter(|(of, _)| of == name);
    let reading = found.next().map(|(_, reading)| reading.clone());
    assert!(found.next().is_none());
    reading.unwrap_or_else(|| panic!("{name} in {queues:?}"))
}

#[test]
fn accepted_sockets_are_one_queue_and_the_worst_is_reported() {
    let mut watched = Watched::default();
    let both = || vec![accepted(3, 800, 7), accepted(4, 100, 8)];
    let queues = scan(&mut watched, both());
    assert_eq!(queues.len(), 2, "{queues:?}");
    let reading = only(&queues, "/run/app");
    assert_eq!((reading.depth, reading.limit), (800, Some(1_000)));
    assert_eq!(extra(&reading, "total_bytes"), Some(900.0));
    assert_eq!((reading.arrivals, reading.wait_ns), (None, None));
    let reading = only(&scan(&mut watched, both()), "/run/app");
    assert_eq!(reading.oldest_age_ns, Some(TICK));
    // The socket with the oldest head is the worst, however little data it holds.
    let queues = scan(&mut watched, vec![accepted(3, 800, 9), accepted(4, 100, 8)]);
    let reading = only(&queues, "/run/app");
    assert_eq!(
        (reading.depth, reading.oldest_age_ns),
        (100, Some(2 * TICK))
    );
    assert_eq!(reading.fill, Some(0.8));
    assert_eq!(reading.worst.as_deref(), Some("process 12 fd 4"));
}

#[test]
fn idle_connections_have_no_wait() {
    let queues = scan(&mut Watched::default(), vec![accepted(3, 0, 0), opened(0)]);
    assert_eq!(queues.len(), 4);
    for (_, reading) in queues {
        assert_eq!((reading.depth, reading.full), (0, false));
        assert_eq!((reading.wait_ns, reading.oldest_age_ns), (Some(0), None));
        assert_eq!(reading.worst, None);
    }
}

#[test]
fn data_that_the_peer_does_not_read_is_a_queue_and_the_peer_is_named() {
    let mut watched = Watched::default();
    let holder = Holder {
        inode: 105,
        tgid: 77,
        name: "rsyslogd".to_owned(),
        fd: 4,
        reads: true,
        writes: true,
    };
    let sampled = Sample {
        unix: vec![opened(500)],
        holders: Some(vec![holder]),
        ..Sample::default()
    };
    let reading = only(&watched.scan(Kind::Unix, sampled), "-> /run/log sent");
    assert!(!reading.full);
    let worst = "process 12 fd 5 to rsyslogd (77)";
    assert_eq!(reading.worst.as_deref(), Some(worst));
    let reading = only(&scan(&mut watched, vec![opened(1_000)]), "-> /run/log sent");
    assert_eq!((reading.depth, reading.limit), (1_000, Some(1_000)));
    assert!(reading.full);
    assert_eq!(reading.worst.as_deref(), Some(worst));
    assert_eq!(reading.oldest_age_ns, None, "not known from this end");
}

#[test]
fn datagrams_are_counted_where_they_are_read() {
    let server = |queued| UnixSocket {
        style: UnixStyle::Datagram,
        path: Some("/dev/log".to_owned()),
        peer: None,
        queued,
        head: 7,
        ..socket(3)
    };
    let mut watched = Watched::default();
    let reading = only(&scan(&mut watched, vec![server(10)]), "/dev/log");
    assert_eq!((reading.depth, reading.limit), (10, Some(10)));
    assert_eq!(reading.unit, Some("datagrams"));
    assert!(!reading.full, "one more may wait");
    let reading = only(&scan(&mut watched, vec![server(11)]), "/dev/log");
    assert!(reading.full);
    assert_eq!(reading.oldest_age_ns, Some(TICK));
}

#[test]
fn data_at_rest_in_an_internal_pair_is_not_a_queue() {
    let mut watched = Watched::default();
    let pair = |unread, head| {
        let one = UnixSocket {
            peer: Some(4),
            unread,
            head,
            ..socket(3)
        };
        let other = UnixSocket {
            peer: Some(3),
            unread_by_peer: unread,
            ..socket(4)
        };
        vec![one, other]
    };
    scan(&mut watched, pair(0, 0));
    for _ in 0..30 {
        let queues = scan(&mut watched, pair(500, 7));
        let reading = only(&queues, "unnamed");
        assert_eq!(queues.len(), 1, "what one sent is what the other received");
        assert_eq!(extra(&reading, "sockets"), Some(2.0));
        assert!(reading.oldest_age_ns.unwrap_or(0) <= 10 * TICK);
    }
    let reading = only(&scan(&mut watched, pair(1_000, 7)), "unnamed");
    assert_eq!(reading.oldest_age_ns, Some(30 * TICK), "full");
}

#[test]
fn a_bound_client_counts_as_opened_and_a_server_as_accepted() {
    let listener = UnixSocket {
        listening: true,
        ..accepted(3, 0, 0)
    };
    let named = |inode, path: &str, peer: &str| UnixSocket {
        path: Some(path.to_owned()),
        peer_path: Some(peer.to_owned()),
        ..socket(inode)
    };
    let queues = scan(
        &mut Watched::default(),
        vec![
            listener,
            named(4, "/run/app", "/tmp/caller"),
            named(5, "/tmp/me", "/run/log"),
        ],
    );
    let names: Vec<_> = queues.iter().map(|(name, _)| name.as_str()).collect();
    let accepted = ["/run/app", "/run/app sent"];
    let opened = ["-> /run/log", "-> /run/log sent"];
    assert_eq!(names, [accepted, opened].concat());
}

#[test]
fn queues_whose_paths_are_displayed_alike_have_different_names() {
    let bound = |inode, style, path: &str| UnixSocket {
        style,
        path: Some(path.to_owned()),
        ..socket(inode)
    };
    let long = |end: &str| format!("/{}{end}", "x".repeat(600));
    let sockets = || {
        vec![
            bound(3, UnixStyle::Stream, "/run/log"),
            bound(4, UnixStyle::Datagram, "/run/log"),
            bound(5, UnixStyle::Stream, &long("a")),
            bound(6, UnixStyle::Stream, &long("b")),
            bound(7, UnixStyle::Stream, &long("c")),
        ]
    };
    let mut watched = Watched::default();
    let names = |queues: &[(String, Reading)]| -> Vec<String> {
        queues.iter().map(|(name, _)| name.clone()).collect()
    };
    let first = names(&scan(&mut watched, sockets()));
    assert_eq!(
        first[..4],
        [
            "/run/log",
            "/run/log sent",
            "/run/log [2]",
            "/run/log [2] sent"
        ]
    );
    let different: std::collections::BTreeSet<&String> = first.iter().collect();
    assert_eq!((first.len(), different.len()), (10, 10), "{first:?}");
    assert_eq!(names(&scan(&mut watched, sockets())), first);
}

#[test]
fn a_client_and_a_server_in_one_service_are_judged_like_any_other() {
    let mut watched = Watched::default();
    let both = || {
        let server = UnixSocket {
            peer: Some(4),
            ..accepted(3, 500, 7)
        };
        let client = UnixSocket {
            peer: Some(3),
            peer_path: server.path.clone(),
            unread_by_peer: 500,
            ..socket(4)
        };
        vec![server, client]
    };
    for _ in 0..20 {
        scan(&mut watched, both());
    }
    let queues = scan(&mut watched, both());
    let names: Vec<_> = queues.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["/run/app", "-> /run/app"]);
    assert_eq!(only(&queues, "/run/app").oldest_age_ns, Some(20 * TICK));
}
