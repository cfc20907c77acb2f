//! Identifiers for kernel objects that do not reveal kernel addresses.
#![forbid(unsafe_code)]

use std::hash::{BuildHasher as _, RandomState};

/// The lowest kernel address: the kernel lies in the upper half of the address space. Socket cookies are small numbers,
/// counted up, and never reach it.
const FIRST_ADDRESS: u64 = 1 << 63;

/// Maps an object's address to an identifier that is the same for as long as the agent runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ObjectIds {
    key: u64,
}

impl ObjectIds {
    pub(super) fn new() -> Self {
        Self {
            key: RandomState::new().hash_one(0_u64) | 1,
        }
    }

    /// The identifier of the object at an address; 0 (none) stays 0.
    pub(super) fn object(self, address: u64) -> u64 {
        // A bijection, so that two objects never share an identifier (the finalizer of MurmurHash3, keyed).
        let mixed = (address ^ self.key).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let mixed = (mixed ^ mixed >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        if address == 0 { 0 } else { mixed ^ mixed >> 33 }
    }

    /// A socket's cookie as it is. Where the kernel assigned none, the record holds the address, which is mapped.
    pub(super) fn cookie(self, cookie: u64) -> u64 {
        if cookie >= FIRST_ADDRESS {
            self.object(cookie)
        } else {
            cookie
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectIds;

    #[test]
    fn addresses_are_hidden_and_cookies_are_not() {
        let ids = ObjectIds::new();
        let address = 0xffff_8880_1234_5600;
        assert_ne!(ids.cookie(address), address);
        assert_eq!(ids.cookie(address), ids.object(address));
        assert_ne!(ids.object(address), ids.object(address + 64));
        assert_eq!((ids.cookie(77), ids.object(0)), (77, 0));
    }
}
