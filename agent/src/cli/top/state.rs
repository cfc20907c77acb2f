//! What the user has chosen: the service, the details, a pause.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::{emit::terminal::Colour, signal::live::view::View};

/// Step of the arrow keys in a recording, seconds.
const SEEK_SECONDS: i64 = 10;
/// Lines of Page Up and Page Down.
const PAGE: usize = 10;

/// What a key asks for beyond the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    Pause(bool),
    /// Seconds, in a recording.
    Seek(i64),
}

/// What fills the screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Page {
    #[default]
    Services,
    Details,
    Help,
}

/// See the module.
pub(super) struct State {
    pub(super) colour: Colour,
    pub(super) is_replay: bool,
    pub(super) page: Page,
    is_paused: bool,
    /// The selected service: directory, name and PID. `None`: the worst.
    selected: Option<Key>,
    /// Its row, as it was last drawn.
    row: usize,
    /// First row of the list, and first line of the details.
    pub(super) top_row: usize,
    pub(super) top_line: usize,
    /// As they were last drawn.
    services: Vec<Key>,
}

type Key = (String, String, u32);

impl State {
    pub(super) fn new(colour: Colour, is_replay: bool) -> Self {
        Self {
            colour,
            is_replay,
            page: Page::default(),
            is_paused: false,
            selected: None,
            row: 0,
            top_row: 0,
            top_line: 0,
            services: Vec::new(),
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// The row of the selected service: it stays selected when others become worse. Without a choice, the worst is selected.
    pub(super) fn row(&mut self, view: &View) -> usize {
        let services = view.services.iter();
        let keys = services.map(|of| (of.directory.clone(), of.target.clone(), of.pid));
        self.services = keys.collect();
        let last = self.services.len().saturating_sub(1);
        let row = match &self.selected {
            None => 0,
            Some(key) => {
                let found = self.services.iter().position(|of| of == key);
                found.unwrap_or(self.row).min(last)
            }
        };
        self.row = row;
        row
    }

    /// The reaction to a key.
    pub(super) fn press(&mut self, key: KeyEvent) -> Option<Action> {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if is_control => return Some(Action::Quit),
            KeyCode::Char('q') => return Some(Action::Quit),
            KeyCode::Char('p' | ' ') => {
                self.is_paused = !self.is_paused;
                return Some(Action::Pause(self.is_paused));
            }
            KeyCode::Left if self.is_replay => return Some(Action::Seek(-SEEK_SECONDS)),
            KeyCode::Right if self.is_replay => return Some(Action::Seek(SEEK_SECONDS)),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => {
                self.page = match self.page {
                    Page::Help => Page::Services,
                    _ => Page::Help,
                };
            }
            // Back. In the list it selects the worst service again; it never quits.
            KeyCode::Esc => match self.page {
                Page::Services => self.selected = None,
                _ => self.page = Page::Services,
            },
            KeyCode::Enter if self.page == Page::Services => {
                self.page = Page::Details;
                self.top_line = 0;
                self.select(self.row);
            }
            KeyCode::Enter => self.page = Page::Services,
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::PageDown => self.go(PAGE as isize),
            KeyCode::PageUp => self.go(-(PAGE as isize)),
            KeyCode::Home | KeyCode::Char('g') => self.go(isize::MIN / 2),
            KeyCode::End | KeyCode::Char('G') => self.go(isize::MAX / 2),
            _ => {}
        }
        None
    }

    fn go(&mut self, by: isize) {
        match self.page {
            Page::Services => {
                let last = self.services.len().saturating_sub(1);
                self.select(self.row.saturating_add_signed(by).min(last));
            }
            // `draw` limits it to the lines that there are.
            Page::Details => self.top_line = self.top_line.saturating_add_signed(by),
            Page::Help => {}
        }
    }

    fn select(&mut self, row: usize) {
        self.row = row;
        self.selected = self.services.get(row).cloned();
    }
}
