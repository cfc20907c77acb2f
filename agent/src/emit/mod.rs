//! The other end: what the pipeline says, told to people, programs and trace stores.

mod cause;
#[cfg(test)]
mod fixture;
pub mod json;
pub mod otlp;
pub mod report;
pub mod spans;
pub mod table;
pub mod terminal;

use std::io;

use crate::event::Event;

/// Something that is told what happens.
pub trait Sink {
    /// Tells one event.
    fn emit(&mut self, event: &Event) -> io::Result<()>;
}
