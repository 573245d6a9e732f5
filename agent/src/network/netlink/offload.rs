//! Checksum offload of a device, by the kernel's ethtool family. Invariant: only the transmit checksums are touched.

use std::io;

use super::{Attributes, Generic, attributes};

const FEATURES_GET: u8 = 11;
const FEATURES_SET: u8 = 12;
/// `ETHTOOL_A_FEATURES_*`
const HEADER: u16 = 1;
const WANTED: u16 = 3;
const ACTIVE: u16 = 4;
/// `ETHTOOL_A_HEADER_DEV_NAME`
const DEVICE_NAME: u16 = 2;
/// `ETHTOOL_A_BITSET_BITS`, `_BITS_BIT`, `_BIT_NAME`
const BITS: u16 = 3;
const BIT: u16 = 1;
const BIT_NAME: u16 = 2;
/// The feature of devices that hand checksums on, whatever the packet.
const FEATURE: &[u8] = b"tx-checksum-ip-generic\0";

fn family() -> io::Result<Generic> {
    Generic::open("ethtool")?.ok_or_else(|| io::Error::other("the kernel has no ethtool netlink"))
}

fn header(device: &str) -> Attributes {
    let (mut name, mut all) = (Attributes::default(), Attributes::default());
    name.put(DEVICE_NAME, format!("{device}\0").as_bytes());
    all.nest(HEADER, &name);
    all
}

/// Whether the device leaves checksums to what sends for it.
pub(in crate::network) fn is_on(device: &str) -> io::Result<bool> {
    let answers = family()?.ask(FEATURES_GET, &header(device))?;
    Ok(answers.iter().any(|answer| lists(answer, ACTIVE)))
}

/// Whether a set of features in an answer has ours.
fn lists(answer: &[u8], set: u16) -> bool {
    let inside =
        |bytes, wanted: u16| attributes(bytes).filter(move |(kind, _)| *kind == wanted).map(|(_, v)| v);
    inside(answer, set)
        .flat_map(|set| inside(set, BITS))
        .flat_map(|bits| inside(bits, BIT))
        .flat_map(|bit| inside(bit, BIT_NAME))
        .any(|name| name == FEATURE)
}

/// Makes the stack compute checksums before packets reach the device.
pub(in crate::network) fn turn_off(device: &str) -> io::Result<()> {
    let (mut bit, mut bits, mut set) = (Attributes::default(), Attributes::default(), Attributes::default());
    // Named without a value: off.
    bit.put(BIT_NAME, FEATURE);
    bits.nest(BIT, &bit);
    set.nest(BITS, &bits);
    let mut request = header(device);
    request.nest(WANTED, &set);
    family()?.change(FEATURES_SET, &request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_searched_to_its_names() {
        let (mut bit, mut bits, mut set) =
            (Attributes::default(), Attributes::default(), Attributes::default());
        bit.put(1, &[0; 4]).put(BIT_NAME, FEATURE);
        bits.nest(BIT, &bit);
        set.nest(BITS, &bits);
        let mut answer = header("x");
        answer.nest(ACTIVE, &set);
        assert!(lists(answer.bytes(), ACTIVE));
        assert!(!lists(answer.bytes(), WANTED));
        assert!(!lists(header("x").bytes(), ACTIVE));
    }
}
