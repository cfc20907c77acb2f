//! Groups of processes that serve together: a union-find over their indices.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Disjoint sets of indices, with path halving.
pub(super) struct Groups {
    /// For each index, another one in its group, or itself if it represents the group.
    parent: Vec<usize>,
}

impl Groups {
    pub(super) fn new(len: usize) -> Self {
        Self {
            parent: (0..len).collect(),
        }
    }

    /// The index that represents a group.
    pub(super) fn find(&mut self, mut index: usize) -> usize {
        while self.parent[index] != index {
            self.parent[index] = self.parent[self.parent[index]];
            index = self.parent[index];
        }
        index
    }

    pub(super) fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.parent[a.max(b)] = a.min(b);
    }

    /// Joins all indices that have the same key.
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
    fn indices_with_the_same_key_are_one_group() {
        let mut groups = Groups::new(5);
        groups.join_by([("a", 0), ("b", 1), ("a", 3), ("b", 4)]);
        groups.join(3, 4);
        assert_eq!(groups.find(0), groups.find(1));
        assert_ne!(groups.find(0), groups.find(2));
    }
}
