//! Ids of episodes and incidents: the same stream of samples yields the same ids on any machine.

/// A hash of the parts: FNV-1a with a separator after each part, then the finalizer of SplitMix64, because FNV mixes the last byte
/// only into the low bits. <http://www.isthe.com/chongo/tech/comp/fnv/>
pub(super) fn id(parts: &[&[u8]]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // 0 is not a valid trace or span id.
    (hash ^ (hash >> 31)).max(1)
}

#[cfg(test)]
mod tests {
    use super::id;

    #[test]
    fn parts_and_their_boundaries_both_change_the_id() {
        assert_ne!(id(&[b"ab", b"c"]), id(&[b"a", b"bc"]));
        assert_eq!(id(&[b"ab", b"c"]), id(&[b"ab", b"c"]));
    }
}
