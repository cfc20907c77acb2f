//! What the commands that look at the live kernel share: privileges, the loaded programs, signals.

use std::{
    fs, io,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use super::{Failure, exit_code::Outcome};
use crate::{
    collect::{Budget, Collector},
    kernel::glance::Glance,
    target::{Selector, Spec},
};

/// Loads the programs into the kernel, or says why that cannot be.
pub(super) fn load() -> Outcome<Glance> {
    check_proc()?;
    raise_memlock();
    Glance::load().map_err(|error| {
        // SAFETY: no arguments, cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        Failure::kernel(explained(error, root))
    })
}

/// Processes are named by their pids in our own namespace: a /proc of another one would name others.
fn check_proc() -> Outcome<()> {
    let own = std::process::id().to_string();
    match fs::read_link("/proc/self") {
        Ok(shown) if shown.as_os_str() != own.as_str() => Err(Failure::kernel(anyhow!(
            "/proc belongs to another pid namespace (it calls this process {}, which is {own}): mount the one of this \
             namespace, `mount -t proc proc /proc` or `unshare --mount-proc`",
            shown.display()
        ))),
        // Without /proc there is little to be had, and what is missing says so itself.
        _ => Ok(()),
    }
}

/// Why loading failed, with the remedy.
fn explained(error: anyhow::Error, root: bool) -> anyhow::Error {
    let text = format!("{error:#}");
    if text.contains("invalid func unknown#") {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        return anyhow!(
            "this kernel ({}) is too old: Tailback's programs call helpers that it does not have; \
             use Linux 5.10 or later",
            release.trim()
        );
    }
    // The verifier refuses with EACCES too, and then leaves a log.
    let is_verdict = text.contains(" insns (limit ");
    let denied = !is_verdict
        && error.chain().any(|cause| {
            cause.downcast_ref::<io::Error>().is_some_and(|cause| {
                matches!(cause.raw_os_error(), Some(libc::EPERM | libc::EACCES))
            })
        });
    if denied && !root {
        anyhow!(
            "Tailback may not load its eBPF programs: run it as root, or with the capabilities CAP_BPF, \
             CAP_PERFMON and CAP_SYS_PTRACE (setcap cap_bpf,cap_perfmon,cap_sys_ptrace+ep tailback)"
        )
    } else if denied {
        short(error).context(
            "the kernel refuses the eBPF programs though this is root: a container needs CAP_BPF and \
             CAP_PERFMON (or CAP_SYS_ADMIN), and no seccomp rule against bpf(2); `tailback doctor` says more",
        )
    } else {
        short(error).context("`tailback doctor` says what this kernel allows")
    }
}

/// A verifier's log runs to thousands of lines: its end says why.
fn short(error: anyhow::Error) -> anyhow::Error {
    const KEEP: usize = 800;
    let text = format!("{error:#}");
    match text.char_indices().nth_back(KEEP) {
        Some((at, _)) => {
            let head: String = text.chars().take(160).collect();
            anyhow!("{head} […] {}", &text[at..])
        }
        None => error,
    }
}

/// Kernels before 5.11 count maps against RLIMIT_MEMLOCK.
fn raise_memlock() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: a live rlimit. Where it may not be raised, newer kernels do not need it.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// A collector over `specs`; a pid that does not exist is an error, a name that matches nothing yet is not.
pub(super) fn collector(specs: Vec<Spec>, budget: Budget, must_exist: bool) -> Outcome<Collector> {
    let mut collector = Collector::new(load()?, specs, budget);
    let found = collector.discover().map_err(Failure::kernel)?;
    for selector in &found.unmatched {
        match selector {
            Selector::Pid(pid) => {
                return Err(Failure::no_target(anyhow!(
                    "there is no process {pid} (any more); `ps -e` lists those that there are"
                )));
            }
            _ if must_exist && found.targets.is_empty() => {
                return Err(Failure::no_target(anyhow!("no process matches {selector}")));
            }
            _ => {}
        }
    }
    Ok(collector)
}

/// Asks to stop: SIGINT, SIGTERM, SIGHUP.
pub(super) struct Stop(Receiver<()>);

impl Stop {
    /// From now on, these signals ask us to stop instead of ending the process; a second one ends it at once.
    pub(super) fn on_signals() -> Outcome<Self> {
        let (asked, receiver) = channel();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])
            .context("cannot catch signals")
            .map_err(Failure::bug)?;
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for (count, signal) in signals.forever().enumerate() {
                    if count > 0 || asked.send(()).is_err() {
                        std::process::exit(128 + signal);
                    }
                }
            })
            .context("cannot start a thread")
            .map_err(Failure::bug)?;
        Ok(Self(receiver))
    }

    /// WaitHistograms; `true` when asked to stop meanwhile.
    pub(super) fn wait(&self, time: Duration) -> bool {
        !matches!(self.0.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32, log: &str, root: bool) -> String {
        let error = anyhow::Error::from(io::Error::from_raw_os_error(errno));
        let loading = format!("the kernel refuses the iterator files: {log}");
        format!("{:#}", explained(error.context(loading), root))
    }

    #[test]
    fn a_kernel_without_the_helpers_is_called_too_old() {
        let log =
            "invalid func unknown#162\nprocessed 31 insns (limit 1000000) max_states_per_insn 0";
        let text = refused(libc::EINVAL, log, true);
        assert!(
            text.contains("too old") && text.contains("Linux 5.10"),
            "{text}"
        );
    }

    #[test]
    fn what_the_verifier_refuses_is_not_blamed_on_privileges() {
        let log = "access beyond struct sock\nprocessed 9 insns (limit 1000000)";
        let text = refused(libc::EACCES, log, true);
        assert!(
            text.contains("beyond struct sock") && !text.contains("CAP_BPF"),
            "{text}"
        );
        let text = refused(libc::EACCES, log, false);
        assert!(!text.contains("run it as root"), "{text}");
    }

    #[test]
    fn what_privileges_do_not_allow_is() {
        assert!(refused(libc::EPERM, "", true).contains("though this is root"));
        assert!(refused(libc::EPERM, "", false).contains("run it as root"));
    }
}
