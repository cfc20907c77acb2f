//! What must not outlive us: process groups and folders, also when a person presses Ctrl-C.
//!
//! Owners' `Drop` does the work in the ordinary case. A signal ends the process without unwinding, so what lives
//! is on one list here, and a thread that waits for the signals goes through it before it lets the process end.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::{Mutex, MutexGuard, Once, PoisonError},
    thread,
};

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process_group, set_child_subreaper, waitpgid,
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Default)]
struct Living {
    groups: BTreeSet<i32>,
    folders: BTreeSet<PathBuf>,
}

static LIVING: Mutex<Living> = Mutex::new(Living {
    groups: BTreeSet::new(),
    folders: BTreeSet::new(),
});
static WATCHING: Once = Once::new();

fn living() -> MutexGuard<'static, Living> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts something that leads its own process group, and puts the group on the list before any signal can be
/// acted upon: `start` returns the group's id.
pub(crate) fn start_group<T>(start: impl FnOnce() -> io::Result<(T, Pid)>) -> io::Result<T> {
    WATCHING.call_once(watch_signals);
    // Grandchildren whose parent was killed become our children, so that we can wait for their end.
    let _ = set_child_subreaper(Some(getpid()));
    let mut living = living();
    let (started, group) = start()?;
    living.groups.insert(group.as_raw_pid());
    Ok(started)
}

/// Kills what is left of the group. To be called before its leader is reaped: from then on the number may be
/// another's.
pub(crate) fn end_group(group: Pid) {
    let mut living = living();
    if living.groups.remove(&group.as_raw_pid()) {
        // The group may be empty by now, which is what is wanted.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// Waits for the end of those that are left of a group whose leader was reaped: with it its ports are free.
pub(crate) fn reap_group(group: Pid) {
    while let Ok(Some(_)) = waitpgid(group, WaitOptions::empty()) {}
}

pub(crate) fn keep_folder(path: &Path) {
    WATCHING.call_once(watch_signals);
    living().folders.insert(path.to_owned());
}

pub(crate) fn remove_folder(path: &Path) {
    if living().folders.remove(path) {
        let _ = fs::remove_dir_all(path);
    }
}

/// Ends the process as the signal would have, after everything on the list.
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
        // Held to the end: nothing new is started from here on.
        let living = living();
        for group in living
            .groups
            .iter()
            .filter_map(|group| Pid::from_raw(*group))
        {
            let _ = kill_process_group(group, Signal::KILL);
            reap_group(group);
        }
        for folder in &living.folders {
            let _ = fs::remove_dir_all(folder);
        }
        eprintln!("\ninterrupted: what was started is stopped, temporary files are removed");
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
