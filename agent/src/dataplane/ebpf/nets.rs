//! Networks that have addresses of frontends, so that the programs tell at a glance what is for no service. Invariant: the
//! bit of a frontend's network is in the kernel before the frontend is; bits are taken away only when all frontends were
//! read, at a start.

use super::encode;
use super::map::Map;
use crate::dataplane::DataplaneError;
use sheave_ebpf_abi::map as names;
use std::net::IpAddr;
use std::path::Path;

/// The bits as the kernel has them.
#[derive(Debug)]
pub(super) struct Nets {
    map: Map<u32, u64>,
    words: Vec<u64>,
}

impl Nets {
    /// Reads what the map pinned in `dir` holds.
    pub(super) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        let map: Map<u32, u64> = Map::open(dir, names::NETS)?;
        let mut words = vec![0; names::NETS_WORDS];
        for (index, word) in map.entries(usize::MAX)? {
            if let Some(held) = words.get_mut(index as usize) {
                *held = word;
            }
        }
        Ok(Self { map, words })
    }

    /// Sets the bits of these addresses' networks.
    pub(super) fn add(&mut self, addresses: impl Iterator<Item = IpAddr>) -> Result<(), DataplaneError> {
        let mut wanted = self.words.clone();
        set(&mut wanted, addresses);
        self.write(wanted)
    }

    /// Makes these addresses' networks all that have their bits set.
    pub(super) fn be(&mut self, addresses: impl Iterator<Item = IpAddr>) -> Result<(), DataplaneError> {
        let mut wanted = vec![0; names::NETS_WORDS];
        set(&mut wanted, addresses);
        self.write(wanted)
    }

    fn write(&mut self, wanted: Vec<u64>) -> Result<(), DataplaneError> {
        for (index, (held, wanted)) in (0_u32..).zip(self.words.iter_mut().zip(wanted)) {
            if *held != wanted {
                self.map.put(&index, &wanted)?;
                *held = wanted;
            }
        }
        Ok(())
    }
}

fn set(words: &mut [u64], addresses: impl Iterator<Item = IpAddr>) {
    for address in addresses {
        let net = encode::address(address).net();
        if let Some(word) = words.get_mut(net as usize / 64) {
            *word |= 1 << (net % 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_bit_of_its_network() {
        let mut words = vec![0; names::NETS_WORDS];
        let all = ["10.96.0.1", "10.96.255.9", "10.97.0.1", "fd00:96::1", "fd00:96::ffff:1"];
        set(&mut words, all.iter().map(|text| text.parse().unwrap()));
        let bits: u32 = words.iter().map(|word| word.count_ones()).sum();
        assert_eq!(bits, 3);
        let net = 10 << 8 | 96;
        assert_eq!(words[net / 64] >> (net % 64) & 3, 3);
    }
}
