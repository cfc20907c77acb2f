//! What a process can do after it has dropped its privileges as the agent does: tried from the inside.
//!
//! Needs root, and a kernel with BTF. One test: privileges do not come back.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod own_process;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::AsRawFd as _,
        unix::{fs::OpenOptionsExt as _, net::UnixListener, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use own_process::{kernel_btf, watch_own_process};
use rustix::thread::CapabilitySet;
use tailback::{
    confinement::{drop_capabilities, filter_system_calls},
    kernel::{btf::Btf, layout::resolve, scanner::Scanner},
};
use tailback_tests::{temp::TempDir, wait};

const DEADLINE: Duration = Duration::from_secs(10);

/// Blocks or unblocks all signals in this thread.
fn mask_signals(how: libc::c_int) {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset(3) fills the set in.
    let result = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(how, all.as_ptr(), std::ptr::null_mut())
    };
    assert_eq!(result, 0);
}

/// The error of a call that returned -1.
fn errno(result: libc::c_long) -> i32 {
    assert_eq!(result, -1);
    io::Error::last_os_error().raw_os_error().unwrap()
}

/// A line of /proc/self/task/TID/status, for each thread.
fn of_threads(key: &str) -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let status = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("status")));
    let value = |status: String| {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    status.map(|status| value(status.unwrap())).collect()
}

/// `directory` is removed already, because it could not be removed any more: without the filter, the error would be ENOENT.
fn files_cannot_be_written(directory: &Path, open: &mut File) {
    let existing = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
    let denied = |result: io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{what}: {error}");
    };
    let open_with = |options: &OpenOptions| options.open(&existing).map(drop);
    let options = File::options;
    denied(open_with(options().write(true)), "open for writing");
    denied(open_with(options().append(true)), "open for appending");
    denied(open_with(options().read(true).write(true)), "open for both");
    let truncating = libc::O_TRUNC;
    let options = options().read(true).custom_flags(truncating).clone();
    denied(open_with(&options), "open that empties the file");
    denied(File::create(directory.join("new")).map(drop), "create");
    denied(fs::create_dir(directory.join("d")), "mkdir");
    denied(fs::remove_file(&existing), "unlink");
    denied(fs::rename(&existing, directory.join("other")), "rename");
    denied(fs::hard_link(&existing, directory.join("l")), "link");
    let link = std::os::unix::fs::symlink("x", directory.join("s"));
    denied(link, "symlink");
    let mode = fs::metadata(&existing).unwrap().permissions();
    denied(fs::set_permissions(&existing, mode), "chmod");
    let socket = UnixListener::bind(directory.join("socket"));
    denied(socket.map(drop), "bind a unix socket");
    denied(TcpListener::bind("127.0.0.1:0").map(drop), "bind a port");
    let own = format!("/proc/{}/mem", std::process::id());
    denied(File::options().write(true).open(own).map(drop), "memory");
    denied(Command::new("/bin/true").spawn().map(drop), "a program");
    let mut how = [0_u64; 3];
    how[0] = libc::O_RDWR as u64;
    let path = c"/dev/null".as_ptr();
    // SAFETY: a live path, and a struct open_how of the size passed.
    let opened =
        unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path, &raw const how, 24) };
    assert_eq!(errno(opened), libc::ENOSYS, "openat2");
    // What is open stays open, and reading works.
    open.write_all(b"more").unwrap();
    assert_eq!(fs::read(&existing).unwrap(), b"more");
}

fn system_calls_are_denied() {
    let parent = libc::c_long::from(std::os::unix::process::parent_id());
    let denied: &[(libc::c_long, [libc::c_long; 3])] = &[
        (libc::SYS_kill, [parent, 0, 0]),
        (libc::SYS_ptrace, [16, parent, 0]),
        (libc::SYS_process_vm_writev, [parent, 0, 0]),
        (libc::SYS_prlimit64, [parent, 7, 0]),
        (libc::SYS_setns, [0, 0, 0]),
        (libc::SYS_unshare, [0, 0, 0]),
        (libc::SYS_mount, [0, 0, 0]),
        (libc::SYS_setresuid, [0, 0, 0]),
        (libc::SYS_perf_event_open, [0, 0, 0]),
        (libc::SYS_userfaultfd, [0, 0, 0]),
        (libc::SYS_io_uring_setup, [1, 0, 0]),
        (libc::SYS_clone, [libc::SIGCHLD as libc::c_long, 0, 0]),
        // BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_BTF_LOAD, BPF_PROG_GET_FD_BY_ID.
        (libc::SYS_bpf, [0, 0, 0]),
        (libc::SYS_bpf, [5, 0, 0]),
        (libc::SYS_bpf, [8, 0, 0]),
        (libc::SYS_bpf, [18, 0, 0]),
        (libc::SYS_bpf, [13, 0, 0]),
    ];
    for (call, [first, second, third]) in denied {
        // SAFETY: the filter rejects the call before its arguments are used.
        let result = unsafe { libc::syscall(*call, *first, *second, *third, 0, 0) };
        assert_eq!(errno(result), libc::EPERM, "system call {call}({first}, …)");
    }
    #[cfg(target_arch = "x86_64")]
    {
        let x32 = libc::SYS_setresuid | 1 << 30;
        // SAFETY: as above.
        let result = unsafe { libc::syscall(x32, 0, 0, 0) };
        // ENOSYS, if the filter had let it pass to a kernel without the x32 ABI.
        assert_eq!(errno(result), libc::EPERM, "the x32 form of a system call");
    }
}

#[test]
fn a_confined_process_scans_but_loads_and_writes_nothing() {
    const TEST: &str = "a_confined_process_scans_but_loads_and_writes_nothing";
    let Some(btf) = kernel_btf(TEST) else { return };
    let fields = resolve(&Btf::parse(&btf).unwrap());
    let mut scanner = watch_own_process(&fields);
    let temp = TempDir::new("confinement").unwrap();
    let mut open = File::create(temp.path().join("existing")).unwrap();
    let directory = temp.path().to_owned();
    drop(temp);
    let mut another = Command::new("cat");
    another.uid(65_534).stdin(Stdio::piped());
    another.env_clear().env("OTEL_SERVICE_NAME", "another");
    let mut another = another.spawn().unwrap();
    // A thread that was started before, and one that waits in a system call that is not restarted.
    let (stop, stopped) = channel::<()>();
    let waiting = thread::spawn(move || stopped.recv());
    // One that cannot be interrupted until then, as if it waited for a file system that does not answer.
    let (go_on, goes_on) = channel::<()>();
    let (blocked, is_blocked) = channel();
    let stuck = thread::spawn(move || {
        mask_signals(libc::SIG_BLOCK);
        blocked.send(()).unwrap();
        let _ = goes_on.recv();
        mask_signals(libc::SIG_UNBLOCK);
        let _ = goes_on.recv();
    });
    is_blocked.recv().unwrap();
    let dropped = drop_capabilities(|| scanner.check_access().is_ok()).unwrap();
    filter_system_calls(false).unwrap();
    let kept = dropped.kept;
    assert_eq!(dropped.pending, 1);
    go_on.send(()).unwrap();
    let bits = format!("{:016x}", kept.bits());
    wait::until("the thread to drop its capabilities", DEADLINE, || {
        let have_all = of_threads("CapPrm").iter().all(|held| *held == bits);
        Ok(have_all.then_some(()))
    })
    .unwrap();

    assert!(kept.contains(CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH));
    assert!(
        !kept.intersects(CapabilitySet::PERFMON | CapabilitySet::SETUID),
        "{kept:?}"
    );
    for key in ["CapPrm", "CapEff"] {
        let of_threads = of_threads(key);
        assert!(of_threads.len() >= 3, "{of_threads:?}");
        assert!(
            of_threads.iter().all(|held| *held == bits),
            "{key}: {of_threads:?}"
        );
    }
    for (key, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let of_threads = of_threads(key);
        assert!(
            of_threads.iter().all(|held| held == value),
            "{key}: {of_threads:?}"
        );
    }
    system_calls_are_denied();
    files_cannot_be_written(&directory, &mut open);
    assert!(
        Scanner::load_with(&fields, false).is_err(),
        "a second object loads"
    );

    // Samples go on, also in new threads and of new processes.
    let seen = thread::spawn(move || {
        let mut seen = 0;
        scanner.check_access().unwrap();
        scanner.scan_threads(&mut |_| seen += 1).unwrap();
        (scanner, seen)
    });
    let (mut scanner, seen) = seen.join().unwrap();
    assert!(seen >= 3, "{seen} threads");
    scanner.scan_files(&mut |_| {}).unwrap();
    let of_another = format!("/proc/{}", another.id());
    assert!(fs::read_link(format!("{of_another}/exe")).is_ok());
    let environment = fs::read(format!("{of_another}/environ")).unwrap();
    assert!(environment.starts_with(b"OTEL_SERVICE_NAME=another\0"));
    // It ends with its input: it cannot be killed any more.
    drop(another.stdin.take());
    another.wait().unwrap();
    drop(stop);
    assert!(waiting.join().unwrap().is_err());
    drop(go_on);
    stuck.join().unwrap();
}
