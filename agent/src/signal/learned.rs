//! What an agent has learned about its services, kept for its successor: an agent that restarts in the middle of an overload
//! cannot measure a service time at rest.
//!
//! The file is in the directory of the pages. A service is recognized by the pid and start time of its first process, a queue by
//! its kind and name. The file is only read if the agent's user owns it and nobody else could have written it.

use std::{collections::HashMap, os::fd::BorrowedFd, sync::Arc};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{
    constants::{CONTROLLER_VALID_NS, SERVICE_TIME_VALID_NS},
    controller::LearnedController,
    directory::read_own_file,
    files::StateFile,
    requests::LearnedRequests,
};
use crate::{queue::QueueKey, sample::Target};

/// The file in the directory of the pages.
const FILE: StateFile = StateFile::Learned;
/// Its name.
const NAME: &str = FILE.names().0;
/// Maximum number of queues in it.
const MAX_QUEUES: usize = 10_000;
/// The format. A file of another version is ignored.
const VERSION: u32 = 1;

/// What was learned about one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LearnedQueue {
    pub(super) requests: Option<LearnedRequests>,
    pub(super) controller: Option<LearnedController>,
    /// Size of a response, bytes.
    pub(super) response_bytes: Option<f64>,
}

/// What a former agent learned. Each part is valid for a limited time.
#[derive(Debug, Default)]
pub struct Learned {
    /// CLOCK_MONOTONIC, ns.
    at_ns: u64,
    queues: HashMap<Id, LearnedQueue>,
}

/// Identifies a queue across agents.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Id {
    pid: u32,
    start_ns: u64,
    kind: String,
    name: String,
}

/// The file. The queues are a list, because their ids cannot be JSON keys.
#[derive(Serialize, Deserialize)]
struct Contents<Queues> {
    version: u32,
    at_ns: u64,
    queues: Queues,
}

impl Id {
    fn of(target: &Target, key: &QueueKey) -> Self {
        Self {
            pid: target.pid,
            start_ns: target.start_ns,
            kind: key.kind.name().to_owned(),
            name: key.name().to_owned(),
        }
    }
}

impl Learned {
    pub(super) fn new(at_ns: u64) -> Self {
        Self {
            at_ns,
            queues: HashMap::new(),
        }
    }

    /// Adds what was learned about a queue, unless that is nothing or there is no room.
    pub(super) fn add(&mut self, target: &Target, key: &QueueKey, learned: LearnedQueue) {
        if learned != LearnedQueue::default() && self.queues.len() < MAX_QUEUES {
            self.queues.insert(Id::of(target, key), learned);
        }
    }

    /// What was learned about this queue and is still valid at `now_ns`.
    pub(super) fn get(&self, target: &Target, key: &Arc<QueueKey>, now_ns: u64) -> LearnedQueue {
        if self.queues.is_empty() {
            return LearnedQueue::default();
        }
        let Some(learned) = self.queues.get(&Id::of(target, key)) else {
            return LearnedQueue::default();
        };
        // The time in a file from before a reboot may be in the future.
        let Some(age_ns) = now_ns.checked_sub(self.at_ns) else {
            return LearnedQueue::default();
        };
        LearnedQueue {
            requests: learned
                .requests
                .filter(|requests| age_ns <= SERVICE_TIME_VALID_NS && requests.is_valid()),
            controller: learned
                .controller
                .filter(|controller| age_ns <= CONTROLLER_VALID_NS && controller.is_valid()),
            response_bytes: learned
                .response_bytes
                .filter(|bytes| age_ns <= SERVICE_TIME_VALID_NS && is_sane(*bytes)),
        }
    }

    /// The contents of the file.
    pub fn contents(&self) -> Result<Vec<u8>> {
        let contents = Contents {
            version: VERSION,
            at_ns: self.at_ns,
            queues: self.queues.iter().collect::<Vec<_>>(),
        };
        Ok(serde_json::to_vec(&contents)?)
    }

    /// Reads the file in this directory; nothing if there is none.
    pub fn load(directory: BorrowedFd<'_>) -> Result<Self> {
        let Some(bytes) = read_own_file(directory, NAME, FILE.max_bytes())? else {
            return Ok(Self::default());
        };
        let contents: Contents<Vec<(Id, LearnedQueue)>> =
            serde_json::from_slice(&bytes).with_context(|| format!("{NAME} is damaged"))?;
        if contents.version != VERSION {
            return Ok(Self::default());
        }
        Ok(Self {
            at_ns: contents.at_ns,
            queues: contents.queues.into_iter().take(MAX_QUEUES).collect(),
        })
    }
}

/// Finite and not negative.
pub(super) fn is_sane(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{
            fd::{AsFd as _, OwnedFd},
            unix::fs::{PermissionsExt as _, symlink},
        },
        path::Path,
    };

    use tailback_tests::temp::TempDir;

    use super::*;
    use crate::{
        queue::Kind,
        signal::files::{Files as _, OwnFiles},
    };

    const NOW_NS: u64 = 1_000_000_000_000;

    fn shop() -> Target {
        Target {
            id: 1,
            pid: 7,
            start_ns: 5,
            ..Target::default()
        }
    }

    fn key() -> Arc<QueueKey> {
        Arc::new(QueueKey::new(1, Kind::Inflight, ":80".into()))
    }

    fn learned() -> LearnedQueue {
        LearnedQueue {
            requests: Some(LearnedRequests {
                service_time_ns: 4e7,
                usual_depth: 2.5,
                concurrency: Some(4.0),
            }),
            controller: None,
            response_bytes: Some(101.5),
        }
    }

    fn saved(directory: &Path) -> OwnedFd {
        let directory = OwnedFd::from(File::open(directory).unwrap());
        let files = OwnFiles(directory.try_clone().unwrap());
        let mut all = Learned::new(NOW_NS);
        all.add(&shop(), &key(), learned());
        files.save(FILE, &all.contents().unwrap()).unwrap();
        directory
    }

    #[test]
    fn the_next_agent_recalls_the_same_process_for_a_limited_time() {
        let temp = TempDir::new("learned").unwrap();
        let directory = saved(temp.path());
        let all = Learned::load(directory.as_fd()).unwrap();
        assert_eq!(all.get(&shop(), &key(), NOW_NS + 1), learned());
        let restarted = Target {
            start_ns: 6,
            ..shop()
        };
        for (target, now_ns) in [
            (restarted, NOW_NS),
            (shop(), NOW_NS + SERVICE_TIME_VALID_NS + 1),
        ] {
            assert_eq!(all.get(&target, &key(), now_ns), LearnedQueue::default());
        }
    }

    #[test]
    fn a_file_that_another_user_could_have_written_is_not_read() {
        let temp = TempDir::new("learned").unwrap();
        let directory = saved(temp.path());
        let path = temp.path().join(NAME);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let error = Learned::load(directory.as_fd()).unwrap_err();
        assert!(error.to_string().contains("only the agent's user"));
        std::fs::remove_file(&path).unwrap();
        let elsewhere = temp.path().join("elsewhere");
        std::fs::write(&elsewhere, "{}").unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(Learned::load(directory.as_fd()).is_err());
    }

    #[test]
    fn nothing_is_learned_from_a_damaged_file_or_one_of_another_version() {
        let temp = TempDir::new("learned").unwrap();
        let directory = saved(temp.path());
        let path = temp.path().join(NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        for damaged in ["", "[]", &text[..text.len() / 2]] {
            std::fs::write(&path, damaged).unwrap();
            assert!(Learned::load(directory.as_fd()).is_err());
        }
        let other = text.replace("\"version\":1", "\"version\":2");
        assert_ne!(other, text);
        std::fs::write(&path, other).unwrap();
        let all = Learned::load(directory.as_fd()).unwrap();
        assert!(all.queues.is_empty());
        std::fs::write(&path, &text).unwrap();
        let all = Learned::load(directory.as_fd()).unwrap();
        assert_eq!(all.get(&shop(), &key(), NOW_NS), learned());
        let after_reboot = all.get(&shop(), &key(), NOW_NS - 1);
        assert_eq!(after_reboot, LearnedQueue::default());
        let negative = text.replace("2.5", "-2.5").replace("101.5", "-1");
        std::fs::write(&path, negative).unwrap();
        let all = Learned::load(directory.as_fd()).unwrap();
        assert_eq!(all.get(&shop(), &key(), NOW_NS), LearnedQueue::default());
    }
}
