//! The table of offsets: one row per field, one column per kernel.

use std::fmt;

use anyhow::{Context as _, Result, ensure};

/// A field or size: `task_struct.__state|state`, or `sizeof(upid)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub container: String,
    /// Alternatives, newest first; empty for the size of the struct itself.
    pub paths: Vec<String>,
    /// Whether the offset is in bits: `task_struct.in_iowait:bits`.
    pub bits: bool,
}

impl Place {
    fn parse(text: &str) -> Result<Self> {
        if let Some(container) = text
            .strip_prefix("sizeof(")
            .and_then(|rest| rest.strip_suffix(')'))
        {
            return Ok(Self {
                container: container.to_owned(),
                paths: Vec::new(),
                bits: false,
            });
        }
        let (text, bits) = match text.strip_suffix(":bits") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let (container, paths) = text
            .split_once('.')
            .with_context(|| format!("{text} is neither struct.field nor sizeof(struct)"))?;
        Ok(Self {
            container: container.to_owned(),
            paths: paths.split('|').map(str::to_owned).collect(),
            bits,
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.paths.is_empty() {
            write!(f, "sizeof({})", self.container)
        } else {
            let bits = if self.bits { ":bits" } else { "" };
            write!(f, "{}.{}{bits}", self.container, self.paths.join("|"))
        }
    }
}

struct Row {
    field: String,
    place: Place,
    /// Text of each column.
    offsets: Vec<String>,
}

/// The whole file. Lines that begin with `#` are comments; those with a release (`# 6.1: 6.1.0-50`) are generated.
pub struct Table {
    comments: Vec<String>,
    /// Version and release.
    kernels: Vec<(String, String)>,
    rows: Vec<Row>,
}

impl Table {
    pub fn parse(text: &str) -> Result<Self> {
        let mut table = Self {
            comments: Vec::new(),
            kernels: Vec::new(),
            rows: Vec::new(),
        };
        let mut releases = Vec::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            if let Some(comment) = line.strip_prefix("# ") {
                match comment.split_once(": ") {
                    Some((version, release))
                        if version.starts_with(|c: char| c.is_ascii_digit()) =>
                    {
                        releases.push((version.to_owned(), release.to_owned()));
                    }
                    _ => table.comments.push(comment.to_owned()),
                }
                continue;
            }
            let mut words = line.split_whitespace().map(str::to_owned);
            let (Some(field), Some(place)) = (words.next(), words.next()) else {
                anyhow::bail!("{line:?} is not a field with its place");
            };
            if field == "field" {
                table.kernels = words
                    .map(|version| {
                        let known = releases.iter().find(|(known, _)| *known == version);
                        let release =
                            known.map_or_else(String::new, |(_, release)| release.clone());
                        (version, release)
                    })
                    .collect();
                continue;
            }
            let mut offsets: Vec<String> = words.collect();
            ensure!(
                offsets.len() <= table.kernels.len(),
                "{field} has more offsets than there are kernels"
            );
            // A field added by hand has no offsets until the next run.
            offsets.resize(table.kernels.len(), "?".to_owned());
            table.rows.push(Row {
                field,
                place: Place::parse(&place)?,
                offsets,
            });
        }
        Ok(table)
    }

    /// Places of all fields, in order.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<'_> {
        self.rows.iter().map(|row| row.place.clone())
    }

    /// Sets the column of a kernel, adding it if necessary. One offset per row; `None` means that the field does not exist.
    pub fn set(&mut self, version: &str, release: &str, offsets: Vec<Option<u32>>) {
        let at = self.kernels.iter().position(|(known, _)| known == version);
        let at = at.unwrap_or_else(|| {
            let numbers =
                |version: &str| -> Vec<u32> { version.split('.').flat_map(str::parse).collect() };
            let newer = |known: &&(String, String)| numbers(&known.0) > numbers(version);
            let at = self
                .kernels
                .iter()
                .take_while(|known| !newer(known))
                .count();
            self.kernels.insert(at, (version.to_owned(), String::new()));
            for row in &mut self.rows {
                row.offsets.insert(at, "?".to_owned());
            }
            at
        });
        release.clone_into(&mut self.kernels[at].1);
        for (row, offset) in self.rows.iter_mut().zip(offsets) {
            row.offsets[at] = offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string());
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for comment in &self.comments {
            writeln!(f, "# {comment}")?;
        }
        for (version, release) in &self.kernels {
            writeln!(f, "# {version}: {release}")?;
        }
        let heads = self.kernels.iter().map(|(version, _)| version.clone());
        let mut lines = vec![("field", "place".to_owned(), heads.collect::<Vec<_>>())];
        lines.extend(self.rows.iter().map(|row| {
            let place = row.place.to_string();
            (row.field.as_str(), place, row.offsets.clone())
        }));
        let fields = lines.iter().map(|line| line.0.len()).max().unwrap_or(0);
        let places = lines.iter().map(|line| line.1.len()).max().unwrap_or(0);
        for (field, place, offsets) in &lines {
            write!(f, "{field:<fields$}  {place:<places$}")?;
            for offset in offsets {
                write!(f, "  {offset:>6}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# Offsets.
# 6.1: 6.1.0-50
# 6.12: 6.12.107
field       place                         6.1    6.12
task_state  task_struct.__state|state      24      32
upid_size   sizeof(upid)                   16       -
";

    #[test]
    fn parsing_and_printing_round_trips() -> Result<()> {
        assert_eq!(Table::parse(TEXT)?.to_string(), TEXT);
        Ok(())
    }

    #[test]
    fn a_new_kernel_is_sorted_in_and_a_new_field_has_unknown_offsets() -> Result<()> {
        let mut table = Table::parse(&format!("{TEXT}new  pid.level\n"))?;
        table.set("6.8", "6.8.9", vec![Some(1), None, Some(4)]);
        let text = table.to_string();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .skip(4)
            .map(|line| line.split_whitespace().skip(2).collect())
            .collect();
        assert_eq!(lines[0], ["6.1", "6.8", "6.12"]);
        assert_eq!(lines[1], ["24", "1", "32"]);
        assert_eq!(lines[2], ["16", "-", "-"]);
        assert_eq!(lines[3], ["?", "4", "?"]);
        Ok(())
    }
}
