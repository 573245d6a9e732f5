//! One 16-byte form for both address families. Invariant: an IPv4 address is always IPv4-mapped here, so equality
//! of the words is equality of the address.

use crate::layout::plain;

/// Third word of an IPv4-mapped IPv6 address (`::ffff:0:0`), in network byte order in memory.
pub const MAPPED_WORD: u32 = 0x0000_ffff_u32.to_be();

plain! {
    /// An IPv6 or IPv4-mapped address, as four words in network byte order in memory.
    pub struct Address = 16 {
        /// The words, most significant first.
        pub words: [u32; 4],
    }
}

impl Address {
    /// The IPv4 address whose packet bytes are `word`.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED_WORD, word] }
    }

    /// The IPv6 (or already mapped) address whose packet bytes are `words`.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The IPv4 word when the address is IPv4-mapped.
    ///
    /// One comparison, not three: a verifier goes every way behind each.
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<u32> {
        let [a, b, c, word] = self.words;
        if a | b | (c ^ MAPPED_WORD) == 0 { Some(word) } else { None }
    }

    /// The bit of the address's network in [`crate::map::NETS`]: of its first 16 bits where it is IPv4, else of a hash of its
    /// first 64.
    #[inline(always)]
    pub const fn net(&self) -> u32 {
        match self.as_v4() {
            Some(word) => u32::from_be(word) >> 16,
            None => {
                let upper = (self.words[0] as u64) << 32 | self.words[1] as u64;
                crate::map::NETS_V4 + (upper.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 48) as u32
            }
        }
    }

    /// Whether the address is `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        match self.as_v4() {
            Some(word) => word == 0,
            None => self.words[0] | self.words[1] | self.words[2] | self.words[3] == 0,
        }
    }

    /// Whether the address is in 127.0.0.0/8 or is `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        match self.as_v4() {
            Some(word) => u32::from_be(word) >> 24 == 127,
            None => {
                self.words[0] == 0
                    && self.words[1] == 0
                    && self.words[2] == 0
                    && self.words[3] == 1_u32.to_be()
            }
        }
    }
}
