//! What one run consists of: which consumers play which scenarios, how long that takes, and what it needs.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Result, ensure};

use super::{
    Args,
    consumers::{CONSUMERS, Consumer, Kind, Play},
    outcome::Outcome,
    run::Run,
    scenario::{Phases, Scenario, ScenarioKind},
    service::Service,
    shedding,
};

/// Loads relative to the capacity; a plot also shows those without overload.
const OVERLOADS: [f64; 3] = [1.5, 2.0, 3.0];
pub const PLOTTED_LOADS: [f64; 6] = [0.5, 0.8, 1.0, 1.5, 2.0, 3.0];
const QUICK_LOADS: [f64; 1] = [2.0];
/// Loads beside a slow server, relative to its capacity plus that of a healthy one.
const SLOW_SERVER_LOADS: [f64; 2] = [0.75, 0.9];
/// Threads of the CPU neighbour. With the service's two they take half of the CPU, and two thirds.
const NEIGHBOURS: [u32; 2] = [2, 4];

/// One scenario of one consumer.
#[derive(Clone, Copy)]
pub struct Part {
    pub consumer: &'static Consumer,
    /// `None`: the consumer has instances of its own.
    pub service: Option<Service>,
    pub scenario: Scenario,
}

impl Part {
    pub fn play(&self, run: &mut Run) -> Result<Outcome> {
        match (&self.consumer.play, self.service) {
            (Play::Shed(shedding, _), Some(service)) => {
                shedding::play(run, service, *shedding, self.scenario)
            }
            (Play::Own(play), None) => play(run, self.scenario),
            _ => anyhow::bail!("{} is not measured like this", self.consumer.name),
        }
    }

    /// Service, consumer and scenario.
    pub fn title(&self) -> String {
        let service = self.service.map_or("", Service::name);
        let title = format!("{service} {}, {}", self.consumer.name, self.scenario.name());
        title.trim_start().to_owned()
    }
}

/// Whether `--quick` includes a consumer. Without a goal there is no verdict, and a day of an autoscaler takes minutes.
fn has_quick_verdict(consumer: &Consumer) -> bool {
    consumer.kind != Kind::Baseline && !consumer.scenarios.contains(&ScenarioKind::Day)
}

/// All parts that the arguments select, for one round.
pub fn select(args: &Args) -> Result<Vec<Part>> {
    let scenarios = scenarios(args);
    // A consumer's first scenario is the one that it is meant for.
    let is_quick = args.quick && args.scenario.is_empty();
    let of_consumer = |consumer: &'static Consumer, service: Option<Service>| {
        let plays = move |scenario: &Scenario| {
            consumer.scenarios.contains(&scenario.kind())
                && (!is_quick || consumer.scenarios.first() == Some(&scenario.kind()))
                && (scenario.kind() != ScenarioKind::LostCpu
                    || service.is_none_or(Service::computes))
        };
        let scenarios = scenarios.clone().into_iter().filter(plays);
        scenarios.map(move |scenario| Part {
            consumer,
            service,
            scenario,
        })
    };
    let wanted = |consumer: &&'static Consumer| {
        if args.consumer.is_empty() {
            !args.quick || has_quick_verdict(consumer)
        } else {
            args.consumer.iter().any(|name| name == consumer.name)
        }
    };
    let consumers = || CONSUMERS.iter().filter(wanted);
    let mut parts = Vec::new();
    for service in Service::ALL {
        for consumer in consumers() {
            let is_measured = consumer.services().contains(&service)
                && (!args.quick || consumer.services().first() == Some(&service));
            if is_measured && (args.service.is_empty() || args.service.contains(&service)) {
                parts.extend(of_consumer(consumer, Some(service)));
            }
        }
    }
    if args.service.is_empty() {
        for consumer in consumers().filter(|consumer| matches!(consumer.play, Play::Own(_))) {
            parts.extend(of_consumer(consumer, None));
        }
    }
    ensure!(
        !parts.is_empty(),
        "no selected consumer plays these scenarios with these services; the table is in docs/appendix/benchmarks.md"
    );
    Ok(parts)
}

fn scenarios(args: &Args) -> Vec<Scenario> {
    let loads: &[f64] = match args {
        _ if !args.load.is_empty() => &args.load,
        _ if args.quick => &QUICK_LOADS,
        _ if args.plot.is_some() => &PLOTTED_LOADS,
        _ => &OVERLOADS,
    };
    let mut scenarios: Vec<Scenario> = loads.iter().copied().map(Scenario::Load).collect();
    scenarios.push(Scenario::Spike);
    scenarios.extend(NEIGHBOURS.map(Scenario::LostCpu));
    let slow_server_loads = if args.quick {
        &SLOW_SERVER_LOADS[..1]
    } else {
        &SLOW_SERVER_LOADS
    };
    scenarios.extend(slow_server_loads.iter().copied().map(Scenario::SlowServer));
    scenarios.extend([
        Scenario::StalledServer,
        Scenario::Day,
        Scenario::AgentDies,
        Scenario::AgentReturns,
    ]);
    scenarios
        .retain(|scenario| args.scenario.is_empty() || args.scenario.contains(&scenario.kind()));
    scenarios
}

/// Services to be measured at rest.
pub fn services(parts: &[Part]) -> BTreeSet<Service> {
    parts.iter().filter_map(|part| part.service).collect()
}

/// Estimated duration of one round.
pub fn duration(parts: &[Part], phases: &Phases) -> Duration {
    let at_rest = services(parts).len() as u32 * phases.at_rest();
    let parts = parts.iter().map(|part| part.scenario.duration(phases));
    at_rest + parts.sum::<Duration>()
}

/// Parts of `cargo xtask setup` that must be there.
pub fn needs(parts: &[Part]) -> Vec<&'static str> {
    let mut needs = BTreeSet::new();
    for part in parts {
        needs.extend(part.consumer.needs);
        needs.extend(part.service.iter().flat_map(|service| service.needs()));
        if part.scenario.kind() == ScenarioKind::LostCpu {
            needs.insert("stress-ng");
        }
    }
    needs.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::setup;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn selected(line: &str) -> Vec<Part> {
        let line = Line::try_parse_from(format!("overload {line}").split_whitespace()).unwrap();
        select(&line.args).unwrap()
    }

    #[test]
    fn quick_reaches_a_verdict_on_every_consumer_within_five_minutes() {
        let parts = selected("--quick");
        for consumer in CONSUMERS {
            let own = parts
                .iter()
                .filter(|part| part.consumer.name == consumer.name);
            let expected = usize::from(has_quick_verdict(consumer));
            assert_eq!(own.count(), expected, "{}", consumer.name);
        }
        let estimate = duration(&parts, &Phases::quick());
        assert!(estimate <= Duration::from_secs(300), "{estimate:?}");
    }

    #[test]
    fn arguments_select_parts() {
        let titles =
            |line: &str| -> Vec<String> { selected(line).iter().map(Part::title).collect() };
        assert_eq!(
            titles("--consumer page-c --load 1.2 --scenario load --scenario agent-dies"),
            [
                "c-threads page-c, 1.2× load",
                "c-threads page-c, agent dies"
            ]
        );
        assert_eq!(
            titles("--consumer maxconn --scenario lost-cpu"),
            [
                "nginx-uwsgi maxconn, beside 2 threads",
                "nginx-uwsgi maxconn, beside 4 threads"
            ]
        );
        let line =
            Line::try_parse_from(["overload", "--consumer", "page-c", "--service", "node-http"]);
        assert!(select(&line.unwrap().args).is_err());
    }

    #[test]
    fn setup_knows_every_need() {
        let needs = CONSUMERS.iter().flat_map(|consumer| consumer.needs.iter());
        let needs = needs.chain(Service::ALL.iter().flat_map(|service| service.needs()));
        for need in needs.chain(&["stress-ng"]) {
            assert!(setup::has_part(need), "{need}");
        }
    }
}
