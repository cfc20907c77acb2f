//! Deterministic mutations of byte strings.

/// Boundary values of lengths, counts and sums.
const INTERESTING: &[u64] = &[
    0,
    1,
    2,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];
/// Largest input, bytes.
pub const MAX_BYTES: usize = 64 * 1024;

/// Deterministic pseudo-random numbers (xorshift64).
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        // The generator never leaves 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number less than `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.next().checked_rem(bound as u64).unwrap_or(0) as usize
    }
}

/// An input of the corpus with one to eight changes. `words` are inserted whole, for text formats.
pub fn mutant(corpus: &[Vec<u8>], words: &[&str], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = corpus[numbers.below(corpus.len())].clone();
    for _ in 0..=numbers.below(8) {
        let other = &corpus[numbers.below(corpus.len())];
        mutate(&mut bytes, other, words, numbers);
    }
    bytes.truncate(MAX_BYTES);
    bytes
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], words: &[&str], numbers: &mut Numbers) {
    let at = numbers.below(bytes.len() + 1);
    // Most changes keep the length: otherwise the parser would rarely get past the change.
    match numbers.below(12) {
        0..3 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << numbers.below(8);
            }
        }
        3..7 => {
            let width = 1 << numbers.below(4);
            let number = INTERESTING[numbers.below(INTERESTING.len())];
            // Mostly aligned like a field, sometimes anywhere.
            let at = if numbers.below(4) == 0 {
                at
            } else {
                at / width * width
            };
            let number = &number.to_le_bytes()[..width];
            let place = bytes.iter_mut().skip(at);
            place.zip(number).for_each(|(byte, new)| *byte = *new);
        }
        7 => bytes.truncate(at),
        8 => {
            let end = (at + 1 + numbers.below(32)).min(bytes.len());
            bytes.drain(at.min(end)..end);
        }
        9 => {
            let (from, len) = (numbers.below(other.len()), 1 + numbers.below(300));
            let piece: Vec<u8> = other.iter().skip(from).take(len).copied().collect();
            bytes.splice(at..at, piece);
        }
        10 => {
            let piece: Vec<u8> = bytes
                .iter()
                .skip(at)
                .take(1 + numbers.below(300))
                .copied()
                .collect();
            bytes.splice(at..at, piece);
        }
        _ if words.is_empty() => bytes.insert(at, numbers.next() as u8),
        _ => {
            let word = words[numbers.below(words.len())].bytes();
            bytes.splice(at..at, word);
        }
    }
}
