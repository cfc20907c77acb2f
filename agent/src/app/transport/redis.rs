//! Queues that libraries keep in Redis: their names from sets, or from the keys; then a few commands for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::Result;
use wildmatch::WildMatch;

use super::resp::{Client, Reply};
use crate::app::{
    json::seconds_of_time,
    mapping::MAX_QUEUES,
    series::{Names, Series, SeriesSet},
    table::{Ask, RedisQueues, RedisValue},
};

/// Keys that a SCAN visits at once, and the least time for each: 200 keys a second, but for the first step of each pattern.
const SCAN_COUNT: usize = 200;
const SCAN_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of commands that are sent at once.
const MAX_COMMANDS: usize = 256;
/// Longest key that is kept, bytes: with the number of keys it bounds the memory.
const MAX_KEY_BYTES: usize = 1_024;
/// Longest cursor of a SCAN: a number of 64 bits.
const MAX_CURSOR_BYTES: usize = 20;
/// Maximum number of clients whose addresses are asked for.
const MAX_MEMBERS: usize = 1_024;
/// Longest job whose document is read, bytes.
const MAX_JOB_BYTES: usize = 64 << 10;

/// What is kept from one answer to the next, also if the connection ends.
#[derive(Default)]
pub struct State {
    scanned: Option<Instant>,
    /// The pattern whose keys are scanned next.
    next: usize,
    /// By request.
    scans: BTreeMap<usize, Scan>,
}

/// Keys found by SCAN.
#[derive(Default)]
struct Scan {
    cursor: String,
    /// Of the last complete round, and of this one.
    last: BTreeSet<String>,
    found: BTreeSet<String>,
    /// Keys beyond the limit, in the last complete round and in this one: SCAN may return a key twice.
    last_left_out: usize,
    left_out: usize,
}

impl Scan {
    /// The keys, and the number of further ones.
    fn keys(&self) -> (BTreeSet<String>, usize) {
        let all = self.last.union(&self.found);
        let beyond = all.clone().skip(MAX_QUEUES).count();
        let left_out = self.last_left_out.max(self.left_out).max(beyond);
        (all.take(MAX_QUEUES).cloned().collect(), left_out)
    }

    fn add(&mut self, key: &str) {
        if self.found.contains(key) {
            return;
        }
        if self.found.len() < MAX_QUEUES && key.len() <= MAX_KEY_BYTES {
            self.found.insert(key.to_owned());
        } else {
            self.left_out += 1;
        }
    }

    fn end_round(&mut self) {
        self.last = std::mem::take(&mut self.found);
        self.last_left_out = std::mem::take(&mut self.left_out);
    }
}

/// The values of all requests.
pub async fn ask(
    client: &mut Client,
    asks: &[Ask],
    state: &mut State,
    names: &Names,
) -> Result<SeriesSet> {
    client.begin();
    scan(client, asks, state).await?;
    let mut out = SeriesSet::default();
    for (index, ask) in asks.iter().enumerate() {
        let Ask::Redis {
            table,
            queues,
            values,
        } = ask
        else {
            continue;
        };
        let Some(queues) = queues else {
            for value in values {
                let replies = client.ask(std::slice::from_ref(&value.command)).await?;
                for reply in replies {
                    of_server(&reply, table, value, names, &mut out);
                }
            }
            continue;
        };
        let (keys, left_out) = state.scans.get(&index).map(Scan::keys).unwrap_or_default();
        out.left_out += left_out;
        let found = queue_names(client, queues, keys, &mut out.left_out).await?;
        for value in values {
            read(client, table, value, &found, names, &mut out).await?;
        }
    }
    Ok(out)
}

/// A value of the whole server: a number, or, for INFO, lines `key:value`.
fn of_server(reply: &Reply, table: &str, value: &RedisValue, names: &Names, out: &mut SeriesSet) {
    let name = format!("{table}.{}", value.name);
    match (reply.number(), reply.text()) {
        (Some(number), _) if names.contains(&name) => out.push(Series {
            name,
            labels: Vec::new(),
            value: number,
        }),
        (None, Some(text)) => out.append(crate::app::lines::pairs(text, table, names)),
        _ => {}
    }
}

/// One step of as many scans as are due: they take turns.
async fn scan(client: &mut Client, asks: &[Ask], state: &mut State) -> Result<()> {
    let patterns: Vec<(usize, &RedisQueues)> = asks
        .iter()
        .enumerate()
        .filter_map(|(index, ask)| match ask {
            Ask::Redis {
                queues: Some(queues),
                ..
            } if queues.scan.is_some() => Some((index, queues)),
            _ => None,
        })
        .collect();
    // At first all: one step of each finds all keys of a small database.
    let passed = state.scanned.map_or(Duration::MAX, |at| at.elapsed());
    let due = passed.as_nanos() / SCAN_INTERVAL.as_nanos();
    let due = usize::try_from(due)
        .unwrap_or(usize::MAX)
        .min(patterns.len());
    if due == 0 {
        return Ok(());
    }
    state.scanned = Some(Instant::now());
    for _ in 0..due {
        let (index, queues) = patterns[state.next % patterns.len()];
        state.next = (state.next + 1) % patterns.len();
        let scan = state.scans.entry(index).or_default();
        if scan.cursor.is_empty() {
            scan.cursor = "0".to_owned();
        }
        let pattern = queues.scan.as_deref().unwrap_or_default();
        let mut command = vec!["SCAN", &scan.cursor, "MATCH", pattern];
        let count = SCAN_COUNT.to_string();
        command.extend(["COUNT", &count]);
        if let Some(key_type) = &queues.key_type {
            command.extend(["TYPE", key_type]);
        }
        let command: Vec<String> = command.into_iter().map(str::to_owned).collect();
        let replies = client.ask(&[command]).await?;
        let [cursor, keys] = replies.first().map(Reply::list).unwrap_or_default() else {
            continue;
        };
        let keys = keys.list().iter().filter_map(Reply::text);
        for key in keys {
            scan.add(key);
        }
        let cursor = cursor.text().filter(|text| text.len() <= MAX_CURSOR_BYTES);
        scan.cursor = cursor.unwrap_or("0").to_owned();
        if scan.cursor == "0" {
            scan.end_round();
        }
    }
    Ok(())
}

/// The names of queues. Adds to `left_out` the number of names beyond the limit, and 1 for each set that was not read
/// to its end.
async fn queue_names(
    client: &mut Client,
    queues: &RedisQueues,
    keys: BTreeSet<String>,
    left_out: &mut usize,
) -> Result<BTreeSet<String>> {
    let sets: Vec<String> = match &queues.set {
        Some(set) => vec![set.clone()],
        None if queues.members => keys.into_iter().collect(),
        None => {
            let pattern = queues.scan.as_deref().unwrap_or_default();
            let names = keys.iter().filter_map(|key| at_star(pattern, key));
            return Ok(names.map(str::to_owned).collect());
        }
    };
    let mut found = BTreeSet::new();
    for sets in sets.chunks(MAX_COMMANDS) {
        let commands: Vec<Vec<String>> = sets
            .iter()
            // One step: the first members of a large set.
            .map(|set| {
                ["SSCAN", set, "0", "COUNT", "256"]
                    .map(str::to_owned)
                    .to_vec()
            })
            .collect();
        for reply in client.ask(&commands).await? {
            let next = reply.list().first().and_then(Reply::text);
            *left_out += usize::from(next.is_some_and(|next| next != "0"));
            let members = reply.list().get(1).map(Reply::list).unwrap_or_default();
            for member in members.iter().filter_map(Reply::text) {
                let name = match &queues.after {
                    Some(separator) => member.rsplit(separator.as_str()).next().unwrap_or(member),
                    None => member,
                };
                let is_left_out = queues
                    .without
                    .iter()
                    .any(|glob| WildMatch::new(glob).matches(name));
                if is_left_out || found.contains(name) {
                    continue;
                }
                if found.len() < MAX_QUEUES && name.len() <= MAX_KEY_BYTES {
                    found.insert(name.to_owned());
                } else {
                    *left_out += 1;
                }
            }
        }
    }
    Ok(found)
}

/// The text of a key at the first `*` of a pattern.
fn at_star<'a>(pattern: &str, key: &'a str) -> Option<&'a str> {
    let (before, after) = pattern.split_once('*')?;
    key.strip_prefix(before)?.strip_suffix(after)
}

/// One value of all queues.
async fn read(
    client: &mut Client,
    table: &str,
    value: &RedisValue,
    queues: &BTreeSet<String>,
    names: &Names,
    out: &mut SeriesSet,
) -> Result<()> {
    if value.clients {
        return read_clients(client, table, value, queues, names, out).await;
    }
    let queues: Vec<&String> = queues.iter().collect();
    for queues in queues.chunks(MAX_COMMANDS) {
        let commands: Vec<Vec<String>> = queues
            .iter()
            .map(|queue| filled(&value.command, queue, ""))
            .collect();
        let mut replies = client.ask(&commands).await?;
        if let Some(then) = &value.then {
            let first = replies.iter().zip(queues);
            let known: Vec<(usize, Vec<String>)> = first
                .enumerate()
                .filter_map(|(at, (reply, queue))| Some((at, filled(then, queue, reply.text()?))))
                .collect();
            let commands: Vec<Vec<String>> =
                known.iter().map(|(_, command)| command.clone()).collect();
            let seconds = client.ask(&commands).await?;
            replies = vec![Reply::Nothing; replies.len()];
            for ((at, _), reply) in known.into_iter().zip(seconds) {
                replies[at] = reply;
            }
        }
        for (reply, queue) in replies.iter().zip(queues) {
            put(table, value, queue, reply, names, out);
        }
    }
    Ok(())
}

fn filled(command: &[String], queue: &str, reply: &str) -> Vec<String> {
    let words = command.iter();
    words
        .map(|word| word.replace("{queue}", queue).replace("{reply}", reply))
        .collect()
}

/// The addresses of the clients that take items from each queue: of each member of a list, the reply to the second command.
async fn read_clients(
    client: &mut Client,
    table: &str,
    value: &RedisValue,
    queues: &BTreeSet<String>,
    names: &Names,
    out: &mut SeriesSet,
) -> Result<()> {
    let name = format!("{table}.{}", value.name);
    let (Some(then), true) = (&value.then, names.contains(&name)) else {
        return Ok(());
    };
    let commands = |of: &[&String]| -> Vec<Vec<String>> {
        of.iter()
            .map(|queue| filled(&value.command, queue, ""))
            .collect()
    };
    let queues: Vec<&String> = queues.iter().collect();
    let mut members: Vec<(&String, String)> = Vec::new();
    for queues in queues.chunks(MAX_COMMANDS) {
        for (queue, reply) in queues.iter().zip(client.ask(&commands(queues)).await?) {
            let texts = reply.list().iter().filter_map(Reply::text);
            let short = texts.filter(|text| text.len() <= MAX_KEY_BYTES);
            members.extend(short.map(|text| (*queue, text.to_owned())));
        }
    }
    members.truncate(MAX_MEMBERS);
    for members in members.chunks(MAX_COMMANDS) {
        let commands: Vec<Vec<String>> = members
            .iter()
            .map(|(queue, member)| filled(then, queue, member))
            .collect();
        for ((queue, _), reply) in members.iter().zip(client.ask(&commands).await?) {
            let address = reply.text().and_then(|text| text.parse().ok());
            let Some(address) = address else {
                continue;
            };
            let mut of_queue = Series {
                name: name.clone(),
                ..Series::default()
            };
            of_queue.add_label("queue", queue);
            out.push_address(of_queue, address);
        }
    }
    Ok(())
}

fn put(
    table: &str,
    value: &RedisValue,
    queue: &str,
    reply: &Reply,
    names: &Names,
    out: &mut SeriesSet,
) {
    let name = format!("{table}.{}", value.name);
    if value.rows {
        for row in reply.list() {
            put_row(&name, queue, row.list(), names, out);
        }
        return;
    }
    let number = if let Some(key) = &value.key {
        number_in(reply, key)
    } else if value.score {
        reply.list().get(1).and_then(Reply::number)
    } else {
        let time = || reply.text().and_then(seconds_of_time);
        reply.number().or_else(time)
    };
    if let Some(number) = number
        && names.contains(&name)
    {
        let mut series = Series {
            name,
            labels: Vec::new(),
            value: number,
        };
        series.add_label("queue", queue);
        out.push(series);
    }
}

/// Keys and values in turn.
fn put_row(prefix: &str, queue: &str, row: &[Reply], names: &Names, out: &mut SeriesSet) {
    let pairs = || row.chunks_exact(2);
    let key = |pair: &[Reply]| pair[0].text().map(str::to_owned);
    let own_name = pairs().find(|pair| pair[0].text() == Some("name"));
    for pair in pairs() {
        let (Some(key), Some(value)) = (key(pair), pair[1].number()) else {
            continue;
        };
        let name = format!("{prefix}.{key}");
        if !names.contains(&name) {
            continue;
        }
        let mut series = Series {
            name,
            labels: Vec::new(),
            value,
        };
        series.add_label("queue", queue);
        if let Some(own_name) = own_name.and_then(|pair| pair[1].text()) {
            series.add_label("name", own_name);
        }
        out.push(series);
    }
}

/// The number, or the time, under a key of a JSON document.
fn number_in(reply: &Reply, key: &str) -> Option<f64> {
    let text = reply.text().filter(|text| text.len() <= MAX_JOB_BYTES)?;
    let document: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).ok()?;
    let value = document.get(key)?;
    let time = || seconds_of_time(value.as_str()?);
    value.as_f64().or_else(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_queue_is_at_the_star_of_the_pattern() {
        assert_eq!(at_star("bull:*:meta", "bull:mail:meta"), Some("mail"));
        assert_eq!(at_star("bull:*:meta", "bull:a:b:meta"), Some("a:b"));
        assert_eq!(at_star("*", "events"), Some("events"));
        assert_eq!(at_star("bull:*:meta", "bull:mail:id"), None);
    }

    #[test]
    fn keys_beyond_the_limit_are_counted() {
        let mut scan = Scan::default();
        for key in 0..MAX_QUEUES + 5 {
            scan.add(&key.to_string());
        }
        // SCAN may return a key twice.
        scan.add("0");
        let (keys, left_out) = scan.keys();
        assert_eq!((keys.len(), left_out), (MAX_QUEUES, 5));
        scan.end_round();
        let (keys, left_out) = scan.keys();
        assert_eq!((keys.len(), left_out), (MAX_QUEUES, 5));
        scan.end_round();
        assert_eq!(scan.keys(), (BTreeSet::new(), 0));
    }

    #[test]
    fn rows_of_keys_and_values_are_read() {
        let text = |text: &str| Reply::Text(text.as_bytes().to_vec());
        let row = Reply::List(vec![
            text("name"),
            text("billing"),
            text("lag"),
            Reply::Number(7),
            text("last-delivered-id"),
            text("1-0"),
        ]);
        let value = RedisValue {
            name: "groups".to_owned(),
            command: Vec::new(),
            then: None,
            key: None,
            score: false,
            rows: true,
            clients: false,
        };
        let mut out = SeriesSet::default();
        let names = Names::new(["streams.groups.lag".to_owned()]);
        put(
            "streams",
            &value,
            "events",
            &Reply::List(vec![row]),
            &names,
            &mut out,
        );
        assert_eq!(out.all.len(), 1);
        assert_eq!(out.all[0].label("name"), Some("billing"));
        assert_eq!(out.all[0].label("queue"), Some("events"));
        assert_eq!(out.all[0].value, 7.0);
    }

    #[test]
    fn a_time_in_a_job_is_read() {
        let job = Reply::Text(br#"{"enqueued_at": 1700000000.5, "args": [1]}"#.to_vec());
        assert_eq!(number_in(&job, "enqueued_at"), Some(1_700_000_000.5));
        let job = Reply::Text(br#"{"enqueued_at": "1970-01-01T00:00:09.000Z"}"#.to_vec());
        assert_eq!(number_in(&job, "enqueued_at"), Some(9.0));
        assert_eq!(number_in(&Reply::Text(b"{".to_vec()), "enqueued_at"), None);
    }
}
