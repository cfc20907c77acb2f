//! Removes identifying texts from samples, so that a user can share a recording.
//!
//! Numbers are kept: the pipeline reaches the same verdicts before and after, with other names. Each text is replaced with
//! a short token, always the same one for the same text. Only well-known words are kept: program names, standard
//! directories, and words of process titles and log lines that the rules know. Network addresses are replaced, except for
//! loopback. Processes that are neither watched nor a peer of a watched one are dropped, except for their CPU time, which
//! others may have waited for.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    Sample, VM_THREAD, Workload,
    texts::{Text, each_address, each_text},
};
use crate::messages::KNOWN;

/// Replaces omitted words.
pub const LEFT_OUT: &str = "…";

/// Program names that are kept: they identify the kind of service, not its owner.
pub const PROGRAMS: &[&str] = &[
    "apache2",
    "beam.smp",
    "caddy",
    "celery",
    "dnsmasq",
    "dotnet",
    "envoy",
    "etcd",
    "gunicorn",
    "gzip",
    "haproxy",
    "httpd",
    "java",
    "mariadbd",
    "memcached",
    "mongod",
    "mosquitto",
    "mysqld",
    "nginx",
    "node",
    "pgbouncer",
    "php-fpm",
    "postgres",
    "puma",
    "python",
    "redis-server",
    "rsyslogd",
    "ruby",
    "systemd",
    "uvicorn",
    "uwsgi",
    "uwsgi-core",
    "valkey-server",
    "varnishd",
];
/// Presets of queues inside services that are kept: those that come with the agent.
pub const PRESETS: &[&str] = &[
    "envoy",
    "haproxy",
    "litellm",
    "micrometer",
    "nats",
    "pgbouncer",
    "rabbitmq",
    "redis",
    "vllm",
];
/// Names of a runtime's own threads, without the number that may follow. They are kept, because the rules know them.
const THREADS: &[&str] = &["GC Thread#", "VM Periodic Tas", VM_THREAD];
/// Names of directories and control groups that are kept.
pub const PLACES: &[&str] = &[
    ".",
    "..",
    "bin",
    "console",
    "dev",
    "docker",
    "etc",
    "home",
    "init.scope",
    "kubepods",
    "kubepods.slice",
    "lib",
    "log",
    "machine.slice",
    "opt",
    "proc",
    "pts",
    "run",
    "sys",
    "system.slice",
    "tmp",
    "tty",
    "user.slice",
    "usr",
    "var",
];
/// Words of process titles that are kept: they describe what a server does, and the rules know some of them.
pub const TITLES: &[&str] = &[
    "(aborted)",
    "ALTER",
    "ANALYZE",
    "BEGIN",
    "COMMIT",
    "COPY",
    "CREATE",
    "DELETE",
    "DROP",
    "INSERT",
    "LOCK",
    "ROLLBACK",
    "SELECT",
    "TRUNCATE",
    "UPDATE",
    "VACUUM",
    "[local]",
    "autovacuum",
    "checkpointer",
    "idle",
    "in",
    "master",
    "process",
    "transaction",
    "waiting",
    "worker",
    "writer",
];

/// Maximum number of digits of a name that are kept, as the number of a thread in its pool.
const MAX_DIGITS: usize = 9;

/// Anonymizes the samples of one recording.
#[derive(Debug, Default)]
pub struct Anonymizer {
    /// Processes that are kept.
    kept: BTreeSet<u32>,
    tokens: HashMap<(Text, String), String>,
    counts: HashMap<Text, usize>,
    /// Suffixes for names with several numbers.
    suffixes: HashMap<String, usize>,
    addresses: HashMap<IpAddr, IpAddr>,
    /// Remote ports of the targets' connections.
    remote_ports: BTreeSet<u16>,
}

impl Anonymizer {
    /// First pass: must see every sample, since a process may become relevant late in the recording.
    pub fn learn(&mut self, sample: &Sample) {
        for target in sample.targets.iter().flatten() {
            self.kept.extend(&target.tgids);
        }
        for holder in sample.holders.iter().flatten() {
            self.kept.insert(holder.tgid);
        }
        for peer in sample.peers.iter().flatten() {
            self.kept.insert(peer.tgid);
        }
        for wait in sample.lock_waits.iter().flatten() {
            self.kept.extend(wait.holder.tgid());
        }
        for connection in &sample.connections {
            self.remote_ports.insert(connection.remote.port());
        }
    }

    /// Second pass: the anonymized sample.
    pub fn anonymize(&mut self, sample: &Sample) -> Sample {
        let mut sample = sample.clone();
        self.drop_unrelated(&mut sample);
        each_text(&mut sample, &mut |what, text| {
            *text = self.replace(what, text);
        });
        each_address(&mut sample, &mut |address| {
            address.set_ip(self.address(address.ip()));
        });
        sample
    }

    fn drop_unrelated(&self, sample: &mut Sample) {
        if let Some(listening) = &mut sample.listening {
            listening.retain(|one| {
                self.kept.contains(&one.tgid) || self.remote_ports.contains(&one.address.port())
            });
        }
        sample
            .titles
            .retain(|title| self.kept.contains(&title.tgid));
        // The agent writes codes of this form only; a crafted recording may contain anything.
        let is_code = |code: &str| {
            code.len() <= 40 && code.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
        };
        sample.notices.retain(|notice| is_code(&notice.code));
        // CPU time of unrelated processes is kept: a target may have waited for it.
        sample
            .cpu_users
            .retain(|one| one.cpu_ns > 0 || self.kept.contains(&one.tgid));
        for target in sample.targets.iter_mut().flatten() {
            target.attributes.clear();
            target.workload = Workload::default();
        }
    }

    fn replace(&mut self, what: Text, text: &str) -> String {
        match what {
            _ if text.is_empty() => String::new(),
            Text::Name => self.name(text),
            Text::Path => self.path(text),
            Text::Group => self.places(Text::Group, text),
            Text::Title => title(text),
            Text::Message if is_known(text) => text.to_owned(),
            Text::Preset if PRESETS.contains(&text) => text.to_owned(),
            // The message's name has already been replaced, so filter the line by all patterns.
            Text::Line => line(text),
            Text::Notice => LEFT_OUT.to_owned(),
            Text::Container
            | Text::Attribute
            | Text::Device
            | Text::Message
            | Text::Preset
            | Text::Queue => self.token(what, text),
        }
    }

    /// Names that differ only in a number keep that number: they are threads of one pool.
    fn name(&mut self, name: &str) -> String {
        if is_program(name) || is_of_a_runtime(name) {
            return name.to_owned();
        }
        let digits: Vec<&str> = name
            .split(|letter: char| !letter.is_ascii_digit())
            .filter(|run| !run.is_empty())
            .collect();
        let pattern: String = name
            .chars()
            .fold((String::new(), false), |(mut out, in_run), letter| {
                let digit = letter.is_ascii_digit();
                if !digit {
                    out.push(letter);
                } else if !in_run {
                    out.push('#');
                }
                (out, digit)
            })
            .0;
        let token = self.token(Text::Name, &pattern);
        match digits.as_slice() {
            [] => token,
            [one] if one.len() <= MAX_DIGITS => format!("{token}{one}"),
            _ => {
                let next = self.suffixes.len() + 1;
                let suffix = self.suffixes.entry(name.to_owned()).or_insert(next);
                format!("{token}{suffix}")
            }
        }
    }

    fn path(&mut self, path: &str) -> String {
        let number = path.strip_prefix("/dev/pts/");
        if number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit())) {
            return path.to_owned();
        }
        if path.starts_with("/dev/tty") {
            return "/dev/tty".to_owned();
        }
        let inode = path
            .strip_prefix("socket:[")
            .and_then(|it| it.strip_suffix(']'));
        if inode.is_some_and(|inode| inode.bytes().all(|digit| digit.is_ascii_digit())) {
            return path.to_owned();
        }
        match path.strip_prefix('@') {
            Some(name) => format!("@{}", self.places(Text::Path, name)),
            None => self.places(Text::Path, path),
        }
    }

    fn places(&mut self, what: Text, path: &str) -> String {
        let places: Vec<String> = path
            .split('/')
            .map(|place| {
                if place.is_empty() || PLACES.contains(&place) {
                    place.to_owned()
                } else {
                    self.token(what, place)
                }
            })
            .collect();
        places.join("/")
    }

    /// Tokens differ in letters only: digits in a name count as the number of a thread in a pool.
    fn token(&mut self, what: Text, text: &str) -> String {
        let known = self.tokens.get(&(what, text.to_owned()));
        if let Some(known) = known {
            return known.clone();
        }
        let count = self.counts.entry(what).or_default();
        let token = format!("{}-{}", prefix(what), letters(*count));
        *count += 1;
        self.tokens.insert((what, text.to_owned()), token.clone());
        token
    }

    fn address(&mut self, address: IpAddr) -> IpAddr {
        let plain = address.to_canonical();
        if plain.is_loopback() || plain.is_unspecified() {
            return address;
        }
        let next = self.addresses.len() as u32 + 1;
        let replacement = *self.addresses.entry(plain).or_insert_with(|| match plain {
            IpAddr::V4(_) => Ipv4Addr::from(0x0a00_0000 | next & 0x00ff_ffff).into(),
            IpAddr::V6(_) => Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(next)).into(),
        });
        match (address, replacement) {
            (IpAddr::V6(_), IpAddr::V4(replacement)) => replacement.to_ipv6_mapped().into(),
            _ => replacement,
        }
    }
}

fn prefix(what: Text) -> &'static str {
    match what {
        Text::Name => "name",
        Text::Path => "path",
        Text::Group => "group",
        Text::Container => "container",
        Text::Attribute => "attribute",
        Text::Device => "device",
        Text::Message => "own",
        Text::Preset => "preset",
        Text::Queue => "queue",
        Text::Title | Text::Line | Text::Notice => "text",
    }
}

/// Whether this is a token, with or without the number of a thread in its pool.
pub fn is_token(word: &str) -> bool {
    let Some((prefix, rest)) = word.split_once('-') else {
        return false;
    };
    let name = rest.trim_end_matches(|letter: char| letter.is_ascii_digit());
    let prefixes = [
        "name",
        "path",
        "group",
        "container",
        "attribute",
        "device",
        "own",
        "preset",
        "queue",
        "text",
    ];
    prefixes.contains(&prefix)
        && (1..=5).contains(&name.len())
        && name.bytes().all(|letter| letter.is_ascii_lowercase())
}

/// A number in base 26: a, b, … z, ba, bb, …
fn letters(mut number: usize) -> String {
    let mut out = Vec::new();
    loop {
        out.push(b'a' + (number % 26) as u8);
        number /= 26;
        if number == 0 {
            break;
        }
    }
    out.iter().rev().map(|letter| char::from(*letter)).collect()
}

/// Whether this is a known program, possibly with a version: `python3.11`.
fn is_program(name: &str) -> bool {
    let base = name.trim_end_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
    name.len() - base.len() <= 5 && PROGRAMS.contains(&base)
}

/// Whether a runtime gives this name to a thread of its own: `GC Thread#3`.
pub fn is_of_a_runtime(name: &str) -> bool {
    let mut rests = THREADS.iter().filter_map(|known| name.strip_prefix(known));
    rests.any(|rest| rest.bytes().all(|digit| digit.is_ascii_digit()))
}

fn is_known(message: &str) -> bool {
    KNOWN.iter().any(|known| known.name == message)
}

fn title(title: &str) -> String {
    only(title, |word| {
        TITLES.contains(&word) || word.strip_suffix(':').is_some_and(is_program)
    })
}

/// Keeps only words of the patterns in the table of messages.
fn line(line: &str) -> String {
    only(line, is_of_a_pattern)
}

/// Whether a word is part of a pattern in the table of messages.
pub fn is_of_a_pattern(word: &str) -> bool {
    KNOWN.iter().any(|known| {
        let mut words = known.pattern.split([' ', '*']);
        words.any(|known| !known.is_empty() && known.eq_ignore_ascii_case(word))
    })
}

fn only(text: &str, is_kept: impl Fn(&str) -> bool) -> String {
    let mut words: Vec<&str> = Vec::new();
    for word in text.split_whitespace() {
        match is_kept(word) {
            true => words.push(word),
            false if words.last() == Some(&LEFT_OUT) => {}
            false => words.push(LEFT_OUT),
        }
    }
    words.join(" ")
}

#[cfg(test)]
#[path = "anonymize/tests.rs"]
mod tests;
