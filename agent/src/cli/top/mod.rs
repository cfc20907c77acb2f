//! `tailback top`: the services, their queues and why they fill, on a terminal.
//!
//! `source` yields what is shown, from a running agent, from own samples or, by `player`, from a recording. `state` is what the user
//! has chosen, `draw` puts both on a buffer of cells (pure), and `screen` brings that to the terminal, which it restores whatever
//! happens.
#![forbid(unsafe_code)]

mod draw;
mod model;
mod player;
mod screen;
mod source;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::anyhow;
use clap::Args;
use ratatui::{buffer::Buffer, layout::Rect};
use rustix::fs::{Stat, fstat};

use self::{
    screen::{Input, Screen},
    source::{Source, Step},
    state::{Action, State},
};
use super::{
    Failure, Targets, TierOption, exit_code::Outcome, logging, output::colour, session::Stop,
};

/// Longest wait for a key before signals and the source are checked.
const MAX_WAIT: Duration = Duration::from_millis(200);
/// Interval of the frames where the cursor cannot be moved.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);
/// Size of these frames, if it is unknown: a terminal's traditional one.
const PLAIN_SIZE: (u16, u16) = (80, 24);

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    targets: Targets,
    /// Show a recording instead of this host
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pid", "name", "port", "cgroup", "all", "tier"])]
    replay: Option<PathBuf>,
    #[command(flatten)]
    tier: TierOption,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    let is_full_screen = !is_dumb && io::stdout().is_terminal() && io::stdin().is_terminal();
    if is_full_screen {
        check_log(&options.targets)?;
    }
    let mut source = match &options.replay {
        Some(file) => Source::replay(file, &options.targets)?,
        None => Source::of_host(&options.targets, options.tier)?,
    };
    let stop = Stop::on_signals_with(screen::restore_before_exit)?;
    if !is_full_screen {
        return print_frames(&mut source, &stop);
    }
    let mut state = State::new(colour(), source.is_replay());
    let mut screen = Screen::start().map_err(Failure::stdout)?;
    let mut shown = None;
    let mut is_changed = true;
    loop {
        if is_changed {
            screen
                .draw(|area, buffer| draw::frame(area, buffer, &mut state, shown.as_ref()))
                .map_err(Failure::stdout)?;
            is_changed = false;
        }
        let wait = source.due_in().min(MAX_WAIT);
        match screen.input(wait).map_err(Failure::stdout)? {
            Some(Input::Key(key)) => {
                is_changed = true;
                match state.press(key) {
                    Some(Action::Quit) => return Ok(()),
                    Some(Action::Pause(is_paused)) => source.pause(is_paused),
                    Some(Action::Seek(seconds)) => source.seek(seconds)?,
                    None => {}
                }
            }
            Some(Input::Resized) => is_changed = true,
            None => {}
        }
        if stop.wait(Duration::ZERO) {
            return Ok(());
        }
        if !source.due_in().is_zero() {
            continue;
        }
        match source.step(&stop)? {
            Step::Nothing => {}
            Step::Stopped => return Ok(()),
            // A pause only stops what is shown: samples continue, so that rates and verdicts stay right.
            Step::Shown(_) if state.is_paused() && !source.is_replay() => {}
            Step::Shown(next) => {
                shown = Some(*next);
                is_changed = true;
            }
        }
    }
}

/// Fails if a debug log would be written over the screen.
fn check_log(targets: &Targets) -> Outcome<()> {
    let is_logging = logging::filter().is_some() || targets.log_bpf;
    let device = |status: rustix::io::Result<Stat>| status.ok().map(|status| status.st_rdev);
    // Standard error may be another terminal.
    let is_same =
        io::stderr().is_terminal() && device(fstat(io::stderr())) == device(fstat(io::stdout()));
    if is_logging && is_same {
        return Err(Failure::usage(anyhow!(
            "the debug log would be written over the screen: redirect standard error, `tailback top … 2> top.log`"
        )));
    }
    Ok(())
}

/// Prints frames below each other, without moving the cursor and without colour: for dumb terminals, pipes and files.
fn print_frames(source: &mut Source, stop: &Stop) -> Outcome<()> {
    let mut state = State::new(crate::emit::terminal::Colour::Never, false);
    let (columns, rows) = screen::size().unwrap_or(PLAIN_SIZE);
    let area = Rect::new(0, 0, columns.max(20), rows.max(10));
    let mut shown = None;
    let mut printed: Option<std::time::Instant> = None;
    loop {
        if stop.wait(source.due_in().min(MAX_WAIT)) {
            return Ok(());
        }
        match source.step(stop)? {
            Step::Nothing => {}
            Step::Stopped => return Ok(()),
            Step::Shown(next) => shown = Some(*next),
        }
        let is_due = printed.is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL);
        let is_over = source.is_over();
        if shown.is_none() || !(is_due || is_over) {
            continue;
        }
        printed = Some(std::time::Instant::now());
        let mut buffer = Buffer::empty(area);
        draw::frame(area, &mut buffer, &mut state, shown.as_ref());
        let text = draw::text(&buffer);
        let mut out = io::stdout().lock();
        writeln!(out, "{text}").map_err(Failure::stdout)?;
        out.flush().map_err(Failure::stdout)?;
        if is_over {
            return Ok(());
        }
    }
}
