//! The kernel end: what this kernel offers, and the glance tier's iterators.
//!
//! `btf` and `layout` find where the kernel keeps its fields, `glance` loads the object (in `load`) and walks, `records` tells
//! apart what it read, `batched_scan` walks by one visit of a process, `iter` is the thin layer over `bpf(2)` that aya does not have.

mod batched_scan;
pub mod btf;
mod cast;
pub mod glance;
mod iter;
pub mod layout;
mod output_buffer;
pub mod records;
mod ring;
