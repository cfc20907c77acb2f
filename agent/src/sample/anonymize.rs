//! A sample without the words of the machine that it was taken on, for one who sends us a recording.
//!
//! Numbers stay: the pipeline says the same of the samples before and after, in other names. A text becomes a short token, the
//! same one wherever it stands. What stays of texts are words that all the world knows and that tell what happens: programs,
//! usual folders, what a process title or a log line says that rules and tables know. Addresses of networks become
//! others, loopback ones stay. Processes that are neither watched nor at the other end of anything are dropped, all but
//! the CPU time that they used: others wanted it.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    Sample,
    texts::{Text, each_address, each_text},
};
use crate::messages::KNOWN;

/// In place of words that are left out.
pub const LEFT_OUT: &str = "…";

/// Names of programs that stay: they tell a reader what kind of service it is, and nothing about whose.
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
/// Folders and control groups that stay.
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
/// Words of process titles that stay: the rules know some of them, and they tell what a server does.
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

/// Digits of a name that stay: the number of a thread in its pool.
const DIGITS: usize = 9;

/// Makes samples of one recording anonymous.
#[derive(Debug, Default)]
pub struct Anonymizer {
    /// Processes that are told of.
    kept: BTreeSet<u32>,
    tokens: HashMap<(Text, String), String>,
    counts: HashMap<Text, usize>,
    /// Endings of names with several numbers.
    endings: HashMap<String, usize>,
    addresses: HashMap<IpAddr, IpAddr>,
    /// Ports that targets call.
    called: BTreeSet<u16>,
}

impl Anonymizer {
    /// Every sample of the recording is to be shown first: who matters may be known only late.
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
        for connection in &sample.connections {
            self.called.insert(connection.remote.port());
        }
    }

    /// The same sample, in other words.
    pub fn anonymize(&mut self, sample: &Sample) -> Sample {
        let mut sample = sample.clone();
        self.drop_strangers(&mut sample);
        each_text(&mut sample, &mut |what, text| {
            *text = self.told(what, text);
        });
        each_address(&mut sample, &mut |address| {
            address.set_ip(self.address(address.ip()));
        });
        sample
    }

    fn drop_strangers(&self, sample: &mut Sample) {
        if let Some(listening) = &mut sample.listening {
            listening.retain(|one| {
                self.kept.contains(&one.tgid) || self.called.contains(&one.address.port())
            });
        }
        sample
            .titles
            .retain(|title| self.kept.contains(&title.tgid));
        // The agent's own words are of one form; in a recording that was made to do harm anything may stand there.
        let is_code = |code: &str| {
            code.len() <= 40 && code.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
        };
        sample.notices.retain(|notice| is_code(&notice.code));
        // What a stranger used of the CPU counts: others wanted it.
        sample
            .cpu_users
            .retain(|one| one.cpu_ns > 0 || self.kept.contains(&one.tgid));
        for target in sample.targets.iter_mut().flatten() {
            target.attributes.clear();
        }
    }

    fn told(&mut self, what: Text, text: &str) -> String {
        match what {
            _ if text.is_empty() => String::new(),
            Text::Name => self.name(text),
            Text::Path => self.path(text),
            Text::Group => self.places(Text::Group, text),
            Text::Title => title(text),
            Text::Message if is_known(text) => text.to_owned(),
            // Which message it was is not known here: its name went first.
            Text::Line => line(text),
            Text::Notice => LEFT_OUT.to_owned(),
            Text::Container | Text::Attribute | Text::Device | Text::Message => {
                self.token(what, text)
            }
        }
    }

    /// Names that differ in their numbers alone still do: the threads of one pool.
    fn name(&mut self, name: &str) -> String {
        if is_program(name) {
            return name.to_owned();
        }
        let digits: Vec<&str> = name
            .split(|letter: char| !letter.is_ascii_digit())
            .filter(|run| !run.is_empty())
            .collect();
        let alike: String = name
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
        let token = self.token(Text::Name, &alike);
        match digits.as_slice() {
            [] => token,
            [one] if one.len() <= DIGITS => format!("{token}{one}"),
            _ => {
                let next = self.endings.len() + 1;
                let ending = self.endings.entry(name.to_owned()).or_insert(next);
                format!("{token}{ending}")
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

    /// Letters alone tell tokens apart: numbers in names are read as those of one pool.
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
        let told = *self.addresses.entry(plain).or_insert_with(|| match plain {
            IpAddr::V4(_) => Ipv4Addr::from(0x0a00_0000 | next & 0x00ff_ffff).into(),
            IpAddr::V6(_) => Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(next)).into(),
        });
        match (address, told) {
            (IpAddr::V6(_), IpAddr::V4(told)) => told.to_ipv6_mapped().into(),
            _ => told,
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
        Text::Title | Text::Line | Text::Notice => "text",
    }
}

/// Whether this is a token, with or without the number that a thread has in its pool.
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
        "text",
    ];
    prefixes.contains(&prefix)
        && (1..=5).contains(&name.len())
        && name.bytes().all(|letter| letter.is_ascii_lowercase())
}

/// a, b, … z, ba, bb, …
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

/// Of the list, with its version: `python3.11`.
fn is_program(name: &str) -> bool {
    let base = name.trim_end_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
    name.len() - base.len() <= 5 && PROGRAMS.contains(&base)
}

fn is_known(message: &str) -> bool {
    KNOWN.iter().any(|known| known.name == message)
}

fn title(title: &str) -> String {
    only(title, |word| {
        TITLES.contains(&word) || word.strip_suffix(':').is_some_and(is_program)
    })
}

/// The words that the patterns of the table of messages are made of, as whole words.
fn line(line: &str) -> String {
    only(line, is_of_a_pattern)
}

/// Whether a word stands in a pattern of the table of messages.
pub fn is_of_a_pattern(word: &str) -> bool {
    KNOWN.iter().any(|known| {
        let mut words = known.pattern.split([' ', '*']);
        words.any(|known| !known.is_empty() && known.eq_ignore_ascii_case(word))
    })
}

fn only(text: &str, stays: impl Fn(&str) -> bool) -> String {
    let mut words: Vec<&str> = Vec::new();
    for word in text.split_whitespace() {
        match stays(word) {
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
