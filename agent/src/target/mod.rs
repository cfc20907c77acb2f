//! What is watched: from the user's selectors to processes, and from processes to services (*targets*).
//!
//! A service with several processes (prefork, SO_REUSEPORT, an inherited listener) is one target. On a node (`--all`), so is a
//! container and a systemd unit: `node` decides, from what `place` reads in the control groups.

mod cgroup;
mod containers;
mod discovery;
mod downward;
mod facts;
mod group;
pub(crate) mod namespaces;
mod neighbours;
mod node;
mod place;
mod process_file;
mod selector;

pub use discovery::{Discovered, Discovery, ListenerInfo, ProcessInfo};
pub use downward::Downward;
pub(crate) use facts::cgroup_path;
pub(crate) use neighbours::{End, HostView, MAX_NEIGHBOURS, ends, find_neighbours};
pub use node::{LeftOut, MAX_SERVICES};
pub(crate) use process_file::{read as read_process_file, run as run_in_reader};
pub use selector::{Selector, Spec};
