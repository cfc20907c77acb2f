//! Control groups and the machine.
#![forbid(unsafe_code)]

use crate::sample::{Cgroup, Machine, Target};

#[derive(Default)]
pub(super) struct System {}

impl System {
    pub(super) fn read(&mut self, _targets: &[Target]) -> (Vec<Cgroup>, Machine) {
        (Vec::new(), Machine::default())
    }
}
