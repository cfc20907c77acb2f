//! A map for keys that are looked up in nearly the same order each time, such as the sockets of one scan after another.
#![forbid(unsafe_code)]

use rustc_hash::FxHashMap;

/// Values by key. A key that follows the same key as last time is found without hashing, in memory laid out in the order
/// of the scan. Any other key costs one hash look-up, and is remembered as the successor.
///
/// Keys are numbers that the kernel or the agent assigns in ascending order. No outsider chooses them, so a fast hash
/// is safe.
#[derive(Debug)]
pub(crate) struct InOrder<T> {
    entries: Vec<Entry<T>>,
    places: FxHashMap<u64, u32>,
    /// Indexes of entries without a value.
    free: Vec<u32>,
    /// Index of the entry found last.
    last: u32,
}

#[derive(Debug)]
struct Entry<T> {
    key: u64,
    /// Index of the entry looked up after this one, last time.
    next: u32,
    value: Option<T>,
}

impl<T> Default for InOrder<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            places: FxHashMap::default(),
            free: Vec::new(),
            last: 0,
        }
    }
}

impl<T> InOrder<T> {
    /// The value of `key`, looked up in order.
    pub(crate) fn next(&mut self, key: u64) -> Option<&mut T> {
        let place = match self.guess(key) {
            Some(place) => place,
            None => *self.places.get(&key)?,
        };
        self.follow(place);
        self.entries[place as usize].value.as_mut()
    }

    /// The value of `key`, looked up out of order.
    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let place = *self.places.get(&key)?;
        self.entries[place as usize].value.as_ref()
    }

    /// Sets the value of `key`.
    pub(crate) fn insert(&mut self, key: u64, value: T) -> &mut T {
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None => self.new_place(key),
        };
        self.follow(place);
        self.entries[place as usize].value.insert(value)
    }

    /// Removes the values that `stays` rejects.
    pub(crate) fn retain(&mut self, mut stays: impl FnMut(&mut T) -> bool) {
        for (place, entry) in (0..).zip(&mut self.entries) {
            if let Some(value) = &mut entry.value
                && !stays(value)
            {
                entry.value = None;
                self.places.remove(&entry.key);
                self.free.push(place);
            }
        }
        if self.places.is_empty() {
            *self = Self::default();
        }
    }

    fn guess(&self, key: u64) -> Option<u32> {
        let place = self.entries.get(self.last as usize)?.next;
        let entry = self.entries.get(place as usize)?;
        (entry.key == key && entry.value.is_some()).then_some(place)
    }

    fn follow(&mut self, place: u32) {
        if let Some(last) = self.entries.get_mut(self.last as usize) {
            last.next = place;
        }
        self.last = place;
    }

    fn new_place(&mut self, key: u64) -> u32 {
        let entry = Entry {
            key,
            next: 0,
            value: None,
        };
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place as usize] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                // A machine has fewer than 2^32 sockets. If it had more, only those beyond would be looked up wrongly.
                u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.places.insert(key, place);
        place
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::InOrder;

    #[test]
    fn a_key_is_found_in_order_and_out_of_order() {
        let mut map = InOrder::default();
        for key in [7, 8, 9] {
            map.insert(key, key * 10);
        }
        for key in [7, 8, 9, 9, 7, 8] {
            assert_eq!(map.next(key), Some(&mut (key * 10)));
            assert_eq!(map.get(key), Some(&(key * 10)));
        }
        assert_eq!(map.next(6), None);
        assert_eq!(map.get(6), None);
    }

    #[test]
    fn a_removed_key_is_not_found_through_its_predecessor() {
        let mut map = InOrder::default();
        for key in [7, 8, 9] {
            map.insert(key, key);
        }
        map.retain(|value| *value != 8);
        assert_eq!(map.next(7), Some(&mut 7));
        assert_eq!(map.next(8), None);
        // The entry is reused, and the successor of 7 is still checked by its key.
        map.insert(5, 5);
        assert_eq!(map.next(7), Some(&mut 7));
        assert_eq!(map.next(8), None);
        assert_eq!(map.next(5), Some(&mut 5));
    }

    #[test]
    fn it_behaves_like_a_map() {
        let (mut map, mut plain) = (InOrder::default(), BTreeMap::new());
        let mut state = 1_u64;
        let mut number = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for step in 0..20_000 {
            let (key, value) = (number(12), number(12));
            match number(8) {
                0 => {
                    map.retain(|known| *known != value);
                    plain.retain(|_, known| *known != value);
                }
                1..4 => {
                    map.insert(key, value);
                    plain.insert(key, value);
                }
                _ => assert_eq!(
                    map.next(key).copied(),
                    plain.get(&key).copied(),
                    "step {step}"
                ),
            }
            for key in 0..12 {
                assert_eq!(map.get(key), plain.get(&key), "step {step}");
            }
        }
    }
}
