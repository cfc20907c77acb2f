//! Open files against their limit.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Files {}

impl Source for Files {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
