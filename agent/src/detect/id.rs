//! Names for episodes and incidents: the same for the same stream of samples, on any machine.

/// FNV-1a over the parts, with a separator between them, then mixed (the bits of FNV's last byte stay low).
/// <http://www.isthe.com/chongo/tech/comp/fnv/>; the mixer is SplitMix64's.
pub(super) fn id(parts: &[&[u8]]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // 0 is no valid id of a trace or span.
    (hash ^ (hash >> 31)).max(1)
}

#[cfg(test)]
mod tests {
    use super::id;

    #[test]
    fn the_parts_and_their_borders_both_count() {
        assert_ne!(id(&[b"ab", b"c"]), id(&[b"a", b"bc"]));
        assert_eq!(id(&[b"ab", b"c"]), id(&[b"ab", b"c"]));
    }
}
