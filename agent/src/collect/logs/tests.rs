//! Real processes write to real files; time is simulated.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use tailback_tests::{temp::TempDir, wait};

use super::*;

const S: u64 = 1_000 * MS;
const SHARE: f64 = 1e9;
const TIMEOUT: Duration = Duration::from_secs(10);

/// A shell whose standard output is a file, and which runs commands from a pipe.
struct Writer {
    shell: Child,
    commands: ChildStdin,
}

impl Writer {
    fn to(path: &Path) -> Self {
        let file = append(path);
        let mut shell = Command::new("sh")
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let commands = shell.stdin.take().unwrap();
        Self { shell, commands }
    }

    fn pid(&self) -> u32 {
        self.shell.id()
    }

    /// Runs a command and waits until it is `done`.
    fn run(&mut self, command: &str, done: impl Fn() -> bool) {
        writeln!(self.commands, "{command}").unwrap();
        wait::until(command, TIMEOUT, || Ok(done().then_some(()))).unwrap();
    }

    /// Redirects its standard output to another file.
    fn reopens(&mut self, path: &Path) {
        let link = format!("/proc/{}/fd/1", self.pid());
        let wanted = path.to_owned();
        self.run(&format!("exec >>{}", path.display()), || {
            fs::read_link(&link).is_ok_and(|now| now == wanted)
        });
    }

    fn info(&self) -> ProcessInfo {
        ProcessInfo {
            tgid: self.pid(),
            pid: self.pid(),
            parent: 1,
            start_ns: 1,
            exec_id: 1,
            kernel: false,
            comm: "sh".to_owned(),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn append(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.append(true).create(true).open(path).unwrap()
}

fn write(path: &Path, text: &str) {
    append(path).write_all(text.as_bytes()).unwrap();
}

/// The logs of one target, and a simulated clock.
struct Scene {
    dir: TempDir,
    logs: Logs,
    notices: Notices,
    processes: Vec<ProcessInfo>,
    now_ns: u64,
}

impl Scene {
    fn new(purpose: &str) -> Self {
        Self {
            dir: TempDir::new(purpose).unwrap(),
            logs: Logs::new(Some(Table::new([]).unwrap())),
            notices: Notices::default(),
            processes: Vec::new(),
            now_ns: 100 * S,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn watch(&mut self, writers: &[&Writer]) {
        self.processes = writers.iter().map(|writer| writer.info()).collect();
        self.processes.sort_unstable_by_key(|process| process.tgid);
    }

    fn poll_after(&mut self, ns: u64) -> Vec<Message> {
        self.now_ns += ns;
        let target = Target {
            id: 7,
            tgids: self.processes.iter().map(|process| process.tgid).collect(),
            ..Target::default()
        };
        let processes = self.processes.clone();
        assert!(self.logs.is_due(self.now_ns));
        self.logs
            .poll(self.now_ns, SHARE, &[target], &processes, &mut self.notices)
    }

    fn focused(&mut self) {
        self.logs.set_focused(&BTreeSet::from([7]), self.now_ns);
    }

    fn unfocused(&mut self) {
        self.logs.set_focused(&BTreeSet::new(), self.now_ns);
    }

    fn notice_codes(&mut self) -> Vec<String> {
        self.notices
            .take()
            .into_iter()
            .map(|notice| notice.code)
            .collect()
    }
}

fn counts(messages: &[Message]) -> Vec<(&str, u32)> {
    messages
        .iter()
        .map(|message| (message.name.as_str(), message.count))
        .collect()
}

#[test]
fn lines_written_around_the_time_of_focus_count_once_and_older_ones_do_not() {
    let mut scene = Scene::new("logs-moment");
    let path = scene.path("out");
    write(&path, "queue full before we came\n");
    let writer = Writer::to(&path);
    scene.watch(&[&writer]);
    assert_eq!(scene.poll_after(0), []);
    write(&path, "queue full long ago\n");
    for _ in 0..15 {
        assert_eq!(scene.poll_after(S), [], "healthy services are not read");
    }
    write(&path, "all is well\nqueue full now\n");
    assert_eq!(scene.poll_after(S), []);
    scene.focused();
    let messages = scene.poll_after(0);
    assert_eq!(counts(&messages), [("queue_full", 1)]);
    let message = &messages[0];
    assert_eq!(message.line, "queue full now");
    assert_eq!(message.path, path.display().to_string());
    // It was written between two polls of the size, before the log was read.
    let written = (message.not_before_ns, message.not_after_ns);
    assert_eq!(written, (scene.now_ns - S, scene.now_ns));

    write(&path, "queue fu");
    assert_eq!(scene.poll_after(250 * MS), []);
    write(
        &path,
        "ll in two pieces\nToo many open files\nqueue is full\n",
    );
    let messages = scene.poll_after(250 * MS);
    assert_eq!(counts(&messages), [("fd_exhausted", 1), ("queue_full", 2)]);
    assert_eq!(messages[1].line, "queue full in two pieces");
    assert_eq!(messages[1].not_before_ns, scene.now_ns - 250 * MS);
    assert_eq!(scene.poll_after(250 * MS), []);

    // Read for the hold time, then closed, and no line is counted twice.
    scene.unfocused();
    write(&path, "queue full, still\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    scene.now_ns += FOCUS_RETENTION_NS;
    scene.unfocused();
    assert_eq!(scene.poll_after(S), []);
    assert!(scene.logs.tails[0].is_closed());
    scene.focused();
    assert_eq!(scene.poll_after(S), []);
    write(&path, "queue full again\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
}

#[test]
fn a_truncated_log_is_read_from_the_start() {
    let mut scene = Scene::new("logs-truncated");
    let path = scene.path("app.log");
    let writer = Writer::to(&path);
    scene.watch(&[&writer]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    write(&path, "queue full 1\nqueue full 2\nqueue fu");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 2)]);
    File::create(&path).unwrap();
    write(&path, "queue full 3\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    write(&path, "queue full 4\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
}

#[test]
fn a_rotated_log_is_read_to_its_end_and_the_new_one_from_the_start() {
    let mut scene = Scene::new("logs-rotated");
    let (path, old) = (scene.path("app.log"), scene.path("app.log.1"));
    let mut writer = Writer::to(&path);
    scene.watch(&[&writer]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    write(&path, "queue full 1\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    // Renamed: its writer keeps writing to it until it opens the new one.
    fs::rename(&path, &old).unwrap();
    write(&old, "queue full 2\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    write(&old, "queue full 3\nqueue full, with no end");
    writer.reopens(&path);
    write(&path, "queue full 4\n");
    let messages = scene.poll_after(S);
    let counted: Vec<(&str, u32)> = messages
        .iter()
        .map(|message| (message.path.as_str(), message.count))
        .collect();
    let (path, old) = (path.display().to_string(), old.display().to_string());
    // The old one keeps the name that it had when it was found.
    assert_eq!(counted, [(path.as_str(), 3)], "{old}");
    assert_eq!(scene.poll_after(S), []);
}

#[test]
fn of_a_huge_log_that_grows_fast_only_the_end_is_read() {
    let mut scene = Scene::new("logs-huge");
    let path = scene.path("huge.log");
    let file = append(&path);
    file.set_len(10 << 30).unwrap();
    let writer = Writer::to(&path);
    scene.watch(&[&writer]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    assert_eq!(scene.notice_codes(), Vec::<String>::new());
    let line = "queue full\n";
    let many = line.repeat(200_000);
    for round in 0..5 {
        write(&path, &many);
        let before_ns = crate::collect::cpu_time_ns();
        let messages = scene.poll_after(S);
        let cost_ns = crate::collect::cpu_time_ns() - before_ns;
        assert_eq!(messages.len(), 1);
        let room = tail::MAX_READ as usize / line.len();
        let count = messages[0].count as usize;
        assert!((room - 1..=room).contains(&count), "{count} of {room}");
        assert!(cost_ns < 500 * MS, "{cost_ns} ns");
        let codes = scene.notice_codes();
        assert_eq!(
            codes.contains(&"log_left_out".to_owned()),
            round == 0,
            "{codes:?}"
        );
    }
    let skipped = 5 * (many.len() as u64 - tail::MAX_READ);
    assert_eq!(scene.logs.skipped.bytes, skipped);
}

#[test]
fn a_hole_after_a_truncation_is_skipped() {
    let mut scene = Scene::new("logs-hole");
    let path = scene.path("app.log");
    let writer = Writer::to(&path);
    scene.watch(&[&writer]);
    scene.focused();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    assert_eq!(scene.poll_after(0), []);
    file.write_all_at(&[b'x'; 1_000], 0).unwrap();
    assert_eq!(scene.poll_after(S), []);
    file.set_len(0).unwrap();
    assert_eq!(scene.poll_after(S), []);
    // A hole of 30 GB, then the line.
    file.write_all_at(b"queue full\n", 30 << 30).unwrap();
    assert_eq!(scene.poll_after(S), []);
    file.write_all_at(b"queue full\n", (30 << 30) + 11).unwrap();
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
}

#[test]
fn pipes_and_files_open_for_reading_are_left_alone() {
    let mut scene = Scene::new("logs-others");
    let data = scene.path("data.log");
    let mut shell = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "exec 5<>{} 6>/dev/null; read -r line",
            data.display()
        ))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let commands = shell.stdin.take().unwrap();
    let writer = Writer { shell, commands };
    let six = format!("/proc/{}/fd/6", writer.pid());
    wait::until("the shell to open its files", TIMEOUT, || {
        Ok(fs::metadata(&six).ok().map(|_| ()))
    })
    .unwrap();
    scene.watch(&[&writer]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    assert!(scene.logs.tails.is_empty());
}

#[test]
fn a_log_shared_by_workers_is_read_once_and_outlives_each_of_them() {
    let mut scene = Scene::new("logs-shared");
    let path = scene.path("app.log");
    let (first, second) = (Writer::to(&path), Writer::to(&path));
    scene.watch(&[&first, &second]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    write(&path, "queue full 1\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    drop(first);
    scene.watch(&[&second]);
    write(&path, "queue full 2\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    write(&path, "queue full 3\n");
    assert_eq!(counts(&scene.poll_after(S)), [("queue_full", 1)]);
    assert_eq!(scene.logs.tails.len(), 1);
    // The last writer ends with an incomplete line.
    write(&path, "queue full, its last words");
    drop(second);
    scene.watch(&[]);
    let mut count = 0;
    for _ in 0..5 {
        count += scene
            .poll_after(S)
            .iter()
            .map(|message| message.count)
            .sum::<u32>();
    }
    assert_eq!(count, 1);
    assert!(scene.logs.tails.is_empty() && scene.logs.scanned.is_empty());
}

#[test]
fn a_log_opened_while_focused_is_read_from_the_start() {
    let mut scene = Scene::new("logs-late");
    let mut writer = Writer::to(&scene.path("out"));
    scene.watch(&[&writer]);
    scene.focused();
    assert_eq!(scene.poll_after(0), []);
    let late = scene.path("errors.log");
    let link = format!("/proc/{}/fd/9", writer.pid());
    writer.run(&format!("exec 9>>{}", late.display()), || {
        Path::new(&link).exists()
    });
    write(&late, "Too many open files\n");
    let mut count = 0;
    for _ in 0..7 {
        count += scene
            .poll_after(S)
            .iter()
            .map(|message| message.count)
            .sum::<u32>();
    }
    assert_eq!(count, 1);
}

#[test]
fn the_number_of_logs_per_target_is_limited() {
    let mut scene = Scene::new("logs-many");
    let mut writer = Writer::to(&scene.path("out"));
    for fd in 3..10 {
        let path = scene.path(&format!("{fd}.log"));
        let link = format!("/proc/{}/fd/{fd}", writer.pid());
        writer.run(&format!("exec {fd}>>{}", path.display()), || {
            Path::new(&link).exists()
        });
    }
    scene.watch(&[&writer]);
    assert_eq!(scene.poll_after(0), []);
    assert_eq!((scene.logs.tails.len(), scene.notice_codes().len()), (8, 0));
    let tenth = scene.path("tenth.log");
    let link = format!("/proc/{}/fd/2", writer.pid());
    writer.run(&format!("exec 2>>{}", tenth.display()), || {
        fs::read_link(&link).is_ok_and(|now| now == tenth)
    });
    assert_eq!(scene.poll_after(RESCAN_INTERVAL_NS), []);
    assert_eq!(scene.logs.tails.len(), MAX_PER_TARGET);
    assert_eq!(scene.notice_codes(), ["too_many_logs"]);
}

#[test]
fn no_log_is_read_when_reading_is_turned_off() {
    let mut logs = Logs::new(None);
    logs.set_focused(&BTreeSet::from([7]), 0);
    assert!(!logs.is_due(100 * S));
    let me = ProcessInfo {
        tgid: std::process::id(),
        pid: std::process::id(),
        parent: 1,
        start_ns: 1,
        exec_id: 1,
        kernel: false,
        comm: "test".to_owned(),
    };
    let mut notices = Notices::default();
    assert_eq!(logs.poll(100 * S, SHARE, &[], &[me], &mut notices), []);
    assert!(logs.tails.is_empty() && logs.scanned.is_empty());
}
