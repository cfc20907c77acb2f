//! Memory and files of a watched process that hold up their readers: a file system does not answer, or a lock is held.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::OsStrExt as _,
            fs::{OpenOptionsExt as _, PermissionsExt as _},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::channel,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;
use tailback_tests::{
    process::{End, Process},
    program,
    skip::skip,
    temp::TempDir,
};

use crate::{DEADLINE, allowed, end, tailback};

const HOSTILE: &str = env!("CARGO_BIN_EXE_tailback-hostile");
/// User and group nobody.
const NOBODY: u32 = 65534;
/// Deadline of a command that samples for two seconds.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// Numbers of include/uapi/linux/fuse.h.
mod protocol {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const RELEASE: u32 = 18;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    /// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
    pub const REQUEST_HEADER: usize = 40;
    pub const RESPONSE_HEADER: u32 = 16;
    /// `FUSE_MIN_READ_BUFFER`, and room for a write.
    pub const BUFFER: usize = 128 * 1024;
}

#[derive(Default)]
struct Requests {
    reads: AtomicU32,
    opens: AtomicU32,
}

/// A regular file whose file system answers every request except for its content.
struct SilentFile {
    path: PathBuf,
    /// Requests for its content, and to open it.
    requests: Arc<Requests>,
    server: Option<JoinHandle<()>>,
}

impl SilentFile {
    /// Mounts such a file over the one at `path`. `None`, with the reason in the log of skipped tests, if there is no FUSE.
    fn mount(test: &str, path: &Path) -> Result<Option<Self>> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open("/dev/fuse");
        let Ok(device) = device else {
            skip(test, "this kernel has no FUSE");
            return Ok(None);
        };
        let options = format!(
            "fd={},rootmode=100666,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let at = CString::new(path.as_os_str().as_bytes())?;
        let options = CString::new(options)?;
        // SAFETY: live strings.
        let result = unsafe {
            libc::mount(
                c"silent".as_ptr(),
                at.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                options.as_ptr().cast(),
            )
        };
        ensure!(result == 0, "mount: {}", io::Error::last_os_error());
        let requests = Arc::new(Requests::default());
        let counter = Arc::clone(&requests);
        let server = thread::spawn(move || serve(&device, &counter));
        Ok(Some(Self {
            path: path.to_owned(),
            requests,
            server: Some(server),
        }))
    }

    /// Ends it: waiting readers get an error.
    fn abort(&mut self) {
        if let Some(server) = self.server.take() {
            if let Ok(at) = CString::new(self.path.as_os_str().as_bytes()) {
                // SAFETY: a live string. Forced, it aborts all requests, and the server's next read fails.
                unsafe { libc::umount2(at.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
            }
            let _ = server.join();
        }
    }
}

impl Drop for SilentFile {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Answers until the file system is unmounted.
fn serve(mut device: &File, requests: &Requests) {
    let mut request = vec![0; protocol::BUFFER];
    loop {
        match device.read(&mut request) {
            Ok(len) if len >= protocol::REQUEST_HEADER => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => return,
        }
        let word = |at: usize| {
            let bytes = request[at..at + 4].try_into();
            u32::from_ne_bytes(bytes.unwrap_or_default())
        };
        let unique = [word(8), word(12)];
        let (error, body) = match word(4) {
            protocol::READ => {
                requests.reads.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            protocol::FORGET | protocol::INTERRUPT => continue,
            // `struct fuse_init_out`: version 7.31, and a maximum of 4,096 bytes per write.
            protocol::INIT => (0, words::<16>(&[(0, 7), (1, 31), (5, 4096)])),
            // `struct fuse_attr_out`: inode 1, four pages, mode 100666, one link.
            protocol::GETATTR => (
                0,
                words::<26>(&[
                    (0, 3600),
                    (4, 1),
                    (6, 4 * 4096),
                    (19, 0o100_666),
                    (20, 1),
                    (21, NOBODY),
                ]),
            ),
            protocol::OPEN => {
                requests.opens.fetch_add(1, Ordering::SeqCst);
                (0, words::<4>(&[]))
            }
            protocol::RELEASE | protocol::FLUSH => (0, Vec::new()),
            _ => (-libc::ENOSYS, Vec::new()),
        };
        let len = protocol::RESPONSE_HEADER + body.len() as u32;
        let header = [len, error as u32, unique[0], unique[1]];
        let header = header.iter().flat_map(|word| word.to_ne_bytes());
        let response: Vec<u8> = header.chain(body).collect();
        // An error means that the request was aborted.
        let _ = device.write(&response);
    }
}

/// `N` words that are zero except for these.
fn words<const N: usize>(set: &[(usize, u32)]) -> Vec<u8> {
    let mut words = [0_u32; N];
    for (at, value) in set {
        words[*at] = *value;
    }
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Runs the agent. Returns its output, or an error if it does not end in time. `release` then makes the memory readable.
fn run(args: &[&str], release: impl FnOnce()) -> Result<String> {
    let agent = Process::start("tailback", &mut tailback(args)?)?;
    if agent.wait_end(ENDS_WITHIN).is_err() {
        agent.signal(Signal::KILL)?;
        thread::sleep(Duration::from_secs(1));
        let survives = agent.ended()?.is_none();
        // Before waiting for the agent: otherwise this test would hang, too.
        release();
        let survives = if survives { ", even when killed" } else { "" };
        bail!("tailback {} does not end{survives}", args.join(" "));
    }
    let output = end(&agent)?;
    ensure!(
        matches!(output.end, End::Code(0 | 1)),
        "{:?}: {}",
        output.end,
        output.text()
    );
    Ok(output.out.join("\n"))
}

/// The arguments of a sample of a process, for two seconds.
fn sample_of(pid: &str) -> [&str; 8] {
    [
        "sample",
        "--json",
        "--pid",
        pid,
        "--interval",
        "50ms",
        "--duration",
        "2s",
    ]
}

/// A process of user nobody, and the file that it uses. The file is dropped first: until then the process may be unable to end.
struct Attack {
    file: SilentFile,
    hostile: Process,
    pid: String,
    _directory: TempDir,
}

impl Attack {
    /// `None`, with the reason in the log of skipped tests, if there is no FUSE.
    fn start(test: &str, what: &str) -> Result<Option<Self>> {
        Self::start_in(TempDir::new("silent")?, "file", test, what)
    }

    /// The same with a file of this name in this directory.
    fn start_in(directory: TempDir, name: &str, test: &str, what: &str) -> Result<Option<Self>> {
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        let binary = directory.path().join("hostile");
        program::copy(Path::new(HOSTILE), &binary)?;
        fs::set_permissions(&binary, Permissions::from_mode(0o755))?;
        let path = directory.write(name, "")?;
        let Some(file) = SilentFile::mount(test, &path)? else {
            return Ok(None);
        };
        let mut command = Command::new(&binary);
        let hostile = Process::start(
            "hostile",
            command.arg(what).arg(&path).uid(NOBODY).gid(NOBODY),
        )?;
        let pid = hostile.pid().to_string();
        let attack = Self {
            file,
            hostile,
            pid,
            _directory: directory,
        };
        attack.hostile.wait_line("hidden ", DEADLINE)?;
        Ok(Some(attack))
    }

    /// The agent samples and diagnoses as if nothing were wrong.
    fn check_agent(&mut self) -> Result<()> {
        let sample = run(&sample_of(&self.pid), || self.file.abort())?;
        let shown = format!("\"pid\":{}", self.pid);
        ensure!(sample.contains(&shown), "no {shown}: {sample}");
        let one = ["diagnose", "--pid", &self.pid, "--for", "2s"];
        run(&one, || self.file.abort())?;
        run(&["diagnose", "--for", "2s"], || self.file.abort())?;
        self.hostile.check_running()
    }

    fn reads(&self) -> u32 {
        self.file.requests.reads.load(Ordering::SeqCst)
    }

    fn opens(&self) -> u32 {
        self.file.requests.opens.load(Ordering::SeqCst)
    }
}

#[test]
fn memory_of_a_file_system_that_never_answers_does_not_hold_up_the_agent() -> Result<()> {
    let test = "memory_of_a_file_system_that_never_answers_does_not_hold_up_the_agent";
    if !allowed(test) {
        return Ok(());
    }
    let Some(mut attack) = Attack::start(test, "waits")? else {
        return Ok(());
    };
    attack.check_agent()?;
    // The strongest evidence: nobody has asked for the content.
    ensure!(
        attack.reads() == 0,
        "{} requests for the content",
        attack.reads()
    );
    // The file does hold up a reader.
    let path = attack.file.path.clone();
    let reader = thread::spawn(move || fs::read(path));
    let end = Instant::now() + DEADLINE;
    while attack.reads() == 0 {
        ensure!(Instant::now() < end, "the file is not silent");
        thread::sleep(Duration::from_millis(5));
    }
    attack.file.abort();
    ensure!(reader.join().is_ok_and(|read| read.is_err()), "it was read");
    Ok(())
}

#[test]
fn a_command_line_that_cannot_be_read_does_not_hold_up_the_agent() -> Result<()> {
    let test = "a_command_line_that_cannot_be_read_does_not_hold_up_the_agent";
    if !allowed(test) {
        return Ok(());
    }
    let Some(mut attack) = Attack::start(test, "lock")? else {
        return Ok(());
    };
    // Its memory is indeed locked: a reader of its command line waits.
    let line = format!("/proc/{}/cmdline", attack.pid);
    let (send, done) = channel();
    let reader = thread::spawn(move || {
        let read = fs::read(line);
        let _ = send.send(());
        read
    });
    let early = done.recv_timeout(Duration::from_secs(1));
    ensure!(early.is_err(), "its command line can be read");
    attack.check_agent()?;
    attack.file.abort();
    ensure!(
        reader.join().is_ok_and(|read| read.is_ok()),
        "it was not read"
    );
    Ok(())
}

#[test]
fn performance_data_on_a_file_system_that_never_answers_is_not_opened() -> Result<()> {
    let test = "performance_data_on_a_file_system_that_never_answers_is_not_opened";
    if !allowed(test) {
        return Ok(());
    }
    let directory = format!("/tmp/hsperfdata_tailback-{}", std::process::id());
    let directory = TempDir::at(Path::new(&directory))?;
    let Some(mut attack) = Attack::start_in(directory, "1", test, "jvm")? else {
        return Ok(());
    };
    let maps = fs::read_to_string(format!("/proc/{}/maps", attack.pid))?;
    let path = attack.file.path.display().to_string();
    ensure!(
        maps.lines().any(|line| line.ends_with(&path)),
        "it does not map {path}"
    );
    attack.check_agent()?;
    ensure!(
        attack.reads() == 0,
        "{} requests for the content",
        attack.reads()
    );
    // Only the process itself has opened it.
    ensure!(attack.opens() == 1, "opened {} times", attack.opens());
    Ok(())
}
