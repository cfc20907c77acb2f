//! Tailback's agent as a library; the binary is a thin shell around the command line.
//!
//! Data flows one way: `kernel` → `sample` → `queue` → `detect` → `diagnose` → `emit` and `signal`. From `sample` on everything is a pure
//! function of the stream of samples; only the two ends touch the world.

pub mod adapters;
pub mod cause;
pub mod cli;
pub mod collect;
pub mod config;
pub mod detect;
pub mod diagnose;
pub mod emit;
pub mod event;
mod ewma;
mod in_order;
pub mod kernel;
pub mod messages;
pub mod pipeline;
pub mod queue;
pub mod sample;
pub mod signal;
pub mod target;
pub mod text;
