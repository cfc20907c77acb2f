//! Cuts a part out of a recording so that it replays by itself: state reported before the part is repeated in its first
//! sample.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::Sample;

/// Cuts a stream of samples.
#[derive(Debug)]
pub struct Cut {
    /// Time since the first sample, ns.
    part: Range<u64>,
    first_ns: Option<u64>,
    begun: bool,
    /// The last reported state before the part begins.
    state: Sample,
}

impl Cut {
    /// `part` is a range of times since the first sample, ns.
    pub fn new(part: Range<u64>) -> Self {
        Self {
            part,
            first_ns: None,
            begun: false,
            state: Sample::default(),
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
        let state = &mut self.state;
        state.targets = sample.targets.take().or(state.targets.take());
        state.listening = sample.listening.take().or(state.listening.take());
        state.holders = sample.holders.take().or(state.holders.take());
        state.peers = sample.peers.take().or(state.peers.take());
        state.lock_waits = sample.lock_waits.take().or(state.lock_waits.take());
        state.local_ports = sample.local_ports.take().or(state.local_ports.take());
        state.conntrack = sample.conntrack.take().or(state.conntrack.take());
        for title in sample.titles.drain(..) {
            state.titles.retain(|known| known.tgid != title.tgid);
            state.titles.push(title);
        }
        if at_ns < self.part.start {
            return None;
        }
        self.begun = true;
        sample.targets = state.targets.take();
        sample.listening = state.listening.take();
        sample.holders = state.holders.take();
        sample.peers = state.peers.take();
        sample.lock_waits = state.lock_waits.take();
        sample.local_ports = state.local_ports.take();
        sample.conntrack = state.conntrack.take();
        sample.titles = std::mem::take(&mut state.titles);
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

    /// One sample per second; the first has the targets, the first two have a title.
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
    fn a_part_begins_with_the_state_reported_before_it() {
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
    fn cutting_nothing_changes_nothing() {
        let mut cut = Cut::new(0..u64::MAX);
        let whole = stream().into_iter().map(|sample| cut.take(sample));
        assert_eq!(whole.collect::<Option<Vec<_>>>(), Some(stream()));
    }
}
