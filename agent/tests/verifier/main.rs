//! The kernel's verifier checks the layout: real offsets load, wrong ones do not (`offsets`), and a missing field switches off its
//! feature and nothing else (`absent_fields`). Both loops over an accept queue yield the same (`accept_queue`). Log statements
//! cost nothing unless `--log-bpf` is given (`logging`).
//!
//! Needs root, and a kernel with BTF.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod absent_fields;
mod accept_queue;
mod logging;
mod offsets;
#[path = "../own_process/mod.rs"]
mod own_process;
