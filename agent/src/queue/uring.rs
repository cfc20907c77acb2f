//! Submission and completion queues of io_uring.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Uring {}

impl Source for Uring {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
