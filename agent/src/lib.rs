//! Tailback's agent as a library; the binary only calls its command line.
//!
//! Data flows one way: `kernel` → `collect` → `sample` → `queue` → `detect` → `diagnose` → `emit` and `signal`. From
//! `sample` to `diagnose` everything is a pure function of the stream of samples: only the two ends do I/O. `event`
//! holds the plain types of the output. Beside this line, `target` selects the processes to watch, `app` asks services
//! for their own queues, and `adapters` is a separate process that serves the published signals. docs/architecture.md
//! has a map of all modules. The tidy test (`xtask/tests/tidy`) lists what each module may import.

pub mod adapters;
pub mod app;
pub mod cause;
pub mod cli;
pub mod collect;
pub mod config;
pub mod confinement;
pub mod detect;
pub mod diagnose;
pub mod emit;
pub mod event;
mod ewma;
mod hash;
mod in_order;
pub mod kernel;
pub mod messages;
pub mod pipeline;
pub mod queue;
pub mod sample;
pub mod signal;
pub mod target;
pub mod text;
