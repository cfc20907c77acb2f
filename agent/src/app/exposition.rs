//! The text format of Prometheus, and what OpenMetrics adds to it.

use super::series::{Names, Series, SeriesSet};

/// The values in `names`. Lines of other metrics are skipped unread, malformed ones are counted.
pub fn parse(text: &str, names: &Names) -> SeriesSet {
    let mut out = SeriesSet::default();
    for line in text.lines() {
        let line = line.trim_ascii();
        let end = line.find(|letter: char| !is_of_a_name(letter));
        let (name, rest) = line.split_at(end.unwrap_or(line.len()));
        if !names.contains(name) {
            continue;
        }
        match series(name, rest) {
            Some(series) => out.push(series),
            None => out.malformed += 1,
        }
    }
    out
}

fn is_of_a_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_' || letter == ':'
}

/// `{label="value"} 12 1395066363000 # {trace_id="1"} 1`: labels, time and exemplar are optional.
fn series(name: &str, rest: &str) -> Option<Series> {
    let mut series = Series {
        name: name.to_owned(),
        ..Series::default()
    };
    let mut rest = rest.trim_ascii_start();
    if let Some(labels) = rest.strip_prefix('{') {
        rest = read_labels(labels, &mut series)?;
    }
    let mut words = rest.split_ascii_whitespace();
    let value = words.next()?;
    // Rust accepts "infinity" and "nan" in any case, as Prometheus does.
    series.value = value.parse().ok()?;
    match words.next() {
        None | Some("#") => {}
        // The time of the value; it may be one of seconds with a fraction.
        Some(time) => drop(time.parse::<f64>().ok()?),
    }
    Some(series)
}

/// Reads `a="b",c="d"}`; returns what follows.
fn read_labels<'a>(mut rest: &'a str, series: &mut Series) -> Option<&'a str> {
    loop {
        rest = rest.trim_ascii_start();
        if let Some(after) = rest.strip_prefix('}') {
            return Some(after);
        }
        let (label, after) = rest.split_once('=')?;
        let quoted = after.trim_ascii_start().strip_prefix('"')?;
        let (value, after) = unquoted(quoted)?;
        series.add_label(label.trim_ascii(), &value);
        rest = after.trim_ascii_start();
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

/// The text up to the closing quote, with `\\`, `\"` and `\n` resolved; and what follows the quote.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match letters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> SeriesSet {
        parse(text, &Names::new(["waiting".to_owned(), "x:y".to_owned()]))
    }

    fn one(text: &str) -> Series {
        let set = parsed(text);
        assert_eq!((set.all.len(), set.malformed), (1, 0), "{text}");
        set.all[0].clone()
    }

    #[test]
    fn values_are_read_with_their_labels() {
        let series = one("waiting{queue=\"a\\\"b\\\\c\\nd\", vhost=\"/\",} 12");
        assert_eq!(series.value, 12.0);
        assert_eq!(series.label("queue"), Some("a\"b\\c\nd"));
        assert_eq!(series.label("vhost"), Some("/"));
        assert_eq!(one("waiting 1.5e3").value, 1500.0);
        assert_eq!(one("  x:y\t-3 1395066363000").value, -3.0);
        assert_eq!(one("waiting{} 4 # {trace_id=\"1\"} 0.5").value, 4.0);
        assert_eq!(one("waiting{a=\"{}\"} 4 1520879607.789").value, 4.0);
    }

    #[test]
    fn other_metrics_and_comments_are_skipped() {
        let text = "# HELP waiting {\n# TYPE waiting gauge\n\nwaiting_total 7\nother{\nwaiting 2\n";
        assert_eq!(one(text).value, 2.0);
    }

    #[test]
    fn malformed_lines_and_values_that_are_no_numbers_are_counted() {
        for line in [
            "waiting",
            "waiting x",
            "waiting{",
            "waiting{a=\"b\"",
            "waiting{a=b} 1",
            "waiting{a=\"b} 1",
            "waiting{a=\"b\"}",
            "waiting NaN",
            "waiting +Inf",
            "waiting 1 yesterday",
        ] {
            let set = parsed(line);
            assert_eq!((set.all.len(), set.malformed), (0, 1), "{line}");
        }
    }

    #[test]
    fn a_million_labels_are_bounded() {
        let labels: String = (0..1_000).map(|at| format!("l{at}=\"v\",")).collect();
        assert!(one(&format!("waiting{{{labels}}} 1")).labels.len() <= 32);
        let long = "v".repeat(100_000);
        let series = one(&format!("waiting{{queue=\"{long}\"}} 1"));
        assert!(series.label("queue").unwrap().len() <= 256);
        let many: String = (0..20_000)
            .map(|at| format!("waiting{{q=\"{at}\"}} 1\n"))
            .collect();
        let set = parsed(&many);
        assert_eq!((set.all.len(), set.left_out), (16_384, 3_616));
    }
}
