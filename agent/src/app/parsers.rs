//! For properties and fuzzing: the parsers of what services answer.

pub use super::{
    exposition::parse as exposition,
    json::parse as json,
    lines::{csv, pairs},
    transport::{postgres::message as postgres, resp::parse as resp},
};
