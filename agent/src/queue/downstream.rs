//! Calls on other services: requests sent on the connections that a service opened, and not yet answered.

use super::{Sink, Source, Targets};
use crate::sample::Sample;

#[derive(Default)]
pub(super) struct Downstream {}

impl Source for Downstream {
    fn read(&mut self, _sample: &Sample, _targets: &Targets, _sink: &mut Sink<'_>) {}
}
