//! For tests: compares metrics as they are served with `docs/reference/metrics.md`, both ways: names, types, labels, help.

use std::collections::{BTreeMap, BTreeSet};

/// Type, labels and help of a family.
#[derive(Debug, Default, PartialEq, Eq)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
    help: String,
}

/// Fails unless `text`, in Prometheus's format, has exactly the families that these sections of the page document. Each family
/// must have a sample. Returns the samples: name, labels, value.
pub(crate) fn assert_documented(sections: &[&str], text: &str) -> Vec<(String, String, f64)> {
    let (served, samples) = parse(text);
    let documented = documented(sections);
    let names = |of: &BTreeMap<String, Family>| of.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&served), names(&documented));
    for (name, family) in &served {
        let page = &documented[name];
        assert_eq!(
            (&family.kind, &family.labels),
            (&page.kind, &page.labels),
            "{name}"
        );
        // The page may go into detail after the help text.
        let rest = page.help.strip_prefix(&family.help);
        assert!(
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([',', ':', ';', '('])),
            "{name}: the help text is {:?}, the page says {:?}",
            family.help,
            page.help
        );
    }
    samples
}

/// The families of an exposition by name, and its samples: name, labels and value.
type Exposition = (BTreeMap<String, Family>, Vec<(String, String, f64)>);

fn parse(text: &str) -> Exposition {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut samples = Vec::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            current = name.to_owned();
            let family = Family {
                help: normal(help),
                ..Family::default()
            };
            let before = families.insert(current.clone(), family);
            assert!(before.is_none(), "{name} is declared twice");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, current, "TYPE follows HELP");
            families.get_mut(name).unwrap().kind = kind.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = match series.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
                None => (series, ""),
            };
            let family = families.get_mut(&current).unwrap();
            let suffix = name.strip_prefix(&current).unwrap();
            let is_of_histogram = ["_bucket", "_sum", "_count"].contains(&suffix);
            assert!(
                suffix.is_empty() || family.kind == "histogram" && is_of_histogram,
                "{name} in the family {current}"
            );
            let named = labels
                .split("\",")
                .filter_map(|label| label.split_once("=\""));
            let named = named.map(|(label, _)| label.to_owned());
            // `le` is the label of a histogram's buckets.
            family.labels.extend(named.filter(|label| label != "le"));
            samples.push((name.to_owned(), labels.to_owned(), value.parse().unwrap()));
        }
    }
    for name in families.keys() {
        let has_sample = samples
            .iter()
            .any(|(of, _, _)| of.starts_with(name.as_str()));
        assert!(
            has_sample,
            "{name} has no sample: fill the state that the test renders"
        );
    }
    (families, samples)
}

fn documented(sections: &[&str]) -> BTreeMap<String, Family> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut families = BTreeMap::new();
    for section in sections {
        let heading = format!("\n## {section}\n");
        let (_, body) = page
            .split_once(&heading)
            .unwrap_or_else(|| panic!("docs/reference/metrics.md has no heading {section:?}"));
        let body = body.split_once("\n## ").map_or(body, |(body, _)| body);
        let labels = body.lines().find(|line| line.starts_with("Label"));
        let labels: BTreeSet<String> = labels.map(words).unwrap_or_default();
        for row in body.lines().filter(|line| line.starts_with("| `tailback_")) {
            let cells: Vec<&str> = row.trim_matches([' ', '|']).split(" | ").collect();
            let [name, kind, help] = cells[..] else {
                panic!("{row}");
            };
            // `… in the label `mode``: of this family alone.
            let own = help.split_once("label `").map(|(_, rest)| rest);
            let own = own.and_then(|rest| Some(rest.split_once('`')?.0.to_owned()));
            let family = Family {
                kind: kind.to_owned(),
                labels: labels.iter().cloned().chain(own).collect(),
                help: normal(help),
            };
            families.insert(name.trim_matches('`').to_owned(), family);
        }
    }
    families
}

/// The words between backticks.
fn words(text: &str) -> BTreeSet<String> {
    let words = text.split('`').skip(1).step_by(2);
    words.map(str::to_owned).collect()
}

/// A help text without its full stop, links and backticks, in lower case.
fn normal(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once('[') {
        let (label, after) = link.split_once("](").unwrap();
        let (_, after) = after.split_once(')').unwrap();
        plain.push_str(before);
        plain.push_str(label);
        rest = after;
    }
    plain.push_str(rest);
    let plain = plain.replace('`', "").to_lowercase();
    plain.strip_suffix('.').unwrap_or(&plain).to_owned()
}
