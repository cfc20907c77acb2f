//! Which CPU does what while a service is measured.

use std::{process::Command, thread};

use anyhow::Result;
use tailback_tests::{process::Process, program};

pub fn cpus() -> f64 {
    thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64
}

/// Which CPU does what. Server and load get one each, so that neither is moved about; the agent is free, as it is
/// in use: it goes where there is time, or takes it from one of them.
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
                "server on CPU {}, load on CPU {}, the agent wherever the kernel puts it",
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
