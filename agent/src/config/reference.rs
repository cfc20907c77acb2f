//! Every configuration key: type, bounds, default and meaning.
//!
//! This one table is the source of `docs/reference/configuration.md`. Tests compare it with the keys that the parser
//! accepts and with the defaults in force. After a change run them with `TAILBACK_BLESS=1` to rewrite the page.
#![forbid(unsafe_code)]

/// One configuration key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The section as written in the file: `[detect.KIND]`, `[[target]]`; empty at the top level.
    pub section: &'static str,
    pub name: &'static str,
    /// The type of the value, with its bounds.
    pub value: &'static str,
    /// The default as written in the file. Empty: no default, or the key is required.
    pub default: &'static str,
    pub meaning: &'static str,
}

const fn key(
    section: &'static str,
    name: &'static str,
    value: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> Key {
    Key {
        section,
        name,
        value,
        default,
        meaning,
    }
}

/// All keys, section by section. `[detect.*]` stands for `[detect.all]`, `[detect.KIND]` and `thresholds` of
/// `[[detect.queue]]`.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key("", "interval", "duration, 1ms to 60s", "100ms", "sampling interval; `--interval` overrides it"),
    key("", "focus_interval", "duration, 1ms to 60s", "10ms", "sampling interval of a focused service, as far as the budget allows"),
    key("", "cpu_budget", "0.0005 to 1", "0.01", "CPU budget of the agent, as a fraction of one core; by default 0.05 for `diagnose` and `top`"),
    key("", "tier", "glance, auto or watch", "glance", "whether [hooks](../guides/exact-waits.md) measure waits exactly: never, while a service is focused, or always; `--tier` overrides it"),
    key("", "hook_budget", "0.0001 to 0.5", "0.01", "CPU budget of these hooks, as a fraction of the machine's CPU time"),
    key("", "otlp", "URL", "", "OTLP endpoint; `--otlp` and `OTEL_EXPORTER_OTLP_*` override it"),
    key("[[target]]", "pid", "process id", "", "watch this PID and its forked workers"),
    key("[[target]]", "name", "glob", "", "watch processes whose name or executable matches"),
    key("[[target]]", "port", "TCP port", "", "watch processes that listen on this port"),
    key("[[target]]", "cgroup", "path", "", "watch all processes in this cgroup and its descendants"),
    key("[[target]]", "user", "user id", "", "only processes of this user, with the workers that they forked"),
    key("[[target]]", "service_name", "string", "", "service name; by default the service's `OTEL_SERVICE_NAME`, else its program's name"),
    key("[detect.*]", "target", "duration above 0", "", "target delay; by default half the service time, 5 ms to 500 ms"),
    key("[detect.*]", "warn", "score, above 0 to 10", "0.7", "score at which level warn is entered"),
    key("[detect.*]", "critical", "score, at least `warn`", "0.9", "score at which level critical is entered"),
    key("[detect.*]", "exit_ratio", "0 to 1", "0.5", "hysteresis: a level is left when the score falls below `exit_ratio` × its threshold"),
    key("[detect.*]", "clear_after", "duration", "1500ms", "how long the score must stay that low before the level is left"),
    key("[detect.*]", "window", "duration", "1s", "a queue is standing if it has not drained within this time"),
    key("[detect.*]", "dwell", "duration", "300ms", "how long the fill (depth ÷ limit) must hold before it counts"),
    key("[detect.*]", "repeat_interval", "duration", "30s", "how often an open episode is reported again"),
    key("[[detect.queue]]", "name", "glob", "", "name of the queues; required"),
    key("[[detect.queue]]", "kind", "queue kind", "", "kind of the queues; by default any"),
    key("[[detect.queue]]", "thresholds", "table of `[detect.*]` keys", "", "their thresholds; required"),
    key("[logs]", "read", "boolean", "true", "whether logs of focused services are read"),
    key("[[logs.pattern]]", "name", "lower-case letters, digits, `_`", "", "name of the message; a known name adds to its patterns; required"),
    key("[[logs.pattern]]", "pattern", "text, at most 200 bytes", "", "text in the line, `*` matches anything; required; at most 64 patterns"),
    key("[app]", "enabled", "boolean", "true", "whether services are asked for the queues that they keep themselves"),
    key("[app]", "disabled", "names of presets", "", "presets that are not used"),
    key("[app]", "also", "names of presets", "", "presets that are used only if named here: `micrometer`"),
    key("[[app.login]]", "preset", "name of a preset", "", "the preset whose services require a password; required"),
    key("[[app.login]]", "process_user", "user id", "", "only processes of this user get the password: any process can take the name of a server; required"),
    key("[[app.login]]", "user", "text", "", "by default that of the preset"),
    key("[[app.login]]", "password_file", "absolute path", "", "a file with the password, read at each login; required"),
    key("[[app.preset]]", "name", "lower-case letters, digits, `_`, at most 40", "", "part of the names of its queues; a preset of the agent with this name is replaced; required"),
    key("[[app.preset]]", "find", "`exe`: base names of executables, `argv`: consecutive arguments", "", "which processes: of each list that is given, one entry must match; required"),
    key("[[app.preset]]", "at", "`ports`, `port_options`, `sockets`, `only_sockets`", "", "which of the process's own listeners: ports, options of the process that name one, base names of unix sockets; by default any port"),
    key("[[app.preset]]", "proof", "name of a value", "", "a value that each answer has; required"),
    key("[[app.preset]]", "pace", "duration, 500ms to 1h", "5s", "interval between requests; at least 50 times the time that an answer takes"),
    key("[[app.preset]]", "focused_pace", "duration, 500ms to 1h", "1s", "the same while the service is focused"),
    key("[[app.preset]]", "opt_in", "boolean", "false", "used only if `also` names it"),
    key("[[app.preset]]", "ask", "tables, by `protocol`: `prometheus`, `json`, `csv`, `pairs`, `postgres`, `redis`", "", "the requests ([their keys](queues/app.md#requests)); required"),
    key("[[app.preset]]", "queue", "`[[app.preset.queue]]` tables", "", "what the answers mean; required"),
    key("[[app.preset.queue]]", "name", "text; `{label}` stands for the value of a label", "", "a queue for each value of its labels; required"),
    key("[[app.preset.queue]]", "unit", "items, messages, jobs, tasks, requests, clients, connections, threads or bytes", "", "what it counts; required"),
    key("[[app.preset.queue]]", "depth", "value", "", "what waits: the name of a value, `name{label=text}`, a list that is added up, `{ first = [\"a\", \"b\"] }`: the first that the answer has, or `{ option = [\"--name\"] }` of the process; required"),
    key("[[app.preset.queue]]", "limit", "value", "", "the most that may wait"),
    key("[[app.preset.queue]]", "limit_rejects", "boolean", "false", "whether work is rejected, or its producer blocked, at the limit"),
    key("[[app.preset.queue]]", "serving", "value", "", "what is being processed"),
    key("[[app.preset.queue]]", "slots", "value", "", "the maximum that can be processed at one time"),
    key("[[app.preset.queue]]", "entered", "counter", "", "what entered; computed from `left` and the depth if it is absent"),
    key("[[app.preset.queue]]", "left", "counter", "", "what left; likewise from `entered`"),
    key("[[app.preset.queue]]", "lost", "counter", "", "what was lost or rejected"),
    key("[[app.preset.queue]]", "waited", "`seconds`, `milliseconds` or `microseconds` = counter", "", "the time that items waited in total"),
    key("[[app.preset.queue]]", "waits", "counter", "", "the number of items in `waited`"),
    key("[[app.preset.queue]]", "oldest", "like `waited`, or `since_seconds`, `since_milliseconds` = a timestamp, counted from 1970", "", "age of the oldest item"),
    key("[[app.preset.queue]]", "consumers", "value", "", "how many take items from it"),
    key("[[app.preset.queue]]", "consumed_by", "name of a value", "", "the [addresses of its consumers](queues/app.md#consumers)"),
    key("[[app.preset.queue]]", "served_on", "name of a value", "", "the [addresses of its connections](queues/app.md#servers) to servers"),
    key("[[app.preset.queue]]", "context", "table of values", "", "shown as evidence, never judged"),
    key("[signal]", "publish", "boolean", "true", "whether pages and the stream are published"),
    key("[signal]", "directory", "absolute path", "/run/tailback", "directory of pages and sockets; `$RUNTIME_DIRECTORY` (systemd) comes before the default"),
    key("[signal]", "directory_wait", "duration, at most 10m", "0s", "how long a starting agent waits for another one that publishes there to end"),
    key("[signal]", "ttl", "duration, two sampling intervals to 60s", "1s", "how long a signal is valid; by default three sampling intervals, if that is longer"),
    key("[signal]", "max_pages", "1 to 4096", "256", "maximum number of services that get a page"),
    key("[signal]", "start_adapter_process", "boolean", "true", "whether `run` starts the adapter process; if not, run `tailback adapters --config FILE`"),
    key("[signal.http]", "listen", "address or `unix:PATH`", "", "HTTP adapter; required"),
    key("[signal.http]", "allowed_hosts", "at most 64 names; `.example.com` also stands for all names in it", "", "names of the adapter in the `Host` of requests, besides localhost, IP addresses and the name of this machine ([what is checked](../guides/prometheus.md#who-may-ask))"),
    key("[[signal.haproxy]]", "target", "service name", "", "HAProxy agent-check for this service; required"),
    key("[[signal.haproxy]]", "listen", "address or `unix:PATH`", "", "where HAProxy connects; required"),
    key("[[signal.haproxy]]", "maxconn", "number", "", "control `maxconn` (up to this value) instead of the weight"),
    key("[[signal.envoy]]", "target", "service name", "", "concurrency limit of this service for Envoy; required"),
    key("[[signal.envoy]]", "cluster", "text, at most 200 bytes", "", "name of the cluster in Envoy's configuration; required"),
    key("[[signal.envoy]]", "symlink_root", "absolute path", "", "the link that Envoy's disk layer follows; required"),
    key("[[signal.orca]]", "target", "service name", "", "ORCA load reports for this service; required"),
    key("[[signal.orca]]", "listen", "address or `unix:PATH`", "", "where gRPC clients connect; required"),
    key("[signal.keda]", "listen", "address or `unix:PATH`", "", "KEDA external scaler; required"),
    key("[[signal.pressure_socket]]", "target", "service name", "", "pressure socket for this service; required"),
    key("[[signal.pressure_socket]]", "path", "absolute path", "", "path of the socket; required"),
    key("[[signal.group]]", "targets", "service names", "", "instances behind one load balancer; required"),
    key("[[signal.group]]", "min_ready", "0 to the number of targets", "1", "at least this many stay ready and undrained"),
];

/// The table of all keys in Markdown.
pub fn markdown() -> String {
    let mut text = String::from("| key | value | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in KEYS {
        let space = if key.section.is_empty() { "" } else { " " };
        let default = match key.default {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        text += &format!(
            "| `{}{space}{}` | {} | {default} | {} |\n",
            key.section, key.name, key.value, key.meaning
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

    use super::*;
    use crate::{
        config::Config,
        detect::Settings,
        queue::{Kind, QueueKey},
    };

    const BEGIN: &str = "<!-- keys:begin -->\n";
    const END: &str = "<!-- keys:end -->";

    /// A file that opens `section`, with the keys that the parser requires besides the one under test left out.
    fn header(section: &str) -> String {
        match section {
            "" => String::new(),
            "[detect.*]" => "[detect.all]\n".to_owned(),
            "[[app.preset.queue]]" => "[[app.preset]]\n[[app.preset.queue]]\n".to_owned(),
            section => format!("{section}\n"),
        }
    }

    /// The keys that the parser accepts in a section, from its error about an unknown one.
    fn accepted(section: &str) -> BTreeSet<String> {
        let text = format!("{}no_such_key = 1\n", header(section));
        let error = format!("{:#}", Config::parse(&text).unwrap_err());
        let expected = error.split("expected").nth(1).unwrap_or_default();
        let names = expected.split('`').skip(1).step_by(2);
        names.map(str::to_owned).collect()
    }

    #[test]
    fn the_table_lists_exactly_the_keys_that_the_parser_accepts() {
        let sections: BTreeSet<&str> = KEYS.iter().map(|key| key.section).collect();
        for section in &sections {
            let mut listed: BTreeSet<String> = KEYS
                .iter()
                .filter(|key| key.section == *section)
                .map(|key| key.name.to_owned())
                .collect();
            // Tables of their own: `[logs]` has `pattern`, `[signal]` has its adapters.
            let prefix = section.trim_matches(['[', ']']);
            let below = sections
                .iter()
                .map(|other| other.trim_matches(['[', ']']))
                .filter_map(|other| match prefix {
                    "" => other.split('.').next().filter(|name| !name.is_empty()),
                    prefix => other
                        .strip_prefix(prefix)?
                        .strip_prefix('.')?
                        .split('.')
                        .next(),
                });
            listed.extend(below.map(str::to_owned));
            assert_eq!(listed, accepted(section), "keys of {section:?}");
        }
    }

    #[test]
    fn the_defaults_in_the_table_are_the_defaults_in_force() {
        let mut text = String::new();
        for section in ["", "[detect.*]", "[logs]", "[app]", "[signal]"] {
            text += &header(section);
            for key in KEYS
                .iter()
                .filter(|key| key.section == section && !key.default.is_empty())
            {
                let is_bare = key.default.parse::<f64>().is_ok() || key.default == "true";
                let quote = if is_bare { "" } else { "\"" };
                text += &format!("{} = {quote}{}{quote}\n", key.name, key.default);
            }
        }
        let (written, default) = (Config::parse(&text).unwrap(), Config::default());
        let queue = QueueKey::new(1, Kind::Accept, ":80".into());
        assert_eq!(written.settings_for()(&queue), Settings::default());
        assert_eq!(
            format!("{:?}", written.budget()),
            format!("{:?}", default.budget())
        );
        assert_eq!(
            (written.tier(), written.hook_budget()),
            (default.tier(), default.hook_budget())
        );
        assert!(written.messages().unwrap().is_some() && default.messages().unwrap().is_some());
        let (written, default) = (written.signal, default.signal);
        let interval = Duration::from_millis(100);
        assert_eq!(written.ttl_ns(interval), default.ttl_ns(interval));
        assert_eq!(written.max_pages(), default.max_pages());
        assert_eq!(written.publishes(), default.publishes());
        let group = "[[signal.group]]\ntargets = [\"a\"]\n";
        let group = &Config::parse(group).unwrap().signal.group[0];
        let min_ready = KEYS.iter().find(|key| key.name == "min_ready").unwrap();
        assert_eq!(group.min_ready.to_string(), min_ready.default);
    }

    #[test]
    fn the_page_has_the_table() {
        let page =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/configuration.md");
        let text = fs::read_to_string(&page).unwrap();
        let begin = text.find(BEGIN).expect("a begin marker") + BEGIN.len();
        let end = text.find(END).expect("an end marker");
        let expected = format!("{}{}{}", &text[..begin], markdown(), &text[end..]);
        if text != expected && std::env::var_os("TAILBACK_BLESS").is_some() {
            fs::write(&page, expected).unwrap();
            return;
        }
        assert!(
            text == expected,
            "docs/reference/configuration.md is out of date: run this test with TAILBACK_BLESS=1"
        );
    }
}
