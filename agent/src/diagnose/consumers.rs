//! Which processes take items from queues inside services.

use crate::{
    hash::HashMap,
    queue::{QueueId, QueueKey, Targets},
    sample::{Sample, TargetId},
};

/// The tgids of the consumers, by service and queue.
#[derive(Default)]
pub(super) struct Consumers(HashMap<(TargetId, QueueId), Vec<u32>>);

impl Consumers {
    /// Adds one sample: an answer of a service replaces what the previous one said.
    pub(super) fn read(&mut self, sample: &Sample, targets: &Targets) {
        if sample.targets.is_some() {
            self.0
                .retain(|(target, _), _| targets.get(*target).is_some());
        }
        for answer in &sample.app {
            let (Some(target), Some(queues)) = (targets.of(answer.tgid), &answer.queues) else {
                continue;
            };
            let is_of_answer = |id: &QueueId| matches!(id, QueueId::App { preset, .. } if **preset == *answer.preset);
            self.0
                .retain(|(other, id), _| *other != target || !is_of_answer(id));
            for queue in queues.iter().filter(|one| !one.consumer_tgids.is_empty()) {
                let id = QueueId::App {
                    preset: answer.preset.as_str().into(),
                    name: queue.name.as_str().into(),
                };
                self.0.insert((target, id), queue.consumer_tgids.clone());
            }
        }
    }

    /// The consumers of a queue; empty if they are not known.
    pub(super) fn of(&self, key: &QueueKey) -> &[u32] {
        let of = self.0.get(&(key.target, key.id.clone()));
        of.map_or(&[], Vec::as_slice)
    }
}
