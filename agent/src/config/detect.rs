//! `[detect]`: thresholds for all queues, for one kind, and for queues by name.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer, de};
use wildmatch::WildMatch;

use super::duration;
use crate::{
    detect::{Settings, SettingsFor},
    queue::{Kind, QueueKey},
};

/// The highest score that `warn` may ask for: a score of 10 is a standing delay of 20 targets.
const MAX_SCORE: f64 = 10.0;

/// `[detect.all]` applies to all queues, then `[detect.KIND]` to one kind, then `[[detect.queue]]` to queues by name.
/// Later ones override earlier ones key by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Detect {
    all: Thresholds,
    queue: Vec<QueueEntry>,
    kinds: BTreeMap<Kind, Thresholds>,
}

/// Written by hand: with serde's `flatten` an error would no longer name its line.
impl<'de> Deserialize<'de> for Detect {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tables;
        impl<'de> de::Visitor<'de> for Tables {
            type Value = Detect;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "tables named all, queue, or after a queue kind")
            }

            fn visit_map<M: de::MapAccess<'de>>(self, mut map: M) -> Result<Detect, M::Error> {
                let mut detect = Detect::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "all" => detect.all = map.next_value()?,
                        "queue" => detect.queue = map.next_value()?,
                        name => {
                            let kind = Kind::ALL.iter().find(|kind| kind.name() == name);
                            let kind = kind.ok_or_else(|| unknown(name))?;
                            detect.kinds.insert(*kind, map.next_value()?);
                        }
                    }
                }
                Ok(detect)
            }
        }
        fn unknown<E: de::Error>(name: &str) -> E {
            let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
            E::custom(format!(
                "unknown field `{name}`, expected all, queue, or one of {}",
                kinds.join(", ")
            ))
        }
        deserializer.deserialize_map(Tables)
    }
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Thresholds {
    /// The target delay, as in CoDel.
    #[serde(default, deserialize_with = "duration")]
    target: Option<Duration>,
    #[serde(default)]
    warn: Option<f64>,
    #[serde(default)]
    critical: Option<f64>,
    #[serde(default)]
    exit_ratio: Option<f64>,
    #[serde(default, deserialize_with = "duration")]
    window: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    dwell: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    clear_after: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    repeat_interval: Option<Duration>,
}

/// Thresholds of the queues whose name matches. (`flatten` would lose `deny_unknown_fields`.)
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct QueueEntry {
    /// A glob on the queue's name.
    name: String,
    #[serde(default)]
    kind: Option<Kind>,
    thresholds: Thresholds,
}

impl Detect {
    pub(super) fn check(&self) -> Result<()> {
        self.all.check().context("invalid [detect.all]")?;
        for (kind, thresholds) in &self.kinds {
            thresholds
                .check()
                .with_context(|| format!("invalid [detect.{}]", kind.name()))?;
        }
        for entry in &self.queue {
            entry
                .thresholds
                .check()
                .with_context(|| format!("invalid [[detect.queue]] {}", entry.name))?;
        }
        Ok(())
    }

    pub(super) fn settings_for(&self) -> SettingsFor {
        let mut by_kind = BTreeMap::new();
        for kind in Kind::ALL {
            let for_all = self.all.over(Settings::default());
            let of_kind = self.kinds.get(kind);
            by_kind.insert(
                *kind,
                of_kind.map_or(for_all, |of_kind| of_kind.over(for_all)),
            );
        }
        let by_name: Vec<(WildMatch, Option<Kind>, Thresholds)> = self
            .queue
            .iter()
            .map(|entry| {
                (
                    WildMatch::new(&entry.name),
                    entry.kind,
                    entry.thresholds.clone(),
                )
            })
            .collect();
        Arc::new(move |key: &QueueKey| {
            let of_kind = by_kind.get(&key.kind).copied().unwrap_or_default();
            by_name
                .iter()
                .filter(|(glob, kind, _)| {
                    glob.matches(key.name()) && kind.is_none_or(|kind| kind == key.kind)
                })
                .fold(of_kind, |settings, (.., thresholds)| {
                    thresholds.over(settings)
                })
        })
    }
}

impl Thresholds {
    fn check(&self) -> Result<()> {
        let settings = self.over(Settings::default());
        if !(0.0..=MAX_SCORE).contains(&settings.warn) || settings.warn <= 0.0 {
            bail!(
                "warn = {}: must be a score above 0 and at most {MAX_SCORE}, usually below 1",
                settings.warn
            );
        }
        if !(settings.warn..).contains(&settings.critical) {
            bail!(
                "critical = {} must not be below warn = {}",
                settings.critical,
                settings.warn
            );
        }
        if !(0.0..=1.0).contains(&settings.exit_ratio) {
            bail!(
                "exit_ratio = {}: must be between 0 and 1",
                settings.exit_ratio
            );
        }
        if settings.target_delay_ns == Some(0) {
            bail!("target must be greater than 0");
        }
        Ok(())
    }

    /// These thresholds where they are set, else those of `settings`.
    fn over(&self, mut settings: Settings) -> Settings {
        let set = |slot: &mut u64, value: Option<Duration>| {
            if let Some(value) = value {
                *slot = value.as_nanos() as u64;
            }
        };
        set(&mut settings.window_ns, self.window);
        settings.window_max_ns = settings.window_max_ns.max(settings.window_ns);
        set(&mut settings.dwell_ns, self.dwell);
        set(&mut settings.clear_after_ns, self.clear_after);
        set(&mut settings.repeat_interval_ns, self.repeat_interval);
        settings.target_delay_ns = self
            .target
            .map(|target| target.as_nanos() as u64)
            .or(settings.target_delay_ns);
        settings.warn = self.warn.unwrap_or(settings.warn);
        settings.critical = self.critical.unwrap_or(settings.critical);
        settings.exit_ratio = self.exit_ratio.unwrap_or(settings.exit_ratio);
        settings
    }
}
