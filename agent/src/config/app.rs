//! `[app]`: which services are asked for the queues that they keep themselves.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::{
    app::{
        asker::Login,
        table::{Preset, Table},
    },
    collect::AppSettings,
};

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct App {
    #[serde(default)]
    enabled: Option<bool>,
    /// Presets that are not used.
    #[serde(default)]
    disabled: Vec<String>,
    /// Presets that are used only if they are named.
    #[serde(default)]
    also: Vec<String>,
    #[serde(default, rename = "login")]
    logins: Vec<LoginEntry>,
    #[serde(default, rename = "preset")]
    presets: Vec<Preset>,
}

/// `[[app.login]]`: how the agent identifies itself to the processes of a preset.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct LoginEntry {
    preset: String,
    process_user: u32,
    #[serde(default)]
    user: Option<String>,
    password_file: PathBuf,
}

impl App {
    pub(super) fn settings(&self) -> Result<Option<AppSettings>> {
        let table = Table::new(&self.presets, &self.disabled, &self.also)?;
        let mut logins = BTreeMap::new();
        for entry in &self.logins {
            let mut presets = table.presets().iter();
            ensure!(
                presets.any(|preset| preset.name == entry.preset),
                "login: no preset {:?} is used",
                entry.preset
            );
            ensure!(
                entry.password_file.is_absolute(),
                "login of {}: password_file must be an absolute path",
                entry.preset
            );
            let login = Login {
                process_user: entry.process_user,
                user: entry.user.clone(),
                password_file: entry.password_file.clone(),
            };
            let is_new = logins.insert(entry.preset.clone(), login).is_none();
            ensure!(is_new, "two logins for {}", entry.preset);
        }
        let is_enabled = self.enabled.unwrap_or(true);
        Ok(is_enabled.then_some(AppSettings { table, logins }))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn services_are_asked_unless_that_is_turned_off() {
        let apps = |text: &str| Config::parse(text).unwrap().apps().unwrap();
        let all = apps("").unwrap();
        assert!(apps("[app]\nenabled = false\n").is_none());
        let fewer = apps("[app]\ndisabled = [\"redis\"]\n").unwrap();
        assert_eq!(fewer.table.presets().len() + 1, all.table.presets().len());
        let more = apps("[app]\nalso = [\"micrometer\"]\n").unwrap();
        assert_eq!(more.table.presets().len(), all.table.presets().len() + 1);
    }

    #[test]
    fn the_examples_in_the_documentation_are_valid() {
        let page = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../docs/reference/queues/app.md"
        );
        let page = std::fs::read_to_string(page).unwrap();
        let blocks = page.split("```toml\n").skip(1);
        let examples: Vec<Config> = blocks
            .map(|rest| Config::parse(rest.split_once("```").unwrap().0).unwrap())
            .collect();
        let settings = examples.last().unwrap().apps().unwrap().unwrap();
        assert_eq!(settings.table.presets()[0].name, "shop");
    }

    #[test]
    fn an_error_names_the_row_and_the_key() {
        let error = |text: &str| format!("{:#}", Config::parse(text).unwrap_err());
        let login = "[[app.login]]\npreset = \"redis\"\nprocess_user = 112\npassword_file = \"/etc/tailback/redis\"\n";
        assert!(Config::parse(login).is_ok());
        assert!(error(&format!("{login}{login}")).contains("two logins for redis"));
        let relative = error(&login.replace("/etc", "etc"));
        assert!(
            relative.contains("login of redis: password_file must be"),
            "{relative}"
        );
        assert!(
            error(&login.replace("redis\"", "kafka9\"")).contains("login: no preset \"kafka9\"")
        );
        assert!(error("[app]\nenable = true\n").contains("line 2"));
        let unknown = error("[app]\ndisabled = [\"kafka9\"]\n");
        assert!(
            unknown.contains("[app]") && unknown.contains("kafka9"),
            "{unknown}"
        );
    }
}
