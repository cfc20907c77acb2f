//! The controller against a simulated service: a number of servers, a service time, and arrivals at a given load.

use std::collections::VecDeque;

use super::{Controller, Observation};
use crate::signal::{
    constants::MIN_ADMIT_RATIO,
    waits::{Known, Waits},
};

const TICK_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;
const SERVERS: usize = 4;
const SERVICE_NS: u64 = 50_000_000;
const TARGET_NS: u64 = SERVICE_NS / 2;
/// How long the service itself needs to reject a request.
const SHED_NS: u64 = 300_000;

/// Who rejects requests.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sheds {
    Service,
    /// It learns of a new admit ratio one tick late.
    Proxy,
    /// The service itself, by queue wait, under overload.
    ByWait,
}

struct Outcome {
    /// Requests per second.
    capacity: f64,
    /// The admit ratio after each tick.
    admit: Vec<f64>,
    /// Arrival and response time of each answered request, ns.
    responses: Vec<(u64, u64)>,
    /// Arrivals of rejected requests, ns.
    shed: Vec<u64>,
}

impl Outcome {
    fn goodput(&self, from_s: u64, to_s: u64) -> f64 {
        let span = from_s * SECOND_NS..to_s * SECOND_NS;
        let good = self.responses.iter().filter(|(came, took)| {
            span.contains(came) && *took <= 2 * SERVICE_NS + SERVICE_NS + TARGET_NS
        });
        good.count() as f64 / (to_s - from_s) as f64 / self.capacity
    }

    fn p99_ns(&self, from_s: u64) -> u64 {
        let mut took: Vec<u64> = self
            .responses
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

/// The arrival process.
#[derive(Clone, Copy, Debug)]
enum Arrivals {
    Evenly,
    Poisson,
}

#[derive(Clone, Copy)]
struct Scene {
    sheds: Sheds,
    process: Arrivals,
    servers: usize,
    /// The controller knows the utilization of the servers.
    knows_utilization: bool,
    seconds: u64,
}

/// Arrivals at `times_capacity(second)` of the capacity.
fn simulate(sheds: Sheds, seconds: u64, times_capacity: impl Fn(f64) -> f64) -> Outcome {
    let scene = Scene {
        sheds,
        process: Arrivals::Evenly,
        servers: SERVERS,
        knows_utilization: true,
        seconds,
    };
    simulate_with(scene, times_capacity, |_| SERVICE_NS)
}

/// The same, with a service time that depends on the second in which service begins.
fn simulate_with(
    scene: Scene,
    times_capacity: impl Fn(f64) -> f64,
    service_ns: impl Fn(f64) -> u64,
) -> Outcome {
    let Scene {
        sheds,
        process,
        servers,
        knows_utilization,
        seconds,
    } = scene;
    let (mut random, mut turn) = (1_u64, 0.0);
    let mut gap = || match process {
        // Within 5%, as on a real machine: exactly even arrivals would be in phase with the samples.
        Arrivals::Evenly => {
            turn = (turn + 0.618) % 1.0;
            0.95 + 0.1 * turn
        }
        Arrivals::Poisson => {
            // Knuth's MMIX generator; exponential gaps by inversion.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            -(((random >> 11) as f64 + 1.0) / (1_u64 << 53) as f64).ln()
        }
    };
    let mut outcome = Outcome {
        capacity: servers as f64 / (SERVICE_NS as f64 / 1e9),
        admit: Vec::new(),
        responses: Vec::new(),
        shed: Vec::new(),
    };
    let mut free_at = vec![0_u64; servers];
    let mut waiting: VecDeque<u64> = VecDeque::new();
    let (mut arrivals, mut departures, mut phase, mut next_ns) = (0_u64, 0_u64, 0.5, 0.0_f64);
    let mut controller: Option<Controller> = None;
    let (mut proxy_ratio, mut utilization) = (1.0, 0.0);
    let known = Known {
        service_time_ns: SERVICE_NS as f64,
        in_service: Some(servers as f64),
    };
    let waits = Waits::of(TARGET_NS, Some(known));
    let is_admitted = |phase: &mut f64, admit_ratio: f64| {
        *phase += admit_ratio;
        let admitted = *phase >= 1.0;
        *phase -= if admitted { 1.0 } else { 0.0 };
        admitted
    };
    for tick in 1..=seconds * 10 {
        let end_ns = tick * TICK_NS;
        let admit_ratio = controller.as_ref().map_or(1.0, Controller::admit_ratio);
        let is_shedding = controller.as_ref().is_some_and(Controller::is_shedding);
        // The workers are sampled at a moment of the tick that is unrelated to the arrivals.
        let (sample_ns, mut busy) = (
            end_ns - tick * 37_300_000 % TICK_NS / 100_000 * 100_000 - 100_000,
            0.0,
        );
        // Steps of 0.1 ms are fine enough for a service time of 50 ms.
        for now_ns in (end_ns - TICK_NS..end_ns).step_by(100_000) {
            while next_ns <= now_ns as f64 {
                next_ns += gap() * SERVICE_NS as f64
                    / servers as f64
                    / times_capacity(now_ns as f64 / 1e9);
                if sheds == Sheds::Proxy && !is_admitted(&mut phase, proxy_ratio) {
                    outcome.shed.push(now_ns);
                    continue;
                }
                arrivals += 1;
                waiting.push_back(now_ns);
            }
            if now_ns == sample_ns {
                let working = free_at.iter().filter(|free| **free > now_ns).count();
                busy = working as f64 / servers as f64;
            }
            for server in &mut free_at {
                while *server <= now_ns
                    && let Some(came) = waiting.pop_front()
                {
                    departures += 1;
                    let is_shed = match sheds {
                        Sheds::Service => !is_admitted(&mut phase, admit_ratio),
                        Sheds::Proxy => false,
                        Sheds::ByWait => is_shedding && now_ns - came > waits.max_queue_wait_ns,
                    };
                    if is_shed {
                        outcome.shed.push(came);
                        *server = now_ns + SHED_NS;
                        continue;
                    }
                    *server = now_ns + service_ns(now_ns as f64 / 1e9);
                    outcome.responses.push((came, *server - came));
                }
            }
        }
        utilization += (busy - utilization) * (1.0 - f64::exp(-1.0));
        let observation = Observation {
            now_ns: end_ns,
            delay_ns: waiting.front().map_or(0, |came| end_ns - came),
            target_delay_ns: waits.target_delay_ns,
            max_queue_wait_ns: waits.max_queue_wait_ns,
            // As in an accept queue: arrivals and departures are unknown if it was empty in between.
            is_counted: !waiting.is_empty(),
            arrivals,
            departures,
            utilization: knows_utilization.then_some(utilization),
        };
        proxy_ratio = admit_ratio;
        controller
            .get_or_insert_with(|| Controller::new(observation))
            .read(observation);
        outcome
            .admit
            .push(controller.as_ref().map_or(1.0, Controller::admit_ratio));
    }
    outcome
}

const ALL: [Sheds; 3] = [Sheds::Service, Sheds::Proxy, Sheds::ByWait];

#[test]
fn below_capacity_everything_is_admitted() {
    for sheds in ALL {
        for load in [0.5, 0.8, 0.95] {
            let outcome = simulate(sheds, 30, |_| load);
            assert!(
                outcome.shed.is_empty(),
                "{} shed at {load}",
                outcome.shed.len()
            );
        }
    }
}

#[test]
fn goodput_stays_near_capacity_at_three_times_the_load() {
    for sheds in ALL {
        for (load, least) in [(1.5, 0.95), (2.0, 0.95), (3.0, 0.90)] {
            let outcome = simulate(sheds, 30, |second| if second < 5.0 { 0.5 } else { load });
            let good = outcome.goodput(6, 29);
            assert!(good >= least, "goodput {good:.3} at {load}");
            // Twice the service time plus the target delay, once the backlog from before the first decision has drained. A proxy can
            // no longer reject that backlog, and learns of a decision one tick late.
            let (from_s, late_ns) = match sheds {
                Sheds::Service | Sheds::ByWait => (7, 0),
                Sheds::Proxy => (9, TARGET_NS),
            };
            let p99_ns = outcome.p99_ns(from_s);
            let most_ns = 2 * SERVICE_NS + TARGET_NS + late_ns;
            assert!(p99_ns <= most_ns, "p99 {p99_ns} ns at {load}, {sheds:?}");
        }
    }
}

#[test]
fn in_a_steady_state_the_admit_ratio_stays_within_5_percent_of_the_equilibrium() {
    for sheds in [Sheds::Service, Sheds::Proxy] {
        for load in [1.5, 2.0, 3.0] {
            let outcome = simulate(sheds, 40, |_| load);
            let (least, most) = outcome.admit_between(15, 40);
            let balance = 1.0 / load;
            assert!(
                least >= balance - 0.05 && most <= balance + 0.05,
                "{least:.3} to {most:.3} around {balance:.3}"
            );
        }
    }
}

#[test]
fn everything_is_admitted_again_soon_after_a_spike() {
    for sheds in [Sheds::Service, Sheds::Proxy] {
        let outcome = simulate(sheds, 30, |second| {
            if (10.0..15.0).contains(&second) {
                1.4
            } else {
                0.8
            }
        });
        let last = outcome.shed.iter().max().copied().unwrap_or(0);
        assert!(
            last < 15_700_000_000,
            "shed until {:.1} s, the spike ended at 15 s",
            last as f64 / 1e9
        );
        assert!(outcome.admit[170..].iter().all(|ratio| *ratio >= 1.0));
    }
}

#[test]
fn a_queue_without_departures_admits_the_minimum_after_a_second() {
    let observe = |tick: u64| Observation {
        now_ns: tick * TICK_NS,
        delay_ns: tick * TICK_NS,
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: true,
        arrivals: 20,
        departures: 0,
        utilization: None,
    };
    let mut controller = Controller::new(observe(0));
    for tick in 1..20 {
        controller.read(observe(tick));
        if tick == 5 {
            assert_eq!(
                controller.admit_ratio(),
                1.0,
                "that may be one long request"
            );
        }
    }
    assert!(
        (controller.admit_ratio() - MIN_ADMIT_RATIO).abs() < 1e-9,
        "{}",
        controller.admit_ratio()
    );
}

#[test]
fn a_stalled_queue_admits_the_minimum_and_recovers() {
    let observe = |tick: u64, delay_ms: u64, departures: u64| Observation {
        now_ns: tick * TICK_NS,
        delay_ns: delay_ms * 1_000_000,
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: true,
        arrivals: tick * 10,
        departures,
        utilization: None,
    };
    let mut controller = Controller::new(observe(0, 0, 0));
    for tick in 1..50 {
        controller.read(observe(tick, tick * 100, 0));
    }
    assert!(
        (controller.admit_ratio() - MIN_ADMIT_RATIO).abs() < 1e-9,
        "{}",
        controller.admit_ratio()
    );
    for tick in 50..250 {
        controller.read(observe(tick, 0, tick * 10));
    }
    assert!((controller.admit_ratio() - 1.0).abs() < 1e-9);
    assert!(controller.is_expired());
}

#[test]
fn goodput_stays_near_capacity_if_the_utilization_is_unknown() {
    for sheds in ALL {
        for (load, least) in [(1.5, 0.95), (2.0, 0.95), (3.0, 0.90)] {
            let scene = Scene {
                sheds,
                process: Arrivals::Evenly,
                servers: SERVERS,
                knows_utilization: false,
                seconds: 30,
            };
            let times = |second: f64| if second < 5.0 { 0.5 } else { load };
            let outcome = simulate_with(scene, times, |_| SERVICE_NS);
            let good = outcome.goodput(6, 29);
            assert!(good >= least, "goodput {good:.3} at {load}");
        }
    }
}

#[test]
fn goodput_with_poisson_arrivals_is_nearly_as_high() {
    for (sheds, servers, from_s, least, most_ns) in [
        (Sheds::Service, 4, 8, [0.86, 0.87, 0.88], 4 * SERVICE_NS),
        (Sheds::Proxy, 4, 8, [0.80, 0.85, 0.88], 7 * SERVICE_NS),
        (Sheds::ByWait, 4, 6, [0.95, 0.975, 0.97], 2 * SERVICE_NS),
        // With few servers no other one works while one is idle.
        (Sheds::ByWait, 2, 6, [0.95, 0.975, 0.97], 5 * SERVICE_NS / 2),
        (Sheds::ByWait, 1, 6, [0.88, 0.94, 0.97], 5 * SERVICE_NS / 2),
    ] {
        let scene = Scene {
            sheds,
            process: Arrivals::Poisson,
            servers,
            knows_utilization: true,
            seconds: 60,
        };
        for (load, least) in [1.5, 2.0, 3.0].into_iter().zip(least) {
            let times = |second: f64| if second < 5.0 { 0.5 } else { load };
            let outcome = simulate_with(scene, times, |_| SERVICE_NS);
            let good = outcome.goodput(from_s, 59);
            let p99_ns = outcome.p99_ns(from_s);
            assert!(
                good >= least,
                "goodput {good:.3} of {servers} at {load}, {sheds:?}"
            );
            assert!(
                p99_ns <= most_ns,
                "p99 {p99_ns} ns of {servers} at {load}, {sheds:?}"
            );
        }
    }
}

#[test]
fn shedding_by_queue_wait_ends_with_the_spike() {
    let spike = |second: f64| {
        if (10.0..15.0).contains(&second) {
            1.4
        } else {
            0.7
        }
    };
    let outcome = simulate(Sheds::ByWait, 30, spike);
    let last_ns = outcome.shed.iter().max().copied().unwrap_or(0);
    assert!(
        (14_000_000_000..15_200_000_000).contains(&last_ns),
        "shed until {last_ns} ns; the spike ended at 15 s"
    );
    // With Poisson arrivals there are short overloads now and then.
    let scene = Scene {
        sheds: Sheds::ByWait,
        process: Arrivals::Poisson,
        servers: SERVERS,
        knows_utilization: true,
        seconds: 90,
    };
    let outcome = simulate_with(scene, spike, |_| SERVICE_NS);
    let after = outcome.shed.iter().filter(|came| **came >= 16 * SECOND_NS);
    let (shed, came) = (after.count(), 0.7 * 80.0 * 74.0);
    assert!(
        shed as f64 <= 0.01 * came,
        "{shed} shed after the spike, of {came}"
    );
}

#[test]
fn the_equilibrium_follows_a_service_that_becomes_slower() {
    for (sheds, process, at_once) in [
        (Sheds::Service, Arrivals::Evenly, 0.4),
        (Sheds::Service, Arrivals::Poisson, 0.3),
        (Sheds::Proxy, Arrivals::Evenly, 0.2),
        (Sheds::ByWait, Arrivals::Evenly, 0.45),
        (Sheds::ByWait, Arrivals::Poisson, 0.45),
    ] {
        let slower = |second: f64| if second < 10.0 { 1 } else { 2 } * SERVICE_NS;
        let scene = Scene {
            sheds,
            process,
            servers: SERVERS,
            knows_utilization: true,
            seconds: 30,
        };
        let outcome = simulate_with(scene, |_| 1.5, slower);
        // Its capacity is halved. A response counts as good within 5 times the original service time.
        let good = |from_s: u64, to_s: u64| {
            let span = from_s * SECOND_NS..to_s * SECOND_NS;
            let good = outcome
                .responses
                .iter()
                .filter(|(came, took)| span.contains(came) && *took <= 5 * SERVICE_NS);
            good.count() as f64 / (to_s - from_s) as f64 / outcome.capacity
        };
        assert!(
            good(10, 13) >= at_once,
            "{:.3} at once, {process:?}",
            good(10, 13)
        );
        assert!(
            good(20, 29) >= 0.4,
            "{:.3} later, {process:?}",
            good(20, 29)
        );
    }
}

#[test]
fn an_idle_slow_service_behind_a_proxy_recovers_soon() {
    // Two departures per second, behind a proxy that admits one request in twenty. Then it becomes fast, and nothing waits.
    let observe = |tick: u64, is_over: bool| Observation {
        now_ns: tick * TICK_NS,
        delay_ns: if is_over { 9 * TARGET_NS } else { 0 },
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: is_over,
        arrivals: tick * 4,
        departures: tick / 5,
        utilization: Some(if is_over { 1.0 } else { 0.0 }),
    };
    let mut controller = Controller::new(observe(0, true));
    for tick in 1..50 {
        controller.read(observe(tick, true));
    }
    assert!(
        controller.admit_ratio() <= 2.0 * MIN_ADMIT_RATIO,
        "{}",
        controller.admit_ratio()
    );
    for tick in 50..80 {
        controller.read(observe(tick, false));
    }
    assert!(
        controller.admit_ratio() >= 1.0,
        "{}",
        controller.admit_ratio()
    );
}

#[test]
fn a_fast_service_that_stays_nearly_fully_utilized_recovers() {
    // 5,000 per second: there is hardly any Poisson noise.
    let observe = |tick: u64, is_over: bool| Observation {
        now_ns: tick * TICK_NS,
        delay_ns: if is_over { 3 * TARGET_NS } else { 0 },
        target_delay_ns: TARGET_NS,
        max_queue_wait_ns: TARGET_NS,
        is_counted: is_over,
        arrivals: tick * 600,
        departures: tick * 500,
        utilization: Some(if is_over { 1.0 } else { 0.95 }),
    };
    let mut controller = Controller::new(observe(0, true));
    for tick in 1..5 {
        controller.read(observe(tick, true));
    }
    assert!(
        controller.admit_ratio() < 0.9,
        "{}",
        controller.admit_ratio()
    );
    for tick in 5..105 {
        controller.read(observe(tick, false));
    }
    assert!(
        controller.admit_ratio() >= 1.0,
        "{}",
        controller.admit_ratio()
    );
}

#[test]
fn a_backlog_that_nobody_can_withdraw_does_not_lower_the_equilibrium() {
    // A backlog of one second, the delay of which stays although the minimum is admitted; then one of 200 ms.
    for (delay_ms, is_lowered) in [(1_000, false), (200, true)] {
        let observe = |tick: u64| Observation {
            now_ns: tick * TICK_NS,
            delay_ns: delay_ms * 1_000_000,
            target_delay_ns: TARGET_NS,
            max_queue_wait_ns: TARGET_NS,
            is_counted: tick <= 3,
            arrivals: tick * 20,
            departures: tick * 10,
            utilization: Some(1.0),
        };
        let mut controller = Controller::new(observe(0));
        for tick in 1..=25 {
            controller.read(observe(tick));
        }
        let now = controller.state().equilibrium_admit_ratio.unwrap();
        assert_eq!(now < 0.45, is_lowered, "{now} after {delay_ms} ms");
        assert!(is_lowered || (now - 0.5).abs() < 1e-9, "{now}");
    }
}
