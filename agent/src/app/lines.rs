//! Line protocols: tables with a head line, and lines `key: value`.

use std::net::SocketAddr;

use super::series::{Names, Series, SeriesSet};

/// Maximum number of columns of a table. HAProxy has about a hundred.
const MAX_COLUMNS: usize = 256;

/// A table whose first line names the columns: `# pxname,svname,qcur`. A number in the column `qcur` is the value `TABLE.qcur`; the
/// columns in `labels` are its labels. Quoted fields may hold commas.
pub fn csv(text: &str, table: &str, labels: &[String], names: &Names) -> SeriesSet {
    let mut out = SeriesSet::default();
    let mut lines = text.lines().filter(|line| !line.trim_ascii().is_empty());
    let Some(head) = lines.next() else {
        return out;
    };
    let columns = fields(head.trim_start_matches(['#', ' ']));
    for line in lines {
        rows(&columns, &fields(line), table, labels, names, &mut out);
    }
    out
}

/// The values of one row of a table. A field may also be an address with a port.
pub fn rows(
    columns: &[String],
    fields: &[String],
    table: &str,
    labels: &[String],
    names: &Names,
    out: &mut SeriesSet,
) {
    let cells = || columns.iter().zip(fields);
    for (column, field) in cells().filter(|(column, _)| !column.is_empty()) {
        let name = format!("{table}.{column}");
        if !names.contains(&name) {
            continue;
        }
        let address: Option<SocketAddr> = field.parse().ok();
        // An empty field is an absent value.
        let value = match (field.parse(), address) {
            (Ok(value), _) => value,
            (Err(_), Some(_)) => 0.0,
            (Err(_), None) => {
                out.malformed += usize::from(!field.is_empty());
                continue;
            }
        };
        let mut series = Series {
            name,
            labels: Vec::new(),
            value,
        };
        for label in labels {
            let (column, label) = label.split_once('=').unwrap_or((label, label));
            let mut cells = cells();
            if let Some((_, field)) = cells.find(|(known, _)| *known == column) {
                series.add_label(label, field);
            }
        }
        match address {
            Some(address) => out.push_address(series, address),
            None => out.push(series),
        }
    }
}

/// The fields of a line of comma-separated values, after RFC 4180.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut is_quoted = false;
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        let count = fields.len();
        let Some(field) = fields.last_mut() else {
            break;
        };
        match letter {
            '"' if is_quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted && count == MAX_COLUMNS => break,
            ',' if !is_quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

/// Lines `key: value`: a number is the value `TABLE.key`.
pub fn pairs(text: &str, table: &str, names: &Names) -> SeriesSet {
    let mut out = SeriesSet::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let name = format!("{table}.{}", key.trim_ascii());
        if !names.contains(&name) {
            continue;
        }
        match value.trim_ascii().parse() {
            Ok(value) => out.push(Series {
                name,
                labels: Vec::new(),
                value,
            }),
            Err(_) => out.malformed += 1,
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Names {
        Names::new(all.iter().map(|name| (*name).to_owned()))
    }

    #[test]
    fn rows_of_a_table_are_labelled_by_its_columns() {
        let text = "# pxname,svname,qcur,qlimit,type,\nshop,BACKEND,7,,1,\nshop,\"a,\"\"1\"\"\",x,100,2,\n";
        let labels = ["pxname=proxy".to_owned(), "svname".to_owned()];
        let set = csv(text, "stat", &labels, &names(&["stat.qcur", "stat.qlimit"]));
        assert_eq!((set.all.len(), set.malformed), (2, 1));
        assert_eq!(set.all[0].name, "stat.qcur");
        assert_eq!(set.all[0].value, 7.0);
        assert_eq!(set.all[0].label("svname"), Some("BACKEND"));
        assert_eq!(set.all[1].label("svname"), Some("a,\"1\""));
        assert_eq!(set.all[1].label("proxy"), Some("shop"));
        assert_eq!(csv("", "stat", &labels, &names(&[])).all.len(), 0);
    }

    #[test]
    fn an_address_with_a_port_is_kept_as_such() {
        let text = "# pxname,addr\nshop,127.0.0.1:8080\nshop,[::1]:80\nshop,unix\nshop,127.0.0.1\n";
        let set = csv(text, "stat", &["pxname".to_owned()], &names(&["stat.addr"]));
        let found: Vec<String> = set.addresses.iter().map(|(_, at)| at.to_string()).collect();
        assert_eq!(found, ["127.0.0.1:8080", "[::1]:80"]);
        assert_eq!(set.addresses[0].0.label("pxname"), Some("shop"));
        assert_eq!((set.all.len(), set.malformed), (0, 2));
    }

    #[test]
    fn columns_beyond_the_limit_are_left_out() {
        let text = format!("{}\n{}\n", "a,".repeat(200_000), "1,".repeat(200_000));
        let set = csv(&text, "t", &["missing".to_owned()], &names(&["t.a"]));
        assert_eq!(set.all.len(), MAX_COLUMNS);
    }

    #[test]
    fn pairs_are_read() {
        let set = pairs(
            "Name: x\nCurrConns: 12\r\nMaxconn: many\n\n",
            "info",
            &names(&["info.CurrConns", "info.Maxconn"]),
        );
        assert_eq!((set.all.len(), set.malformed), (1, 1));
        assert_eq!(set.all[0].value, 12.0);
    }
}
