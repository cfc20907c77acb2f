//! One vocabulary: the words of the field are used in code, comments, messages and docs, and the private ones that they
//! replaced do not come back.

use std::{fs, path::Path, process::Command, sync::LazyLock};

use regex::Regex;

/// Private words, as regular expressions, and what to write instead.
const PRIVATE: &[(&str, &str)] = &[
    (
        r"\b([Ll]ooks?|[Ll]ooked) (at|into|closely|around|aside)\b|\b(a|one|each|every|this|that|closer|last|two|between) looks?\b",
        "sample, poll, scan, inspect, profile",
    ),
    (r"\b([Tt]ell|[Tt]ells|[Tt]old)\b", "report, say which"),
    (r"\b[Cc]losely\b", "focused"),
    (r"\bdear(er)?\b", "expensive"),
    (r"\b[Tt]hrift\b", "CPU budget"),
    (r"\bfading\b", "EWMA"),
    (
        r"\b[Ww]ho(ever)? (asks|listens|does|reads|waits|takes|sheds|answers|stands|serves)\b",
        "name the party: client, caller, reader, holder",
    ),
    (
        r"\b[Ww]hat (comes|leaves|stands|is said|was said|is told|it can)\b",
        "arrivals, departures, what is reported",
    ),
    (
        r"\b(for )?so (long|often)\b",
        "the duration or interval itself",
    ),
    (r"\bso (many|much) (as|times|that)\b", "the number itself"),
    (r"\b([Ll]et|[Ll]ets) go\b", "disconnect, drain, release"),
    (
        r"\b([Tt]urn|[Tt]urns|[Tt]urned|[Tt]urning) away\b",
        "reject, shed",
    ),
    (r"\bis said\b", "is reported"),
    (r"\bof what it can\b", "of its capacity"),
    (r"\bby chance\b", "randomly, Poisson"),
    (r"\bas ever\b", "as in the baseline"),
    (r"\bhead of the jam\b", "root cause, head of the wait chain"),
    (r"\bof its own wish\b", "sleeping (nanosleep)"),
    (r"\bhow many at once\b", "concurrency limit"),
    (r"\bmeans? that forgets?\b", "EWMA"),
    (
        r"\bdelay that (is fine|stands)\b",
        "target delay, standing delay",
    ),
    (r"(\b|_)[Ff]olders?(\b|_)", "directory"),
    (r"\bWalks\b|\bwalks[:.]|\bbench[_-]walk\b", "scan"),
    (
        r"(\b|_)ticks_total\b|\blate_ticks\b|\bbench tick\b|\bwhole tick\b",
        "samples",
    ),
    (r"\banswers?_(ns|per_s)\b", "response time, responses"),
    (r"(?i)\btakes_?work_?in\b", "inbound"),
    (r"\b[Hh]asten(s|ed)?\b|_hastened_", "poll sooner"),
];

/// Words of the field that the agent's sources must use.
const FIELD: &[&str] = &[
    "latency",
    "backpressure",
    "throughput",
    "EWMA",
    "hysteresis",
    "root cause",
    "standing delay",
    "concurrency limit",
    "baseline",
];

/// Lines that may hold a private word: the file, part of the line, and why.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("xtask/tests/tidy/words.rs", "", "the list itself"),
    ("CHANGELOG.md", " | `", "the table of renamed names"),
];

const TEXT: &[&str] = &[
    "rs", "md", "toml", "yaml", "yml", "py", "go", "js", "h", "c", "sh", "html",
];

#[test]
fn private_words_do_not_come_back() {
    let found: Vec<String> = files()
        .iter()
        .flat_map(|(file, text)| private_words(file, text))
        .collect();
    assert!(
        found.is_empty(),
        "{} lines use private words:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn the_words_of_the_field_can_be_found() {
    let files = files();
    let agent = files
        .iter()
        .filter(|(file, _)| file.starts_with("agent/src/"));
    let agent: String = agent.map(|(_, text)| text.to_lowercase()).collect();
    for word in FIELD {
        assert!(
            agent.contains(&word.to_lowercase()),
            "no {word:?} in agent/src"
        );
    }
}

#[test]
fn a_private_word_is_found_and_named() {
    let found = private_words("agent/src/a.rs", "fine\n// Who listens is told.\n");
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("agent/src/a.rs:2: "), "{found:?}");
    assert!(private_words("agent/src/a.rs", "// Look it up in the table.\n").is_empty());
}

/// [`PRIVATE`], compiled once for all files.
static PATTERNS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let compile =
        |(pattern, instead): &(&str, &'static str)| (Regex::new(pattern).unwrap(), *instead);
    PRIVATE.iter().map(compile).collect()
});

/// `file:line: text` of each line that uses a private word.
fn private_words(file: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let is_allowed =
            |(allowed, part, _): &(&str, &str, &str)| *allowed == file && line.contains(part);
        if ALLOWED.iter().any(is_allowed) {
            continue;
        }
        for (pattern, instead) in PATTERNS.iter() {
            if let Some(word) = pattern.find(line) {
                found.push(format!(
                    "{file}:{}: {:?} (instead: {instead}): {}",
                    number + 1,
                    word.as_str(),
                    line.trim()
                ));
            }
        }
    }
    found
}

/// Path and text of all sources and documents that git tracks.
fn files() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .expect("git lists the files");
    let listed = String::from_utf8(listed.stdout).unwrap();
    let files: Vec<(String, String)> = listed
        .split('\0')
        .filter(|file| {
            TEXT.iter()
                .any(|end| Path::new(file).extension().is_some_and(|e| e == *end))
        })
        .filter_map(|file| Some((file.to_owned(), fs::read_to_string(root.join(file)).ok()?)))
        .collect();
    assert!(
        files.len() > 100,
        "only {} files: is this a git checkout?",
        files.len()
    );
    files
}
