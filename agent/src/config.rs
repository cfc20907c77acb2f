//! The configuration file: TOML in which every key is checked.
//!
//! An unknown key, a number without its unit or a value out of range is an error that names the file, the line and the
//! key. [`mod@reference`] lists every key; the table in `docs/reference/configuration.md` is generated from it.
#![forbid(unsafe_code)]

mod app;
mod detect;
pub mod file;
pub mod reference;
pub mod show;
pub mod signal;

use std::{fmt, ops::RangeInclusive, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer, de};
use wildmatch::WildMatch;

use self::{app::App, detect::Detect, signal::Signal};
use crate::{
    collect::{AppSettings, Budget, DEFAULT_HOOK_BUDGET, Tier},
    detect::SettingsFor,
    messages::Table,
    target::{Selector, Spec},
};

/// The number of the line of a file that this byte is in.
fn line_at(text: &str, byte: usize) -> usize {
    let before = text.as_bytes().get(..byte).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// Bounds of `interval` and `focus_interval`: a sensible range, not a measured one. 60 s is also the longest `ttl`.
const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);
/// Bounds of `cpu_budget`, as a share of one core.
const CPU_BUDGET: RangeInclusive<f64> = 0.0005..=1.0;
/// Bounds of `hook_budget`, as a share of the machine's CPU time.
const HOOK_BUDGET: RangeInclusive<f64> = 0.0001..=0.5;
/// The longest duration accepted anywhere, 100 years: sums of two of them and a timestamp fit in 64 bits of nanoseconds.
const MAX_DURATION: Duration = Duration::from_hours(100 * 366 * 24);

/// A configuration file. Every key is optional.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default, deserialize_with = "duration")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    focus_interval: Option<Duration>,
    #[serde(default)]
    cpu_budget: Option<f64>,
    /// The OTLP endpoint. `--otlp` and the `OTEL_EXPORTER_OTLP_*` variables override it.
    #[serde(default)]
    pub otlp: Option<String>,
    #[serde(default, deserialize_with = "tier")]
    tier: Option<Tier>,
    #[serde(default)]
    hook_budget: Option<f64>,
    #[serde(default)]
    detect: Detect,
    #[serde(default, rename = "target")]
    targets: Vec<TargetEntry>,
    #[serde(default)]
    logs: Logs,
    #[serde(default)]
    pub signal: Signal,
    #[serde(default)]
    app: App,
}

/// `[logs]`: which logs are read for messages about full queues, and for which ones.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Logs {
    #[serde(default)]
    read: Option<bool>,
    #[serde(default, rename = "pattern")]
    patterns: Vec<LogPattern>,
}

/// `[[logs.pattern]]`: a message of the user's own services.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct LogPattern {
    name: String,
    /// Text anywhere in the line; `*` matches any text.
    pattern: String,
}

/// `[[target]]`: processes to watch.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct TargetEntry {
    #[serde(default)]
    service_name: Option<String>,
    #[serde(default)]
    pid: Option<u32>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    cgroup: Option<std::path::PathBuf>,
    #[serde(default)]
    user: Option<u32>,
}

impl Config {
    /// Reads and checks a file. The error names the file, the line and the key.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse_file(path, &file::read(path)?)
    }

    /// Reads and checks the text of the file at `path`, which errors name.
    pub fn parse_file(path: &Path, text: &str) -> Result<Self> {
        Self::parse(text).with_context(|| format!("invalid configuration {}", path.display()))
    }

    /// Reads and checks the text of a file.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if let Some(share) = self.cpu_budget
            && !CPU_BUDGET.contains(&share)
        {
            bail!(
                "cpu_budget = {share}: must be a share of one core, {} to {}",
                CPU_BUDGET.start(),
                CPU_BUDGET.end()
            );
        }
        if let Some(share) = self.hook_budget
            && !HOOK_BUDGET.contains(&share)
        {
            bail!(
                "hook_budget = {share}: must be a share of the machine's CPU time, {} to {}",
                HOOK_BUDGET.start(),
                HOOK_BUDGET.end()
            );
        }
        for (key, interval) in [
            ("interval", self.interval),
            ("focus_interval", self.focus_interval),
        ] {
            if let Some(interval) = interval {
                check_interval(interval).with_context(|| format!("invalid {key}"))?;
            }
        }
        self.detect.check()?;
        for (index, target) in self.targets.iter().enumerate() {
            target
                .spec()
                .with_context(|| format!("invalid [[target]] number {}", index + 1))?;
        }
        self.message_table().context("invalid [[logs.pattern]]")?;
        self.apps()?;
        let interval = Duration::from_nanos(self.budget().interval_ns);
        self.signal.check(interval).context("invalid [signal]")?;
        Ok(())
    }

    /// The targets in the file.
    pub fn specs(&self) -> Vec<Spec> {
        self.targets
            .iter()
            .filter_map(|target| target.spec().ok())
            .collect()
    }

    /// The messages to find in the logs of focused targets; `None` if logs must not be read.
    pub fn messages(&self) -> Result<Option<Table>> {
        let reads = self.logs.read.unwrap_or(true);
        reads.then(|| self.message_table()).transpose()
    }

    /// Which services are asked for their own queues, and how; `None` if none may be.
    pub fn apps(&self) -> Result<Option<AppSettings>> {
        self.app.settings().context("invalid [app]")
    }

    /// Whether the same services are asked in the same way.
    pub fn has_same_apps(&self, other: &Self) -> bool {
        self.app == other.app
    }

    fn message_table(&self) -> Result<Table> {
        let own = self.logs.patterns.iter();
        Table::new(own.map(|entry| (entry.name.as_str(), entry.pattern.as_str())))
    }

    /// The sampling intervals and the CPU budget.
    pub fn budget(&self) -> Budget {
        self.budget_or(Budget::default().cpu_share)
    }

    /// Like [`Config::budget`], with another default for `cpu_budget` (a share of one core).
    pub fn budget_or(&self, share: f64) -> Budget {
        let default = Budget::default();
        let ns = |duration: Option<Duration>, default: u64| {
            duration.map_or(default, |duration| duration.as_nanos() as u64)
        };
        Budget {
            interval_ns: ns(self.interval, default.interval_ns),
            focus_interval_ns: ns(self.focus_interval, default.focus_interval_ns),
            cpu_share: self.cpu_budget.unwrap_or(share),
        }
    }

    /// Whether hooks are attached.
    pub fn tier(&self) -> Tier {
        self.tier.unwrap_or_default()
    }

    /// The share of the machine's CPU time that hooks may take.
    pub fn hook_budget(&self) -> f64 {
        self.hook_budget.unwrap_or(DEFAULT_HOOK_BUDGET)
    }

    /// Whether the same logs are read, for the same messages.
    pub fn has_same_logs(&self, other: &Self) -> bool {
        self.logs == other.logs
    }

    /// Replaces the settings that only take effect at the start by those of `running`. Returns the keys that differed.
    pub fn keep_fixed(&mut self, running: &Self) -> Vec<&'static str> {
        let mut kept = Vec::new();
        if self.otlp != running.otlp {
            self.otlp.clone_from(&running.otlp);
            kept.push("otlp");
        }
        if self.tier() != running.tier() {
            kept.push("tier");
        }
        if self.hook_budget() != running.hook_budget() {
            kept.push("hook_budget");
        }
        self.tier = running.tier;
        self.hook_budget = running.hook_budget;
        kept.extend(self.signal.keep_fixed(&running.signal));
        kept
    }

    /// The detection thresholds of each queue.
    pub fn settings_for(&self) -> SettingsFor {
        self.detect.settings_for()
    }
}

impl TargetEntry {
    fn spec(&self) -> Result<Spec> {
        let selectors = [
            self.pid.map(Selector::Pid),
            self.name
                .as_deref()
                .map(|glob| Selector::Name(WildMatch::new(glob))),
            self.port.map(Selector::Port),
            self.cgroup.clone().map(Selector::Cgroup),
        ];
        let mut selectors = selectors.into_iter().flatten();
        match (selectors.next(), selectors.next()) {
            (Some(selector), None) => Ok(Spec {
                selector,
                service_name: self.service_name.clone(),
                user: self.user,
            }),
            (None, _) => bail!("no selector: give one of pid, name, port, cgroup"),
            (Some(_), Some(_)) => {
                bail!("more than one selector: give only one of pid, name, port, cgroup")
            }
        }
    }
}

/// Fails if a sampling interval is out of range.
pub fn check_interval(interval: Duration) -> Result<()> {
    if !INTERVAL.contains(&interval) {
        let (least, most) = (INTERVAL.start(), INTERVAL.end());
        bail!("{interval:?} is not between {least:?} and {most:?}");
    }
    Ok(())
}

/// Parses a duration with a unit: `100ms`, `30s`.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let duration = humantime::parse_duration(text).with_context(|| {
        format!("{text:?} is not a duration with a unit, such as 100ms, 30s, 5m")
    })?;
    if duration > MAX_DURATION {
        bail!("{text:?} is longer than a hundred years");
    }
    Ok(duration)
}

fn tier<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Tier>, D::Error> {
    let name = String::deserialize(deserializer)?;
    parse_tier(&name).map(Some).map_err(de::Error::custom)
}

/// Parses the name of a tier.
pub fn parse_tier(name: &str) -> Result<Tier, String> {
    Tier::named(name).ok_or_else(|| {
        let names = Tier::ALL.map(Tier::name).join(", ");
        format!("{name:?} is not a tier: give one of {names}")
    })
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    struct Text;
    impl de::Visitor<'_> for Text {
        type Value = Duration;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(
                f,
                "a duration with a unit in quotes, such as \"100ms\", \"30s\", \"5m\""
            )
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            parse_duration(text).map_err(|error| E::custom(format!("{error:#}")))
        }
    }
    deserializer.deserialize_str(Text).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::{Kind, QueueKey};

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn a_complete_file_is_parsed() {
        let config = Config::parse(
            r#"
            interval = "250ms"
            cpu_budget = 0.02
            otlp = "http://127.0.0.1:4318"
            [detect.all]
            warn = 0.6
            [detect.accept]
            target = "20ms"
            [[detect.queue]]
            name = "*:8080"
            kind = "accept"
            thresholds = { dwell = "1s" }
            [[target]]
            name = "uwsgi*"
            service_name = "shop"
            [[target]]
            port = 6379
            user = 112
            "#,
        )
        .unwrap();
        assert_eq!(config.budget().interval_ns, 250_000_000);
        assert_eq!(config.specs().len(), 2);
        assert_eq!(config.specs()[0].service_name.as_deref(), Some("shop"));
        assert_eq!(config.specs()[1].user, Some(112));
        let settings_for = config.settings_for();
        let key = |kind, name: &str| QueueKey::new(1, kind, name.into());
        let accept = settings_for(&key(Kind::Accept, "0.0.0.0:8080"));
        assert_eq!(
            (accept.warn, accept.target_delay_ns, accept.dwell_ns),
            (0.6, Some(20_000_000), 1_000_000_000)
        );
        let recv = settings_for(&key(Kind::Recv, ":8080"));
        assert_eq!(
            (recv.warn, recv.target_delay_ns, recv.dwell_ns),
            (0.6, None, 300_000_000)
        );
    }

    #[test]
    fn an_unknown_key_is_reported_with_its_line() {
        let text = error("interval = \"1s\"\nintervall = \"2s\"\n");
        assert!(
            text.contains("line 2") && text.contains("intervall"),
            "{text}"
        );
        let text = error("[detect.accept]\nwarm = 0.5\n");
        assert!(text.contains("line 2") && text.contains("warm"), "{text}");
    }

    #[test]
    fn an_invalid_unit_is_reported_with_its_line_and_a_valid_example() {
        for wrong in ["\"100 parsecs\"", "100", "\"100\""] {
            let text = error(&format!("\ninterval = {wrong}\n"));
            assert!(text.contains("line 2") && text.contains("100ms"), "{text}");
        }
    }

    #[test]
    fn a_target_has_exactly_one_selector() {
        assert!(error("[[target]]\nservice_name = \"x\"\n").contains("no selector"));
        assert!(error("[[target]]\npid = 1\nport = 80\n").contains("more than one selector"));
    }

    #[test]
    fn log_patterns_are_added_and_log_reading_can_be_disabled() {
        let config = Config::parse(
            "[[logs.pattern]]\nname = \"full\"\npattern = \"Warteschlange * voll\"\n",
        );
        let table = config.unwrap().messages().unwrap().unwrap();
        assert_eq!(table.find(b"warteschlange 7 VOLL"), Some("full"));
        let config = Config::parse("[logs]\nread = false\n").unwrap();
        assert!(config.messages().unwrap().is_none());
    }

    #[test]
    fn an_invalid_log_pattern_is_named() {
        let text = error("[[logs.pattern]]\nname = \"own\"\npattern = \"\"\n");
        assert!(
            text.contains("[[logs.pattern]]") && text.contains("own"),
            "{text}"
        );
        assert!(error("[[logs.pattern]]\nname = \"own\"\n").contains("pattern"));
        assert!(error("[logs]\nreed = true\n").contains("line 2"));
        let many = "[[logs.pattern]]\nname = \"own\"\npattern = \"some text\"\n".repeat(65);
        assert!(error(&many).contains("more than 64"));
    }

    #[test]
    fn the_tier_is_glance_unless_the_file_says_otherwise() {
        assert_eq!(Config::default().tier(), Tier::Glance);
        let config = Config::parse("tier = \"auto\"\nhook_budget = 0.02\n").unwrap();
        assert_eq!((config.tier(), config.hook_budget()), (Tier::Auto, 0.02));
        let text = error("\ntier = \"trace\"\n");
        assert!(
            text.contains("line 2") && text.contains("glance, auto, watch"),
            "{text}"
        );
        assert!(error("hook_budget = 0.9").contains("hook_budget"));
    }

    #[test]
    fn tier_and_hook_budget_change_only_with_a_restart() {
        let mut next = Config::parse("tier = \"watch\"\nhook_budget = 0.05\n").unwrap();
        let kept = next.keep_fixed(&Config::default());
        assert_eq!(kept, ["tier", "hook_budget"]);
        assert_eq!(next.tier(), Tier::Glance);
    }

    #[test]
    fn thresholds_out_of_range_are_rejected() {
        assert!(error("[detect.all]\nwarn = 0.95\n").contains("critical"));
        assert!(error("cpu_budget = 3").contains("cpu_budget"));
    }
}
