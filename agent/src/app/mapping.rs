//! From the values of an answer to queues, as the rows of a preset say.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use super::{
    recognize::Program,
    series::{Series, SeriesSet},
    table::{Metric, Preset, QueueRow, Time, Value},
};
use crate::{
    sample::AppQueue,
    text::{bounded, harmless},
};

/// Maximum number of queues of one process: as many as the agent keeps of one service.
pub const MAX_QUEUES: usize = 256;
/// Maximum number of values beside a queue.
const MAX_CONTEXT: usize = 8;
/// Longest text of a label in the name of a queue, bytes.
const MAX_LABEL_BYTES: usize = 120;
/// Maximum number of connections or servers of one queue.
const MAX_ENDS: usize = 256;
/// Labels in the name of a queue beyond this number are never left out when values are joined: it bounds the combinations.
const MAX_LABELS_IN_NAME: usize = 4;
/// The least limit that means none: Java and Envoy write the greatest number of 31 or 32 bits.
const UNLIMITED: u64 = i32::MAX as u64;
/// A moment beyond this one (the year 5138), in seconds, is one in milliseconds: Sidekiq 8 has changed the unit of `enqueued_at`.
const LATEST_SECONDS: f64 = 1e11;

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mapped {
    /// At most [`MAX_QUEUES`].
    pub queues: Vec<AppQueue>,
    /// The number of further ones.
    pub left_out: usize,
    /// By the name of the queue: the addresses of the clients that take items from it.
    pub clients: Clients,
}

pub type Clients = BTreeMap<String, Vec<SocketAddr>>;

/// The deepest queues.
pub fn queues(preset: &Preset, answer: &SeriesSet, program: &Program, unix_ns: u64) -> Mapped {
    let mut all: BTreeMap<String, AppQueue> = BTreeMap::new();
    let mut clients = Clients::default();
    let mut left_out = 0;
    for row in &preset.queue {
        let of_row = Row {
            row,
            answer,
            program,
            unix_ns,
            labels: row.labels().unwrap_or_default(),
        };
        let (queues, further) = of_row.queues();
        left_out += further;
        clients.extend(of_row.clients());
        let mut names = BTreeSet::new();
        for queue in queues {
            // Names that differ only beyond the limit of their length are one: nothing distinguishes the queues.
            if !names.insert(queue.name.clone()) {
                left_out += 1;
                continue;
            }
            // Of two rows with the same name, the first counts.
            all.entry(queue.name.clone()).or_insert(queue);
        }
    }
    let mut queues: Vec<AppQueue> = all.into_values().collect();
    if queues.len() > MAX_QUEUES {
        left_out += queues.len() - MAX_QUEUES;
        queues.sort_by_key(|queue| std::cmp::Reverse(queue.depth));
        queues.truncate(MAX_QUEUES);
    }
    Mapped {
        queues,
        left_out,
        clients,
    }
}

/// The labels of a value that are in the name of the row, in its order. `None`: the value has no such label, and so belongs to all.
type Place = Vec<Option<String>>;

/// One row, and the answer.
struct Row<'a> {
    row: &'a QueueRow,
    answer: &'a SeriesSet,
    program: &'a Program,
    unix_ns: u64,
    labels: Vec<&'a str>,
}

/// How values that belong to the same queue are combined.
#[derive(Clone, Copy)]
enum Combine {
    Sum,
    Greatest,
    Least,
}

impl Row<'_> {
    /// There is a queue for each depth that has all labels of the name: the deepest ones, and the number of further ones.
    fn queues(&self) -> (Vec<AppQueue>, usize) {
        let row = self.row;
        let depths = self.collect(&row.depth, Combine::Sum);
        let whole = |(place, depth): (&Place, &f64)| {
            let labels: Option<Vec<&str>> = place.iter().map(Option::as_deref).collect();
            Some((place.clone(), self.name(&labels?), whole_number(*depth)?))
        };
        let mut found: Vec<(Place, String, u64)> = depths.0.iter().filter_map(whole).collect();
        let left_out = found.len().saturating_sub(MAX_QUEUES);
        if left_out > 0 {
            found.sort_by_key(|(_, _, depth)| std::cmp::Reverse(*depth));
            found.truncate(MAX_QUEUES);
        }
        let sum = |value: &Option<Value>| self.maybe(value.as_ref(), Combine::Sum);
        let greatest = |value: &Option<Value>| self.maybe(value.as_ref(), Combine::Greatest);
        let (limit, slots) = (greatest(&row.limit), sum(&row.slots));
        let (serving, consumers) = (sum(&row.serving), sum(&row.consumers));
        let (entered, left, lost) = (sum(&row.entered), sum(&row.left), sum(&row.lost));
        let waits = sum(&row.waits);
        let waited = self.durations(row.waited.as_ref(), Combine::Sum);
        let oldest = self.durations(row.oldest.as_ref(), Combine::Greatest);
        let served_on = self.served_on();
        let context = row.context.iter().take(MAX_CONTEXT);
        let context: Vec<(&String, Collected)> = context
            .map(|(name, value)| (name, self.collect(value, Combine::Sum)))
            .collect();
        let queues = found.into_iter().map(|(place, name, depth)| {
            let number = |of: &Collected| of.at(&place).and_then(whole_number);
            AppQueue {
                name,
                unit: row.unit,
                depth,
                limit: number(&limit).filter(|limit| *limit < UNLIMITED),
                limit_rejects: row.limit_rejects,
                serving: number(&serving),
                slots: number(&slots),
                entered: number(&entered),
                left: number(&left),
                lost: number(&lost),
                waited_ns: self.duration_at(&waited, &place),
                waits: number(&waits),
                oldest_ns: self.duration_at(&oldest, &place),
                consumers: number(&consumers),
                context: context
                    .iter()
                    .filter_map(|(name, of)| Some(((*name).clone(), of.at(&place)?)))
                    .collect(),
                consumer_tgids: Vec::new(),
                served_on: served_on
                    .as_ref()
                    .map(|ends| ends.get(&place).cloned().unwrap_or_default()),
            }
        });
        (queues.collect(), left_out)
    }

    /// The clients of each queue that has all labels of the name.
    fn clients(&self) -> Clients {
        let mut clients = Clients::default();
        let ours = self.row.consumed_by.as_ref();
        let named = self.answer.addresses.iter();
        for (series, address) in named.filter(|(series, _)| Some(&series.name) == ours) {
            let place = self.place(series);
            let labels: Option<Vec<&str>> = place.iter().map(Option::as_deref).collect();
            if let Some(labels) = labels {
                clients
                    .entry(self.name(&labels))
                    .or_default()
                    .push(*address);
            }
        }
        clients
    }

    /// The ends of the connections over which the items of each queue are served: addresses, or ports with an address as a label. `None`:
    /// the row has none.
    fn served_on(&self) -> Option<BTreeMap<Place, Vec<SocketAddr>>> {
        let name = self.row.served_on.as_ref()?;
        let addresses = self.answer.addresses.iter();
        let addresses = addresses.map(|(series, address)| (series, Some(*address)));
        let ports = self.answer.all.iter();
        let ports = ports.map(|series| (series, address_with_port(series)));
        let mut ends: BTreeMap<Place, Vec<SocketAddr>> = BTreeMap::new();
        let ours = addresses
            .chain(ports)
            .filter(|(series, _)| series.name == *name);
        for (series, address) in ours {
            let known = ends.entry(self.place(series)).or_default();
            if let Some(address) = address.filter(|_| known.len() < MAX_ENDS) {
                known.push(address);
            }
        }
        Some(ends)
    }

    fn name(&self, labels: &[&str]) -> String {
        let mut parts = self.row.name.split('{');
        let mut name = parts.next().unwrap_or_default().to_owned();
        for (part, value) in parts.zip(labels) {
            name += &bounded(value, MAX_LABEL_BYTES);
            name += part.split_once('}').map_or("", |(_, rest)| rest);
        }
        harmless(&name)
    }

    fn place(&self, series: &Series) -> Place {
        let labels = self.labels.iter();
        labels
            .map(|label| series.label(label).map(str::to_owned))
            .collect()
    }

    fn maybe(&self, value: Option<&Value>, combine: Combine) -> Collected {
        value.map_or_else(Collected::default, |value| self.collect(value, combine))
    }

    /// The value of each queue. Several metrics are added up; of each, values that differ in other labels are combined.
    fn collect(&self, value: &Value, combine: Combine) -> Collected {
        match value {
            Value::Option(names) => {
                let everywhere = vec![None; self.labels.len()];
                let value = self.program.option(names);
                Collected(
                    value
                        .map(|value| (everywhere, value as f64))
                        .into_iter()
                        .collect(),
                )
            }
            Value::First(values) => {
                let all = values.iter().map(|value| self.collect(value, combine));
                let mut present = all.filter(|collected| !collected.0.is_empty());
                present.next().unwrap_or_default()
            }
            Value::Sum(metrics) => {
                let mut total = Collected::default();
                for metric in metrics {
                    for (place, value) in self.combined(metric, combine).0 {
                        *total.0.entry(place).or_insert(0.0) += value;
                    }
                }
                total
            }
        }
    }

    fn combined(&self, metric: &Metric, combine: Combine) -> Collected {
        let mut found = Collected::default();
        for series in self
            .answer
            .all
            .iter()
            .filter(|series| metric.matches(series))
        {
            let value = series.value;
            let place = self.place(series);
            found
                .0
                .entry(place)
                .and_modify(|known| {
                    *known = match combine {
                        Combine::Sum => *known + value,
                        Combine::Greatest => known.max(value),
                        Combine::Least => known.min(value),
                    }
                })
                .or_insert(value);
        }
        found
    }

    fn durations(&self, time: Option<&Time>, combine: Combine) -> Durations {
        let Some(time) = time else {
            return Durations::default();
        };
        let part = |value: &Option<Value>, unit_ns: f64| {
            let collected = self.collect(value.as_ref()?, combine);
            Some((collected, unit_ns))
        };
        let moment = |value: &Option<Value>, unit_ns: f64| {
            // The oldest one began first.
            let collected = self.collect(value.as_ref()?, Combine::Least);
            Some((collected, unit_ns))
        };
        let parts = [
            part(&time.seconds, 1e9),
            part(&time.milliseconds, 1e6),
            part(&time.microseconds, 1e3),
        ];
        Durations {
            parts: parts.into_iter().flatten().collect(),
            since: moment(&time.since_seconds, 1e9).or(moment(&time.since_milliseconds, 1e6)),
        }
    }

    fn duration_at(&self, durations: &Durations, place: &Place) -> Option<u64> {
        if let Some((since, unit_ns)) = &durations.since {
            let since = since.at(place).filter(|since| *since > 0.0)?;
            let since_ns = since
                * if since >= LATEST_SECONDS {
                    1e6
                } else {
                    *unit_ns
                };
            // A moment in the future is of another clock.
            return whole_number(self.unix_ns as f64 - since_ns);
        }
        let parts = durations.parts.iter();
        let parts = parts.filter_map(|(part, unit_ns)| Some(part.at(place)? * unit_ns));
        let sum = parts.reduce(|sum, part| sum + part);
        sum.and_then(whole_number)
    }
}

/// A time of each queue: the sum of durations, or the moment at which it began.
#[derive(Default)]
struct Durations {
    parts: Vec<(Collected, f64)>,
    since: Option<(Collected, f64)>,
}

/// One value for each queue.
#[derive(Default)]
struct Collected(BTreeMap<Place, f64>);

impl Collected {
    /// The value of this queue; else one of all queues that share some of its labels, or of the whole process.
    fn at(&self, place: &Place) -> Option<f64> {
        if self.0.is_empty() {
            return None;
        }
        if let Some(value) = self.0.get(place) {
            return Some(*value);
        }
        // Labels are given up one after another, the first ones last. There are few: names have one to three.
        let shared = place.len().min(MAX_LABELS_IN_NAME);
        let masks = (0..1_u32 << shared).rev().map(|mask| {
            let kept = place.iter().enumerate();
            let kept = kept.map(|(at, label)| label.clone().filter(|_| mask & (1 << at) != 0));
            kept.collect::<Place>()
        });
        masks.skip(1).find_map(|part| self.0.get(&part).copied())
    }
}

/// The value is a port, and a label the address.
fn address_with_port(series: &Series) -> Option<SocketAddr> {
    let ip: IpAddr = series.label("address")?.parse().ok()?;
    let port = u16::try_from(whole_number(series.value)?).ok()?;
    (port > 0).then(|| SocketAddr::new(ip, port))
}

/// A number of things. A negative one, such as -1 for "no limit", is none.
fn whole_number(value: f64) -> Option<u64> {
    (value.is_finite() && value >= 0.0).then_some(value.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        app::{
            json,
            table::{Ask, Table},
        },
        sample::AppUnit,
    };

    fn preset(rows: &str) -> Preset {
        let text = format!(
            "name = \"shop\"\nfind = {{ exe = [\"shopd\"] }}\nproof = \"waiting\"\n\
             ask = [{{ protocol = \"prometheus\", paths = [\"/metrics\"] }}]\n{rows}"
        );
        let preset: Preset = toml::from_str(&text).unwrap();
        Table::new(std::slice::from_ref(&preset), &[], &[]).unwrap();
        preset
    }

    fn series(name: &str, labels: &[(&str, &str)], value: f64) -> Series {
        let mut series = Series {
            name: name.to_owned(),
            labels: Vec::new(),
            value,
        };
        for (label, value) in labels {
            series.add_label(label, value);
        }
        series
    }

    fn mapped(rows: &str, all: Vec<Series>) -> Vec<AppQueue> {
        let answer = SeriesSet {
            all,
            ..SeriesSet::default()
        };
        let program = Program::new("shopd", b"shopd\0--max\x0040\0");
        queues(&preset(rows), &answer, &program, 100_000_000_000).queues
    }

    #[test]
    fn names_that_differ_beyond_their_limit_make_one_queue_and_are_counted() {
        let rows = "[[queue]]\nname = \"q {queue}\"\nunit = \"jobs\"\ndepth = \"waiting\"";
        let long = "a".repeat(200);
        let all = ["1", "2"].map(|end| series("waiting", &[("queue", &(long.clone() + end))], 3.0));
        let answer = SeriesSet {
            all: all.into(),
            ..SeriesSet::default()
        };
        let program = Program::new("shopd", b"");
        let mapped = queues(&preset(rows), &answer, &program, 0);
        assert_eq!((mapped.queues.len(), mapped.left_out), (1, 1));
    }

    #[test]
    fn a_queue_that_is_passed_on_has_the_ends_of_its_own_connections() {
        let rows = "[[queue]]\nname = \"q {queue}\"\nunit = \"jobs\"\ndepth = \"waiting\"\nserved_on = \"ports\"";
        let of = |queue| [("queue", queue), ("address", "127.0.0.1")];
        let mut all = vec![
            series("waiting", &[("queue", "a")], 3.0),
            series("waiting", &[("queue", "b")], 3.0),
            series("waiting", &[("queue", "c")], 3.0),
            series("ports", &of("a"), 5001.0),
            series("ports", &of("a"), 5002.0),
            series("ports", &[("queue", "a"), ("address", "unix")], 5003.0),
            series("ports", &of("a"), 70_000.0),
            series("ports", &of("a"), -1.0),
            series("ports", &of("b"), 6001.0),
        ];
        all.extend((0..1000).map(|port| series("ports", &of("b"), 7000.0 + f64::from(port))));
        let queues = mapped(rows, all);
        let ends = |at: usize| queues[at].served_on.clone().unwrap();
        let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(ends(0), [address(5001), address(5002)]);
        assert_eq!((ends(1)[0], ends(1).len()), (address(6001), MAX_ENDS));
        assert!(ends(2).is_empty());
    }

    #[test]
    fn the_hosts_of_a_cluster_of_envoy_are_its_servers() {
        let table = Table::new(&[], &[], &[]).unwrap();
        let mut presets = table.presets().iter();
        let envoy = presets.find(|preset| preset.name == "envoy").unwrap();
        let host = |name: &str, port: u16| {
            format!(
                r#"{{"name": "c0", "observability_name": "{name}", "host_statuses": [{{"address": {{"socket_address":
                {{"address": "127.0.0.1", "port_value": {port}}}}}, "stats": [{{"name": "cx_active", "value": "2"}}]}}]}}"#
            )
        };
        let clusters = [host("shop", 9000), host("mail", 9001)].join(",");
        let clusters = format!(r#"{{"cluster_statuses": [{clusters}]}}"#);
        let Ask::Json { labels, .. } = &envoy.ask[1] else {
            panic!("{:?}", envoy.ask[1]);
        };
        let none = BTreeMap::new();
        let mut answer = json::parse(&clusters, "", &none, labels, &envoy.names()).unwrap();
        let depth = "envoy_cluster_upstream_rq_pending_active";
        answer.push(series(depth, &[("envoy_cluster_name", "shop")], 3.0));
        let program = Program::new("envoy", b"");
        let queues = queues(envoy, &answer, &program, 0).queues;
        let host = SocketAddr::from(([127, 0, 0, 1], 9000));
        assert_eq!(queues[0].served_on, Some(vec![host]));
    }

    #[test]
    fn labels_in_the_name_make_queues_and_others_are_added_up() {
        let rows = "[[queue]]\nname = \"q {queue}\"\nunit = \"jobs\"\ndepth = [\"waiting\", \"delayed\"]\nserving = \"busy\"\n\
                    limit = { option = [\"--max\"] }\nconsumers = \"readers\"\nslots = \"size\"";
        let queues = mapped(
            rows,
            vec![
                series("waiting", &[("queue", "a"), ("node", "1")], 3.0),
                series("waiting", &[("queue", "a"), ("node", "2")], 4.0),
                series("delayed", &[("queue", "a")], 10.0),
                series("waiting", &[("queue", "b")], 1.0),
                series("waiting", &[("node", "3")], 1000.0),
                series("busy", &[("queue", "b")], 2.0),
                series("readers", &[], 5.0),
                series("size", &[("queue", "a"), ("node", "1")], 8.0),
                series("size", &[("queue", "a"), ("node", "2")], 9.0),
            ],
        );
        assert_eq!(queues.len(), 2);
        let (a, b) = (&queues[0], &queues[1]);
        assert_eq!((a.name.as_str(), a.depth, a.serving), ("q a", 17, None));
        assert_eq!((b.name.as_str(), b.depth, b.serving), ("q b", 1, Some(2)));
        assert_eq!(
            (a.limit, a.consumers, a.slots),
            (Some(40), Some(5), Some(17))
        );
        assert_eq!(a.unit, AppUnit::Jobs);
    }

    #[test]
    fn clients_belong_to_the_queue_whose_labels_they_have() {
        let rows = "[[queue]]\nname = \"q {queue}\"\nunit = \"jobs\"\ndepth = \"waiting\"\nconsumed_by = \"t.clients\"";
        let mut answer = SeriesSet::default();
        for queue in ["a", "b"] {
            answer.push(series("waiting", &[("queue", queue)], 1.0));
        }
        let address: SocketAddr = "127.0.0.1:4711".parse().unwrap();
        for (name, labels) in [
            ("t.clients", [("queue", "a")].as_slice()),
            ("t.others", &[("queue", "b")]),
            ("t.clients", &[]),
        ] {
            answer.push_address(series(name, labels, 0.0), address);
        }
        let program = Program::new("shopd", b"");
        let mapped = queues(&preset(rows), &answer, &program, 0);
        assert_eq!(mapped.queues.len(), 2);
        assert_eq!(
            mapped.clients,
            Clients::from([("q a".to_owned(), vec![address])])
        );
    }

    #[test]
    fn the_first_value_that_the_answer_has_counts() {
        let rows = "[[queue]]\nname = \"all\"\nunit = \"jobs\"\ndepth = \"waiting\"\nleft = { first = [[\"a\", \"b\"], \"c\"] }";
        let left = |names: &[&str]| {
            let values = names.iter().map(|name| series(name, &[], 2.0));
            let depth = series("waiting", &[], 1.0);
            mapped(rows, values.chain([depth]).collect())[0].left
        };
        assert_eq!(left(&["a", "b", "c"]), Some(4));
        assert_eq!(left(&["b", "c"]), Some(2));
        assert_eq!(left(&["c"]), Some(2));
        assert_eq!(left(&[]), None);
    }

    #[test]
    fn a_value_with_fewer_labels_belongs_to_all_queues_that_have_them() {
        let rows = "[[queue]]\nname = \"{db}/{user}\"\nunit = \"clients\"\ndepth = \"waiting\"\nlimit = \"size\"";
        let queues = mapped(
            rows,
            vec![
                series("waiting", &[("db", "a"), ("user", "x")], 1.0),
                series("waiting", &[("db", "b"), ("user", "x")], 2.0),
                series("size", &[("db", "a")], 10.0),
                series("size", &[], 20.0),
            ],
        );
        assert_eq!((queues[0].limit, queues[1].limit), (Some(10), Some(20)));
    }

    #[test]
    fn times_are_durations_that_are_added_up_or_moments() {
        let rows = "[[queue]]\nname = \"all\"\nunit = \"jobs\"\ndepth = \"waiting\"\noldest = { seconds = \"s\", microseconds = \"us\" }";
        let all = vec![
            series("waiting", &[], 1.0),
            series("s", &[], 2.0),
            series("us", &[], 5.0),
        ];
        assert_eq!(mapped(rows, all)[0].oldest_ns, Some(2_000_005_000));
        let rows = "[[queue]]\nname = \"all\"\nunit = \"jobs\"\ndepth = \"waiting\"\noldest = { since_seconds = \"at\" }";
        let oldest = |at| {
            mapped(
                rows,
                vec![series("waiting", &[], 1.0), series("at", &[], at)],
            )[0]
            .oldest_ns
        };
        assert_eq!(oldest(90.0), Some(10_000_000_000));
        // Milliseconds, and so in the future: the clock of this test is at 100 s.
        assert_eq!(oldest(1.7e12), None);
        assert_eq!((oldest(101.0), oldest(0.0)), (None, None));
    }

    #[test]
    fn negative_values_are_absent_and_the_deepest_queues_are_kept() {
        let rows =
            "[[queue]]\nname = \"{queue}\"\nunit = \"jobs\"\ndepth = \"waiting\"\nlimit = \"max\"";
        let queues = mapped(
            rows,
            vec![
                series("waiting", &[("queue", "a")], 1.0),
                series("max", &[("queue", "a")], -1.0),
            ],
        );
        assert_eq!(queues[0].limit, None);
        let unlimited = series("max", &[("queue", "a")], 2_147_483_647.0);
        let queues = mapped(
            rows,
            vec![series("waiting", &[("queue", "a")], 1.0), unlimited],
        );
        assert_eq!(queues[0].limit, None);
        assert!(mapped(rows, vec![series("waiting", &[("queue", "a")], -1.0)]).is_empty());
        let many =
            (0..300).map(|at| series("waiting", &[("queue", &at.to_string())], f64::from(at)));
        let queues = mapped(rows, many.collect());
        assert_eq!(queues.len(), MAX_QUEUES);
        assert!(queues.iter().all(|queue| queue.depth >= 44));
    }

    #[test]
    fn names_of_queues_cannot_inject_into_a_terminal() {
        let rows = "[[queue]]\nname = \"{queue}\"\nunit = \"jobs\"\ndepth = \"waiting\"";
        let queues = mapped(
            rows,
            vec![series("waiting", &[("queue", "a\x1b[31m\n")], 1.0)],
        );
        assert!(
            !queues[0].name.contains(['\x1b', '\n']),
            "{}",
            queues[0].name
        );
    }
}
