use super::*;
use crate::{app::recognize::Program, sample::anonymize::PRESETS};

fn own(text: &str) -> Result<Table> {
    let file: File = toml::from_str(text)?;
    Table::new(&file.presets, &[], &[])
}

fn error(text: &str) -> String {
    format!("{:#}", own(text).unwrap_err())
}

const ROW: &str = r#"
    [[preset]]
    name = "shop"
    find = { exe = ["shopd"] }
    proof = "shop_waiting"
    ask = [{ protocol = "prometheus", paths = ["/metrics"] }]
    [[preset.queue]]
    name = "orders {shard}"
    unit = "jobs"
    depth = "shop_waiting{state=ready}"
"#;

#[test]
fn the_agents_own_rows_are_valid_and_their_names_survive_anonymization() {
    let presets = OWN.as_ref().unwrap();
    for preset in presets {
        preset.check().with_context(|| preset.name.clone()).unwrap();
        assert!(PRESETS.contains(&preset.name.as_str()), "{}", preset.name);
    }
    assert_eq!(PRESETS.len(), presets.len());
    let names = |table: Table| table.0.len();
    let all: Vec<String> = presets.iter().map(|preset| preset.name.clone()).collect();
    assert_eq!(names(Table::new(&[], &[], &all).unwrap()), presets.len());
    assert_eq!(names(Table::new(&[], &all, &all).unwrap()), 0);
}

#[test]
fn servers_of_models_are_asked_at_one_port() {
    let presets = OWN.as_ref().unwrap();
    for (name, default) in [("vllm", 8000), ("litellm", 4000)] {
        let preset = presets.iter().find(|preset| preset.name == name).unwrap();
        let ports = |cmdline: &[u8]| Program::new("python3", cmdline).ports(&preset.at);
        assert_eq!(ports(b"python3\0"), [default]);
        assert_eq!(ports(b"python3\0--port\x009000\0"), [9000]);
    }
}

#[test]
fn a_row_of_the_user_is_added_and_replaces_one_of_the_same_name() {
    let table = own(ROW).unwrap();
    assert_eq!(table.presets()[0].name, "shop");
    assert_eq!(table.presets()[0].pace, Duration::from_secs(5));
    let row = &table.presets()[0].queue[0];
    assert_eq!(row.labels().unwrap(), ["shard"]);
    let replaced = own(&ROW.replace("shop\"", "redis\"")).unwrap();
    let redis: Vec<_> = replaced
        .presets()
        .iter()
        .filter(|preset| preset.name == "redis")
        .collect();
    assert_eq!(redis.len(), 1);
    assert_eq!(redis[0].find.exe, ["shopd"]);
}

#[test]
fn an_error_names_the_row_and_the_key() {
    for (from, to, expected) in [
        (
            "exe = [\"shopd\"]",
            "",
            "preset number 1, \"shop\": find: give",
        ),
        ("\"shopd\"", "\"*\"", "find, at: a text must not be"),
        ("name = \"shop\"", "name = \"Shop\"", "name: must be"),
        (
            "\"/metrics\"",
            "\"metrics\"",
            "ask number 1: paths: each must begin",
        ),
        (
            "{shard}",
            "{shard",
            "queue number 1, \"orders {shard\": name: a `{`",
        ),
        (
            "\"jobs\"",
            "\"parsecs\"",
            "no unit \"parsecs\"; there are items",
        ),
        ("depth =", "deepth =", "unknown field `deepth`"),
        ("{state=ready}", "{state}", "a label has no `=`"),
        (
            "depth =",
            "limit_rejects = true\ndepth =",
            "limit_rejects: there is no limit",
        ),
        ("depth =", "waits = \"x\"\ndepth =", "waited, waits"),
        ("depth =", "oldest = {}\ndepth =", "oldest: give durations"),
        (
            "depth =",
            "limit = { opt = [\"-x\"] }\ndepth =",
            "unknown field `opt`",
        ),
        ("proof =", "pace = \"1ms\"\nproof =", "pace: must be"),
        ("proof =", "pace = \"fast\"\nproof =", "is not a duration"),
        (
            "\"prometheus\"",
            "\"telepathy\"",
            "unknown variant `telepathy`",
        ),
    ] {
        let text = error(&ROW.replacen(from, to, 1));
        assert!(text.contains(expected), "{from} -> {to}: {text}");
    }
    let twice = error(&format!("{ROW}{ROW}"));
    assert!(twice.contains("two presets are called \"shop\""), "{twice}");
}

#[test]
fn only_requests_that_read_are_accepted() {
    let ask = r#"ask = [{ protocol = "prometheus", paths = ["/metrics"] }]"#;
    for (request, expected) in [
        (
            r#"{ protocol = "postgres", user = "a", database = "b", query = "SHUTDOWN", table = "t", labels = [] }"#,
            "query: only one SHOW",
        ),
        (
            r#"{ protocol = "postgres", user = "a", database = "b", query = "SHOW POOLS; KILL x", table = "t", labels = [] }"#,
            "query: only one SHOW",
        ),
        (
            r#"{ protocol = "redis", table = "t", values = [{ name = "n", command = ["FLUSHALL"] }] }"#,
            "command \"FLUSHALL\": only these",
        ),
        (
            r#"{ protocol = "redis", table = "t", values = [{ name = "n", command = ["SRANDMEMBER", "k", "8"], clients = true }] }"#,
            "clients: needs `then`",
        ),
        (
            r#"{ protocol = "csv", command = "show stat\ndisable server", table = "t", labels = [] }"#,
            "command: must be one line",
        ),
        (
            r#"{ protocol = "pairs", command = "show info; disable server a/b", table = "t" }"#,
            "command: must be one line",
        ),
        (
            r#"{ protocol = "pairs", command = "shutdown sessions", table = "t" }"#,
            "must begin with one of these",
        ),
    ] {
        let text = error(&ROW.replace(ask, &format!("ask = [{request}]")));
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_preset_that_does_not_exist_is_named() {
    let error = Table::new(&[], &["kafka9".to_owned()], &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no preset \"kafka9\"") && error.contains("redis"),
        "{error}"
    );
}
