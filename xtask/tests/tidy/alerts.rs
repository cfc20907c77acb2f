//! Alerts, runbook, dashboard and chart fit together: `deploy/prometheus`, `deploy/grafana`, `deploy/chart`, `docs/runbook.md`.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use regex::Regex;
use serde_json::Value;

/// Metrics of Prometheus itself that the rules use.
const OF_PROMETHEUS: &[&str] = &["up"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("read {path}: {error}"))
}

/// The first group of each match.
fn all(pattern: &str, text: &str) -> Vec<String> {
    let pattern = Regex::new(pattern).unwrap();
    let found = pattern.captures_iter(text);
    found.map(|capture| capture[1].to_owned()).collect()
}

/// The text of each alert in the rules, by its name.
fn alerts() -> Vec<(String, String)> {
    let rules = read("deploy/prometheus/rules.yml");
    let parts = rules.split("      - alert: ").skip(1);
    parts
        .map(|part| {
            let (name, rest) = part.split_once('\n').unwrap();
            (name.to_owned(), rest.to_owned())
        })
        .collect()
}

/// The metrics that `docs/reference/metrics.md` lists, with the series of histograms.
fn documented() -> BTreeSet<String> {
    let page = read("docs/reference/metrics.md");
    let rows = all(r"(?m)^\| `(tailback_[a-z_]+)` \|", &page);
    let histograms = all(r"(?m)^\| `(tailback_[a-z_]+)` \| histogram", &page);
    let series = histograms
        .iter()
        .flat_map(|name| ["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")));
    let series: Vec<String> = series.collect();
    rows.into_iter().chain(series).collect()
}

/// Names of metrics, as they are in expressions.
fn metrics(text: &str) -> BTreeSet<String> {
    all(r"\b(tailback_[a-z0-9_]+)\b", text)
        .into_iter()
        .collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("deploy/grafana/tailback.json")).unwrap()
}

#[test]
fn every_alert_says_what_why_and_where_its_section_of_the_runbook_is() {
    let runbook = read("docs/runbook.md");
    let tests = read("deploy/prometheus/rules_test.yml");
    let alerts = alerts();
    assert!(alerts.len() > 10, "{alerts:?}");
    for (name, text) in &alerts {
        for part in ["expr: ", "severity: ", "summary: ", "description: "] {
            assert!(text.contains(part), "{name} has no {part:?}");
        }
        let anchor = format!("runbook_url: docs/runbook.md#{}\n", name.to_lowercase());
        assert!(text.contains(&anchor), "{name} has no {anchor:?}");
        let section = runbook
            .split("\n## ")
            .find(|part| part.lines().next() == Some(name));
        let section = section.unwrap_or_else(|| panic!("docs/runbook.md has no section {name}"));
        for part in ["**Meaning.** ", "**Confirm.** ", "**Do.**"] {
            assert!(
                section.contains(part),
                "docs/runbook.md: {name} has no {part}"
            );
        }
        // A unit test in which it fires.
        let mut of_it = tests
            .split("- alertname: ")
            .filter(|part| part.lines().next() == Some(name));
        assert!(
            of_it.any(|part| part.contains("exp_labels")),
            "rules_test.yml has no test in which {name} fires"
        );
    }
    let known: BTreeSet<&String> = alerts.iter().map(|(name, _)| name).collect();
    for heading in all(r"(?m)^## (Tailback\w+)$", &runbook) {
        assert!(
            known.contains(&heading),
            "docs/runbook.md: no alert {heading}"
        );
    }
    for page in ["docs/operations.md", "docs/guides/prometheus.md"] {
        let named: BTreeSet<String> = all(r"`(Tailback[A-Z]\w+)`", &read(page))
            .into_iter()
            .collect();
        let missing: Vec<_> = known
            .iter()
            .filter(|name| !named.contains(**name))
            .collect();
        let unknown: Vec<_> = named.iter().filter(|name| !known.contains(name)).collect();
        assert!(unknown.is_empty(), "{page}: no alert {unknown:?}");
        assert!(
            page != "docs/operations.md" || missing.is_empty(),
            "{page} does not list {missing:?}"
        );
    }
}

#[test]
fn rules_and_dashboard_use_only_metrics_that_exist() {
    let documented = documented();
    let rules = read("deploy/prometheus/rules.yml");
    let expressions: Vec<String> = dashboard()["panels"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default())
        .map(|target| target["expr"].as_str().unwrap().to_owned())
        .collect();
    let on_dashboard = metrics(&expressions.join("\n"));
    let pages = [
        "docs/runbook.md",
        "docs/operations.md",
        "docs/guides/prometheus.md",
    ]
    .map(read);
    for (place, used) in [
        ("rules.yml", metrics(&rules)),
        ("the dashboard", on_dashboard.clone()),
        ("the documentation", metrics(&pages.join("\n"))),
    ] {
        let unknown: Vec<_> = used.difference(&documented).collect();
        assert!(
            !used.is_empty() && unknown.is_empty(),
            "{place}: {unknown:?}"
        );
    }
    // What the agent exports is shown. Of histograms the buckets: sum and count are for the reader's own queries.
    let is_shown = |name: &&String| {
        let family = name.trim_end_matches("_sum").trim_end_matches("_count");
        on_dashboard.contains(&format!("{family}_bucket"))
    };
    let missing = documented
        .difference(&on_dashboard)
        .filter(|name| !is_shown(name));
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "not on the dashboard: {missing:?}");
    for name in OF_PROMETHEUS {
        assert!(rules.contains(&format!("{name}{{")), "unused: {name}");
    }
}

#[test]
fn the_panels_of_the_dashboard_are_distinct_described_and_do_not_overlap() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut titles, mut taken) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: id");
        let is_row = panel["type"] == "row";
        assert!(is_row || titles.insert(title), "{title} is there twice");
        assert!(
            is_row
                || panel["description"]
                    .as_str()
                    .is_some_and(|text| text.ends_with('.')),
            "{title}"
        );
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title} is too wide");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(taken.insert((x, y)), "{title} overlaps another panel");
            }
        }
    }
}

#[test]
fn the_chart_has_copies_of_rules_and_dashboard() {
    for (source, copy) in [
        (
            "deploy/prometheus/rules.yml",
            "deploy/chart/tailback/files/rules.yml",
        ),
        (
            "deploy/grafana/tailback.json",
            "deploy/chart/tailback/files/dashboard.json",
        ),
    ] {
        let text = read(source);
        // A chart cannot read files outside its directory.
        if env::var_os("TAILBACK_BLESS").is_some() {
            fs::write(root().join(copy), &text).unwrap();
        }
        assert!(
            read(copy) == text,
            "{copy} is not {source}: run this test with TAILBACK_BLESS=1"
        );
    }
    // The template of the chart replaces these.
    let rules = read("deploy/prometheus/rules.yml");
    assert_eq!(rules.matches(r#"job=~"(.+/)?tailback""#).count(), 1);
}
