//! Ends process groups and removes directories when the test program is interrupted, for example by Ctrl-C.
//!
//! Normally the owners' `Drop` does this. A signal ends the process without unwinding, so all live groups and
//! directories are registered here; a thread waits for signals and cleans them up before it lets the process exit. What else an
//! owner has to undo, it registers with [`on_interrupt`].

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::{Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper, wait,
    waitpgid,
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Default)]
struct Registry {
    groups: BTreeSet<i32>,
    directorys: BTreeSet<PathBuf>,
    undo: Vec<Box<dyn FnOnce() + Send>>,
}

/// Deadline of [`end_descendants`].
const END_DEADLINE: Duration = Duration::from_secs(20);

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    groups: BTreeSet::new(),
    directorys: BTreeSet::new(),
    undo: Vec::new(),
});
static SIGNAL_THREAD: Once = Once::new();

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process that leads its own process group, and registers the group before any signal is handled. `start` returns
/// the group's id.
pub(crate) fn start_group<T>(start: impl FnOnce() -> io::Result<(T, Pid)>) -> io::Result<T> {
    SIGNAL_THREAD.call_once(watch_signals);
    // Grandchildren whose parent was killed can be reaped then.
    adopt_orphans();
    let mut registry = registry();
    let (started, group) = start()?;
    registry.groups.insert(group.as_raw_pid());
    Ok(started)
}

/// Kills the remaining processes of the group. Call before reaping its leader: afterwards the number may be reused.
pub(crate) fn end_group(group: Pid) {
    let mut registry = registry();
    if registry.groups.remove(&group.as_raw_pid()) {
        // Fails if the group is already empty, which is fine.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// Reaps the remaining processes of a group whose leader was reaped. Their ports are free afterwards.
pub(crate) fn reap_group(group: Pid) {
    while let Ok(Some(_)) = waitpgid(group, WaitOptions::empty()) {}
}

/// Runs `undo` after a signal, when all groups have been killed and before directories are removed.
pub fn on_interrupt(undo: impl FnOnce() + Send + 'static) {
    SIGNAL_THREAD.call_once(watch_signals);
    registry().undo.push(Box::new(undo));
}

/// Makes orphaned descendants children of this process, so that it can find and reap them.
pub fn adopt_orphans() {
    let _ = set_child_subreaper(Some(getpid()));
}

/// Kills and reaps every process that descends from this one, by its pid. Call it at the end: owners of processes cannot reap
/// theirs afterwards. Returns whether none is left.
pub fn end_descendants() -> bool {
    let end = Instant::now() + END_DEADLINE;
    loop {
        let left = descendants();
        for pid in left.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            // Fails if it has just ended.
            let _ = kill_process(pid, Signal::KILL);
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if left.is_empty() || Instant::now() > end {
            return left.is_empty();
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// All processes that descend from this one.
pub fn descendants() -> Vec<i32> {
    let parents: Vec<(i32, i32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // PID (NAME) STATE PARENT; the name may contain any characters.
            let parent = stat.rsplit(") ").next()?.split(' ').nth(1)?;
            Some((
                entry.file_name().to_str()?.parse().ok()?,
                parent.parse().ok()?,
            ))
        })
        .collect();
    let mut found = vec![getpid().as_raw_pid()];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        let children = parents.iter().filter(|(_, of)| *of == parent);
        found.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

pub(crate) fn register_directory(path: &Path) {
    SIGNAL_THREAD.call_once(watch_signals);
    registry().directorys.insert(path.to_owned());
}

pub(crate) fn remove_directory(path: &Path) {
    if registry().directorys.remove(path) {
        let _ = fs::remove_dir_all(path);
    }
}

/// Waits for signals; on one, cleans up and exits with the code of that signal.
fn watch_signals() {
    let watch = || -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let number = runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut hangup = signal(SignalKind::hangup())?;
            io::Result::Ok(
                std::future::poll_fn(|context| {
                    for (signal, number) in
                        [(&mut interrupt, 2), (&mut terminate, 15), (&mut hangup, 1)]
                    {
                        if signal.poll_recv(context).is_ready() {
                            return std::task::Poll::Ready(number);
                        }
                    }
                    std::task::Poll::Pending
                })
                .await,
            )
        })?;
        // Held until exit, so that no new process is started.
        let mut registry = registry();
        for group in registry
            .groups
            .iter()
            .filter_map(|group| Pid::from_raw(*group))
        {
            let _ = kill_process_group(group, Signal::KILL);
            reap_group(group);
        }
        for undo in std::mem::take(&mut registry.undo) {
            undo();
        }
        for directory in &registry.directorys {
            let _ = fs::remove_dir_all(directory);
        }
        eprintln!("\ninterrupted: stopped all child processes and removed temporary files");
        process::exit(128 + number);
    };
    let spawned = thread::Builder::new()
        .name("cleanup".to_owned())
        .spawn(move || {
            if let Err(error) = watch() {
                eprintln!("warning: cannot clean up on a signal: {error}");
            }
        });
    if let Err(error) = spawned {
        eprintln!("warning: cannot clean up on a signal: {error}");
    }
}
