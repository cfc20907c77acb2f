//! The ways to select targets on the command line and in the configuration.
#![forbid(unsafe_code)]

use std::{fmt, path::PathBuf};

use wildmatch::WildMatch;

use crate::text::harmless;

/// One way to select processes.
#[derive(Clone, Debug, PartialEq)]
pub enum Selector {
    /// One process, and its descendants that run the same executable.
    Pid(u32),
    /// Glob (`*`, `?`) on `comm`, on the executable's path, or on its base name.
    Name(WildMatch),
    /// Processes that listen on this TCP port.
    Port(u16),
    /// All processes in this cgroup and below.
    Cgroup(PathBuf),
    /// Every service of the node, but the agent itself.
    All {
        /// Also processes that are too young for a service, and those of the machine and of Kubernetes.
        every_process: bool,
    },
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "--pid {pid}"),
            Self::Name(glob) => write!(f, "--name {}", harmless(&glob.to_string())),
            Self::Port(port) => write!(f, "--port {port}"),
            Self::Cgroup(path) => write!(f, "--cgroup {}", harmless(&path.to_string_lossy())),
            Self::All { .. } => write!(f, "--all"),
        }
    }
}

/// A selector, and optionally the name of the service that it selects.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub selector: Selector,
    /// Overrides the name that the service would otherwise have.
    pub service_name: Option<String>,
    /// Only processes of this user are selected, with the workers that they forked.
    pub user: Option<u32>,
}

impl From<Selector> for Spec {
    fn from(selector: Selector) -> Self {
        Self {
            selector,
            service_name: None,
            user: None,
        }
    }
}
