//! The screen of 80 × 24 cells, the keys, hostile names, and a terminal that is restored.

use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    style::Color,
};

use super::{
    draw,
    screen::Restore,
    source::Shown,
    state::{Action, State},
};
use crate::{
    emit::terminal::Colour,
    signal::live::{
        fixture,
        view::{Service, View},
    },
};

fn shown() -> Shown {
    Shown {
        view: fixture::view(),
        origin: "agent 4000".to_owned(),
        adapters: vec![
            ("haproxy 127.0.0.1:9001".to_owned(), Some("shop".to_owned())),
            ("http 127.0.0.1:9000".to_owned(), None),
        ],
        ..Shown::default()
    }
}

/// What a terminal shows.
fn screen(columns: u16, rows: u16, state: &mut State, shown: &Shown) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    let draw = |frame: &mut ratatui::Frame<'_>| {
        draw::frame(frame.area(), frame.buffer_mut(), state, Some(shown));
    };
    terminal.draw(draw).unwrap();
    draw::text(terminal.backend().buffer())
}

fn press(state: &mut State, code: KeyCode) -> Option<Action> {
    state.press(KeyEvent::new(code, KeyModifiers::NONE))
}

/// Compares with a file beside this one, which is written again with `TAILBACK_BLESS=1`.
fn assert_golden(name: &str, actual: &str) {
    let path = format!(
        "{}/src/cli/top/golden/{name}.txt",
        env!("CARGO_MANIFEST_DIR")
    );
    let actual = format!("{actual}\n");
    if std::env::var_os("TAILBACK_BLESS").is_some() {
        std::fs::write(&path, &actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == actual,
        "{path}: expected\n{expected}\nbut the screen is\n{actual}"
    );
}

#[test]
fn the_worst_service_its_verdict_and_its_queues_fit_a_screen_of_80_by_24() {
    let mut state = State::new(Colour::Never, false);
    assert_golden("services", &screen(80, 24, &mut state, &shown()));
    press(&mut state, KeyCode::Enter);
    assert_golden("details", &screen(80, 24, &mut state, &shown()));
    press(&mut state, KeyCode::Char('?'));
    assert_golden("help", &screen(80, 24, &mut state, &shown()));
}

#[test]
fn without_an_agent_the_signal_is_marked_as_not_published() {
    let own = Shown {
        is_unpublished: true,
        origin: "own samples".to_owned(),
        ..shown()
    };
    let text = screen(80, 24, &mut State::new(Colour::Never, false), &own);
    assert!(text.contains("not published: no agent runs"), "{text}");
    let gone = Shown {
        problem: Some("no reply from the agent".to_owned()),
        ..shown()
    };
    let text = screen(80, 24, &mut State::new(Colour::Never, false), &gone);
    assert!(text.contains("no reply from the agent"), "{text}");
}

#[test]
fn the_details_have_the_waits_that_hooks_measured_and_the_culprit() {
    let mut state = State::new(Colour::Never, false);
    let shown = shown();
    screen(110, 40, &mut state, &shown);
    press(&mut state, KeyCode::Enter);
    let text = screen(110, 40, &mut state, &shown);
    for line in [
        "CPU wait 1,204 waits, p50 12 µs, p99 12 µs, longest 5.2 ms, when backup (951) had the CPU for 4.0 ms",
        "blocked  recvfrom socket:[4711]: 10 waits, p50 92 ms, p99 160 ms, longest 160 ms",
    ] {
        assert!(text.lines().any(|shown| shown.trim_end() == line), "{text}");
    }
}

#[test]
fn any_size_can_be_drawn() {
    for (columns, rows) in [(1, 1), (10, 3), (20, 5), (40, 10), (79, 24), (300, 100)] {
        let mut state = State::new(Colour::Always, true);
        for key in ['x', '?', '?'] {
            screen(columns, rows, &mut state, &shown());
            press(&mut state, KeyCode::Char(key));
        }
        press(&mut state, KeyCode::Enter);
        press(&mut state, KeyCode::End);
        screen(columns, rows, &mut state, &shown());
        let empty = Shown::default();
        screen(columns, rows, &mut state, &empty);
    }
}

#[test]
fn the_selected_service_stays_selected_when_another_becomes_worse() {
    let mut state = State::new(Colour::Never, false);
    let mut shown = shown();
    screen(80, 24, &mut state, &shown);
    press(&mut state, KeyCode::Char('j'));
    let selected = |text: &str| {
        let row = text.lines().find(|line| line.starts_with('▶')).unwrap();
        row.split_whitespace().nth(2).unwrap().to_owned()
    };
    assert_eq!(selected(&screen(80, 24, &mut state, &shown)), "gateway");
    shown.view.services.swap(0, 1);
    assert_eq!(selected(&screen(80, 24, &mut state, &shown)), "gateway");
    press(&mut state, KeyCode::End);
    assert_eq!(selected(&screen(80, 24, &mut state, &shown)), "calm");
    press(&mut state, KeyCode::Esc);
    assert_eq!(
        selected(&screen(80, 24, &mut state, &shown)),
        "gateway",
        "the worst again"
    );
}

#[test]
fn a_long_list_scrolls_to_the_selected_service() {
    let service = |number: usize| Service {
        target: format!("service-{number}"),
        ..Service::default()
    };
    let shown = Shown {
        view: View {
            services: (0..500).map(service).collect(),
            services_omitted: 7,
            ..View::default()
        },
        ..Shown::default()
    };
    let mut state = State::new(Colour::Never, false);
    screen(80, 24, &mut state, &shown);
    for _ in 0..30 {
        press(&mut state, KeyCode::Down);
        let text = screen(80, 24, &mut state, &shown);
        assert!(text.lines().any(|line| line.starts_with('▶')), "{text}");
    }
    press(&mut state, KeyCode::End);
    let text = screen(80, 24, &mut state, &shown);
    assert!(text.contains("▶ ok       service-499"), "{text}");
}

#[test]
fn keys_quit_pause_and_move_within_a_recording() {
    let mut state = State::new(Colour::Never, true);
    assert_eq!(press(&mut state, KeyCode::Char('q')), Some(Action::Quit));
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.press(control_c), Some(Action::Quit));
    assert_eq!(
        press(&mut state, KeyCode::Char('p')),
        Some(Action::Pause(true))
    );
    let text = screen(80, 24, &mut state, &shown());
    assert!(text.contains("PAUSED"), "{text}");
    assert_eq!(
        press(&mut state, KeyCode::Char(' ')),
        Some(Action::Pause(false))
    );
    assert_eq!(press(&mut state, KeyCode::Left), Some(Action::Seek(-10)));
    let mut live = State::new(Colour::Never, false);
    assert_eq!(press(&mut live, KeyCode::Left), None);
}

#[test]
fn names_cannot_bring_control_characters_to_the_screen() {
    const HOSTILE: &str =
        "a\u{1b}[2J\u{7}\u{202e}\nb\t漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字";
    let mut shown = shown();
    shown.origin = HOSTILE.to_owned();
    shown.problem = Some(HOSTILE.to_owned());
    shown.adapters = vec![(HOSTILE.to_owned(), Some("shop".to_owned()))];
    for service in &mut shown.view.services {
        for queue in &mut service.queues {
            queue.name = HOSTILE.to_owned();
            queue.kind = HOSTILE.to_owned();
            queue.unit = HOSTILE.to_owned();
        }
        for episode in &mut service.episodes {
            for text in [
                &mut episode.kind,
                &mut episode.name,
                &mut episode.evidence,
                &mut episode.advice,
            ] {
                *text = HOSTILE.to_owned();
            }
            episode.verdict = Some(HOSTILE.to_owned());
            for step in &mut episode.path {
                step.name = HOSTILE.to_owned();
                step.state = HOSTILE.to_owned();
            }
        }
        for reader in &mut service.readers {
            reader.name = HOSTILE.to_owned();
        }
        service.target = HOSTILE.to_owned();
    }
    for code in [KeyCode::Char('x'), KeyCode::Enter] {
        let mut state = State::new(Colour::Always, false);
        screen(80, 24, &mut state, &shown);
        press(&mut state, code);
        let text = screen(80, 24, &mut state, &shown);
        let is_harmful = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!text.contains(is_harmful), "{text:?}");
        assert!(text.contains("a\\u{1b}[2J"), "{text}");
    }
}

#[test]
fn colours_are_used_only_if_they_are_wanted() {
    for (colour, wanted) in [(Colour::Always, true), (Colour::Never, false)] {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        let mut state = State::new(colour, false);
        let shown = shown();
        terminal
            .draw(|frame| draw::frame(frame.area(), frame.buffer_mut(), &mut state, Some(&shown)))
            .unwrap();
        let cells = &terminal.backend().buffer().content;
        let has_colour = cells
            .iter()
            .any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset);
        assert_eq!(has_colour, wanted);
    }
}

#[test]
fn a_panic_leaves_the_alternate_screen_and_shows_the_cursor() {
    let mut out = Vec::new();
    let drawing = std::panic::AssertUnwindSafe(|| {
        let _restore = Restore::enter(&mut out).unwrap();
        panic!("while drawing");
    });
    assert!(std::panic::catch_unwind(drawing).is_err());
    let text = String::from_utf8(out).unwrap();
    let (enter, leave) = ("\u{1b}[?1049h\u{1b}[?25l", "\u{1b}[?1049l\u{1b}[?25h");
    assert_eq!(text, format!("{enter}{leave}"));
}
