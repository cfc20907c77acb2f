//! Draws a view on a buffer of cells. Pure. Names come from watched processes: each text is escaped before it becomes a cell.

mod details;
mod words;

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
    text::{Line, Span},
};

use self::words::{
    admit, clock, cut, cut_left_aligned, depth_short, fill_bar, observed, seconds_short, spark,
};
use super::{
    source::Shown,
    state::{Page, State},
};
use crate::{
    emit::terminal::Colour,
    event::Level,
    signal::live::view::{Queue, Service, View},
    text::count,
};

// Widths of the columns of the list, in cells, with the space behind them. Service and queue share the rest.
const MARK: usize = 2;
const LEVEL: usize = 9;
const BAR: usize = 9;
const DEPTH: usize = 10;
const WAIT: usize = 8;
const TREND: usize = 11;
const ADMIT: usize = 5;
/// Longest name of a kind (`downstream`), with the space behind it.
const KIND: usize = 11;
/// Where the terminal is wide, names are no longer than this.
const MAX_NAME: usize = 40;
/// Width of the column of services; queues get the rest.
const MAX_SERVICE: usize = 24;
/// Minimum number of rows of the list, however long the details of the selected service are.
const MIN_LIST: usize = 3;

const HELP: &[(&str, &str)] = &[
    ("↑ ↓, k j", "select a service; in the details: scroll"),
    (
        "PgUp PgDn, g G",
        "10 lines up or down; to the first, to the last",
    ),
    ("Enter", "the details of the selected service, and back"),
    (
        "Esc",
        "back; in the list: select the worst service, whichever it is",
    ),
    ("p, Space", "pause, and continue"),
    ("← →", "in a recording: 10 s back and forward"),
    ("?", "this help"),
    ("q, Ctrl-C", "quit"),
];

const LEGEND: &[&str] = &[
    "DEPTH   items in the worst queue of the service, and its limit",
    "WAIT    the estimated delay there, or the age of the oldest item if greater",
    "TREND   depth since the start, at most over the last ten minutes",
    "ADMIT   share of new work that the service is signalled to admit",
];

/// Draws the whole screen.
pub(super) fn frame(area: Rect, buffer: &mut Buffer, state: &mut State, shown: Option<&Shown>) {
    let mut canvas = Canvas {
        area,
        buffer,
        colour: state.colour,
        row: 0,
    };
    let Some(shown) = shown else {
        canvas.line(Line::from("Waiting for the first samples …"));
        return;
    };
    let view = &shown.view;
    let row = state.row(view);
    canvas.header(shown, state);
    if let Some(problem) = &shown.problem {
        let style = canvas.style(Level::Critical);
        canvas.line(Line::styled(cut(problem, usize::from(area.width)), style));
    }
    let rest = canvas.rest().saturating_sub(1);
    match state.page {
        Page::Help => canvas.help(),
        Page::Details => {
            let lines = view.services.get(row).map_or_else(Vec::new, |service| {
                details::lines(service, shown, usize::from(area.width), state.colour)
            });
            state.top_line = state.top_line.min(lines.len().saturating_sub(rest));
            let visible = lines.into_iter().skip(state.top_line).take(rest);
            visible.for_each(|line| canvas.line(line));
        }
        Page::Services => canvas.services(shown, state, row, rest),
    }
    canvas.footer(state);
}

/// The text of a buffer, without styles.
pub(super) fn text(buffer: &Buffer) -> String {
    let width = usize::from(buffer.area.width).max(1);
    let lines = buffer.content.chunks(width).map(|row| {
        let mut line = String::new();
        let mut covered = 0;
        for cell in row {
            // The cell behind a wide character belongs to it.
            if covered > 0 {
                covered -= 1;
                continue;
            }
            covered = crate::text::width(cell.symbol()).saturating_sub(1);
            line += cell.symbol();
        }
        line.truncate(line.trim_end().len());
        line
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The style of a level. Without colour: bold and reversed.
fn style_of(level: Level, colour: Colour) -> Style {
    let plain = Style::new();
    match (level, colour) {
        (Level::Ok, Colour::Always) => plain.fg(Color::Green),
        (Level::Ok, Colour::Never) => plain,
        (Level::Warn, Colour::Always) => plain.fg(Color::Yellow),
        (Level::Critical, Colour::Always) => plain.fg(Color::Red),
        (Level::Full, Colour::Always) => plain
            .fg(Color::Red)
            .add_modifier(Modifier::BOLD | Modifier::REVERSED),
        (Level::Warn | Level::Critical, Colour::Never) => plain.add_modifier(Modifier::BOLD),
        (Level::Full, Colour::Never) => plain.add_modifier(Modifier::BOLD | Modifier::REVERSED),
    }
}

struct Canvas<'a> {
    area: Rect,
    buffer: &'a mut Buffer,
    colour: Colour,
    row: u16,
}

impl Canvas<'_> {
    fn columns(&self) -> usize {
        usize::from(self.area.width)
    }

    fn rest(&self) -> usize {
        usize::from(self.area.height.saturating_sub(self.row))
    }

    fn style(&self, level: Level) -> Style {
        style_of(level, self.colour)
    }

    #[expect(clippy::needless_pass_by_value, reason = "a line is drawn once")]
    fn line(&mut self, line: Line<'_>) {
        if self.row < self.area.height {
            let (x, y) = (self.area.x, self.area.y + self.row);
            self.buffer.set_line(x, y, &line, self.area.width);
            self.row += 1;
        }
    }

    fn header(&mut self, shown: &Shown, state: &State) {
        let View {
            services,
            services_omitted,
            ..
        } = &shown.view;
        let all = count((services.len() + services_omitted) as u64);
        let bad = services.iter().filter(|it| it.level > Level::Ok).count();
        let summary = match bad {
            0 if all == "1" => "1 service, all ok".to_owned(),
            0 => format!("{all} services, all ok"),
            bad => format!("{bad} of {all} services not ok"),
        };
        let node = shown
            .view
            .agent
            .as_ref()
            .and_then(|agent| agent.node.clone());
        let node = node.map_or_else(String::new, |node| format!("  {}", cut(&node, MAX_NAME)));
        let paused = if state.is_paused() { "  PAUSED" } else { "" };
        let left = format!("tailback{node}  {summary}{paused}");
        let right = format!(
            "{}  {}",
            cut(&shown.origin, MAX_NAME),
            clock(shown.view.time_unix_ns)
        );
        let gap = self.columns().saturating_sub(crate::text::width(&right));
        let text = format!("{}{right}", cut_left_aligned(&left, gap));
        self.line(Line::styled(
            text,
            Style::new().add_modifier(Modifier::REVERSED),
        ));
    }

    fn footer(&mut self, state: &State) {
        self.row = self.area.height.saturating_sub(1);
        let keys = match (state.page, state.is_replay) {
            (Page::Services, false) => "q quit  ↑↓ select  Enter details  p pause  ? help",
            (Page::Services, true) => "q quit  ↑↓ select  Enter details  p pause  ←→ 10 s  ? help",
            (Page::Details, false) => "q quit  ↑↓ scroll  Esc back  p pause  ? help",
            (Page::Details, true) => "q quit  ↑↓ scroll  Esc back  p pause  ←→ 10 s  ? help",
            (Page::Help, _) => "q quit  Esc back",
        };
        let style = Style::new().add_modifier(Modifier::DIM);
        self.line(Line::styled(cut(keys, self.columns()), style));
    }

    fn help(&mut self) {
        self.line(Line::default());
        for (keys, meaning) in HELP {
            self.line(Line::from(format!(
                "  {} {meaning}",
                cut_left_aligned(keys, 16)
            )));
        }
        self.line(Line::default());
        for text in LEGEND {
            self.line(Line::from(format!("  {text}")));
        }
    }

    /// The list, and below it as much of the selected service as there is room for.
    fn services(&mut self, shown: &Shown, state: &mut State, selected: usize, rows: usize) {
        let view = &shown.view;
        let Some(service) = view.services.get(selected) else {
            self.line(Line::default());
            self.line(Line::from("No service is watched yet."));
            return;
        };
        let details = details::lines(service, shown, self.columns(), self.colour);
        // One line of headings, one between.
        let rows = rows.saturating_sub(2);
        let least = MIN_LIST.max(rows / 3);
        let list = view
            .services
            .len()
            .min(rows.saturating_sub(details.len()).max(least));
        // Scroll as little as necessary.
        state.top_row = state.top_row.min(selected);
        if selected >= state.top_row + list {
            state.top_row = selected + 1 - list;
        }
        state.top_row = state.top_row.min(view.services.len().saturating_sub(list));
        let columns = Columns::of(self.columns(), view);
        let headings = columns.headings();
        let style = Style::new().add_modifier(Modifier::DIM);
        self.line(Line::styled(cut(&headings, self.columns()), style));
        let visible = view.services.iter().enumerate();
        for (index, service) in visible.skip(state.top_row).take(list) {
            let line = columns.row(service, index == selected, self.colour);
            self.line(line);
        }
        let more = view.services.len() + view.services_omitted - list;
        let more = match more {
            0 => String::new(),
            more => format!(" {} more ", count(more as u64)),
        };
        let width = self.columns().saturating_sub(more.chars().count());
        self.line(Line::styled(format!("{}{more}", "─".repeat(width)), style));
        for line in details.into_iter().take(rows.saturating_sub(list)) {
            self.line(line);
        }
    }
}

/// The widths of the columns that share what the others leave.
struct Columns {
    service: usize,
    queue: usize,
    /// Points of the history that there can be.
    observed: usize,
}

impl Columns {
    fn of(width: usize, view: &View) -> Self {
        let fixed = MARK + LEVEL + BAR + DEPTH + WAIT + TREND + ADMIT;
        let rest = width.saturating_sub(fixed + KIND);
        let service = rest.clamp(8, MAX_SERVICE);
        // With the name of the queue behind its kind, if there is room for it.
        let queue = KIND + rest.saturating_sub(service).min(MAX_NAME);
        Self {
            service,
            queue,
            observed: observed(view),
        }
    }

    fn headings(&self) -> String {
        format!(
            "{:MARK$}{:LEVEL$}{}{}{:BAR$}{:>depth$} {:>wait$} {:TREND$}{:>ADMIT$}",
            "",
            "LEVEL",
            cut_left_aligned("SERVICE", self.service),
            cut_left_aligned("QUEUE", self.queue),
            "",
            "DEPTH",
            "WAIT",
            "TREND",
            "ADMIT",
            depth = DEPTH - 1,
            wait = WAIT - 1,
        )
    }

    fn row(&self, service: &Service, is_selected: bool, colour: Colour) -> Line<'static> {
        let style = style_of(service.level, colour);
        let queue = service.queues.first();
        let name = queue.map_or_else(String::new, |queue| match queue.depth {
            0 if service.level == Level::Ok => "idle".to_owned(),
            // A name of which hardly anything fits says nothing.
            _ if self.queue <= KIND => queue.kind.clone(),
            _ => format!("{} {}", queue.kind, queue.name),
        });
        let column = |text: &str, width: usize| {
            let text = cut_left_aligned(text, width.saturating_sub(1));
            Span::raw(format!("{text} "))
        };
        let right = |text: &str, width: usize| {
            let text = cut(text, width);
            Span::raw(crate::text::pad_left(&text, width))
        };
        let mark = if is_selected { "▶ " } else { "  " };
        let level = match service.level {
            Level::Ok => "ok".to_owned(),
            level => level.name().to_uppercase(),
        };
        let gap = LEVEL.saturating_sub(level.len());
        let bar = queue.map_or_else(String::new, |queue| fill_bar(queue, BAR - 1));
        let trend = queue.map_or_else(String::new, |queue| spark(queue, TREND - 1, self.observed));
        let wait = queue
            .and_then(|queue| queue.wait_ns)
            .map_or_else(String::new, seconds_short);
        let line = Line::from(vec![
            Span::raw(mark),
            Span::styled(level, style),
            Span::raw(" ".repeat(gap)),
            column(&service.target, self.service),
            column(&name, self.queue),
            Span::styled(format!("{bar} "), text_style(style)),
            right(&queue.map_or_else(String::new, depth_of), DEPTH - 1),
            Span::raw(" "),
            right(&wait, WAIT - 1),
            Span::raw(" "),
            Span::raw(format!("{trend} ")),
            right(&admit(service.admit_ratio), ADMIT),
        ]);
        if is_selected {
            line.style(Style::new().add_modifier(Modifier::BOLD))
        } else {
            line
        }
    }
}

fn depth_of(queue: &Queue) -> String {
    match queue.depth {
        0 => String::new(),
        _ => depth_short(queue),
    }
}

/// A bar shows its amount itself: not reversed.
fn text_style(style: Style) -> Style {
    style.remove_modifier(Modifier::REVERSED)
}
