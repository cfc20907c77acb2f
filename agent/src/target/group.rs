//! Which processes serve together.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Union of indices: find with path halving.
pub(super) struct Groups {
    leader: Vec<usize>,
}

impl Groups {
    pub(super) fn new(len: usize) -> Self {
        Self {
            leader: (0..len).collect(),
        }
    }

    pub(super) fn find(&mut self, mut index: usize) -> usize {
        while self.leader[index] != index {
            self.leader[index] = self.leader[self.leader[index]];
            index = self.leader[index];
        }
        index
    }

    pub(super) fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.leader[a.max(b)] = a.min(b);
    }

    /// Joins all indices that come with the same key.
    pub(super) fn join_by<K: std::hash::Hash + Eq>(
        &mut self,
        pairs: impl IntoIterator<Item = (K, usize)>,
    ) {
        let mut first: HashMap<K, usize> = HashMap::new();
        for (key, index) in pairs {
            let other = *first.entry(key).or_insert(index);
            self.join(other, index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Groups;

    #[test]
    fn what_shares_a_key_is_one_group() {
        let mut groups = Groups::new(5);
        groups.join_by([("a", 0), ("b", 1), ("a", 3), ("b", 4)]);
        groups.join(3, 4);
        assert_eq!(groups.find(0), groups.find(1));
        assert_ne!(groups.find(0), groups.find(2));
    }
}
