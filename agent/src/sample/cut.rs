//! A part of a recording that replays by itself: what was said once, before it, is said again at its beginning.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::Sample;

/// Cuts a stream of samples.
#[derive(Debug)]
pub struct Cut {
    /// From the first sample on, ns.
    part: Range<u64>,
    first_ns: Option<u64>,
    begun: bool,
    /// What was last said before the part begins.
    said: Sample,
}

impl Cut {
    /// `part`: from when to when, counted from the first sample, ns.
    pub fn new(part: Range<u64>) -> Self {
        Self {
            part,
            first_ns: None,
            begun: false,
            said: Sample::default(),
        }
    }

    /// The sample, if it belongs to the part.
    pub fn take(&mut self, mut sample: Sample) -> Option<Sample> {
        let first_ns = *self.first_ns.get_or_insert(sample.mono_ns);
        let at_ns = sample.mono_ns.saturating_sub(first_ns);
        if at_ns >= self.part.end {
            return None;
        }
        if self.begun {
            return Some(sample);
        }
        let said = &mut self.said;
        said.targets = sample.targets.take().or(said.targets.take());
        said.listening = sample.listening.take().or(said.listening.take());
        said.holders = sample.holders.take().or(said.holders.take());
        said.peers = sample.peers.take().or(said.peers.take());
        for title in sample.titles.drain(..) {
            said.titles.retain(|known| known.tgid != title.tgid);
            said.titles.push(title);
        }
        if at_ns < self.part.start {
            return None;
        }
        self.begun = true;
        sample.targets = said.targets.take();
        sample.listening = said.listening.take();
        sample.holders = said.holders.take();
        sample.peers = said.peers.take();
        sample.titles = std::mem::take(&mut said.titles);
        Some(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Target, Title};

    fn title(text: &str) -> Title {
        Title {
            tgid: 7,
            title: text.to_owned(),
        }
    }

    /// One sample a second; in the first the targets, in the first two a title.
    fn stream() -> Vec<Sample> {
        let sample = |second: u64| Sample {
            mono_ns: 1_000_000_000 * (second + 50),
            targets: (second == 0).then(|| vec![Target::default()]),
            titles: match second {
                0 => vec![title("UPDATE")],
                1 => vec![title("UPDATE waiting")],
                _ => Vec::new(),
            },
            ..Sample::default()
        };
        (0..10).map(sample).collect()
    }

    #[test]
    fn a_part_begins_with_what_was_said_before_it() {
        let mut cut = Cut::new(3_000_000_000..6_000_000_000);
        let part: Vec<Sample> = stream()
            .into_iter()
            .filter_map(|sample| cut.take(sample))
            .collect();
        assert_eq!(part.len(), 3);
        assert_eq!(part[0].mono_ns, 53_000_000_000);
        assert_eq!(part[0].targets, Some(vec![Target::default()]));
        assert_eq!(part[0].titles, [title("UPDATE waiting")]);
        assert_eq!((&part[1].targets, part[1].titles.len()), (&None, 0));
    }

    #[test]
    fn the_whole_is_what_it_was() {
        let mut cut = Cut::new(0..u64::MAX);
        let whole = stream().into_iter().map(|sample| cut.take(sample));
        assert_eq!(whole.collect::<Option<Vec<_>>>(), Some(stream()));
    }
}
