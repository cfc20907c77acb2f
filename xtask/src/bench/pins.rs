//! CPU pinning for the benchmarks.

use std::{process::Command, thread};

use anyhow::Result;
use tailback_tests::{process::Process, program};

/// Number of CPUs.
pub fn cpus() -> f64 {
    thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64
}

/// Server and load get one CPU each, so that the scheduler does not migrate them. The agent is not pinned, as in production.
pub struct Pins {
    taskset: Option<String>,
}

impl Pins {
    pub const SERVER: &str = "0";
    const LOAD: &str = "1";

    pub fn choose() -> Self {
        let taskset = program::find(&["taskset"]).filter(|_| cpus() > 1.0);
        Self {
            taskset: taskset.map(|path| path.display().to_string()),
        }
    }

    pub fn text(&self) -> String {
        match self.taskset {
            Some(_) => format!(
                "server on CPU {}, load on CPU {}, agent not pinned",
                Self::SERVER,
                Self::LOAD
            ),
            None => "one CPU, or no taskset: nothing is pinned".to_owned(),
        }
    }

    pub fn pin(&self, words: &mut Vec<String>, cpu: &str) {
        if let Some(taskset) = &self.taskset {
            words.splice(0..0, [taskset, "-c", cpu].map(str::to_owned));
        }
    }

    pub fn start_load(&self, words: &[&str]) -> Result<Process> {
        let mut words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        self.pin(&mut words, Self::LOAD);
        Process::start("load", Command::new(&words[0]).args(&words[1..]))
    }
}
