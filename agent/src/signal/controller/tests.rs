//! The controller against a model of a service: so many servers, a time per request, requests on a clock of their own.

use std::collections::VecDeque;

use super::{Controller, LEAST, Look};
use crate::signal::requests::{Known, Wait};

const TICK_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;
const SERVERS: usize = 4;
const SERVICE_NS: u64 = 50_000_000;
const TARGET_NS: u64 = SERVICE_NS / 2;
/// A request that is turned away by the service itself still takes this long.
const SHED_NS: u64 = 300_000;

/// Who turns requests away.
#[derive(Clone, Copy, PartialEq)]
enum Sheds {
    Service,
    /// It hears of a new share one tick late.
    Proxy,
    /// The service itself, by how long a request waited, while there is too much.
    ByWait,
}

struct Played {
    /// Requests that can be done in a second.
    capacity: f64,
    /// Admit after each tick.
    admit: Vec<f64>,
    /// When it came and how long it took, of each answered request, ns.
    answers: Vec<(u64, u64)>,
    /// When they came.
    shed: Vec<u64>,
}

impl Played {
    fn goodput(&self, from_s: u64, to_s: u64) -> f64 {
        let span = from_s * SECOND_NS..to_s * SECOND_NS;
        let good = self.answers.iter().filter(|(came, took)| {
            span.contains(came) && *took <= 2 * SERVICE_NS + SERVICE_NS + TARGET_NS
        });
        good.count() as f64 / (to_s - from_s) as f64 / self.capacity
    }

    fn p99_ns(&self, from_s: u64) -> u64 {
        let mut took: Vec<u64> = self
            .answers
            .iter()
            .filter(|(came, _)| *came >= from_s * SECOND_NS)
            .map(|(_, took)| *took)
            .collect();
        took.sort_unstable();
        took[took.len() * 99 / 100]
    }

    fn admit_between(&self, from_s: u64, to_s: u64) -> (f64, f64) {
        let of = &self.admit[(from_s * 10) as usize..(to_s * 10) as usize];
        (
            of.iter().copied().fold(f64::MAX, f64::min),
            of.iter().copied().fold(0.0, f64::max),
        )
    }
}

/// How requests come.
#[derive(Clone, Copy, Debug)]
enum Comes {
    Evenly,
    ByChance,
}

#[derive(Clone, Copy)]
struct Scene {
    sheds: Sheds,
    comes: Comes,
    servers: usize,
    seconds: u64,
}

/// Requests at `times_capacity` of the second they come in.
fn play(sheds: Sheds, seconds: u64, times_capacity: impl Fn(f64) -> f64) -> Played {
    let scene = Scene {
        sheds,
        comes: Comes::Evenly,
        servers: SERVERS,
        seconds,
    };
    play_with(scene, times_capacity, |_| SERVICE_NS)
}

/// And with a time for each request by the second in which it is begun.
fn play_with(
    scene: Scene,
    times_capacity: impl Fn(f64) -> f64,
    service_ns: impl Fn(f64) -> u64,
) -> Played {
    let Scene {
        sheds,
        comes,
        servers,
        seconds,
    } = scene;
    let mut chance = 1_u64;
    let mut gap = || match comes {
        Comes::Evenly => 1.0,
        Comes::ByChance => {
            // Knuth's MMIX generator; -ln of a number between 0 and 1.
            chance = chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            -(((chance >> 11) as f64 + 1.0) / (1_u64 << 53) as f64).ln()
        }
    };
    let mut played = Played {
        capacity: servers as f64 / (SERVICE_NS as f64 / 1e9),
        admit: Vec::new(),
        answers: Vec::new(),
        shed: Vec::new(),
    };
    let mut free_at = vec![0_u64; servers];
    let mut waiting: VecDeque<u64> = VecDeque::new();
    let (mut arrivals, mut departures, mut phase, mut next_ns) = (0_u64, 0_u64, 0.5, 0.0_f64);
    let mut controller: Option<Controller> = None;
    let (mut heard, mut lately) = (1.0, 0.0);
    let known = Known {
        time_ns: SERVICE_NS as f64,
        at_once: Some(servers as f64),
    };
    let wait = Wait::of(TARGET_NS, Some(known));
    let is_admitted = |phase: &mut f64, share: f64| {
        *phase += share;
        let admitted = *phase >= 1.0;
        *phase -= if admitted { 1.0 } else { 0.0 };
        admitted
    };
    for tick in 1..=seconds * 10 {
        let end_ns = tick * TICK_NS;
        let share = controller.as_ref().map_or(1.0, Controller::admit);
        let is_too_much = controller.as_ref().is_some_and(Controller::is_too_much);
        // Who works is looked at at a moment of the tick that has nothing to do with how requests come.
        let (look_ns, mut busy) = (
            end_ns - tick * 37_300_000 % TICK_NS / 100_000 * 100_000 - 100_000,
            0.0,
        );
        // In steps of a tenth of a millisecond: fine enough beside 50 ms, and nothing to get wrong.
        for now_ns in (end_ns - TICK_NS..end_ns).step_by(100_000) {
            while next_ns <= now_ns as f64 {
                next_ns += gap() * SERVICE_NS as f64
                    / servers as f64
                    / times_capacity(now_ns as f64 / 1e9);
                if sheds == Sheds::Proxy && !is_admitted(&mut phase, heard) {
                    played.shed.push(now_ns);
                    continue;
                }
                arrivals += 1;
                waiting.push_back(now_ns);
            }
            if now_ns == look_ns {
                let working = free_at.iter().filter(|free| **free > now_ns).count();
                busy = working as f64 / servers as f64;
            }
            for server in &mut free_at {
                while *server <= now_ns
                    && let Some(came) = waiting.pop_front()
                {
                    departures += 1;
                    let is_shed = match sheds {
                        Sheds::Service => !is_admitted(&mut phase, share),
                        Sheds::Proxy => false,
                        Sheds::ByWait => is_too_much && now_ns - came > wait.most_ns,
                    };
                    if is_shed {
                        played.shed.push(came);
                        *server = now_ns + SHED_NS;
                        continue;
                    }
                    *server = now_ns + service_ns(now_ns as f64 / 1e9);
                    played.answers.push((came, *server - came));
                }
            }
        }
        lately += (busy - lately) * (1.0 - f64::exp(-1.0));
        let look = Look {
            now_ns: end_ns,
            delay_ns: waiting.front().map_or(0, |came| end_ns - came),
            target_delay_ns: wait.fine_ns,
            max_queue_wait_ns: wait.most_ns,
            // As of an accept queue: what came and went while it was empty now and then is not known.
            is_counted: !waiting.is_empty(),
            arrivals,
            departures,
            utilization: Some(lately),
        };
        heard = share;
        controller
            .get_or_insert_with(|| Controller::new(look))
            .read(look);
        played
            .admit
            .push(controller.as_ref().map_or(1.0, Controller::admit));
    }
    played
}

const ALL: [Sheds; 3] = [Sheds::Service, Sheds::Proxy, Sheds::ByWait];

#[test]
fn below_capacity_everything_is_admitted() {
    for sheds in ALL {
        for load in [0.5, 0.8, 0.95] {
            let played = play(sheds, 30, |_| load);
            assert!(
                played.shed.is_empty(),
                "{} shed at {load}",
                played.shed.len()
            );
        }
    }
}

#[test]
fn at_twice_and_three_times_the_load_nearly_all_that_can_be_done_is_done_in_time() {
    for sheds in ALL {
        for (load, least) in [(1.5, 0.95), (2.0, 0.95), (3.0, 0.90)] {
            let played = play(sheds, 30, |second| if second < 5.0 { 0.5 } else { load });
            let good = played.goodput(6, 29);
            assert!(good >= least, "goodput {good:.3} at {load}");
            // Twice the time of a request on its own, and the delay that is fine; when what piled up before the first
            // decision is worked off. A proxy cannot turn that away any more, and hears of a decision one tick late.
            let (from_s, late_ns) = match sheds {
                Sheds::Service | Sheds::ByWait => (7, 0),
                Sheds::Proxy => (9, TARGET_NS),
            };
            let p99_ns = played.p99_ns(from_s);
            let most_ns = 2 * SERVICE_NS + TARGET_NS + late_ns;
            assert!(p99_ns <= most_ns, "p99 {p99_ns} ns at {load}");
        }
    }
}

#[test]
fn in_a_steady_state_the_share_keeps_within_5_percent_of_the_balance() {
    for sheds in [Sheds::Service, Sheds::Proxy] {
        for load in [1.5, 2.0, 3.0] {
            let played = play(sheds, 40, |_| load);
            let (least, most) = played.admit_between(15, 40);
            let balance = 1.0 / load;
            assert!(
                least >= balance - 0.05 && most <= balance + 0.05,
                "{least:.3} to {most:.3} around {balance:.3}"
            );
        }
    }
}

#[test]
fn after_a_spike_all_is_admitted_again_soon() {
    for sheds in [Sheds::Service, Sheds::Proxy] {
        let played = play(sheds, 30, |second| {
            if (10.0..15.0).contains(&second) {
                1.4
            } else {
                0.8
            }
        });
        let last = played.shed.iter().max().copied().unwrap_or(0);
        assert!(
            last < 15_700_000_000,
            "shed until {:.1} s, the spike ended at 15 s",
            last as f64 / 1e9
        );
        assert!(played.admit[170..].iter().all(|share| *share >= 1.0));
    }
}

#[test]
fn behind_work_that_nobody_takes_the_least_is_admitted_though_none_comes() {
    let look = |tick: u64| Look {
        now_ns: tick * TICK_NS,
        delay_ns: tick * TICK_NS,
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: true,
        arrivals: 20,
        departures: 0,
        utilization: None,
    };
    let mut controller = Controller::new(look(0));
    for tick in 1..20 {
        controller.read(look(tick));
        if tick == 5 {
            assert_eq!(
                controller.admit(),
                1.0,
                "that may be one long piece of work"
            );
        }
    }
    assert!(
        (controller.admit() - LEAST).abs() < 1e-9,
        "{}",
        controller.admit()
    );
}

#[test]
fn a_queue_that_nobody_serves_admits_the_least_and_recovers() {
    let look = |tick: u64, delay_ms: u64, departures: u64| Look {
        now_ns: tick * TICK_NS,
        delay_ns: delay_ms * 1_000_000,
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: true,
        arrivals: tick * 10,
        departures,
        utilization: None,
    };
    let mut controller = Controller::new(look(0, 0, 0));
    for tick in 1..50 {
        controller.read(look(tick, tick * 100, 0));
    }
    assert!(
        (controller.admit() - LEAST).abs() < 1e-9,
        "{}",
        controller.admit()
    );
    for tick in 50..150 {
        controller.read(look(tick, 0, tick * 10));
    }
    assert!((controller.admit() - 1.0).abs() < 1e-9);
    assert!(controller.is_idle());
}

#[test]
fn requests_that_come_by_chance_are_answered_in_time_nearly_as_often() {
    for (sheds, servers, from_s, least, most_ns) in [
        (Sheds::Service, 4, 8, [0.75; 3], 8 * SERVICE_NS),
        (Sheds::Proxy, 4, 8, [0.75; 3], 9 * SERVICE_NS),
        (Sheds::ByWait, 4, 6, [0.95, 0.975, 0.97], 2 * SERVICE_NS),
        // There is no other that works while one has nothing to do.
        (Sheds::ByWait, 2, 6, [0.95, 0.975, 0.97], 5 * SERVICE_NS / 2),
        (Sheds::ByWait, 1, 6, [0.88, 0.94, 0.97], 5 * SERVICE_NS / 2),
    ] {
        let scene = Scene {
            sheds,
            comes: Comes::ByChance,
            servers,
            seconds: 60,
        };
        for (load, least) in [1.5, 2.0, 3.0].into_iter().zip(least) {
            let times = |second: f64| if second < 5.0 { 0.5 } else { load };
            let played = play_with(scene, times, |_| SERVICE_NS);
            let good = played.goodput(from_s, 59);
            let p99_ns = played.p99_ns(from_s);
            assert!(good >= least, "goodput {good:.3} of {servers} at {load}");
            assert!(p99_ns <= most_ns, "p99 {p99_ns} ns of {servers} at {load}");
        }
    }
}

#[test]
fn by_the_wait_a_spike_is_over_when_it_ends() {
    let spike = |second: f64| {
        if (10.0..15.0).contains(&second) {
            1.4
        } else {
            0.7
        }
    };
    let played = play(Sheds::ByWait, 30, spike);
    let last_ns = played.shed.iter().max().copied().unwrap_or(0);
    assert!(
        (14_000_000_000..15_200_000_000).contains(&last_ns),
        "shed until {last_ns} ns; the spike ended at 15 s"
    );
    // By chance there is too much for a moment now and then.
    let scene = Scene {
        sheds: Sheds::ByWait,
        comes: Comes::ByChance,
        servers: SERVERS,
        seconds: 90,
    };
    let played = play_with(scene, spike, |_| SERVICE_NS);
    let after = played.shed.iter().filter(|came| **came >= 16 * SECOND_NS);
    let (shed, came) = (after.count(), 0.7 * 80.0 * 74.0);
    assert!(
        shed as f64 <= 0.01 * came,
        "{shed} shed after the spike, of {came}"
    );
}

#[test]
fn a_service_that_becomes_slower_gets_what_it_can_do_then_within_seconds() {
    for (sheds, comes, at_once) in [
        (Sheds::Service, Comes::Evenly, 0.4),
        (Sheds::Service, Comes::ByChance, 0.3),
        (Sheds::Proxy, Comes::Evenly, 0.25),
        (Sheds::ByWait, Comes::Evenly, 0.45),
        (Sheds::ByWait, Comes::ByChance, 0.45),
    ] {
        let slower = |second: f64| if second < 10.0 { 1 } else { 2 } * SERVICE_NS;
        let scene = Scene {
            sheds,
            comes,
            servers: SERVERS,
            seconds: 30,
        };
        let played = play_with(scene, |_| 1.5, slower);
        // It can do half of what it could; an answer is good within 5 times the time of a request, as it was.
        let good = |from_s: u64, to_s: u64| {
            let span = from_s * SECOND_NS..to_s * SECOND_NS;
            let good = played
                .answers
                .iter()
                .filter(|(came, took)| span.contains(came) && *took <= 5 * SERVICE_NS);
            good.count() as f64 / (to_s - from_s) as f64 / played.capacity
        };
        assert!(
            good(10, 13) >= at_once,
            "{:.3} at once, {comes:?}",
            good(10, 13)
        );
        assert!(good(20, 29) >= 0.4, "{:.3} later, {comes:?}", good(20, 29));
    }
}

#[test]
fn a_slow_service_that_has_nothing_to_do_behind_a_proxy_takes_all_again_soon() {
    // Two a second left, of which a proxy let one in twenty through; then it becomes fast, and nothing waits.
    let look = |tick: u64, is_over: bool| Look {
        now_ns: tick * TICK_NS,
        delay_ns: if is_over { 9 * TARGET_NS } else { 0 },
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: is_over,
        arrivals: tick * 4,
        departures: tick / 5,
        utilization: Some(if is_over { 1.0 } else { 0.0 }),
    };
    let mut controller = Controller::new(look(0, true));
    for tick in 1..50 {
        controller.read(look(tick, true));
    }
    assert!(controller.admit() <= 2.0 * LEAST, "{}", controller.admit());
    for tick in 50..80 {
        controller.read(look(tick, false));
    }
    assert!(controller.admit() >= 1.0, "{}", controller.admit());
}

#[test]
fn a_fast_service_that_is_nearly_as_busy_as_it_can_be_takes_all_of_it_again() {
    // 5,000 a second: chance explains very little.
    let look = |tick: u64, is_over: bool| Look {
        now_ns: tick * TICK_NS,
        delay_ns: if is_over { 3 * TARGET_NS } else { 0 },
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: is_over,
        arrivals: tick * 600,
        departures: tick * 500,
        utilization: Some(if is_over { 1.0 } else { 0.95 }),
    };
    let mut controller = Controller::new(look(0, true));
    for tick in 1..5 {
        controller.read(look(tick, true));
    }
    assert!(controller.admit() < 0.9, "{}", controller.admit());
    for tick in 5..105 {
        controller.read(look(tick, false));
    }
    assert!(controller.admit() >= 1.0, "{}", controller.admit());
}
