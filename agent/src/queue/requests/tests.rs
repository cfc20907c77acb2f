//! The rule against a model that knows the truth, and against connections made by hand.

mod talk;
mod tcp;

use talk::{Style, Talk};
use tcp::{CLIENT, Net, SERVER, Tcp};

use super::*;

/// What was right and wrong over one conversation.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    looks: u64,
    waited: u64,
    wrong: u64,
    unknown: u64,
    push: u64,
    begun: u64,
    answered: u64,
    truly: u64,
    age_error_us: u64,
    took: u64,
    took_error: f64,
}

/// Looks every `every_us` for a minute, from the start of the connection or from later on.
fn watch(style: Style, end: usize, every_us: u64, skip_us: u64, seed: u64) -> Score {
    let role = if end == SERVER {
        Role::Accepted
    } else {
        Role::Opened
    };
    let mut talk = Talk::new(style, seed);
    let start_us = talk.tcp.now_us + skip_us;
    let mut score = Score::default();
    talk.run_to(start_us);
    let before = talk.look(end).1;
    let mut conversation: Option<Conversation> = None;
    let mut at_us = start_us;
    while at_us < start_us + 60_000_000 {
        talk.run_to(at_us);
        let now_ns = at_us * 1_000;
        let (connection, truth) = talk.look(end);
        let seen = match &mut conversation {
            Some(known) => known.look(&connection, now_ns),
            None => {
                let fresh = skip_us == 0;
                let (known, seen) = Conversation::first(&connection, role, fresh, now_ns);
                conversation = Some(known);
                seen
            }
        };
        score.looks += 1;
        score.begun += u64::from(seen.begun);
        score.answered += u64::from(seen.answered);
        score.truly = truth.begun - before.begun;
        // At least: never more than there were. One that was under way at the first look may be answered.
        let was = u64::from(before.waits);
        assert!(
            score.begun <= truth.begun - before.begun + was,
            "{seen:?} {truth:?} {score:?}"
        );
        assert!(
            score.answered <= truth.answered - before.answered + 1,
            "{seen:?} {truth:?}"
        );
        if let Some(took_ns) = seen.took_ns {
            score.took += 1;
            score.took_error += took_ns as f64;
        }
        match seen.standing {
            Standing::Unknown => score.unknown += 1,
            Standing::Push => score.push += 1,
            standing if standing.waits() != truth.waits => {
                score.wrong += 1;
                if std::env::var_os("TELL").is_some() {
                    println!("{at_us}: {seen:?} {truth:?} {connection:?}");
                }
            }
            standing => {
                if truth.waits {
                    score.waited += 1;
                    let began_us = seen.began_ns / 1_000;
                    score.age_error_us = score.age_error_us.max(began_us.abs_diff(truth.began_us));
                }
                let tells = matches!(standing, Standing::Unread | Standing::Working);
                if tells && style.net.loss == 0 && style.request < 1_000 {
                    assert_eq!(standing == Standing::Unread, truth.unread);
                }
            }
        }
        at_us += every_us;
    }
    score
}

/// Both ends, several speeds of looking, several conversations.
fn watch_all(name: &str, style: Style, skip_us: u64) -> Score {
    let mut sum = Score::default();
    for end in [SERVER, CLIENT] {
        for every_us in [9_700, 23_000, 101_000, 333_000, 2_100_000] {
            for seed in 1..=8 {
                let one = watch(style, end, every_us, skip_us, seed * 7919);
                sum.looks += one.looks;
                sum.waited += one.waited;
                sum.wrong += one.wrong;
                sum.unknown += one.unknown;
                sum.push += one.push;
                sum.age_error_us = sum.age_error_us.max(one.age_error_us);
            }
        }
    }
    println!("{name}: {sum:?}");
    sum
}

#[test]
fn styles() {
    let d = Style::default();
    let net = d.net;
    let probes = Net {
        probe_us: 1_000_000,
        ..net
    };
    let far = Net {
        delay_us: 20_000,
        jitter_us: 10_000,
        ..net
    };
    let lossy = Net { loss: 50, ..far };
    let slow = Style {
        think_us: 2_500_000,
        work_us: 2_500_000,
        ..d
    };
    let all = [
        ("usual", d),
        (
            "quick",
            Style {
                think_us: 0,
                work_us: 2_000,
                ..d
            },
        ),
        (
            "no delayed ack",
            Style {
                net: Net {
                    delayed_ack_us: 0,
                    ..net
                },
                ..d
            },
        ),
        (
            "large",
            Style {
                request: 150_000,
                answer: 400_000,
                ..d
            },
        ),
        (
            "streamed",
            Style {
                pieces: 10,
                gap_us: 200_000,
                ..d
            },
        ),
        ("greeting", Style { greeting: 80, ..d }),
        (
            "probes",
            Style {
                net: probes,
                ..slow
            },
        ),
        ("far", Style { net: far, ..d }),
        (
            "far large",
            Style {
                net: far,
                request: 150_000,
                answer: 400_000,
                ..d
            },
        ),
        ("lossy", Style { net: lossy, ..d }),
        (
            "lossy large",
            Style {
                net: lossy,
                request: 50_000,
                answer: 50_000,
                ..d
            },
        ),
        (
            "unread",
            Style {
                unread_us: 500_000,
                ..d
            },
        ),
    ];
    for (name, style) in all {
        watch_all(name, style, 0);
        watch_all(name, style, 7_777_777);
    }
}
