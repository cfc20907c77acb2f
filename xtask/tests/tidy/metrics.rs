//! `docs/reference/metrics.md` lists exactly the metrics that the agent exports.

use std::{collections::BTreeSet, fs, path::Path};

use regex::Regex;

/// Names in the sources that are no Prometheus metric: the metric that the KEDA scaler offers.
const OTHER: &[&str] = &["tailback_load"];

#[test]
fn the_metrics_page_lists_what_the_agent_exports() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut exported = BTreeSet::new();
    for directory in ["agent/src/signal", "agent/src/adapters"] {
        for entry in fs::read_dir(root.join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                exported.extend(names(&fs::read_to_string(path).unwrap(), '"'));
            }
        }
    }
    for name in OTHER {
        exported.remove(*name);
    }
    let page = fs::read_to_string(root.join("docs/reference/metrics.md")).unwrap();
    let documented = names(&page, '`');
    let missing: Vec<&String> = exported.difference(&documented).collect();
    let unknown: Vec<&String> = documented.difference(&exported).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "docs/reference/metrics.md: not documented {missing:?}, not exported {unknown:?}"
    );
}

/// Metric names between two of `quote`.
fn names(text: &str, quote: char) -> BTreeSet<String> {
    let pattern = Regex::new(&format!("{quote}(tailback_[a-z_]+){quote}")).unwrap();
    let found = pattern.captures_iter(text);
    found.map(|capture| capture[1].to_owned()).collect()
}
