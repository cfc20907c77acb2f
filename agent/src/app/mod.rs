//! Asks services for the queues that they keep in their own memory: brokers, pools, gateways, schedulers.
//!
//! - `table`: which processes are recognized, where they are asked, and what their numbers mean. Data, in `presets.toml`; users add
//!   rows in the configuration.
//! - `recognize`: which preset a process belongs to. Pure, like `series`, `mapping` and the parsers `exposition`, `json`, `lines`.
//! - `transport`: one file per protocol. Each bounds the size of an answer; `asker` bounds its time.
//! - `own`: the agent's own connections.
//! - `asker`: a thread with a task per process, so that a slow service never delays a sample.
//!
//! **Rules.** A process is recognized first; then only its own listeners are asked, and only with requests that read. Nothing is sent
//! before the connection is known to be to that process (`transport/owner`). No credential is guessed. A request is never repeated
//! while the previous one is under way.
#![forbid(unsafe_code)]

pub mod asker;
mod exposition;
mod json;
mod lines;
mod mapping;
pub mod own;
#[doc(hidden)]
pub mod parsers;
pub mod recognize;
mod series;
pub mod table;
mod transport;

#[doc(hidden)]
pub use series::Names;
pub use transport::owner::users;
