//! The kernel end: what this kernel offers, and the glance tier's iterators.
//!
//! `btf` and `layout` find where the kernel keeps its fields, `glance` loads the object (in `load`) and walks, `records` tells
//! apart what it read, `quick` walks by one visit of a process, `iter` is the thin layer over `bpf(2)` that aya does not have.

pub mod btf;
mod cast;
pub mod glance;
mod iter;
pub mod layout;
mod quick;
pub mod records;
mod ring;
mod sheet;
