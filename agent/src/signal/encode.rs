//! Encodes a pressure as the words of a page, which [`tailback_page`] reads. Pure.

use sha2::{Digest as _, Sha256};
use tailback_page::layout::{
    ADMIT_AT, CONCURRENCY_LIMIT_AT, COUNT_AT, CPU_AT, ENTRIES, ENTRIES_AT, ENTRY, HAS_LIMIT,
    HAS_P99, HAS_RATES, INBOUND, LEVEL_AT, LOAD_AT, MAGIC, MAX_QUEUE_WAIT_AT, NEVER, OLDEST_AGE_AT,
    PID_AT, PUBLISHED_AT, RETRY_AFTER_AT, SCORE_AT, TIME_TO_FULL_AT, TTL_AT, VERSION, VERSION_AT,
    WAKE_AT, WORDS, WORST_AT,
};

use super::pressure::{Pressure, is_inbound};
use crate::{detect::Gauge, queue::QueueKey};

/// The content of a page. Words from `used` on keep their old values.
pub struct Words {
    pub words: [u64; WORDS],
    pub used: usize,
}

/// When a page was published, and its time to live, ns. CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug)]
pub struct Published {
    pub at_ns: u64,
    pub ttl_ns: u64,
}

/// The page for a pressure. `seq` stays 0: the writer counts it. `wake` increases whenever the level changes.
pub fn encode(pressure: &Pressure, published: Published, wake: u32) -> Words {
    let count = pressure.queues.len().min(ENTRIES);
    let mut page = Page([0; WORDS]);
    page.head(published);
    page.u32(COUNT_AT, count as u32);
    page.u32(PID_AT, pressure.target.pid);
    page.u32(LEVEL_AT, pressure.level as u32);
    page.u32(SCORE_AT, ppm(pressure.score));
    page.u32(ADMIT_AT, ppm(pressure.admit_ratio.clamp(0.0, 1.0)));
    // The queues are sorted, the worst first.
    page.u32(WORST_AT, 0);
    page.u32(WAKE_AT, wake);
    page.u64(OLDEST_AGE_AT, pressure.oldest_age_ns);
    page.u64(TIME_TO_FULL_AT, pressure.time_to_full_ns.unwrap_or(NEVER));
    page.u32(RETRY_AFTER_AT, pressure.retry_after_ms);
    page.u32(LOAD_AT, ppm(pressure.load.all));
    page.u32(CPU_AT, ppm(pressure.load.cpu));
    page.u32(
        CONCURRENCY_LIMIT_AT,
        pressure.concurrency_limit.unwrap_or(0),
    );
    page.u64(MAX_QUEUE_WAIT_AT, pressure.max_queue_wait_ns.unwrap_or(0));
    for (index, (key, gauge)) in pressure.queues.iter().take(count).enumerate() {
        page.entry(ENTRIES_AT + ENTRY * index, key, gauge);
    }
    Words {
        words: page.0,
        used: (ENTRIES_AT + ENTRY * count) / 8,
    }
}

/// A page without any pressure.
pub fn encode_none(published: Published, wake: u32) -> Words {
    let mut page = Page([0; WORDS]);
    page.head(published);
    page.u32(ADMIT_AT, 1_000_000);
    page.u32(WAKE_AT, wake);
    page.u64(TIME_TO_FULL_AT, NEVER);
    Words {
        words: page.0,
        used: ENTRIES_AT / 8,
    }
}

/// A full page whose numbers all derive from `n`, for tests: a reader that sees two different values of `n` has read a torn page.
pub fn pattern(n: u64, published: Published) -> Words {
    let part = n % 1_000_000;
    let mut page = Page([0; WORDS]);
    page.head(published);
    page.u32(COUNT_AT, ENTRIES as u32);
    page.u32(SCORE_AT, part as u32);
    page.u32(ADMIT_AT, part as u32);
    page.u64(OLDEST_AGE_AT, n);
    page.u64(TIME_TO_FULL_AT, n);
    page.u32(RETRY_AFTER_AT, n as u32);
    for at in (0..ENTRIES).map(|index| ENTRIES_AT + ENTRY * index) {
        page.u16(at + 2, HAS_P99);
        page.u32(at + 8, n as u32);
        page.u64(at + 16, n);
        page.u64(at + 24, n);
        page.u64(at + 32, n);
    }
    Words {
        words: page.0,
        used: WORDS,
    }
}

/// Identifies a queue within its service: the first 32 bits of the SHA-256 of kind and name.
pub fn id(key: &QueueKey) -> u32 {
    let mut hash = Sha256::new();
    hash.update(key.kind.name());
    hash.update([0]);
    hash.update(key.name());
    let hash = hash.finalize();
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]])
}

fn ppm(ratio: f64) -> u32 {
    // `as` saturates.
    (ratio * 1e6).round() as u32
}

fn bounded(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

struct Page([u64; WORDS]);

impl Page {
    fn head(&mut self, published: Published) {
        self.u64(0, u64::from_le_bytes(MAGIC));
        self.u32(VERSION_AT, VERSION);
        self.u64(PUBLISHED_AT, published.at_ns);
        self.u64(TTL_AT, published.ttl_ns);
    }

    fn entry(&mut self, at: usize, key: &QueueKey, gauge: &Gauge) {
        let flag = |is_set: bool, flag: u16| if is_set { flag } else { 0 };
        let rates = gauge.arrivals_per_s.zip(gauge.departures_per_s);
        // Requests that arrived and were answered between two samples count on both sides.
        let rates = rates.map(|(arrivals, departures)| {
            let responses = gauge.responses_per_s.unwrap_or(departures);
            let hidden = (responses - departures).max(0.0);
            (arrivals + hidden, departures + hidden)
        });
        // A limit in bytes of memory may not fit into the field, and is left out.
        let limit = gauge.limit.and_then(|limit| u32::try_from(limit).ok());
        let flags = flag(limit.is_some(), HAS_LIMIT)
            | flag(rates.is_some(), HAS_RATES)
            | flag(gauge.p99_ns.is_some(), HAS_P99)
            | flag(is_inbound(key), INBOUND);
        let (arrivals, departures) = rates.unwrap_or_default();
        self.u16(at, key.kind.wire());
        self.u16(at + 2, flags);
        self.u32(at + 4, id(key));
        self.u32(at + 8, bounded(gauge.depth));
        self.u32(at + 12, limit.unwrap_or(0));
        self.u64(at + 16, gauge.standing_delay_ns);
        self.u64(at + 24, gauge.p99_ns.unwrap_or(0));
        self.u64(
            at + 32,
            gauge.oldest_age_ns.filter(|_| gauge.depth > 0).unwrap_or(0),
        );
        self.u32(at + 40, ppm(gauge.score));
        self.u32(at + 44, arrivals.round() as u32);
        self.u32(at + 48, departures.round() as u32);
        self.u32(at + 52, bounded(gauge.losses));
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.0[at / 8] = value.to_le();
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.part(at, u64::from(value));
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.part(at, u64::from(value));
    }

    /// Sets bits of a word that are still 0.
    fn part(&mut self, at: usize, value: u64) {
        let word = u64::from_le(self.0[at / 8]) | value << (at % 8 * 8);
        self.0[at / 8] = word.to_le();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tailback_page::layout::LEVELS;

    use super::*;
    use crate::{event::Level, queue::Kind, sample::Target, signal::load::Load};

    #[test]
    fn levels_have_the_numbers_that_readers_expect() {
        let levels = [Level::Ok, Level::Warn, Level::Critical, Level::Full];
        assert_eq!(levels.map(Level::name), LEVELS);
        assert_eq!(levels.map(|level| level as usize), [0, 1, 2, 3]);
    }

    #[test]
    fn every_field_is_at_its_offset() {
        let key = QueueKey::new(1, Kind::Accept, ":80".into());
        let gauge = Gauge {
            depth: 7,
            limit: Some(100),
            standing_delay_ns: 11,
            oldest_age_ns: Some(13),
            score: 0.5,
            arrivals_per_s: Some(30.4),
            departures_per_s: Some(19.6),
            responses_per_s: Some(119.6),
            losses: 3,
            ..Gauge::default()
        };
        let pressure = Pressure {
            target: Arc::new(Target {
                pid: 4711,
                ..Target::default()
            }),
            level: Level::Critical,
            score: 1.25,
            admit_ratio: 0.62,
            load: Load {
                all: 1.5,
                cpu: 0.25,
            },
            utilization: None,
            concurrency_limit: Some(6),
            max_queue_wait_ns: Some(20_000_000),
            oldest_age_ns: 13,
            time_to_full_ns: None,
            retry_after_ms: 2_000,
            queues: vec![(Arc::new(key.clone()), gauge)],
            controllers: Vec::new(),
        };
        let published = Published {
            at_ns: 5,
            ttl_ns: 6,
        };
        let Words { words, used } = encode(&pressure, published, 9);
        assert_eq!(used, (128 + 64) / 8);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(&bytes[..8], b"TAILBACK");
        assert_eq!(
            [8, 12, 40, 44, 48, 52, 56, 60, 80, 84, 88, 92].map(u32_at),
            [
                1, 1, 4711, 2, 1_250_000, 620_000, 0, 9, 2_000, 1_500_000, 250_000, 6
            ]
        );
        assert_eq!(
            [16, 24, 32, 64, 72, 96].map(u64_at),
            [0, 5, 6, 13, u64::MAX, 20_000_000]
        );
        assert_eq!(
            u32_at(128),
            1 | u32::from(HAS_LIMIT | HAS_RATES | INBOUND) << 16
        );
        assert_eq!(
            [132, 136, 140, 168, 172, 176, 180].map(u32_at),
            [id(&key), 7, 100, 500_000, 130, 120, 3]
        );
        assert_eq!([144, 152, 160].map(u64_at), [11, 0, 13]);
    }

    #[test]
    fn numbers_are_clamped_to_what_the_page_can_hold() {
        let gauge = Gauge {
            depth: u64::MAX,
            score: 1e30,
            ..Gauge::default()
        };
        let key = QueueKey::new(1, Kind::Send, ":80".into());
        let pressure = Pressure {
            target: Arc::default(),
            level: Level::Ok,
            score: f64::NAN,
            admit_ratio: 2.0,
            load: Load::default(),
            utilization: None,
            concurrency_limit: None,
            max_queue_wait_ns: None,
            oldest_age_ns: 0,
            time_to_full_ns: None,
            retry_after_ms: 0,
            queues: vec![(Arc::new(key), gauge); 100],
            controllers: Vec::new(),
        };
        let page = encode(
            &pressure,
            Published {
                at_ns: 0,
                ttl_ns: 0,
            },
            0,
        );
        assert_eq!(page.used, WORDS);
        assert_eq!(page.words[6] >> 32, 1_000_000);
    }
}
