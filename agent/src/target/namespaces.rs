//! Which namespaces the agent runs in.
#![forbid(unsafe_code)]

use std::{fs, os::unix::fs::MetadataExt as _};

/// A kind of namespace, as named in /proc/self/ns, and the inode number of the initial one, include/linux/proc_ns.h.
pub(crate) type Kind = (&'static str, u64);

/// `PROC_CGROUP_INIT_INO`.
pub(crate) const CGROUP: Kind = ("cgroup", 0xefff_fffb);
/// `PROC_PID_INIT_INO`.
pub(crate) const PID: Kind = ("pid", 0xefff_fffc);
/// `PROC_USER_INIT_INO`.
pub(crate) const USER: Kind = ("user", 0xefff_fffd);

/// Whether the agent is in the initial namespace of this kind. The error says why that is not known.
pub(crate) fn is_initial((name, inode): Kind) -> Result<bool, String> {
    let file = format!("/proc/self/ns/{name}");
    let namespace = fs::metadata(&file).map_err(|error| format!("{file}: {error}"))?;
    Ok(namespace.ino() == inode)
}
