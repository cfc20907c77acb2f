//! Memory of control groups and of the machine, and what threads lose by its want.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Memory {}

impl Source for Memory {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
