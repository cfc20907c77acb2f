//! The kernel end: what this kernel supports, and the BPF iterators that read it.
//!
//! `btf` and `layout` find the offsets of kernel fields. `scanner` loads the eBPF object (in `scanner/load`) and runs its
//! scans; `batched_scan` is the fast path that visits each process once. `records` decodes what a scan returns. `hooks` measures
//! waits at tracepoints, in the tiers `auto` and `watch` only. `iter` wraps the `bpf(2)` calls that aya lacks, `processor` is what differs
//! between architectures, `log` is `--log-bpf`, and `load_error` says why loading failed.

mod batched_scan;
pub mod btf;
mod cast;
pub mod hooks;
mod iter;
pub mod layout;
mod load_error;
mod log;
mod output_buffer;
mod processor;
pub mod records;
mod ring;
pub mod scanner;

pub use load_error::LoadError;
