//! `tailback config check` and `tailback config show`: whether a configuration file is valid, and what is in force with it.

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::{Failure, exit_code::Outcome};
use crate::{
    config::{
        Config, file,
        show::{self, Section, Source},
    },
    emit::{json::Object, otlp::OtlpConfig},
    text::count,
};

#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Check a configuration file; exit code 2 if it is not valid
    Check(Check),
    /// Print every setting that is in force with a configuration file, and where it comes from
    Show(Show),
}

#[derive(Debug, Args)]
struct Check {
    /// The configuration file (`-`: standard input)
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

#[derive(Debug, Args)]
struct Show {
    /// The configuration file (`-`: standard input) [default: none, only defaults and environment]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> Outcome<()> {
    let text = match &options.action {
        Action::Check(check) => checked(&check.file)?,
        Action::Show(show) => shown(show.file.as_deref(), show.json)?,
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(Failure::stdout)
}

fn checked(path: &Path) -> Outcome<String> {
    let config = Config::read(path).map_err(Failure::usage)?;
    OtlpConfig::from_env_and(config.otlp.as_deref())
        .with_context(|| format!("invalid configuration {}: otlp", path.display()))
        .map_err(Failure::usage)?;
    let targets = match config.specs().len() {
        0 => "no [[target]] (`run` needs --pid, --name, --port, --cgroup or --all)".to_owned(),
        1 => "1 target".to_owned(),
        targets => format!("{} targets", count(targets as u64)),
    };
    let adapters = match config.signal.adapters() {
        0 => "no adapter".to_owned(),
        1 => "1 adapter".to_owned(),
        adapters => format!("{adapters} adapters"),
    };
    Ok(format!(
        "{} is valid: {targets}, {adapters}\n",
        path.display()
    ))
}

fn shown(path: Option<&Path>, is_json: bool) -> Outcome<String> {
    let text = path.map_or_else(|| Ok(String::new()), file::read);
    let text = text.map_err(Failure::usage)?;
    let name = path.map_or_else(String::new, |path| path.display().to_string());
    let sections = show::sections(&text, |name| env::var(name).ok())
        .with_context(|| format!("invalid configuration {name}"))
        .map_err(Failure::usage)?;
    Ok(if is_json {
        json(&sections)
    } else {
        show::text(&sections, &name)
    })
}

fn json(sections: &[Section]) -> String {
    let settings = sections.iter().flat_map(|section| {
        let settings = section.settings.iter();
        settings.map(|setting| (&section.header, setting))
    });
    let lines = settings.map(|(section, setting)| {
        let mut object = Object::new("setting");
        object.put("section", section.as_str());
        object.put("key", setting.key);
        object.put_some("value", setting.value.as_deref());
        match setting.source {
            Source::Default => object.put("source", "default"),
            Source::Line(line) => {
                object.put("source", "file");
                object.put("line", line);
            }
            Source::Variable(name) => {
                object.put("source", "environment");
                object.put("variable", name);
            }
        }
        format!("{}\n", serde_json::Value::Object(object.0))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::json::reference::assert_documented;

    #[test]
    fn the_keys_of_a_setting_are_those_of_the_documentation() {
        let variable =
            |name: &str| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| "http://c".to_owned());
        let sections = show::sections("interval = \"1s\"\n", variable).unwrap();
        let objects: Vec<serde_json::Value> = json(&sections)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_documented("setting", &objects);
    }
}
