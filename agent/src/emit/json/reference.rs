//! For tests: compares printed objects with `docs/reference/json.md`, both ways. Every printed key is documented under the heading
//! of its type, and every documented key is printed.

use std::collections::BTreeSet;

use serde_json::Value;

/// Fails unless `objects` together have exactly the keys that the section of this type documents. `name`: as in the heading,
/// between backticks.
pub(crate) fn assert_documented(name: &str, objects: &[Value]) {
    let mut printed = BTreeSet::new();
    for object in objects {
        add_paths(object, "", &mut printed);
    }
    let documented = documented(name);
    let missing: Vec<&String> = printed.difference(&documented).collect();
    let stale: Vec<&String> = documented.difference(&printed).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "docs/reference/json.md, `{name}`: not documented {missing:?}, not printed {stale:?}"
    );
}

/// The paths of all keys below `value`, except `type`: `a`, `b.c`, `d[].e`.
fn add_paths(value: &Value, at: &str, paths: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let key = match (at, key.as_str()) {
                    (_, "type") => continue,
                    ("", key) => key.to_owned(),
                    ("shares", _) => "shares.ACTIVITY".to_owned(),
                    (at, key) => format!("{at}.{key}"),
                };
                assert!(!value.is_null(), "{key} is null instead of absent");
                add_paths(value, &key, paths);
            }
        }
        // Of objects or of plain values: unknown.
        Value::Array(values) if values.is_empty() => {}
        Value::Array(values) if values.iter().any(Value::is_object) => {
            for value in values {
                add_paths(value, &format!("{at}[]"), paths);
            }
        }
        _ => {
            paths.insert(at.to_owned());
        }
    }
}

/// The keys that the section of a type documents.
fn documented(name: &str) -> BTreeSet<String> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/json.md");
    let page = std::fs::read_to_string(page).unwrap();
    let quoted = format!("`{name}`");
    // A heading of the second level ends with the next one; one of the third, with the next of either.
    let level = |line: &str| line.bytes().take_while(|byte| *byte == b'#').count();
    let mut lines = page.lines();
    let heading = lines
        .find(|line| level(line) > 0 && line.contains(&quoted))
        .unwrap_or_else(|| panic!("docs/reference/json.md has no heading {quoted}"));
    let section = lines.take_while(|line| level(line) == 0 || level(line) > level(heading));
    let mut keys = BTreeSet::new();
    for row in section.filter(|line| line.starts_with("| `")) {
        let mut cells = row.split(" | ");
        let (first, meaning) = (cells.next().unwrap(), cells.next().unwrap_or_default());
        let only = meaning.split_once(" only: ").map(|(of, _)| of);
        if only.is_some_and(|of| of != quoted) {
            continue;
        }
        for key in words(first) {
            match key.strip_suffix('…') {
                // `targets[].…`: the keys of another type, which the meaning names first, except those that it names next.
                Some(prefix) => {
                    let mut named = words(meaning);
                    let other = named.next().unwrap();
                    let except: Vec<&str> = named.collect();
                    let included = documented(other).into_iter();
                    keys.extend(
                        included
                            .filter(|key| !except.contains(&key.as_str()))
                            .map(|key| format!("{prefix}{key}")),
                    );
                }
                None => _ = keys.insert(key.to_owned()),
            }
        }
    }
    keys
}

/// The words between backticks.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn a_key_that_only_the_code_or_only_the_page_has_is_found() {
    use serde_json::json;

    let reader = json!({"type": "reader", "pid": 1, "name": "a", "target": "b"});
    assert_documented("reader", std::slice::from_ref(&reader));
    let differs = |object: Value| {
        std::panic::catch_unwind(|| assert_documented("reader", &[object])).is_err()
    };
    assert!(differs(json!({"pid": 1, "name": "a"})));
    assert!(differs(
        json!({"pid": 1, "name": "a", "target": "b", "since": 3})
    ));
    assert!(differs(json!({"pid": 1, "name": "a", "target": null})));
    assert!(documented("level").contains("from") && !documented("queue").contains("from"));
    assert!(!documented(r#""of": "agent""#).contains("agent.time_unix_ns"));
}
