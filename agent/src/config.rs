//! The configuration file: TOML, every key checked.
#![forbid(unsafe_code)]

pub mod signal;

use std::{collections::BTreeMap, fmt, fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer, de};
use wildmatch::WildMatch;

use self::signal::Signal;
use crate::{
    collect::Budget,
    detect::{Settings, SettingsFor},
    messages::Table,
    queue::{Kind, QueueKey},
    target::{Selector, Spec},
};

/// What a file may say. Everything is optional; what is absent has the default.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Between looks: `"100ms"`.
    #[serde(default, deserialize_with = "duration")]
    interval: Option<Duration>,
    /// Between looks at a suspicious target, at best: `"10ms"`.
    #[serde(default, deserialize_with = "duration")]
    focus_interval: Option<Duration>,
    /// Share of one core that the agent may take: `0.01`.
    #[serde(default)]
    cpu_budget: Option<f64>,
    /// OTLP endpoint; the `OTEL_EXPORTER_OTLP_*` variables and `--otlp` come before it.
    #[serde(default)]
    pub otlp: Option<String>,
    #[serde(default)]
    detect: Detect,
    #[serde(default, rename = "target")]
    targets: Vec<TargetEntry>,
    #[serde(default)]
    messages: Messages,
    #[serde(default, rename = "message")]
    own_messages: Vec<MessageEntry>,
    /// Who hears of the pressure.
    #[serde(default)]
    pub signal: Signal,
}

/// What services say of full queues in their own logs.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Messages {
    /// Whether logs are read at all.
    #[serde(default)]
    read: Option<bool>,
}

/// A line to look for.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageEntry {
    name: String,
    /// Text that the line holds; `*` stands for anything.
    pattern: String,
}

/// `[detect]`: for all queues, then `[detect.accept]` for a kind, then `[[detect.queue]]` for queues by name.
#[derive(Debug, Default)]
struct Detect {
    all: Thresholds,
    queue: Vec<QueueEntry>,
    kinds: BTreeMap<Kind, Thresholds>,
}

/// By hand: with `flatten` an error would no longer name its line.
impl<'de> Deserialize<'de> for Detect {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tables;
        impl<'de> de::Visitor<'de> for Tables {
            type Value = Detect;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "tables named all, queue, or as a kind of queue")
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
                "unknown field `{name}`: all, queue, or one of {}",
                kinds.join(", ")
            ))
        }
        deserializer.deserialize_map(Tables)
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Thresholds {
    /// The standing delay that is fine.
    #[serde(default, deserialize_with = "duration")]
    target: Option<Duration>,
    #[serde(default)]
    warn: Option<f64>,
    #[serde(default)]
    critical: Option<f64>,
    #[serde(default)]
    leave: Option<f64>,
    #[serde(default, deserialize_with = "duration")]
    window: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    dwell: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    clear: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    repeat_interval: Option<Duration>,
}

/// Thresholds of the queues whose name matches. (`flatten` would lose `deny_unknown_fields`.)
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueEntry {
    /// Glob on the queue's name.
    name: String,
    #[serde(default)]
    kind: Option<Kind>,
    thresholds: Thresholds,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetEntry {
    /// What the service shall be called.
    #[serde(default)]
    called: Option<String>,
    #[serde(default)]
    pid: Option<u32>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    cgroup: Option<std::path::PathBuf>,
}

impl Config {
    /// Reads and checks a file. An error names the file, the line and the key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::parse(&text)
            .with_context(|| format!("the configuration {} cannot be used", path.display()))
    }

    /// Reads and checks the text of a file.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if let Some(share) = self.cpu_budget
            && !(0.0005..=1.0).contains(&share)
        {
            bail!("cpu_budget = {share}: a share of one core between 0.0005 and 1");
        }
        for (key, interval) in [
            ("interval", self.interval),
            ("focus_interval", self.focus_interval),
        ] {
            if let Some(interval) = interval {
                check_interval(interval).with_context(|| format!("{key} cannot be used"))?;
            }
        }
        let detect = &self.detect;
        detect.all.check().context("[detect.all] cannot be used")?;
        for (kind, thresholds) in &detect.kinds {
            thresholds
                .check()
                .with_context(|| format!("[detect.{}] cannot be used", kind.name()))?;
        }
        for entry in &detect.queue {
            entry
                .thresholds
                .check()
                .with_context(|| format!("[[detect.queue]] {} cannot be used", entry.name))?;
        }
        for (index, target) in self.targets.iter().enumerate() {
            target
                .spec()
                .with_context(|| format!("[[target]] number {} cannot be used", index + 1))?;
        }
        self.table().context("[[message]] cannot be used")?;
        let interval = Duration::from_nanos(self.budget().interval_ns);
        self.signal
            .check(interval)
            .context("[signal] cannot be used")?;
        Ok(())
    }

    /// The targets that the file names.
    pub fn specs(&self) -> Vec<Spec> {
        self.targets
            .iter()
            .filter_map(|target| target.spec().ok())
            .collect()
    }

    /// What to look for in the logs of suspicious targets; `None`: they are not to be read.
    pub fn messages(&self) -> Result<Option<Table>> {
        let reads = self.messages.read.unwrap_or(true);
        reads.then(|| self.table()).transpose()
    }

    fn table(&self) -> Result<Table> {
        let own = self.own_messages.iter();
        Table::new(own.map(|entry| (entry.name.as_str(), entry.pattern.as_str())))
    }

    /// How often to look and what that may cost.
    pub fn budget(&self) -> Budget {
        self.budget_or(Budget::default().share)
    }

    /// The same, with a share of one core that applies where the file names none.
    pub fn budget_or(&self, share: f64) -> Budget {
        let default = Budget::default();
        let ns = |duration: Option<Duration>, default: u64| {
            duration.map_or(default, |duration| duration.as_nanos() as u64)
        };
        Budget {
            interval_ns: ns(self.interval, default.interval_ns),
            hot_interval_ns: ns(self.focus_interval, default.hot_interval_ns),
            share: self.cpu_budget.unwrap_or(share),
        }
    }

    /// The thresholds of each queue.
    pub fn settings_for(&self) -> SettingsFor {
        let mut by_kind = BTreeMap::new();
        for kind in Kind::ALL {
            let for_all = self.detect.all.over(Settings::default());
            let of_kind = self.detect.kinds.get(kind);
            by_kind.insert(
                *kind,
                of_kind.map_or(for_all, |of_kind| of_kind.over(for_all)),
            );
        }
        let named: Vec<(WildMatch, Option<Kind>, Thresholds)> = self
            .detect
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
            named
                .iter()
                .filter(|(glob, kind, _)| {
                    glob.matches(&key.name) && kind.is_none_or(|kind| kind == key.kind)
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
        if !(0.0..=10.0).contains(&settings.warn) || settings.warn <= 0.0 {
            bail!("warn = {}: a score above 0, usually below 1", settings.warn);
        }
        if !(settings.warn..).contains(&settings.critical) {
            bail!(
                "critical = {} is below warn = {}",
                settings.critical,
                settings.warn
            );
        }
        if !(0.0..=1.0).contains(&settings.leave) {
            bail!(
                "leave = {}: a part of the entry score, 0 to 1",
                settings.leave
            );
        }
        if settings.target_ns == Some(0) {
            bail!("target = 0: a delay of nothing cannot be kept");
        }
        Ok(())
    }

    fn over(&self, mut settings: Settings) -> Settings {
        let set = |slot: &mut u64, value: Option<Duration>| {
            if let Some(value) = value {
                *slot = value.as_nanos() as u64;
            }
        };
        set(&mut settings.window_ns, self.window);
        settings.window_max_ns = settings.window_max_ns.max(settings.window_ns);
        set(&mut settings.dwell_ns, self.dwell);
        set(&mut settings.clear_ns, self.clear);
        set(&mut settings.tell_every_ns, self.repeat_interval);
        settings.target_ns = self
            .target
            .map(|target| target.as_nanos() as u64)
            .or(settings.target_ns);
        settings.warn = self.warn.unwrap_or(settings.warn);
        settings.critical = self.critical.unwrap_or(settings.critical);
        settings.leave = self.leave.unwrap_or(settings.leave);
        settings
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
                called: self.called.clone(),
            }),
            (None, _) => bail!("it names no process: give one of pid, name, port, cgroup"),
            (Some(_), Some(_)) => {
                bail!("it names processes in two ways: give one of pid, name, port, cgroup")
            }
        }
    }
}

/// Shortest and longest sensible interval.
pub fn check_interval(interval: Duration) -> Result<()> {
    if interval < Duration::from_millis(1) || interval > Duration::from_secs(60) {
        bail!("{interval:?} is not between 1ms and 60s");
    }
    Ok(())
}

const MAX_DURATION: Duration = Duration::from_hours(100 * 366 * 24);

/// A duration with a unit: `100ms`, `30s`.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let duration = humantime::parse_duration(text).with_context(|| {
        format!("{text:?} is not a duration with a unit, such as 100ms, 30s, 5m")
    })?;
    // Sums of such durations and times stay within 64 bits of nanoseconds.
    if duration > MAX_DURATION {
        bail!("{text:?} is longer than a hundred years");
    }
    Ok(duration)
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

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn a_whole_file_is_understood() {
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
            called = "shop"
            [[target]]
            port = 6379
            "#,
        )
        .unwrap();
        assert_eq!(config.budget().interval_ns, 250_000_000);
        assert_eq!(config.specs().len(), 2);
        assert_eq!(config.specs()[0].called.as_deref(), Some("shop"));
        let settings_for = config.settings_for();
        let key = |kind, name: &str| QueueKey {
            target: 1,
            kind,
            name: name.to_owned(),
        };
        let accept = settings_for(&key(Kind::Accept, "0.0.0.0:8080"));
        assert_eq!(
            (accept.warn, accept.target_ns, accept.dwell_ns),
            (0.6, Some(20_000_000), 1_000_000_000)
        );
        let recv = settings_for(&key(Kind::Recv, ":8080"));
        assert_eq!(
            (recv.warn, recv.target_ns, recv.dwell_ns),
            (0.6, None, 300_000_000)
        );
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = error("interval = \"1s\"\nintervall = \"2s\"\n");
        assert!(
            text.contains("line 2") && text.contains("intervall"),
            "{text}"
        );
        let text = error("[detect.accept]\nwarm = 0.5\n");
        assert!(text.contains("line 2") && text.contains("warm"), "{text}");
    }

    #[test]
    fn a_wrong_unit_is_named_with_its_line_and_a_right_one() {
        for wrong in ["\"100 parsecs\"", "100", "\"100\""] {
            let text = error(&format!("\ninterval = {wrong}\n"));
            assert!(text.contains("line 2") && text.contains("100ms"), "{text}");
        }
    }

    #[test]
    fn a_target_must_name_processes_in_one_way() {
        assert!(error("[[target]]\ncalled = \"x\"\n").contains("names no process"));
        assert!(error("[[target]]\npid = 1\nport = 80\n").contains("two ways"));
    }

    #[test]
    fn own_messages_are_looked_for_and_logs_may_be_left_alone() {
        let config =
            Config::parse("[[message]]\nname = \"full\"\npattern = \"Warteschlange * voll\"\n");
        let table = config.unwrap().messages().unwrap().unwrap();
        assert_eq!(table.find(b"warteschlange 7 VOLL"), Some("full"));
        let config = Config::parse("[messages]\nread = false\n").unwrap();
        assert!(config.messages().unwrap().is_none());
    }

    #[test]
    fn an_unusable_message_is_named() {
        let text = error("[[message]]\nname = \"own\"\npattern = \"\"\n");
        assert!(
            text.contains("[[message]]") && text.contains("message own"),
            "{text}"
        );
        assert!(error("[[message]]\nname = \"own\"\n").contains("pattern"));
        assert!(error("[messages]\nreed = true\n").contains("line 2"));
        let many = "[[message]]\nname = \"own\"\npattern = \"some text\"\n".repeat(65);
        assert!(error(&many).contains("more than 64"));
    }

    #[test]
    fn nonsense_thresholds_are_refused() {
        assert!(error("[detect.all]\nwarn = 0.95\n").contains("critical"));
        assert!(error("cpu_budget = 3").contains("cpu_budget"));
    }
}
