//! A map for what is asked in nearly the same order again and again: the sockets of one walk, then those of the next.
#![forbid(unsafe_code)]

use rustc_hash::FxHashMap;

/// What is remembered under each key. A key that follows the one it followed last time is found without a search, in
/// memory that lies in the order of the walk; any other costs one look-up, and is remembered as the follower.
///
/// A key is a number that the kernel or the agent counts up: nobody outside chooses it, so a fast hash is safe.
#[derive(Debug)]
pub(crate) struct InOrder<T> {
    entries: Vec<Entry<T>>,
    places: FxHashMap<u64, u32>,
    /// Places whose values have gone.
    free: Vec<u32>,
    /// The place found last.
    last: u32,
}

#[derive(Debug)]
struct Entry<T> {
    key: u64,
    /// The place that was asked for after this one, last time.
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
    /// What is remembered under `key`, whose turn it is.
    pub(crate) fn next(&mut self, key: u64) -> Option<&mut T> {
        let place = match self.guess(key) {
            Some(place) => place,
            None => *self.places.get(&key)?,
        };
        self.follow(place);
        self.entries[place as usize].value.as_mut()
    }

    /// What is remembered under `key`, out of turn.
    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let place = *self.places.get(&key)?;
        self.entries[place as usize].value.as_ref()
    }

    /// Remembers `value` under `key`, in place of what was.
    pub(crate) fn insert(&mut self, key: u64, value: T) -> &mut T {
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None => self.new_place(key),
        };
        self.follow(place);
        self.entries[place as usize].value.insert(value)
    }

    /// Forgets what does not stay.
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
                // A machine has fewer sockets than 2^32; were it not so, the look-up would still be right about the rest.
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
    fn a_key_is_found_in_turn_and_out_of_turn() {
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
    fn what_was_forgotten_is_not_found_by_the_way_that_led_to_it() {
        let mut map = InOrder::default();
        for key in [7, 8, 9] {
            map.insert(key, key);
        }
        map.retain(|value| *value != 8);
        assert_eq!(map.next(7), Some(&mut 7));
        assert_eq!(map.next(8), None);
        // The place is used again, and what follows 7 is still told by its key.
        map.insert(5, 5);
        assert_eq!(map.next(7), Some(&mut 7));
        assert_eq!(map.next(8), None);
        assert_eq!(map.next(5), Some(&mut 5));
    }

    #[test]
    fn it_remembers_what_any_map_does() {
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
