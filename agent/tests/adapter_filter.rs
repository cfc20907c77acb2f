//! What the adapter process can do with its filter of system calls: tried from the inside.
//!
//! One test: the filter stays. Refused calls fail as on a kernel that does not have them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixListener,
    process::Command,
    thread,
};

use tailback::confinement::{Refusal, allow_only_serving};
use tailback_tests::temp::TempDir;

fn is_refused<T>(result: io::Result<T>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{what} is allowed"));
    assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{what}: {error}");
}

fn refused_calls() {
    let parent = libc::c_long::from(std::os::unix::process::parent_id());
    let executable = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
    let private = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let refused: &[(&str, libc::c_long, [libc::c_long; 4])] = &[
        ("kill", libc::SYS_kill, [parent, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [parent, parent, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [16, parent, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0, 0]),
        ("unshare", libc::SYS_unshare, [0, 0, 0, 0]),
        ("setns", libc::SYS_setns, [0, 0, 0, 0]),
        ("mount", libc::SYS_mount, [0, 0, 0, 0]),
        ("setresuid", libc::SYS_setresuid, [0, 0, 0, 0]),
        ("capset", libc::SYS_capset, [0, 0, 0, 0]),
        ("prctl", libc::SYS_prctl, [38, 1, 0, 0]),
        ("prlimit64", libc::SYS_prlimit64, [parent, 7, 0, 0]),
        (
            "clone",
            libc::SYS_clone,
            [libc::c_long::from(libc::SIGCHLD), 0, 0, 0],
        ),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, 0, 0, 0]),
        ("a netlink socket", libc::SYS_socket, [16, 3, 0, 0]),
        ("a packet socket", libc::SYS_socket, [17, 3, 0, 0]),
        ("input for a terminal", libc::SYS_ioctl, [0, 0x5412, 0, 0]),
        (
            "executable memory",
            libc::SYS_mmap,
            [0, 4_096, executable, private],
        ),
        (
            "memory made executable",
            libc::SYS_mprotect,
            [0, 0, executable, 0],
        ),
    ];
    for (what, call, [first, second, third, fourth]) in refused {
        // SAFETY: the filter refuses the call before its arguments are used.
        let result = unsafe { libc::syscall(*call, *first, *second, *third, *fourth, -1, 0) };
        assert_eq!(result, -1, "{what} is allowed");
        is_refused(Err::<(), _>(io::Error::last_os_error()), what);
    }
}

#[test]
fn the_adapter_process_can_serve_and_do_little_else() {
    let temp = TempDir::new("filter").unwrap();
    let file = temp.path().join("file");
    fs::write(&file, "text").unwrap();
    allow_only_serving(false, Refusal::Fails).unwrap();

    // What it does for a living, in a thread that starts afterwards.
    let served = thread::spawn(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        listener.accept().unwrap().0.write_all(b"ok").unwrap();
        let mut text = [0; 2];
        client.read_exact(&mut text).unwrap();
        text
    });
    assert_eq!(&served.join().unwrap(), b"ok");
    assert_eq!(fs::read_to_string(&file).unwrap(), "text");
    let socket = temp.path().join("socket");
    drop(UnixListener::bind(&socket).unwrap());
    fs::remove_file(&socket).unwrap();
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);

    is_refused(File::options().write(true).open(&file), "open for writing");
    is_refused(File::create(temp.path().join("new")), "create");
    is_refused(fs::create_dir(temp.path().join("d")), "mkdir");
    is_refused(fs::rename(&file, temp.path().join("other")), "rename");
    is_refused(
        std::os::unix::fs::symlink("x", temp.path().join("s")),
        "symlink",
    );
    is_refused(fs::hard_link(&file, temp.path().join("l")), "link");
    is_refused(Command::new("/bin/true").spawn().map(drop), "a program");
    refused_calls();
}
