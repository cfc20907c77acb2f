//! Who is watched: from what the user names to processes, and from processes to services.
//!
//! A service with several processes (prefork, SO_REUSEPORT, an inherited listener) is one target.

mod around;
mod discovery;
mod facts;
mod group;
mod selector;

pub(crate) use around::{End, MAX_FOLLOWED, Nearby, around, ends};
pub use discovery::{Discovery, Found, ListenerSeen, ProcessSeen};
pub(crate) use facts::cgroup_path;
pub use selector::{Selector, Spec};
