//! The reference in `docs/` lists what the code has: every metric, and a page for every queue kind. (Causes and log
//! messages are compared in `agent/src/messages/tests.rs`.)

use std::{collections::BTreeSet, fs, path::PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The words in `text` that begin with `tailback_`, between quotation marks of the given kind.
fn metrics(text: &str, quote: char) -> BTreeSet<String> {
    text.split(quote)
        .filter(|part| part.starts_with("tailback_"))
        .filter(|part| {
            part.bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let mut code = BTreeSet::new();
    for file in ["agent/src/signal/metrics.rs", "agent/src/adapters/mod.rs"] {
        code.extend(metrics(&read(file), '"'));
    }
    assert!(code.len() > 30, "{code:?}");
    let documented = metrics(&read("docs/reference/metrics.md"), '`');
    let missing: Vec<&String> = code.difference(&documented).collect();
    assert!(
        missing.is_empty(),
        "not in docs/reference/metrics.md: {missing:?}"
    );
    let stale: Vec<&String> = documented.difference(&code).collect();
    assert!(stale.is_empty(), "not in the code: {stale:?}");
}

#[test]
fn every_queue_kind_has_a_page_and_a_row() {
    let layout = read("deploy/readers/rust/src/lib.rs");
    let (_, kinds) = layout.split_once("KINDS: [&str; 17] = [").expect("KINDS");
    let (kinds, _) = kinds.split_once(']').expect("the end of KINDS");
    let kinds: Vec<&str> = kinds.split('"').skip(1).step_by(2).collect();
    assert_eq!(kinds.len(), 17);
    let index = read("docs/reference/queues/README.md");
    // Prose may break between a number and its kind.
    let page_format = read("docs/reference/page-format.md").replace('\n', " ");
    for (number, kind) in kinds.iter().enumerate() {
        let page = read(&format!("docs/reference/queues/{kind}.md"));
        assert!(page.starts_with(&format!("# {kind}\n")), "{kind}");
        let row = format!("| [`{kind}`]({kind}.md) |");
        assert!(
            index.contains(&row),
            "docs/reference/queues/README.md: {row}"
        );
        let numbered = format!("{number} {kind}");
        assert!(
            page_format.contains(&numbered),
            "docs/reference/page-format.md: {numbered}"
        );
    }
}
