//! The Internet checksum (RFC 1071) and its correction (RFC 1624). Invariant: a correction by [`diff`] gives what a
//! full computation over the changed bytes would give.

/// The sum that changing `old` to `new` adds to a ones' complement sum: `Σ new + Σ ~old`, not yet folded to 16 bits.
/// Words are as they lie in the packet. This is what the kernel's checksum helpers take as a difference.
#[inline(always)]
pub fn diff<const N: usize>(old: &[u32; N], new: &[u32; N]) -> u32 {
    let mut sum: u64 = 0;
    let mut i = 0;
    while i < N {
        sum += u64::from(!old[i]) + u64::from(new[i]);
        i += 1;
    }
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// [`diff`] of one 16-bit word.
#[inline(always)]
pub fn diff16(old: u16, new: u16) -> u32 {
    u32::from(!old) + u32::from(new)
}

/// The sum of two differences.
#[inline(always)]
pub fn add(a: u32, b: u32) -> u32 {
    let sum = u64::from(a) + u64::from(b);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// Folds a 32-bit ones' complement sum to 16 bits.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum field `check` after the bytes it covers changed by `diff`.
#[inline(always)]
pub fn apply(check: u16, diff: u32) -> u16 {
    let sum = u64::from(!check) + u64::from(diff);
    !fold(((sum & 0xffff_ffff) + (sum >> 32)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full(words: &[u32]) -> u16 {
        let mut sum = 0_u64;
        for word in words {
            sum += u64::from(*word as u16) + u64::from((*word >> 16) as u16);
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    /// 0x0000 and 0xffff are the same number in ones' complement arithmetic.
    fn same(a: u16, b: u16) -> bool {
        let canon = |x: u16| if x == 0xffff { 0 } else { x };
        canon(a) == canon(b)
    }

    proptest! {
        #[test]
        fn correction_equals_recomputation(rest in any::<[u32; 3]>(), old in any::<[u32; 4]>(), new in any::<[u32; 4]>()) {
            let words = |part: [u32; 4]| { let mut w = std::vec::Vec::from(rest); w.extend(part); w };
            prop_assert!(same(apply(full(&words(old)), diff(&old, &new)), full(&words(new))));
        }

        #[test]
        fn port_correction(rest in any::<[u32; 3]>(), high in any::<u16>(), old in any::<u16>(), new in any::<u16>()) {
            let words = |low: u16| [rest[0], rest[1], rest[2], u32::from(high) << 16 | u32::from(low)];
            prop_assert!(same(apply(full(&words(old)), diff16(old, new)), full(&words(new))));
        }
    }

    #[test]
    fn example_of_rfc_1624() {
        assert_eq!(apply(0xdd2f, diff16(0x5555, 0x3285)), 0x0000);
    }
}
