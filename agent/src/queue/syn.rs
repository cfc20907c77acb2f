//! Handshakes under way on each listening address.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Syn {}

impl Source for Syn {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
