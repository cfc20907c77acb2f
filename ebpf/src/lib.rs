//! Records that the BPF iterators and hooks write and the agent reads, and the settings that the agent passes to them.
//!
//! Each type is defined once: the programs in this crate's binary write it, the agent reads it. All are plain
//! little-endian structs without implicit padding. Their sizes are asserted at compile time on both sides; userspace
//! builds (feature `user`) also let `bytemuck` check that there is no padding.
#![no_std]

mod hook_records;
mod layout;
mod output_buffer;
mod record;

pub use hook_records::*;
pub use layout::{ABSENT, CAST_CALL, Controllers, Helpers, Layout, NO_CALL, Processor, Types};
pub use output_buffer::{BATCH_FDS, MAX_BATCHED_FDS, OUTPUT_BYTES, OutputBuffer};
pub use record::*;
