//! Documentation against the sources: a page for every queue kind, numbered as in the shared-memory page, with every measure
//! of its readings; every constant of the admission controllers; every type of JSON object; every code of a notice.
//!
//! What can be compared in process is compared in the agent's unit tests: the keys of each JSON object (`emit/json/reference.rs`),
//! metrics as they are served (`signal/metrics/reference.rs`), configuration keys, causes, log messages, title patterns.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use regex::Regex;

/// Types of objects that only hidden commands for benchmarks print.
const UNDOCUMENTED_TYPES: &[&str] = &["scan", "focus_samples"];

/// Files below `agent/src/queue` whose readings are of other kinds than the file's name says.
const KINDS_OF_FILE: &[(&str, &[&str])] = &[
    ("unix_listener", &["accept"]),
    ("starvation", &["runqueue"]),
    ("stream", &["recv", "send"]),
];
/// Measures that `inflight.rs` adds to the readings of `downstream.rs`.
const DOWNSTREAM: [&str; 4] = [
    "response_time_ns",
    "responses_per_s",
    "response_bytes_per_s",
    "at_least",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn every_queue_kind_has_a_page_and_a_row() {
    let layout = read("deploy/readers/rust/src/lib.rs");
    let (_, kinds) = layout.split_once("KINDS: [&str; 18] = [").expect("KINDS");
    let (kinds, _) = kinds.split_once(']').expect("the end of KINDS");
    let kinds: Vec<&str> = kinds.split('"').skip(1).step_by(2).collect();
    assert_eq!(kinds.len(), 18);
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

/// The text of all sources below `directory`, by path, without tests.
fn sources(directory: &str) -> BTreeMap<PathBuf, String> {
    fn add(path: &Path, found: &mut BTreeMap<PathBuf, String>) {
        let entries =
            fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for entry in entries.map_while(Result::ok) {
            let path = entry.path();
            let is_test = path.file_stem().is_some_and(|stem| {
                ["tests", "fixture", "watched"]
                    .iter()
                    .any(|name| stem == *name)
            });
            if path.is_dir() && !is_test {
                add(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") && !is_test {
                let text = fs::read_to_string(&path)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
                found.insert(path, text[..end].to_owned());
            }
        }
    }
    let mut found = BTreeMap::new();
    add(&root().join(directory), &mut found);
    assert!(found.len() > 10, "{directory}");
    found
}

/// What the groups of this pattern match in the sources.
fn matches(pattern: &str, sources: &BTreeMap<PathBuf, String>) -> BTreeSet<String> {
    let pattern = Regex::new(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
    let all = sources
        .values()
        .flat_map(|text| pattern.captures_iter(text));
    all.filter_map(|found| Some(found.iter().skip(1).flatten().next()?.as_str().to_owned()))
        .collect()
}

/// The words between backticks.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_type_of_json_object_has_a_section() {
    let mut printed = matches(
        r#"Object::new\("(\w+)"\)|\.queue\("(\w+)",|episode_object\("(\w+)",|"type": "(\w+)"|r#type: "(\w+)""#,
        &sources("agent/src"),
    );
    for name in UNDOCUMENTED_TYPES {
        assert!(printed.remove(*name), "{name} is not printed");
    }
    let page = read("docs/reference/json.md");
    let headings = page.lines().filter(|line| line.starts_with("## `"));
    // `live.episode` is a part of `live`.
    let whole = headings.flat_map(words).filter(|name| !name.contains('.'));
    let documented: BTreeSet<String> = whole.map(str::to_owned).collect();
    assert_eq!(printed, documented);
}

#[test]
fn every_code_of_a_notice_is_documented() {
    let sources = sources("agent/src");
    let mut codes = matches(
        r#"code: "(\w+)"|\bnotice\("(\w+)"|\b(?:report|report_once|notify)\(\s*"(\w+)""#,
        &sources,
    );
    // The names of scans that the budget may stretch, from which the codes are made.
    let stretched = matches(r#"\bscan\(\s*"(\w+)",\s*""#, &sources);
    assert_eq!(stretched.len(), 3, "{stretched:?}");
    codes.extend(stretched.iter().map(|name| format!("{name}_stretched")));
    let page = read("docs/reference/json.md");
    let (_, section) = page.split_once("## Codes of notices\n").unwrap();
    let section = section.split_once("\n## ").unwrap().0;
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.split(" | ").next().unwrap());
    let documented: BTreeSet<String> = cells
        .flat_map(words)
        .filter(|code| *code != "…_not_stretched")
        .map(str::to_owned)
        .collect();
    assert_eq!(codes, documented);
}

#[test]
fn the_page_of_a_kind_names_the_measures_of_its_readings() {
    let names =
        Regex::new(
        r#"[^a-z_!]\(\s*"(\w+)",|[^a-z_!]\((UTILIZATION|RESPONSES_PER_S|RESPONSE_BYTES_PER_S|STALL_SHARE),|counted\(sample, "(\w+)"\)"#,
    )
    .unwrap();
    let mut measures: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in sources("agent/src/queue") {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let kinds = KINDS_OF_FILE.iter().find(|(file, _)| *file == stem);
        let kinds = kinds.map_or_else(|| vec![stem], |(_, kinds)| kinds.to_vec());
        let found = names.captures_iter(&text);
        let found: BTreeSet<String> = found
            .map(|found| {
                found
                    .iter()
                    .skip(1)
                    .flatten()
                    .next()
                    .unwrap()
                    .as_str()
                    .to_lowercase()
            })
            .collect();
        for kind in kinds {
            measures
                .entry(kind.to_owned())
                .or_default()
                .extend(found.clone());
        }
    }
    for name in DOWNSTREAM {
        assert!(measures["inflight"].contains(name), "{name}");
        measures
            .get_mut("downstream")
            .unwrap()
            .insert(name.to_owned());
    }
    let json = read("docs/reference/json.md");
    let (_, section) = json.split_once("## `queue` and `level`\n").unwrap();
    let section = section.split_once("\n## ").unwrap().0;
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let common: BTreeSet<&str> = rows.flat_map(words).collect();
    let mut wrong = Vec::new();
    let mut pages = 0;
    for (kind, measures) in &measures {
        let page = root().join(format!("docs/reference/queues/{kind}.md"));
        let Ok(page) = fs::read_to_string(page) else {
            assert!(measures.is_empty(), "{kind}: {measures:?}");
            continue;
        };
        pages += 1;
        // Also in `"losses_shared": 1`.
        let named: BTreeSet<&str> = words(&page)
            .flat_map(|code| code.split(|letter: char| !letter.is_alphanumeric() && letter != '_'))
            .collect();
        let missing = measures
            .iter()
            .filter(|name| !named.contains(name.as_str()));
        wrong.extend(missing.map(|name| format!("{kind}.md does not name `{name}`")));
        let rows = page.lines().filter(|line| line.starts_with("| "));
        let cells = rows.map(|row| row.split(" | ").next().unwrap());
        let stale = cells
            .flat_map(words)
            .filter(|name| !measures.contains(*name) && !common.contains(name));
        wrong.extend(
            stale.map(|name| format!("{kind}.md documents `{name}`, which no reading has")),
        );
    }
    assert!(
        pages > 15 && wrong.is_empty(),
        "{pages} pages: {}",
        wrong.join("\n")
    );
}
