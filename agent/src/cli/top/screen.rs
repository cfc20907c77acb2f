//! The terminal: raw input and the alternate screen, restored on every way out.

use std::{
    io::{self, Stdout, Write},
    panic,
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::Duration,
};

use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    buffer::Buffer,
    crossterm::{
        cursor::{Hide, Show},
        event::{self, Event, KeyEvent, KeyEventKind},
        execute,
        terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
    },
    layout::Rect,
};

/// Whether this program has the terminal.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);
/// How long an exit waits for the terminal to take the sequences that restore it: its output may be stopped (Ctrl-S).
const RESTORE_TIMEOUT: Duration = Duration::from_millis(500);

/// What the user did.
pub(super) enum Input {
    Key(KeyEvent),
    Resized,
}

/// The terminal while the program has it.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    /// Dropped last.
    _restore: Restore<Stdout>,
}

impl Screen {
    pub(super) fn start() -> io::Result<Self> {
        IS_TAKEN.store(true, Ordering::Relaxed);
        enable_raw_mode()?;
        let restore = Restore::enter(io::stdout())?;
        restore_before_panic_messages();
        Ok(Self {
            terminal: Terminal::new(CrosstermBackend::new(io::stdout()))?,
            _restore: restore,
        })
    }

    pub(super) fn draw(&mut self, draw: impl FnOnce(Rect, &mut Buffer)) -> io::Result<()> {
        if !IS_TAKEN.load(Ordering::Relaxed) {
            // Its message is on the terminal, which has been restored for it.
            return Err(io::Error::other("another thread has panicked, see above"));
        }
        self.terminal
            .draw(|frame| draw(frame.area(), frame.buffer_mut()))?;
        Ok(())
    }

    /// Waits at most this long for a key or a new size.
    pub(super) fn input(&mut self, wait: Duration) -> io::Result<Option<Input>> {
        match event::poll(wait) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            // A signal; the caller checks for it.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error),
        }
        Ok(match event::read()? {
            Event::Key(key) if key.kind != KeyEventKind::Release => Some(Input::Key(key)),
            Event::Resize(..) => Some(Input::Resized),
            _ => None,
        })
    }
}

/// Columns and rows of the terminal.
pub(super) fn size() -> Option<(u16, u16)> {
    let (columns, rows) = ratatui::crossterm::terminal::size().ok()?;
    (columns > 0 && rows > 0).then_some((columns, rows))
}

/// The alternate screen, until dropped.
pub(super) struct Restore<W: Write>(W);

impl<W: Write> Restore<W> {
    pub(super) fn enter(out: W) -> io::Result<Self> {
        // First, so that the terminal is restored if the next line fails.
        let mut restore = Self(out);
        execute!(restore.0, EnterAlternateScreen, Hide)?;
        Ok(restore)
    }
}

impl<W: Write> Drop for Restore<W> {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = execute!(self.0, LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
        IS_TAKEN.store(false, Ordering::Relaxed);
    }
}

/// Restores the terminal before an exit without unwinding, from any thread. Nothing can be drawn afterwards.
pub(super) fn restore_before_exit() {
    if !IS_TAKEN.load(Ordering::Relaxed) {
        return;
    }
    // First: it does not wait for the terminal to take output.
    let _ = disable_raw_mode();
    let (done, restored) = sync_channel(1);
    let write = move || {
        // Never unlocked, so that no other thread draws on the screen that the shell gets.
        let mut out = io::stdout().lock();
        let _ = execute!(out, LeaveAlternateScreen, Show);
        let _ = done.send(());
        loop {
            thread::park();
        }
    };
    if thread::Builder::new().spawn(write).is_ok() {
        let _ = restored.recv_timeout(RESTORE_TIMEOUT);
    }
}

/// Restores the terminal before the message of a panic is printed: on the alternate screen it would be lost.
fn restore_before_panic_messages() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
            let _ = disable_raw_mode();
            IS_TAKEN.store(false, Ordering::Relaxed);
            print(info);
        }));
    });
}
