//! What works on this kernel, and why the rest does not.

use crate::kernel::layout::{Feature, Resolved};

/// Whether a capability works on this kernel; `Err` is the reason for the user.
pub type Capability = Result<(), String>;

/// What works on this kernel, and why the rest does not.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Fields found in the kernel's BTF, and missing ones.
    pub fields: Resolved,
    /// Scanning open files. Without it no socket or pipe is watched.
    pub files: Capability,
    /// Scanning threads. Without it no run queue is watched.
    pub threads: Capability,
    /// What threads are blocked on. Without it workers, event loops, locks and disks are not watched.
    pub waits: Capability,
    /// Which process holds the other end of a connection, pipe or unix socket. Without it no wait is followed to another process.
    pub holders: Capability,
    /// CPU time of every thread on the host. Without it the process that starves a target is not named.
    pub cpu_times: Capability,
    /// Limits from the kernel's structures. Without it they are read from mounted control groups alone.
    pub cgroups: Capability,
    /// Iterators bound to one process. Without it every scan visits the whole host.
    pub bound_to_process: Capability,
    /// The scan of focused sockets. Without it listeners and busy sockets are seen by the file scan only.
    pub focused_sockets: Capability,
    /// Reading user memory. Without it only the system call of a blocked thread and its arguments are known.
    pub user_memory: Capability,
    /// `bpf_loop`. Without it the verifier checks every iteration of the accept queue loop, which slows down loading.
    pub bpf_loop: Capability,
    /// Batched scans. Without it the kernel visits each file and thread separately.
    pub batched_scans: Capability,
    /// Recognizing io_uring files.
    pub rings: Capability,
    /// Counting the ready files of epoll instances.
    pub epolls: Capability,
    /// Debug lines of the programs (`--log-bpf`).
    pub log: Capability,
    /// The hooks that measure waits. Without them waits are estimated from samples.
    pub hooks: Capability,
}

impl Capabilities {
    /// Why limits are not read from the kernel's structures, if they are not.
    pub fn without_cgroups(&self) -> Option<String> {
        let missing = self.fields.missing_for(Feature::Cgroups);
        let missing = missing.map(ToString::to_string);
        missing.or_else(|| self.cgroups.clone().err())
    }

    /// Scans that this kernel should run but does not, with the reason. `tailback doctor` shows the optional rest.
    pub fn failed_scans(&self) -> Vec<(&'static str, &str)> {
        let scans = [
            ("open files", &self.files),
            ("threads", &self.threads),
            ("what threads wait for", &self.waits),
            (
                "who holds the other end of a connection or pipe",
                &self.holders,
            ),
            ("CPU time of all threads", &self.cpu_times),
            ("limits of control groups", &self.cgroups),
        ];
        let failed = scans.into_iter().filter_map(|(scan, capability)| {
            let reason = capability.as_ref().err()?;
            Some((scan, reason.as_str()))
        });
        failed.collect()
    }
}
