use std::sync::Arc;

use super::*;
use crate::{
    cause::Cause,
    emit::fixture::{
        GATEWAY, POSTGRES, SHOP, at, culprit, episode, gateway, no_baseline, sample, shop, targets,
        verdict,
    },
    event::{DrivenBy, Event, LoggedMessage},
    queue::Kind,
    sample::{
        Distribution, ExactWait, ExactWaitKind, HookReport, Notice, Thread, WaitParty, WorstWait,
    },
};

fn findings(episodes: Vec<Episode>) -> Findings {
    let mut findings = Findings::default();
    findings.take(&targets());
    for episode in episodes {
        findings.take(&Event::Episode(Box::new(episode)));
    }
    findings.observed(&sample(10), 40);
    let mut last = sample(20);
    last.scans.threads = true;
    let thread = |tid| Thread {
        tgid: 4711,
        tid,
        runnable: false,
        on_cpu: false,
        run_delay_ns: 0,
        dispatches: 0,
        cpu_ns: 0,
    };
    last.threads = (0..31).map(thread).collect();
    findings.observed(&last, 41);
    findings
}

fn text_of(findings: &Findings, colour: Colour, verbosity: Verbosity) -> String {
    let mut out = Vec::new();
    write(&mut out, findings, colour, verbosity).unwrap();
    String::from_utf8(out).unwrap()
}

fn text(episodes: Vec<Episode>) -> String {
    text_of(&findings(episodes), Colour::Never, Verbosity::Normal)
}

fn because(episode: Episode, verdict: Verdict) -> Episode {
    Episode {
        verdict: Some(Arc::new(verdict)),
        ..episode
    }
}

/// The first line.
fn headline(episode: Episode) -> String {
    text(vec![episode]).lines().next().unwrap().to_owned()
}

fn assert_has(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|it| it == *line), "no {line:?} in\n{text}");
    }
}

#[test]
fn the_report_has_the_verdict_then_the_evidence_then_the_advice() {
    let expected = r#"FULL      shop accept 127.0.0.1:8080: it waits for another service, postgres (812) at 127.0.0.1:5432
  evidence    4 threads of shop spent 97% waiting for postgres at 127.0.0.1:5432 in 13 s; postgres
              (815): 96% waiting for a row lock (reported by its process title); postgres (812):
              idle in a transaction for at least 8.2 s
  time        ███████████████████▍  97%  waiting for another service (3,120 samples)
              ▍                      2%  idle
              ▎                      1%  on CPU
  path        uwsgi (4711)          97% waiting for postgres at 127.0.0.1:5432
              └─ postgres (815)     96% waiting for a row lock (reported by its process title)
                 └─ postgres (812)  idle in a transaction for at least 8.2 s
  culprit     postgres (812)
  rates       in 40.0/s (baseline 39.8/s), out 4.1/s (baseline 40.0/s); consumer: departures below
              baseline
  queue       ▁▂▃▅▆██ max 101 of 100 connections; longest wait 2.3 s; 14 connections refused or
              dropped
  since       00:00:07.000Z, for 13 s; full 4.0 s after the warning
  log         23 times, first 9.0 s after the warning: *** uWSGI listen queue of socket
              "127.0.0.1:8080" (fd: 3) full !!! (100/100) *** (in /var/log/uwsgi/shop.log)
  confidence  high; next best explanation (21%): one of its own limits is too small
  advice      End the transaction of postgres (812), idle for 8.2 s (pg_terminate_backend(812) for
              PostgreSQL), or its client; adding workers here will not help.

  Other services in this incident, in the order in which their queues filled:
  00:00:09.000Z  CRITICAL  gateway accept 0.0.0.0:80: it waits for another service, postgres (812)
                           at 127.0.0.1:5432
                           1 thread of gateway spent 95% waiting for shop at 127.0.0.1:8080 in 10 s
                           nginx (90) → uwsgi (4711) → postgres (815) → postgres (812)
  trace       0af7651916cd43dd8448eb211c80319c

2 queues are not ok. Observed 2 services and 1 neighbour, 41 queues, 31 threads for 10 s.
"#;
    let text = text(vec![gateway(), shop()]);
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn a_report_without_findings_states_what_was_observed() {
    assert_eq!(
        text(vec![]),
        "All queues are ok. Observed 2 services and 1 neighbour, 41 queues, 31 threads for 10 s.\n"
    );
}

#[test]
fn queues_without_a_baseline_are_always_reported() {
    let mut found = findings(vec![]);
    found.set_no_baseline(vec![no_baseline()]);
    let expected = "\
All queues are ok. Observed 2 services and 1 neighbour, 41 queues, 31 threads for 10 s.
No baseline: 60 requests in flight at gateway :8000, half of them for 12 s or longer, with 31 calls
outstanding to python3 (812) at 127.0.0.1:9000 (32 connections). Diagnose again while the service is
healthy, or keep `tailback run` running to have a baseline.
";
    for verbosity in [Verbosity::Quiet, Verbosity::Normal] {
        assert_eq!(text_of(&found, Colour::Never, verbosity), expected);
    }
}

#[test]
fn quiet_prints_only_headlines() {
    let findings = findings(vec![gateway(), shop()]);
    let text = text_of(&findings, Colour::Never, Verbosity::Quiet);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("FULL      shop accept"), "{text}");
    assert!(lines[1].starts_with("CRITICAL  gateway accept"), "{text}");
    assert!(lines.last().unwrap().starts_with("2 queues"), "{text}");
    assert!(!text.contains("advice"), "{text}");
}

#[test]
fn verbose_prints_every_service_in_full() {
    let findings = findings(vec![gateway(), shop()]);
    let text = text_of(&findings, Colour::Never, Verbosity::Verbose);
    assert_eq!(text.matches("\n  advice").count(), 2, "{text}");
    assert_eq!(text.matches("\n  trace").count(), 1, "{text}");
}

#[test]
fn the_services_that_were_asked_about_come_before_a_neighbour_that_is_the_root_cause() {
    let database = because(
        Episode {
            level_max: Level::Warn,
            onset: at(12),
            ..episode("e3", POSTGRES, Kind::Lock, "0x7f00")
        },
        Verdict {
            cause: Cause::LockContention,
            path: verdict().path[2..].to_vec(),
            ..verdict()
        },
    );
    let text = text(vec![gateway(), shop(), database]);
    let order: Vec<usize> = ["shop accept", "gateway accept", "WARN      postgres lock"]
        .iter()
        .map(|words| {
            text.find(words)
                .unwrap_or_else(|| panic!("{words}: {text}"))
        })
        .collect();
    assert!(order.is_sorted(), "{text}");
}

#[test]
fn the_worst_incident_comes_first_and_one_that_is_over_last() {
    let of = |incident: &str, id: &str, level, ongoing| Episode {
        incident: incident.to_owned(),
        level_max: level,
        ongoing,
        ..episode(id, SHOP, Kind::Accept, id)
    };
    let text = text(vec![
        of("a", "over", Level::Full, false),
        of("b", "warned", Level::Warn, true),
        of("c", "critical", Level::Critical, true),
    ]);
    let heads: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("shop accept"))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(heads, ["CRITICAL", "WARN", "OVER"], "{text}");
    assert!(text.contains("2 queues are not ok."), "{text}");
}

#[test]
fn a_recovered_queue_is_reported_as_over_with_its_worst_level() {
    let over = Episode {
        ongoing: false,
        ..shop()
    };
    let text = text(vec![over]);
    assert!(
        text.starts_with("OVER      shop accept 127.0.0.1:8080 (was full): it waits"),
        "{text}"
    );
    assert!(text.contains("over after 13 s"), "{text}");
    assert!(text.contains("All queues are ok again."), "{text}");
}

#[test]
fn the_present_level_is_shown_not_the_worst() {
    let mut findings = findings(vec![]);
    findings.take(&Event::EpisodeOpened(Box::new(shop())));
    let state = crate::event::QueueState {
        at: at(18),
        key: shop().key,
        reading: crate::queue::Reading::default(),
        score: 0.8,
        level: Level::Warn,
        arrivals_per_s: None,
        departures_per_s: None,
        time_to_full_ns: None,
    };
    findings.take(&Event::Level {
        state,
        from: Level::Full,
        to: Level::Warn,
        episode: "e1".to_owned(),
    });
    findings.take(&Event::Episode(Box::new(shop())));
    let text = text_of(&findings, Colour::Never, Verbosity::Quiet);
    assert!(
        text.starts_with("WARN      shop accept 127.0.0.1:8080 (was full): "),
        "{text}"
    );
    assert_eq!(findings.critical().count(), 1);
}

#[test]
fn other_queues_of_a_service_are_listed_below_its_worst() {
    let recv = Episode {
        level_max: Level::Warn,
        depth_max: 4_200,
        empty_share: 0.0,
        limit: None,
        unit: "bytes",
        ..episode("e5", SHOP, Kind::Recv, "127.0.0.1:8080")
    };
    let lock = because(
        Episode {
            level_max: Level::Warn,
            ongoing: false,
            depth_max: 3,
            empty_share: 0.0,
            limit: None,
            ..episode("e6", SHOP, Kind::Lock, "0x7f00")
        },
        Verdict {
            cause: Cause::LockContention,
            culprit: None,
            ..verdict()
        },
    );
    let text = text(vec![recv, shop(), lock]);
    assert_has(
        &text,
        &[
            "  also        recv 127.0.0.1:8080, warn, max 4.2 kB",
            "  also        lock 0x7f00, over, max 3 threads: its threads wait for a lock",
        ],
    );
}

#[test]
fn an_episode_without_a_verdict_shows_its_numbers() {
    let young = episode("e1", SHOP, Kind::Accept, "127.0.0.1:8080");
    assert_eq!(
        headline(young.clone()),
        "FULL      shop accept 127.0.0.1:8080: cause not known yet"
    );
    assert_has(
        &text(vec![young]),
        &[
            "  evidence    up to 101 of 100 connections; longest wait 2.3 s",
            "  advice      Inspect what its workers wait for.",
        ],
    );
}

#[test]
fn a_diagnosis_that_started_mid_incident_reports_no_baseline() {
    let text = text(vec![because(
        Episode {
            baseline_arrival_rate: None,
            baseline_service_rate: None,
            driven_by: DrivenBy::Unknown,
            ..shop()
        },
        Verdict {
            driven_by: DrivenBy::Unknown,
            ..verdict()
        },
    )]);
    assert_has(
        &text,
        &["  rates       in 40.0/s, out 4.1/s; no baseline (incident started before sampling)"],
    );
}

#[test]
fn small_shares_are_summed_and_no_samples_print_no_bars() {
    let shares = vec![
        (Activity::Lock, 0.5),
        (Activity::OnCpu, 0.2),
        (Activity::Idle, 0.1),
        (Activity::Disk, 0.08),
        (Activity::Asleep, 0.07),
        (Activity::Inside, 0.05),
    ];
    let with = |shares| {
        because(
            shop(),
            Verdict {
                shares,
                ..verdict()
            },
        )
    };
    let long = text(vec![with(shares)]);
    let all = "██▍                   12%  other";
    assert_has(&long, &[&format!("              {all}")]);
    assert!(!long.contains("asleep"), "{long}");
    assert!(!text(vec![with(vec![])]).contains("  time "));
}

#[test]
fn a_wait_chain_that_returns_to_a_process_is_marked_as_a_cycle() {
    let mut path = verdict().path;
    path.push(path[0].clone());
    let text = text(vec![because(shop(), Verdict { path, ..verdict() })]);
    let line =
        "                    └─ uwsgi (4711)  97% waiting for postgres at 127.0.0.1:5432 (cycle)";
    assert_has(&text, &[line]);
}

#[test]
fn a_log_message_may_precede_the_warning() {
    let mut verdict = verdict();
    verdict.messages[0].lead_ns = Some(-1_500_000_000);
    verdict.messages[0].count = 1;
    let text = text(vec![because(shop(), verdict)]);
    assert!(
        text.contains("once, first 1.5 s before the warning: ***"),
        "{text}"
    );
}

#[test]
fn an_affected_service_with_another_culprit_keeps_its_own_advice() {
    let other = Verdict {
        culprit: Some(crate::event::Culprit {
            pid: Some(9),
            name: "stress (9)".to_owned(),
            ..culprit()
        }),
        advice: "Move stress elsewhere.".to_owned(),
        ..verdict()
    };
    let text = text(vec![shop(), because(gateway(), other)]);
    assert!(text.contains("   Move stress elsewhere.\n"), "{text}");
}

#[test]
fn colour_changes_nothing_but_escape_sequences() {
    let findings = findings(vec![gateway(), shop()]);
    let plain = text_of(&findings, Colour::Never, Verbosity::Normal);
    let mut coloured = text_of(&findings, Colour::Always, Verbosity::Normal);
    assert!(coloured.contains(style(Level::Full)), "{coloured}");
    for style in [Level::Ok, Level::Warn, Level::Critical, Level::Full].map(style) {
        coloured = coloured.replace(style, "");
    }
    for style in [DIM, BOLD, OFF] {
        coloured = coloured.replace(style, "");
    }
    assert_eq!(coloured, plain);
}

#[test]
fn every_thread_state_fits_the_width_with_any_number_of_samples() {
    for activity in Activity::ALL {
        let verdict = Verdict {
            shares: vec![(*activity, 1.0)],
            samples: 123_456_789,
            ..verdict()
        };
        let episode = episode("e1", SHOP, Kind::Accept, "0.0.0.0:80");
        let text = text(vec![because(episode, verdict)]);
        assert!(text.contains("(123,456,789 samples)"), "{text}");
        let long = text.lines().find(|line| width(line) > 100);
        assert_eq!(long, None);
    }
}

#[test]
fn hostile_names_fit_the_width_and_are_escaped() {
    let evil = "\x1b[2J\n漢字 ".repeat(300);
    let path = (0..30)
        .map(|pid| Hop {
            target: None,
            pid: Some(pid),
            name: evil.clone(),
            state: evil.clone(),
            cause: Cause::Unknown,
        })
        .collect();
    let hostile = Verdict {
        path,
        culprit: Some(crate::event::Culprit {
            name: evil.clone(),
            endpoint: Some(evil.clone()),
            container: Some(evil.clone()),
            ..culprit()
        }),
        evidence: evil.clone(),
        advice: evil.clone(),
        messages: vec![
            LoggedMessage {
                line: evil.clone(),
                path: evil.clone(),
                ..verdict().messages[0].clone()
            };
            9
        ],
        shares: vec![(Activity::Lock, f64::NAN), (Activity::Disk, 1e300)],
        ..verdict()
    };
    let name = |target, id: &str| episode(id, target, Kind::Accept, &evil);
    let mut findings = findings(vec![
        because(name(SHOP, "e1"), hostile.clone()),
        because(name(GATEWAY, "e2"), hostile),
    ]);
    findings.take(&Event::Notice {
        at: at(3),
        notice: Notice {
            code: "evil".to_owned(),
            text: evil,
        },
    });
    for verbosity in [Verbosity::Quiet, Verbosity::Normal, Verbosity::Verbose] {
        let text = text_of(&findings, Colour::Never, verbosity);
        for line in text.lines() {
            assert!(width(line) <= COLUMNS, "{line}");
            assert!(!line.contains(char::is_control), "{line:?}");
        }
    }
}

#[test]
fn episodes_are_kept_up_to_a_limit_and_the_rest_is_counted() {
    let mut findings = findings(vec![shop()]);
    for i in 0..2_000 {
        let short = Episode {
            ongoing: false,
            level_max: Level::Warn,
            ..episode(&format!("s{i}"), GATEWAY, Kind::Recv, "q")
        };
        findings.take(&Event::Episode(Box::new(short)));
    }
    assert_eq!(findings.episodes().count(), 1_000);
    assert!(findings.episodes().any(|episode| episode.id == "e1"));
    let text = text_of(&findings, Colour::Never, Verbosity::Quiet);
    assert!(
        text.contains("1,001 episodes that are over are not shown."),
        "{text}"
    );
}

#[test]
fn exited_services_keep_their_name_if_they_appear_in_findings() {
    let mut findings = findings(vec![shop()]);
    findings.take(&Event::Targets {
        at: at(19),
        targets: vec![],
    });
    let text = text_of(&findings, Colour::Never, Verbosity::Quiet);
    assert!(text.starts_with("FULL      shop accept"), "{text}");
    let known = findings.targets().keys();
    // The gateway is not part of any finding.
    assert!(known.eq(&[SHOP, POSTGRES]));
}

#[test]
fn progress_is_one_short_line() {
    let elapsed = Duration::from_millis(3_400);
    assert_eq!(
        progress(&findings(vec![shop()]), elapsed, Duration::from_secs(10)),
        "Observing: 3 of 10 s; 2 services, 41 queues; 1 not ok"
    );
}

#[test]
fn exact_waits_are_reported_with_the_estimate_beside_them_and_who_caused_the_longest() {
    let wait = |kind, call, object, waits: &[(u64, u64)]| ExactWait {
        target: SHOP,
        tgid: 4711,
        kind,
        call,
        object,
        distribution: Distribution {
            count: waits.iter().map(|(_, count)| count).sum(),
            total_ns: waits.iter().map(|(ns, count)| ns * count).sum(),
            max_ns: waits.iter().map(|(ns, _)| *ns).max().unwrap_or(0),
            waits: waits.to_vec(),
        },
        worst: Some(WorstWait {
            wait_ns: 12_000_000,
            tid: 4712,
            cpu: 1,
            culprit: Some(WaitParty {
                tgid: 900,
                tid: 901,
                comm: "backup".to_owned(),
            }),
            culprit_ns: 8_000_000,
            ..WorstWait::default()
        }),
        ..ExactWait::default()
    };
    let with_hooks = |seconds, run_delay_ns, dispatches| {
        let mut sample = sample(seconds);
        sample.hooks = Some(HookReport {
            is_attached: true,
            share: 0.0012,
            budget: 0.01,
            interval_ns: 1_000_000_000,
            waits: vec![
                wait(
                    ExactWaitKind::Woken,
                    None,
                    None,
                    &[(1_000_000, 9), (12_000_000, 1)],
                ),
                wait(ExactWaitKind::Blocked, Some(0), Some(7), &[(5_000_000, 2)]),
            ],
            ..HookReport::default()
        });
        sample.scans.threads = true;
        sample.threads = vec![Thread {
            tgid: 4711,
            tid: 4712,
            runnable: false,
            on_cpu: false,
            run_delay_ns,
            dispatches,
            cpu_ns: 0,
        }];
        sample
    };
    let mut findings = Findings::default();
    findings.take(&targets());
    findings.observed(&with_hooks(10, 0, 0), 40);
    findings.observed(&with_hooks(11, 20_000_000, 10), 40);
    let text = text_of(&findings, Colour::Never, Verbosity::Verbose);
    // Wherever the lines are wrapped.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Exact waits of the threads of shop:",
        "CPU wait 20 waits, mean 2.1",
        "(estimate from samples: mean 2",
        "backup (901)",
        "read fd 7: ",
        "took 0.12% of the machine",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let normal = text_of(&findings, Colour::Never, Verbosity::Normal);
    assert!(!normal.contains("backup"), "{normal}");
}
