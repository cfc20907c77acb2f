//! The records that the iterators write and the agent reads, and the settings that go the other way.
//!
//! There is one definition of each: the programs in this crate's binary write them, the agent reads them.
//! All are plain little-endian structs without hidden padding; userspace builds (feature `user`)
//! have that checked by `bytemuck`, and the sizes are asserted below for both sides.
#![no_std]

mod layout;
mod record;
mod sheet;

pub use layout::{ABSENT, CAST_CALL, Layout, Types, Ways};
pub use record::*;
pub use sheet::{BATCH, MAX_QUICK_FDS, SHEET_BYTES, Sheet};
