//! Unix sockets: streams, datagrams, listeners.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Unix {}

impl Source for Unix {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
