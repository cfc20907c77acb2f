//! What all commands that sample the live kernel share: privileges, program loading, Unix signals.

use std::{
    fs,
    future::poll_fn,
    io::{self, IsTerminal as _},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel},
    task::Poll,
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::debug;

use super::{
    Failure,
    capabilities::{Held, LOADING, listed, to_add},
    exit_code::{Outcome, print_stderr},
};
use crate::{
    collect::{Budget, Collector},
    kernel::{
        LoadError,
        scanner::{Capabilities, LoadOptions, Scanner},
    },
    target::{Selector, Spec},
};

/// Loads the eBPF programs. The error explains how to get the missing privilege or
/// kernel feature.
pub(super) fn load(options: LoadOptions) -> Outcome<Scanner> {
    check_proc()?;
    let held = Held::raise();
    raise_memlock();
    let scanner =
        Scanner::load(options).map_err(|error| Failure::kernel(explained(error, &held)))?;
    let capabilities = scanner.capabilities();
    log_capabilities(capabilities);
    for (scan, reason) in capabilities.failed_scans() {
        print_stderr(format_args!(
            "not available on this kernel: {scan}: {reason}"
        ));
    }
    if options.hooks
        && let Err(reason) = &capabilities.hooks
    {
        print_stderr(format_args!(
            "--tier is not available on this kernel, so waits are estimated: {reason}"
        ));
    }
    if options.log_bpf
        && let Err(reason) = &capabilities.log
    {
        print_stderr(format_args!(
            "--log-bpf is not available on this kernel: {reason}"
        ));
    }
    Ok(scanner)
}

/// Logs which optional kernel features are used, and why the others are not.
fn log_capabilities(capabilities: &Capabilities) {
    for missing in &capabilities.fields.missing {
        debug!(reason = %missing, "kernel fields missing");
    }
    for (feature, state) in [
        (
            "iterators bound to processes",
            &capabilities.bound_to_process,
        ),
        (
            "iterator over socket storage",
            &capabilities.focused_sockets,
        ),
        ("user memory of other processes", &capabilities.user_memory),
        ("bpf_loop", &capabilities.bpf_loop),
        ("batched scans", &capabilities.batched_scans),
        ("io_uring files", &capabilities.rings),
        ("ready files of epoll instances", &capabilities.epolls),
        ("debug lines of the programs", &capabilities.log),
        ("hooks", &capabilities.hooks),
    ] {
        match state {
            Ok(()) => debug!(feature, "kernel feature used"),
            Err(reason) => debug!(feature, reason, "kernel feature not used"),
        }
    }
}

/// Fails if /proc belongs to another pid namespace: its pids would name other processes than ours.
fn check_proc() -> Outcome<()> {
    let own = std::process::id().to_string();
    match fs::read_link("/proc/self") {
        Ok(shown) if shown.as_os_str() != own.as_str() => Err(Failure::kernel(anyhow!(
            "/proc belongs to another pid namespace (it lists this process as {}, but its pid is {own}): mount this \
             namespace's /proc with `mount -t proc proc /proc` or `unshare --mount-proc`",
            shown.display()
        ))),
        // If /proc is missing, later steps report what they cannot read.
        _ => Ok(()),
    }
}

/// Explains why loading failed and what to do.
fn explained(error: LoadError, held: &Held) -> anyhow::Error {
    match error {
        LoadError::KernelTooOld { .. } => {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            anyhow!(
                "this kernel ({}) is too old: it lacks BPF helpers that Tailback needs; use Linux 5.10 or later",
                release.trim()
            )
        }
        error @ LoadError::Denied { .. } => {
            let missing = held.missing(&LOADING);
            if !missing.is_empty() && !held.is_root && held.no_new_privileges {
                return anyhow!(
                    "not permitted to load eBPF programs: missing {}. no_new_privs is set, so the kernel ignores file capabilities. In \
                     Kubernetes, set `allowPrivilegeEscalation: true`, or `runAsUser: 0` (root gets the added \
                     capabilities); podman: remove `--security-opt no-new-privileges`, or add `--user 0`; systemd: \
                     `AmbientCapabilities=`",
                    listed(&missing)
                );
            }
            if !missing.is_empty() {
                return anyhow!(
                    "not permitted to load eBPF programs: missing {}. Run as root, or `setcap \
                     cap_bpf,cap_perfmon,cap_sys_ptrace,cap_dac_read_search+p tailback`. For a container: {}",
                    listed(&missing),
                    to_add(&missing)
                );
            }
            if !held.in_host_namespace {
                return anyhow!(
                    "not permitted to load eBPF programs: in a user namespace capabilities do not count for eBPF. Run the agent in \
                     the host's: `hostUsers: true` (the default) in a pod's spec; podman: rootful, without --userns"
                );
            }
            anyhow::Error::new(error).context(
                "the kernel refuses to load eBPF programs, although the agent holds CAP_BPF and CAP_PERFMON. Either a seccomp \
                 profile forbids bpf(2) (that of podman 4 allows it with CAP_SYS_ADMIN only: `--security-opt \
                 seccomp=unconfined`), or the kernel is locked down; see `tailback doctor`",
            )
        }
        error => anyhow::Error::new(error).context(
            "cannot load the eBPF programs; `tailback doctor` shows what this kernel supports",
        ),
    }
}

/// Raises RLIMIT_MEMLOCK: kernels before 5.11 charge BPF maps to it.
fn raise_memlock() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: points to a live rlimit. A failure is ignored: newer kernels do not need the raise.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// A collector for `specs`. A pid that does not exist is an error; a name that matches nothing yet is not, unless
/// `must_exist` is set and no target was found.
pub(super) fn collector(
    specs: Vec<Spec>,
    budget: Budget,
    must_exist: bool,
    options: LoadOptions,
) -> Outcome<Collector> {
    let mut collector = Collector::new(load(options)?, specs, budget);
    let found = collector.discover().map_err(Failure::kernel)?;
    debug!(
        targets = found.targets.len(),
        processes = found.processes.len(),
        unmatched = ?found.unmatched,
        "targets discovered"
    );
    for selector in &found.unmatched {
        match selector {
            Selector::Pid(pid) => {
                return Err(Failure::no_target(anyhow!("no such process: {pid}")));
            }
            _ if must_exist && found.targets.is_empty() => {
                return Err(Failure::no_target(anyhow!("no process matches {selector}")));
            }
            _ => {}
        }
    }
    Ok(collector)
}

/// A stop request: SIGINT, SIGTERM or SIGHUP.
pub(super) struct Stop(Receiver<()>);

impl Stop {
    /// From now on these signals request a stop instead of ending the process; a second one ends it at once.
    pub(super) fn on_signals() -> Outcome<Self> {
        Self::start(None, || {})
    }

    /// The same; a second signal calls `before_exit` before it ends the process.
    pub(super) fn on_signals_with(before_exit: fn()) -> Outcome<Self> {
        Self::start(None, before_exit)
    }

    /// Like [`Stop::on_signals`], but SIGHUP sends to `reload`, unless it reports that the terminal is gone.
    pub(super) fn or_reload(reload: SyncSender<()>) -> Outcome<Self> {
        Self::start(Some(reload), || {})
    }

    fn start(reload: Option<SyncSender<()>>, before_exit: fn()) -> Outcome<Self> {
        let (request, receiver) = channel();
        Self::start_thread(request, reload, before_exit)
            .context("cannot handle signals")
            .map_err(Failure::bug)?;
        Ok(Self(receiver))
    }

    fn start_thread(
        request: Sender<()>,
        reload: Option<SyncSender<()>>,
        before_exit: fn(),
    ) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let mut signals = {
            let _context = runtime.enter();
            let kinds = [
                SignalKind::interrupt(),
                SignalKind::terminate(),
                SignalKind::hangup(),
            ];
            let streams = kinds.map(|kind| Ok((kind.as_raw_value(), signal(kind)?)));
            streams.into_iter().collect::<io::Result<Vec<_>>>()?
        };
        let had_terminal = has_terminal();
        let serve = move || {
            let mut is_stopping = false;
            loop {
                let number = runtime.block_on(next_of(&mut signals));
                let is_terminal_gone = || had_terminal && !has_terminal();
                if number == SignalKind::hangup().as_raw_value()
                    && let Some(reload) = &reload
                    && !is_terminal_gone()
                {
                    // An error means that a request is pending, or that the agent ends.
                    let _ = reload.try_send(());
                    continue;
                }
                if is_stopping || request.send(()).is_err() {
                    before_exit();
                    std::process::exit(128 + number);
                }
                is_stopping = true;
            }
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(serve)?;
        Ok(())
    }

    /// Waits for `time`; `true` if a stop is requested meanwhile.
    pub(super) fn wait(&self, time: Duration) -> bool {
        !matches!(self.0.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}

/// Whether a standard stream is a terminal. After a hangup none is.
fn has_terminal() -> bool {
    io::stdin().is_terminal() || io::stdout().is_terminal() || io::stderr().is_terminal()
}

/// The number of the next signal that arrives.
async fn next_of(signals: &mut [(i32, Signal)]) -> i32 {
    poll_fn(|context| {
        let arrived = signals
            .iter_mut()
            .find_map(|(number, signal)| signal.poll_recv(context).is_ready().then_some(*number));
        arrived.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::io;

    use rustix::thread::CapabilitySet;

    use super::*;

    const ALL: CapabilitySet = CapabilitySet::BPF
        .union(CapabilitySet::PERFMON)
        .union(CapabilitySet::SYS_PTRACE);

    fn text(error: LoadError, set: CapabilitySet, in_host_namespace: bool) -> String {
        let held = Held {
            in_host_namespace,
            ..Held::of_root(set)
        };
        format!("{:#}", explained(error, &held))
    }

    fn denied() -> LoadError {
        LoadError::Denied {
            attempted: "cannot create the eBPF maps".to_owned(),
            source: io::Error::from_raw_os_error(libc::EPERM),
        }
    }

    #[test]
    fn a_kernel_without_the_required_helpers_is_too_old() {
        let text = text(LoadError::KernelTooOld { program: "files" }, ALL, true);
        assert!(
            text.contains("too old") && text.contains("Linux 5.10"),
            "{text}"
        );
    }

    #[test]
    fn a_verifier_error_is_not_reported_as_missing_privileges() {
        for set in [ALL, CapabilitySet::empty()] {
            let rejected = LoadError::Rejected {
                program: "files",
                log: "access beyond struct sock\nprocessed 9 insns (limit 1000000)".to_owned(),
            };
            let text = text(rejected, set, true);
            assert!(text.contains("beyond struct sock"), "{text}");
            assert!(
                !text.contains("CAP_BPF") && !text.contains("Run as root"),
                "{text}"
            );
        }
    }

    #[test]
    fn only_missing_capabilities_are_called_missing() {
        let lost = text(denied(), ALL - CapabilitySet::BPF, true);
        assert!(lost.contains("missing CAP_BPF. Run as root"), "{lost}");
        let none = text(denied(), CapabilitySet::empty(), true);
        assert!(none.contains("missing CAP_BPF, CAP_PERFMON"), "{none}");
        let inside = text(denied(), ALL, false);
        assert!(inside.contains("user namespace"), "{inside}");
        assert!(!inside.contains("missing"), "{inside}");
        let held = text(denied(), ALL, true);
        assert!(held.contains("although the agent holds"), "{held}");
        assert!(held.contains("seccomp"), "{held}");
    }
}
