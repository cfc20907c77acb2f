//! Outputs of the pipeline: text for people, JSON lines for programs, spans for trace stores.

mod cause;
mod churn;
pub mod explain;
#[cfg(test)]
pub(crate) mod fixture;
pub mod json;
pub mod otlp;
pub mod report;
pub mod spans;
pub mod table;
pub mod terminal;

use std::io;

pub(crate) use cause::{beside_culprit, verdict as headline};

use crate::event::Event;

/// An output that receives the pipeline's events.
pub trait Sink {
    /// Writes one event.
    fn emit(&mut self, event: &Event) -> io::Result<()>;
}
