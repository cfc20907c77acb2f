//! Results of all rounds, and their goals.

use serde_json::json;

use super::stage::{Guard, Service};
use crate::bench::{
    figure::{Figure, Goal},
    statistics::{Spread, between},
};

/// All measured values, in order of first appearance.
#[derive(Default)]
pub struct Samples {
    values: Vec<(Of, Vec<f64>)>,
    /// 99th percentile of the latency without overload, ms, per round.
    unloaded: Vec<(Service, f64)>,
}

/// Key of a figure.
#[derive(Clone, Copy, PartialEq)]
pub struct Of {
    pub service: Service,
    pub guard: Guard,
    pub when: When,
    pub what: What,
}

#[derive(Clone, Copy, PartialEq)]
pub enum When {
    /// Offered load relative to the capacity.
    Load(f64),
    /// After a CPU neighbour with this many threads started.
    Beside(u32),
    AfterSpike,
}

#[derive(Clone, Copy, PartialEq)]
pub enum What {
    Goodput,
    P99,
    Shed,
    Failed,
    Recovery,
}

impl When {
    pub fn name(self) -> String {
        match self {
            Self::Load(load) => format!("{load}× load"),
            Self::Beside(threads) => format!("beside {threads} threads"),
            Self::AfterSpike => "after a 1.4× spike".to_owned(),
        }
    }
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Goodput => "goodput",
            Self::P99 => "p99",
            Self::Shed => "shed",
            Self::Failed => "failed",
            Self::Recovery => "recovery",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Goodput | Self::Shed | Self::Failed => "%",
            Self::P99 => "ms",
            Self::Recovery => "s",
        }
    }
}

impl Samples {
    pub fn add(&mut self, of: Of, value: f64) {
        match self.values.iter_mut().find(|(known, _)| *known == of) {
            Some((_, values)) => values.push(value),
            None => self.values.push((of, vec![value])),
        }
    }

    pub fn add_unloaded(&mut self, service: Service, p99_ms: f64) {
        self.unloaded.push((service, p99_ms));
    }

    /// The median over all rounds.
    pub fn median(&self, of: Of) -> Option<f64> {
        let (_, values) = self.values.iter().find(|(known, _)| *known == of)?;
        between(values).map(|spread| spread.median)
    }

    /// Services that were measured.
    pub fn services(&self) -> Vec<Service> {
        let mut services: Vec<Service> = self.values.iter().map(|(of, _)| of.service).collect();
        services.dedup();
        services
    }

    pub fn has(&self, guard: Guard) -> bool {
        self.values.iter().any(|(of, _)| of.guard == guard)
    }

    pub fn figures(&self, rounds: u64) -> impl Iterator<Item = Figure> {
        self.values.iter().filter_map(move |(of, values)| {
            let value = between(values)?;
            let (when, what) = (of.when.name(), of.what.name());
            let (service, guard) = (of.service.name(), of.guard.name());
            Some(Figure {
                what: format!("{service}, {guard}, {when}: {what}"),
                keys: json!({"bench": "overload", "service": service, "workers": of.service.workers(), "guard": guard, "when": when, "measured": what,
                    "rounds": rounds}),
                unit: of.what.unit(),
                value,
                spread: if rounds > 1 { "minimum to maximum" } else { "one run" },
                goal: self.goal(*of, &value),
            })
        })
    }

    fn goal(&self, of: Of, value: &Spread) -> Option<Goal> {
        if !of.guard.is_ours() {
            return None;
        }
        match (of.when, of.what) {
            (When::Load(load), What::Goodput) if load >= 3.0 => Some(Goal::at_least(90.0, value)),
            (When::Load(load), What::Goodput) if load >= 1.5 => Some(Goal::at_least(95.0, value)),
            (When::Load(load), What::P99) if load > 1.0 => {
                let unloaded = self
                    .unloaded
                    .iter()
                    .filter(|(service, _)| *service == of.service);
                let unloaded: Vec<f64> = unloaded.map(|(_, p99_ms)| *p99_ms).collect();
                let target_ms = of.service.target_delay().as_secs_f64() * 1e3;
                let limit_ms = 2.0 * between(&unloaded)?.median + target_ms;
                Some(Goal::at_most(limit_ms.round(), value))
            }
            (When::AfterSpike, What::Recovery) if of.guard == Guard::Page => {
                Some(Goal::at_most(0.2, value))
            }
            _ => None,
        }
    }
}
