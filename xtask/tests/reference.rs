//! The documentation has a page for every queue kind, numbered as in the shared-memory page, and names every constant of
//! the admission controllers. (Causes and log messages are compared in `agent/src/messages/tests.rs`, metrics in `tidy`.)

use std::{collections::BTreeSet, fs, path::PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
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

#[test]
fn the_table_of_constants_is_that_of_the_code() {
    let code = read("agent/src/signal/constants.rs");
    let code: BTreeSet<&str> = code
        .lines()
        .filter_map(|line| Some(line.strip_prefix("pub const ")?.split_once(':')?.0))
        .collect();
    let page = read("docs/concepts/admission.md");
    let page: BTreeSet<&str> = page
        .split('`')
        .filter(|word| word.len() > 3)
        .filter(|word| {
            word.bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte == b'_')
        })
        .collect();
    let differ: Vec<&&str> = code.symmetric_difference(&page).collect();
    assert!(code.len() > 40 && differ.is_empty(), "{differ:?}");
}
