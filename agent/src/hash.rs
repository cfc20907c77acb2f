//! Hash maps for the pure part of the pipeline. Their order of iteration depends on their content alone.
//!
//! The standard library's maps hash with a random seed for each process. Where a tie is broken by the order of iteration, a
//! replay could then differ from the live run. This hasher has no seed. It does not resist chosen keys; every map here is bounded.
#![forbid(unsafe_code)]

pub use rustc_hash::{FxHashMap as HashMap, FxHashSet as HashSet};
