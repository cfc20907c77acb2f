//! What is watched: from the user's selectors to processes, and from processes to services (*targets*).
//!
//! A service with several processes (prefork, SO_REUSEPORT, an inherited listener) is one target.

mod cgroup;
mod discovery;
mod facts;
mod group;
pub(crate) mod namespaces;
mod neighbours;
mod process_file;
mod selector;

pub use discovery::{Discovered, Discovery, ListenerInfo, ProcessInfo};
pub(crate) use facts::cgroup_path;
pub(crate) use neighbours::{End, HostView, MAX_NEIGHBOURS, ends, find_neighbours};
pub(crate) use process_file::read as read_process_file;
pub use selector::{Selector, Spec};
