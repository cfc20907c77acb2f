//! Prints a timeline: the time, the speaker, and the text.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    time::Instant,
};

/// Width of the time column.
const CLOCK: usize = 8;
/// Width of the speaker column.
const NAME_WIDTH: usize = 10;
/// Width of the text column.
const TEXT: usize = 86;
/// Width of a row name inside the text column.
const NAME: usize = 9;

/// The number in the SGR escape sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Plain = 0,
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
    Magenta = 35,
    Cyan = 36,
}

pub struct Timeline {
    start: Instant,
    colours: bool,
}

impl Timeline {
    /// Starts the clock.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            colours: io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none(),
        }
    }

    /// Prints an entry for the time `at`.
    pub fn entry(&self, at: Instant, who: &str, colour: Colour, text: &str) {
        let clock = format!(
            "{:.1} s",
            at.saturating_duration_since(self.start).as_secs_f64()
        );
        self.print(&clock, who, colour, text);
    }

    /// Continues the last entry.
    pub fn add(&self, colour: Colour, text: &str) {
        self.print("", "", colour, text);
    }

    /// Adds a named row to the last entry.
    pub fn add_row(&self, name: &str, text: &str) {
        for (row, part) in wrapped(text, TEXT - NAME - 1).iter().enumerate() {
            let name = if row == 0 { name } else { "" };
            self.add(Colour::Plain, &format!("{name:<NAME$} {part}"));
        }
    }

    /// Prints a line without a time.
    pub fn remark(&self, text: &str) {
        write(text);
    }

    fn print(&self, clock: &str, who: &str, colour: Colour, text: &str) {
        for (row, part) in wrapped(text, TEXT).iter().enumerate() {
            let (clock, who) = if row == 0 { (clock, who) } else { ("", "") };
            let clock = self.paint(Colour::Dim, &format!("{clock:>CLOCK$}"));
            write(&format!(
                "{clock}  {who:<NAME_WIDTH$} {}",
                self.paint(colour, part)
            ));
        }
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        if self.colours && colour != Colour::Plain {
            format!("\x1b[{}m{text}\x1b[0m", colour as u8)
        } else {
            text.to_owned()
        }
    }
}

/// Writes and flushes a line, so that it appears at once even in a pipe. Ignores a closed output.
fn write(line: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Wraps text at spaces into rows of at most `width` characters.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut rows = vec![String::new()];
    for (number, word) in text.split(' ').enumerate() {
        match rows.last_mut() {
            Some(row) if number == 0 => row.push_str(word),
            Some(row) if row.chars().count() + 1 + word.chars().count() <= width => {
                row.push(' ');
                row.push_str(word);
            }
            _ => rows.push(word.to_owned()),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_wrapped() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("a  b", 80), ["a  b"]);
        assert_eq!(wrapped("unbreakable", 3), ["unbreakable"]);
        assert_eq!(wrapped("", 3), [""]);
    }
}
