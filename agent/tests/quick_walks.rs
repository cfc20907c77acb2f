//! Quick walks tell what the kernel's own walks tell, record for record.
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod ourselves;

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

use ourselves::{kernel, watch_ourselves};
use tailback::kernel::{
    btf::Btf,
    glance::{Glance, Record},
    layout::resolve,
};

/// The tests look at this very process: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Two that watch this process: with quick walks, and without. `None`, and a word to the log of skipped tests, where this
/// kernel has none.
fn both(test: &str) -> Option<[Glance; 2]> {
    let bytes = kernel(test)?;
    let fields = resolve(&Btf::parse(&bytes).unwrap());
    if fields.cast.is_none() {
        tailback_tests::skip::skip(test, "this kernel has no bpf_rdonly_cast, which is of 6.2");
        return None;
    }
    let mut without = fields.clone();
    without.cast = None;
    let both = [fields, without].map(watch_ourselves);
    assert_eq!(both[0].plan().quick, Ok(()));
    assert!(both[1].plan().quick.is_err());
    Some(both)
}

/// What a walk over files tells, without what passes with time; and how many files are open.
fn files(glance: &mut Glance) -> (Vec<String>, Vec<(u32, u32, u64)>) {
    let mut told = Vec::new();
    glance
        .walk_files(&mut |record| {
            told.push(match record {
                Record::Socket(socket) => {
                    let mut socket = *socket;
                    socket.since_received = 0;
                    socket.since_sent = 0;
                    socket.since_heard = 0;
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
    told.sort_unstable();
    let mut open = Vec::new();
    glance.open_files(|tgid, files, limit| open.push((tgid, files, limit)));
    (told, open)
}

fn is_told_alike([quick, own]: &mut [Glance; 2]) -> Vec<String> {
    let before = quick.told_quickly();
    let (told, open) = files(quick);
    assert!(
        quick.told_quickly() > before,
        "the quick walk tells nothing"
    );
    let (expected, expected_open) = files(own);
    assert_eq!(told, expected);
    assert_eq!(open, expected_open);
    told
}

#[test]
fn files_of_every_kind_are_told_alike() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("files_of_every_kind_are_told_alike") else {
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

    // The first walk of each is the kernel's own, and marks the listeners.
    for glance in &mut both {
        files(glance);
    }
    let told = is_told_alike(&mut both);
    for (kind, at_least) in [
        ("SocketRecord", 230),
        ("ListenerRecord", 2),
        ("UdpRecord", 2),
        ("UnixRecord", 4),
        ("PipeRecord", 2),
    ] {
        let found = told.iter().filter(|record| record.contains(kind)).count();
        assert!(found >= at_least, "{found} {kind}");
    }

    // What nobody has named yet, and a listener that is not marked, are left to the kernel's own walk.
    let new = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(new.local_addr().unwrap()).unwrap();
    let server = new.accept().unwrap().0;
    let fresh = is_told_alike(&mut both);
    assert_eq!(fresh.len(), told.len() + 3);
    assert_eq!(is_told_alike(&mut both), fresh);

    // Busy sockets of a hot process are marked.
    for glance in &mut both {
        glance.set_focused(1_000, |_| true).unwrap();
    }
    is_told_alike(&mut both);
    for glance in &mut both {
        let mut marked = 0;
        assert!(glance.walk_marked(&mut |_| marked += 1).unwrap());
        assert_eq!(marked, 3 + 50);
    }
    drop((held, waiting, datagrams, pair, packets, pipe, other));
    drop((client, server));
}

#[test]
fn a_large_table_with_holes_is_told_alike() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("a_large_table_with_holes_is_told_alike") else {
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
    for glance in &mut both {
        files(glance);
    }
    let told = is_told_alike(&mut both);
    assert!(told.len() >= held.len() * 2);
}

#[test]
fn a_table_that_is_shared_with_another_process_is_told_of() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("a_table_that_is_shared_with_another_process_is_told_of") else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for glance in &mut both {
        files(glance);
    }
    // A thread with a table of its own: the kernel's own walk shows both.
    let ready = Arc::new((Barrier::new(2), Barrier::new(2)));
    let theirs = Arc::clone(&ready);
    let fd = listener.as_raw_fd();
    let thread = thread::spawn(move || {
        // SAFETY: only this thread's table of files becomes its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
        theirs.0.wait();
        theirs.1.wait();
        fd
    });
    ready.0.wait();
    let (told, _) = files(&mut both[0]);
    let (expected, _) = files(&mut both[1]);
    assert_eq!(told, expected);
    let listeners = told
        .iter()
        .filter(|record| record.contains("ListenerRecord"));
    assert_eq!(listeners.count(), 2);
    ready.1.wait();
    thread.join().unwrap();
}

#[test]
fn threads_are_told_alike() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut both) = both("threads_are_told_alike") else {
        return;
    };
    const THREADS: usize = 200;
    let done = Arc::new(Barrier::new(THREADS + 1));
    let asleep: Vec<_> = (0..THREADS)
        .map(|_| {
            let done = Arc::clone(&done);
            let (tell, told) = std::sync::mpsc::channel();
            let thread = thread::spawn(move || {
                // SAFETY: no arguments.
                tell.send(unsafe { libc::gettid() } as u32).unwrap();
                done.wait();
            });
            (told.recv().unwrap(), thread)
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
    let mut told = [Vec::new(), Vec::new()];
    let before = both[0].told_quickly();
    for (glance, told) in both.iter_mut().zip(&mut told) {
        let mut others = 0;
        glance
            .walk_threads(&mut |record| {
                if let Record::Thread(thread) = record {
                    if tids.contains(&thread.tid) {
                        told.push(*thread);
                    } else {
                        others += 1;
                    }
                }
            })
            .unwrap();
        assert!(others > 0, "the thread that looks is seen");
        told.sort_unstable_by_key(|thread| thread.tid);
    }
    assert!(
        both[0].told_quickly() > before,
        "the quick walk tells nothing"
    );
    assert_eq!(told[0].len(), THREADS);
    assert_eq!(told[0], told[1]);
    done.wait();
    for (_, thread) in asleep {
        thread.join().unwrap();
    }
}
