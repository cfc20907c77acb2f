//! Processes that hold many sockets or threads, as targets for the agent.

use std::{env, process::Command, thread, time::Duration};

use anyhow::{Context as _, Result};
use rustix::process::{Signal, set_parent_process_death_signal};
use tailback_tests::{
    idle::{Idle, max_open_files},
    process::Process,
};

const READY: &str = "holding";
/// Deadline for the start.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Descriptors of a process reserved for other files.
const OTHER_FILES: u64 = 200;

/// Hidden subcommands: this program as the child process.
#[derive(clap::Subcommand)]
pub enum Hold {
    /// Hold this many TCP sockets: both ends of half as many connections
    #[command(hide = true)]
    HoldSockets { count: usize },
    /// Hold this many threads
    #[command(hide = true)]
    HoldThreads { count: usize },
}

impl Hold {
    /// Runs until this process or its parent is killed.
    pub fn forever(&self) -> Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .context("set the parent death signal")?;
        match self {
            Self::HoldSockets { count } => {
                let idle = Idle::pairs(*count)?;
                println!("{READY} {}", idle.count());
                loop {
                    thread::park();
                }
            }
            Self::HoldThreads { count } => {
                for _ in 0..*count {
                    thread::Builder::new()
                        .stack_size(32 << 10)
                        .spawn(|| {
                            loop {
                                thread::park();
                            }
                        })
                        .context("start a thread")?;
                }
                println!("{READY} {count}");
                loop {
                    thread::park();
                }
            }
        }
    }
}

/// Holds `count` sockets, in as many processes as the limit of open files requires.
pub fn sockets(count: usize) -> Result<Vec<Process>> {
    let each = max_open_files()
        .unwrap_or(u64::MAX)
        .saturating_sub(OTHER_FILES)
        .max(2);
    let processes = (count as u64).div_ceil(each).max(1) as usize;
    let mut holders = Vec::new();
    let mut left = count;
    for number in 0..processes {
        // Even shares, in pairs.
        let share = (left / (processes - number)).next_multiple_of(2).min(left);
        holders.push(hold("hold-sockets", share)?);
        left -= share;
    }
    Ok(holders)
}

/// Holds `count` threads in one process.
pub fn threads(count: usize) -> Result<Vec<Process>> {
    Ok(vec![hold("hold-threads", count)?])
}

/// `--pid N` for each holder.
pub fn targets(holders: &[Process]) -> Vec<String> {
    holders
        .iter()
        .flat_map(|holder| ["--pid".to_owned(), holder.pid().to_string()])
        .collect()
}

fn hold(what: &str, count: usize) -> Result<Process> {
    let program = env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.args(["bench", what, &count.to_string()]);
    let holder = Process::start(what, &mut command)?;
    holder.wait_line(&format!("{READY} {count}"), START_DEADLINE)?;
    Ok(holder)
}
