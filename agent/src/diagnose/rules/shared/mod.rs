//! What several rules need: facts about one kind of evidence. These modules depend on no rule.

pub(super) mod capacity;
pub(super) mod cpu;
pub(super) mod culprit;
pub(super) mod far_end;
pub(super) mod hidden;
pub(super) mod kept_alive;
pub(super) mod lock;
pub(super) mod pool;
pub(super) mod unclosed;
pub(super) mod wait;
