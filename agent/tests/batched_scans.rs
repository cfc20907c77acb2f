//! Batched scans report exactly what the kernel's own iterators report, record for record.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod own_process;

use std::{
    fs,
    io::{self, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsRawFd as _,
        unix::net::{UnixDatagram, UnixStream},
    },
    sync::{Arc, Barrier, Mutex, PoisonError},
    thread,
};

use own_process::{kernel_btf, watch_own_process};
use tailback::kernel::{
    btf::Btf,
    layout::resolve,
    scanner::{Record, Scanner},
};

/// The tests scan their own process, so they run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Two instances that watch this process, with and without batched scans. `None`, with an entry in the log of skipped
/// tests, if this kernel does not support them.
fn both(test: &str) -> Option<[Scanner; 2]> {
    let bytes = kernel_btf(test)?;
    let fields = resolve(&Btf::parse(&bytes).unwrap());
    if fields.cast.is_none() {
        tailback_tests::skip::skip(test, "bpf_rdonly_cast is not available (needs Linux 6.2)");
        return None;
    }
    let mut without = fields.clone();
    without.cast = None;
    let both = [&fields, &without].map(watch_own_process);
    assert_eq!(both[0].capabilities().batched_scans, Ok(()));
    assert!(both[1].capabilities().batched_scans.is_err());
    Some(both)
}

/// The records of a file scan without their timestamps, and the number of open files.
fn files(scanner: &mut Scanner) -> (Vec<String>, Vec<(u32, u32, u64)>) {
    let mut reported = Vec::new();
    scanner
        .scan_files(&mut |record| {
            reported.push(match record {
                Record::Socket(socket) => {
                    let mut socket = *socket;
                    socket.since_received = 0;
                    socket.since_sent = 0;
                    socket.since_any_segment = 0;
                    format!("{socket:?}")
                }
                Record::Listener(listener, stamps) => {
                    let mut listener = *listener;
                    listener.now_ns = 0;
                    format!("{listener:?} {stamps:?}")
                }
                other => format!("{other:?}"),
            });
        })
        .unwrap();
    reported.sort_unstable();
    let mut open = Vec::new();
    scanner.open_files(|tgid, files, limit| open.push((tgid, files, limit)));
    (reported, open)
}

fn assert_same([batched, kernel]: &mut [Scanner; 2]) -> Vec<String> {
    let before = batched.batched_bytes();
    let (reported, open) = files(batched);
    assert!(
        batched.batched_bytes() > before,
        "the batched scan reports nothing"
    );
    let (expected, expected_open) = files(kernel);
    assert_eq!(reported, expected);
    assert_eq!(open, expected_open);
    reported
}

#[test]
fn both_scans_report_the_same_files_of_every_kind() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("both_scans_report_the_same_files_of_every_kind") else {
        return;
    };
    let listeners = ["127.0.0.1:0", "[::1]:0"].map(|at| TcpListener::bind(at).unwrap());
    let mut held = Vec::new();
    for listener in &listeners {
        let address = listener.local_addr().unwrap();
        for number in 0..50 {
            let mut client = TcpStream::connect(address).unwrap();
            let server = listener.accept().unwrap().0;
            if number % 2 == 0 {
                client.write_all(b"unread").unwrap();
            }
            held.push((client, server));
        }
    }
    let waiting: Vec<_> = (0..30)
        .map(|number: usize| {
            TcpStream::connect(listeners[number % 2].local_addr().unwrap()).unwrap()
        })
        .collect();
    let datagrams = ["127.0.0.1:0", "[::1]:0"].map(|at| {
        let socket = UdpSocket::bind(at).unwrap();
        let to = socket.local_addr().unwrap();
        socket.send_to(b"unread", to).unwrap();
        socket
    });
    let mut pair = UnixStream::pair().unwrap();
    pair.0.write_all(b"unread").unwrap();
    let packets = UnixDatagram::pair().unwrap();
    packets.0.send(b"unread").unwrap();
    let mut pipe = io::pipe().unwrap();
    pipe.1.write_all(b"unread").unwrap();
    let other = fs::File::open("/dev/null").unwrap();

    // The first scan of each is the kernel's own; it adds the listeners to the focused sockets.
    for scanner in &mut both {
        files(scanner);
    }
    let reported = assert_same(&mut both);
    for (kind, at_least) in [
        ("SocketRecord", 230),
        ("ListenerRecord", 2),
        ("UdpRecord", 2),
        ("UnixRecord", 4),
        ("PipeRecord", 2),
    ] {
        let found = reported
            .iter()
            .filter(|record| record.contains(kind))
            .count();
        assert!(found >= at_least, "{found} {kind}");
    }

    // Sockets without a cookie, and a listener that is not among the focused sockets, are deferred to the kernel's own iterator.
    let new = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(new.local_addr().unwrap()).unwrap();
    let server = new.accept().unwrap().0;
    let fresh = assert_same(&mut both);
    assert_eq!(fresh.len(), reported.len() + 3);
    assert_eq!(assert_same(&mut both), fresh);

    // Busy sockets of a focused process join the focused sockets.
    for scanner in &mut both {
        scanner.set_focused(1_000, |_| true).unwrap();
    }
    assert_same(&mut both);
    for scanner in &mut both {
        let mut focused = 0;
        assert!(scanner.scan_focused_sockets(&mut |_| focused += 1).unwrap());
        assert_eq!(focused, 3 + 50);
    }
    drop((held, waiting, datagrams, pair, packets, pipe, other));
    drop((client, server));
}

#[test]
fn both_scans_report_the_same_large_file_table_with_holes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("both_scans_report_the_same_large_file_table_with_holes") else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let room = limit.unwrap_or(10_000).min(10_000) as usize;
    let mut held = Vec::new();
    for number in 0..room / 2 - 150 {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        // Every third connection leaves a hole.
        if number % 3 > 0 {
            held.push((client, server));
        }
    }
    for scanner in &mut both {
        files(scanner);
    }
    let reported = assert_same(&mut both);
    assert!(reported.len() >= held.len() * 2);
}

#[test]
fn a_thread_with_its_own_file_table_is_reported() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("a_thread_with_its_own_file_table_is_reported") else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for scanner in &mut both {
        files(scanner);
    }
    // A thread with a file table of its own: the kernel's own iterator reports both tables.
    let ready = Arc::new((Barrier::new(2), Barrier::new(2)));
    let theirs = Arc::clone(&ready);
    let fd = listener.as_raw_fd();
    let thread = thread::spawn(move || {
        // SAFETY: affects only the file table of this thread.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
        theirs.0.wait();
        theirs.1.wait();
        fd
    });
    ready.0.wait();
    let (reported, _) = files(&mut both[0]);
    let (expected, _) = files(&mut both[1]);
    assert_eq!(reported, expected);
    let listeners = reported
        .iter()
        .filter(|record| record.contains("ListenerRecord"));
    assert_eq!(listeners.count(), 2);
    ready.1.wait();
    thread.join().unwrap();
}

#[test]
fn both_scans_report_the_same_threads() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("both_scans_report_the_same_threads") else {
        return;
    };
    const THREADS: usize = 200;
    let done = Arc::new(Barrier::new(THREADS + 1));
    let asleep: Vec<_> = (0..THREADS)
        .map(|_| {
            let done = Arc::clone(&done);
            let (sender, receiver) = std::sync::mpsc::channel();
            let thread = thread::spawn(move || {
                // SAFETY: no arguments.
                sender.send(unsafe { libc::gettid() } as u32).unwrap();
                done.wait();
            });
            (receiver.recv().unwrap(), thread)
        })
        .collect();
    let sleeps = |tid: u32| {
        let state = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
        state.contains(") S ")
    };
    while !asleep.iter().all(|(tid, _)| sleeps(*tid)) {
        thread::yield_now();
    }
    let tids: Vec<u32> = asleep.iter().map(|(tid, _)| *tid).collect();
    let mut reported = [Vec::new(), Vec::new()];
    let before = both[0].batched_bytes();
    for (scanner, reported) in both.iter_mut().zip(&mut reported) {
        let mut others = 0;
        scanner
            .scan_threads(&mut |record| {
                if let Record::Thread(thread) = record {
                    if tids.contains(&thread.tid) {
                        reported.push(*thread);
                    } else {
                        others += 1;
                    }
                }
            })
            .unwrap();
        assert!(others > 0, "the scanning thread is reported");
        reported.sort_unstable_by_key(|thread| thread.tid);
    }
    assert!(
        both[0].batched_bytes() > before,
        "the batched scan reports nothing"
    );
    assert_eq!(reported[0].len(), THREADS);
    assert_eq!(reported[0], reported[1]);
    done.wait();
    for (_, thread) in asleep {
        thread.join().unwrap();
    }
}
