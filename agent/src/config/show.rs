//! The effective configuration, key by key, with where each value comes from. Its text is a valid configuration that says the
//! same.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, line_at,
    reference::{KEYS, Key},
};

/// Column of the source in a line of text.
const SOURCE_COLUMN: usize = 44;
/// The variables that take precedence over `otlp`.
const OTLP_VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
/// The variable that takes precedence over the default of `[signal] directory`.
const DIRECTORY_VARIABLE: &str = "RUNTIME_DIRECTORY";

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Default,
    /// The line in the file.
    Line(usize),
    Variable(&'static str),
}

/// One key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub key: &'static str,
    /// As written in a file; `None`: not set, and without a default.
    pub value: Option<String>,
    pub source: Source,
}

/// The settings of one table, such as `[signal]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Empty at the top level.
    pub header: String,
    pub settings: Vec<Setting>,
}

/// All settings of the file with this text. `variable` reads the environment.
///
/// # Errors
/// If the text is not a valid configuration.
pub fn sections(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Vec<Section>> {
    let config = Config::parse(text)?;
    let parsed = DeTable::parse(text)?;
    let file = File {
        text,
        root: parsed.get_ref(),
    };
    let mut sections = Vec::new();
    let mut seen = BTreeSet::new();
    for key in KEYS {
        if seen.insert(key.section) {
            file.add(key.section, &mut sections);
        }
    }
    for section in &mut sections {
        for setting in &mut section.settings {
            match (section.header.as_str(), setting.key) {
                ("", "otlp") => {
                    let set = |name: &&str| variable(name).is_some_and(|value| !value.is_empty());
                    if let Some(name) = OTLP_VARIABLES.into_iter().find(|name| set(name)) {
                        setting.value = variable(name).map(|value| quoted(&value));
                        setting.source = Source::Variable(name);
                    }
                }
                ("[signal]", "directory") if setting.source == Source::Default => {
                    let directory = config.signal.directory().display().to_string();
                    let directory = quoted(&directory);
                    if setting.value.as_ref() != Some(&directory) {
                        setting.value = Some(directory);
                        setting.source = Source::Variable(DIRECTORY_VARIABLE);
                    }
                }
                ("[signal]", "ttl") if setting.source == Source::Default => {
                    let interval = Duration::from_nanos(config.budget().interval_ns);
                    let ttl = Duration::from_nanos(config.signal.ttl_ns(interval));
                    setting.value = Some(quoted(&humantime::format_duration(ttl).to_string()));
                }
                _ => {}
            }
        }
    }
    Ok(sections)
}

/// The sections as a configuration file, with the source of each value as a comment. `file` is the name of the file.
pub fn text(sections: &[Section], file: &str) -> String {
    let mut text = String::new();
    for section in sections {
        if !section.header.is_empty() {
            text += &format!("\n{}\n", section.header);
        }
        for setting in &section.settings {
            let source = match setting.source {
                Source::Default => "default".to_owned(),
                Source::Line(line) => format!("{file}:{line}"),
                Source::Variable(name) => format!("${name}"),
            };
            match &setting.value {
                Some(value) => {
                    let assignment = format!("{} = {value}", setting.key);
                    text += &format!("{assignment:<SOURCE_COLUMN$}# {source}\n");
                }
                None => text += &format!("# {} is not set\n", setting.key),
            }
        }
    }
    text
}

/// A parsed file.
struct File<'a> {
    text: &'a str,
    root: &'a DeTable<'a>,
}

impl File<'_> {
    /// Adds the tables of a section of the reference: `[signal]`, `[[target]]`, `[detect.*]`.
    fn add(&self, section: &'static str, sections: &mut Vec<Section>) {
        let keys: Vec<&Key> = KEYS.iter().filter(|key| key.section == section).collect();
        let is_array = section.starts_with("[[");
        let path = section.trim_matches(['[', ']']);
        if path == "detect.*" {
            let detect = self.find("detect").and_then(|value| table(value));
            let all = detect.and_then(|detect| table(detect.get("all")?));
            sections.push(self.section("[detect.all]".to_owned(), all, &keys, true));
            for (name, value) in detect.into_iter().flatten() {
                let name = name.get_ref();
                if let Some(table) = table(value)
                    && *name != "all"
                {
                    sections.push(self.section(
                        format!("[detect.{name}]"),
                        Some(table),
                        &keys,
                        false,
                    ));
                }
            }
            return;
        }
        if path.is_empty() {
            sections.push(self.section(String::new(), Some(self.root), &keys, true));
            return;
        }
        match self.find(path).map(Spanned::get_ref) {
            Some(DeValue::Array(entries)) => {
                for entry in entries {
                    let header = section.to_owned();
                    sections.push(self.section(header, table(entry), &keys, true));
                }
            }
            Some(DeValue::Table(table)) => {
                sections.push(self.section(section.to_owned(), Some(table), &keys, true));
            }
            // A section that applies without being written.
            _ if !is_array && keys.iter().any(|key| !key.default.is_empty()) => {
                sections.push(self.section(section.to_owned(), None, &keys, true));
            }
            _ => {}
        }
    }

    /// The settings of one table; `with_defaults` also adds the keys that it does not have.
    fn section(
        &self,
        header: String,
        table: Option<&DeTable<'_>>,
        keys: &[&Key],
        with_defaults: bool,
    ) -> Section {
        let is_entry = header.starts_with("[[");
        let settings = keys.iter().filter_map(|key| {
            if let Some(value) = table.and_then(|table| table.get(key.name)) {
                return Some(Setting {
                    key: key.name,
                    value: Some(self.literal(value)),
                    source: Source::Line(line_at(self.text, value.span().start)),
                });
            }
            let has_default = !key.default.is_empty();
            (with_defaults && (has_default || !is_entry)).then(|| Setting {
                key: key.name,
                value: has_default.then(|| default(key)),
                source: Source::Default,
            })
        });
        Section {
            settings: settings.collect(),
            header,
        }
    }

    fn find(&self, path: &str) -> Option<&Spanned<DeValue<'_>>> {
        let mut names = path.split('.');
        let mut value = self.root.get(names.next()?)?;
        for name in names {
            value = table(value)?.get(name)?;
        }
        Some(value)
    }

    /// A value on one line.
    fn literal(&self, value: &Spanned<DeValue<'_>>) -> String {
        match value.get_ref() {
            DeValue::String(text) => quoted(text),
            DeValue::Array(values) => {
                let values: Vec<String> = values.iter().map(|value| self.literal(value)).collect();
                format!("[{}]", values.join(", "))
            }
            DeValue::Table(table) => {
                let entries = table.iter().map(|(key, value)| {
                    format!("{} = {}", bare(key.get_ref()), self.literal(value))
                });
                format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
            }
            _ => self.text[value.span()].to_owned(),
        }
    }
}

fn table<'a>(value: &'a Spanned<DeValue<'_>>) -> Option<&'a DeTable<'a>> {
    match value.get_ref() {
        DeValue::Table(table) => Some(table),
        _ => None,
    }
}

/// The default as a literal: the reference writes strings without quotes.
fn default(key: &Key) -> String {
    let is_literal = key.default.parse::<f64>().is_ok() || key.default.parse::<bool>().is_ok();
    if is_literal {
        key.default.to_owned()
    } else {
        quoted(key.default)
    }
}

/// A key as TOML writes it.
fn bare(key: &str) -> String {
    let is_bare = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if !key.is_empty() && key.bytes().all(is_bare) {
        key.to_owned()
    } else {
        quoted(key)
    }
}

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            _ if character.is_control() => {
                out += &format!("\\U{:08X}", u32::from(character));
            }
            _ => out.push(character),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
interval = "1s"
[[target]]
name = "sh\"op\u001b*"
[[target]]
port = 80
service_name = "shop"
[detect.accept]
warn = 0.5
[[detect.queue]]
name = "*:80"
thresholds = { warn = 0.5, dwell = "1s" }
[logs]
read = false
[signal]
http.listen = "127.0.0.1:9400"
[[signal.group]]
targets = [
  "a",  # one
  "b",
]
[app]
disabled = ["redis"]
[[app.preset]]
name = "shop"
find = { exe = ["shopd"] }
proof = "waiting"
ask = [{ protocol = "prometheus", paths = ["/metrics"] }]
[[app.preset.queue]]
name = "all"
unit = "jobs"
depth = "waiting"
context = { "jobs kept" = "kept" }
"#;

    fn nothing(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn the_text_is_a_configuration_that_says_the_same() {
        for file in ["", FILE] {
            let sections = sections(file, nothing).unwrap();
            let text = text(&sections, "tailback.toml");
            let shown = Config::parse(&text).unwrap_or_else(|error| panic!("{error:#}\n{text}"));
            let original = Config::parse(file).unwrap();
            assert_eq!(shown.specs(), original.specs(), "{text}");
            assert_eq!(shown.budget(), original.budget(), "{text}");
            assert_eq!(shown.apps().unwrap(), original.apps().unwrap(), "{text}");
            let again = super::text(&super::sections(&text, nothing).unwrap(), "x");
            let values = |text: &str| -> Vec<String> {
                let lines = text.lines().map(|line| line.rsplit_once(" # "));
                lines.flatten().map(|(value, _)| value.to_owned()).collect()
            };
            assert_eq!(values(&text), values(&again));
        }
    }

    #[test]
    fn each_value_has_its_source() {
        let variable = |name: &str| (name == OTLP_VARIABLES[1]).then(|| "http://c:4318".to_owned());
        let sections = sections(FILE, variable).unwrap();
        let text = text(&sections, "t.toml");
        for (assignment, source) in [
            ("interval = \"1s\"", "# t.toml:2"),
            ("focus_interval = \"10ms\"", "# default"),
            ("otlp = \"http://c:4318\"", "# $OTEL_EXPORTER_OTLP_ENDPOINT"),
            ("service_name = \"shop\"", "# t.toml:7"),
            ("warn = 0.7", "# default"),
            ("warn = 0.5", "# t.toml:9"),
            ("ttl = \"3s\"", "# default"),
            ("targets = [\"a\", \"b\"]", "# t.toml:18"),
            ("min_ready = 1", "# default"),
            ("listen = \"127.0.0.1:9400\"", "# t.toml:16"),
        ] {
            let mut lines = text.lines().filter(|line| line.starts_with(assignment));
            assert!(
                lines.any(|line| line.ends_with(source)),
                "{assignment} {source}:\n{text}"
            );
        }
    }

    #[test]
    fn every_key_is_shown() {
        let shown = sections("", nothing).unwrap();
        for key in KEYS.iter().filter(|key| !key.default.is_empty()) {
            let header = key.section.replace("detect.*", "detect.all");
            let is_shown = |section: &Section| {
                section.header == header
                    && section
                        .settings
                        .iter()
                        .any(|setting| setting.key == key.name)
            };
            let is_entry = key.section.starts_with("[[");
            assert!(is_entry || shown.iter().any(is_shown), "{key:?}");
        }
    }
}
