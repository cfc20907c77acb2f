//! Which processes take items from queues inside services, and over which connections services pass items on.

use std::net::SocketAddr;

use crate::{
    hash::HashMap,
    queue::{QueueId, QueueKey, Targets},
    sample::{Sample, TargetId},
};

/// By service and queue.
#[derive(Default)]
pub(super) struct Consumers(HashMap<(TargetId, QueueId), ServedBy>);

/// The consumers of a queue.
enum ServedBy {
    /// These processes, by their tgids.
    Processes(Vec<u32>),
    /// Those at the other ends of the service's own connections: these ends of them are known.
    Connections(Vec<SocketAddr>),
}

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
            for queue in queues {
                let served_by = match &queue.served_on {
                    Some(ends) => ServedBy::Connections(ends.clone()),
                    None if queue.consumer_tgids.is_empty() => continue,
                    None => ServedBy::Processes(queue.consumer_tgids.clone()),
                };
                let id = QueueId::App {
                    preset: answer.preset.as_str().into(),
                    name: queue.name.as_str().into(),
                };
                self.0.insert((target, id), served_by);
            }
        }
    }

    /// The consumers of a queue; empty if they are not known.
    pub(super) fn of(&self, key: &QueueKey) -> &[u32] {
        match self.served_by(key) {
            Some(ServedBy::Processes(tgids)) => tgids,
            _ => &[],
        }
    }

    /// Known ends of the connections over which a service passes on the items of a queue. `None`: it does not pass them on.
    pub(super) fn served_on(&self, key: &QueueKey) -> Option<&[SocketAddr]> {
        match self.served_by(key)? {
            ServedBy::Connections(ends) => Some(ends),
            ServedBy::Processes(_) => None,
        }
    }

    /// The same of all queues that a service passes on.
    pub(super) fn all_served_on(&self, target: TargetId) -> impl Iterator<Item = SocketAddr> {
        let queues = self.0.iter().filter(move |((of, _), _)| *of == target);
        let ends = queues.map(|(_, served_by)| match served_by {
            ServedBy::Connections(ends) => ends.as_slice(),
            ServedBy::Processes(_) => &[],
        });
        ends.flatten().copied()
    }

    fn served_by(&self, key: &QueueKey) -> Option<&ServedBy> {
        self.0.get(&(key.target, key.id.clone()))
    }
}
