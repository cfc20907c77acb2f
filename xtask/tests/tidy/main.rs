//! House rules that the compiler does not check, held by reading the sources.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod alerts;
mod directions;
mod metrics;
mod purity;
mod rust_source;
mod words;
