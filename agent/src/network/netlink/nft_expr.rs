//! nf_tables' expressions: what a rule does, step by step over sixteen 32-bit registers. Invariant: pure; a register
//! is written before it is read within the same rule, which newer kernels insist on.

use super::nfnl::Writer;
use super::nft::{Verdict, data, verdict};

/// A 32-bit register, 0 to 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reg(pub(crate) u8);

impl Reg {
    /// `NFT_REG32_00` and on.
    const fn number(self) -> u32 {
        8 + self.0 as u32
    }
}

/// Comparisons (`NFT_CMP_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Is {
    /// The same.
    Equal = 0,
    /// Not the same.
    Other = 1,
}

/// What `dynset` does (`NFT_DYNSET_OP_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dynamic {
    /// Adds an element that is not there.
    Add = 0,
    /// Adds an element or, where it is there, starts its timeout anew.
    Update = 1,
    /// Takes an element out.
    Delete = 2,
}

/// `NFT_META_…`.
pub(crate) mod meta {
    /// Name of the device that a packet came in by.
    pub(crate) const IN_NAME: u32 = 6;
    /// Name of the device that a packet goes out by.
    pub(crate) const OUT_NAME: u32 = 7;
    /// `NFPROTO_…`.
    pub(crate) const NFPROTO: u32 = 15;
    /// Transport protocol.
    pub(crate) const L4PROTO: u32 = 16;
}

/// `NFT_CT_…`.
pub(crate) mod ct {
    /// Bit of the state.
    pub(crate) const STATE: u32 = 0;
    /// `IPS_…` bits.
    pub(crate) const STATUS: u32 = 2;
    /// Destination port of one direction.
    pub(crate) const PORT_TO: u32 = 12;
    /// IPv4 destination of one direction.
    pub(crate) const TO_V4: u32 = 20;
    /// IPv6 destination of one direction.
    pub(crate) const TO_V6: u32 = 22;
    /// Bit of [`STATE`]: first packet (`NF_CT_STATE_BIT(IP_CT_NEW)`).
    pub(crate) const NEW: u32 = 8;
    /// Bit of [`STATUS`]: destination translated (`IPS_DST_NAT`).
    pub(crate) const TRANSLATED: u32 = 0x20;
}

/// What kind of no a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A TCP reset.
    Reset,
    /// ICMP or ICMPv6: port unreachable.
    PortUnreachable,
}

/// A rule under construction.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Rule {
    writer: Writer,
}

impl Rule {
    /// One that matches everything and does nothing.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(super) fn expressions(&self) -> &Writer {
        &self.writer
    }

    /// What another rule does, after this.
    pub(crate) fn and(mut self, other: &Rule) -> Self {
        self.writer.append(&other.writer);
        self
    }

    fn expression(mut self, name: &str, write: impl FnOnce(&mut Writer)) -> Self {
        let at = self.writer.nest(1);
        self.writer.put_str(1, name);
        let inner = self.writer.nest(2);
        write(&mut self.writer);
        self.writer.end(inner);
        self.writer.end(at);
        self
    }

    /// Loads bytes of the network header.
    pub(crate) fn network(self, offset: u32, len: u32, to: Reg) -> Self {
        self.payload(1, offset, len, to)
    }

    /// Loads bytes of the transport header.
    pub(crate) fn transport(self, offset: u32, len: u32, to: Reg) -> Self {
        self.payload(2, offset, len, to)
    }

    fn payload(self, base: u32, offset: u32, len: u32, to: Reg) -> Self {
        self.expression("payload", |w| {
            w.put_u32(1, to.number());
            w.put_u32(2, base);
            w.put_u32(3, offset);
            w.put_u32(4, len);
        })
    }

    /// Loads a [`meta`] value.
    pub(crate) fn meta(self, key: u32, to: Reg) -> Self {
        self.expression("meta", |w| {
            w.put_u32(1, to.number());
            w.put_u32(2, key);
        })
    }

    /// Loads a [`ct`] value; `original` for those that a direction has.
    pub(crate) fn ct(self, key: u32, original: bool, to: Reg) -> Self {
        self.expression("ct", |w| {
            w.put_u32(1, to.number());
            w.put_u32(2, key);
            if original {
                w.put(3, &[0]);
            }
        })
    }

    /// Goes on if the register is, or is not, this.
    pub(crate) fn compare(self, from: Reg, is: Is, with: &[u8]) -> Self {
        self.expression("cmp", |w| {
            w.put_u32(1, from.number());
            w.put_u32(2, is as u32);
            data(w, 3, with);
        })
    }

    /// `to = from & mask`, as many bytes as the mask has.
    pub(crate) fn mask(self, from: Reg, mask: &[u8], to: Reg) -> Self {
        self.expression("bitwise", |w| {
            w.put_u32(1, from.number());
            w.put_u32(2, to.number());
            w.put_u32(3, mask.len() as u32);
            data(w, 4, mask);
            data(w, 5, &vec![0; mask.len()]);
        })
    }

    /// `to = from`, of the low 31 bits.
    pub(crate) fn copy(self, from: Reg, to: Reg) -> Self {
        self.mask(from, &0x7fff_ffff_u32.to_ne_bytes(), to)
    }

    /// Loads a constant.
    pub(crate) fn constant(self, value: &[u8], to: Reg) -> Self {
        self.expression("immediate", |w| {
            w.put_u32(1, to.number());
            data(w, 2, value);
        })
    }

    /// Goes on if the key is, or is not, in a set.
    pub(crate) fn contained(self, set: &str, key: Reg, is: bool) -> Self {
        self.expression("lookup", |w| {
            w.put_str(1, set);
            w.put_u32(2, key.number());
            if !is {
                w.put_u32(5, 1);
            }
        })
    }

    /// Loads what a map has for the key; ends the rule where it has nothing.
    pub(crate) fn mapped(self, map: &str, key: Reg, to: Reg) -> Self {
        self.expression("lookup", |w| {
            w.put_str(1, map);
            w.put_u32(2, key.number());
            w.put_u32(3, to.number());
        })
    }

    /// Does what a map of verdicts has for the key, if anything.
    pub(crate) fn by_map(self, map: &str, key: Reg) -> Self {
        self.expression("lookup", |w| {
            w.put_str(1, map);
            w.put_u32(2, key.number());
            w.put_u32(3, 0);
        })
    }

    /// Draws a number below `below`.
    pub(crate) fn random(self, below: u32, to: Reg) -> Self {
        self.expression("numgen", |w| {
            w.put_u32(1, to.number());
            w.put_u32(2, below);
            w.put_u32(3, 1);
        })
    }

    /// Loads the kind of address (`RTN_…`) that the source or destination is on this host.
    pub(crate) fn address_kind(self, of_source: bool, to: Reg) -> Self {
        self.expression("fib", |w| {
            w.put_u32(1, to.number());
            w.put_u32(2, 3);
            w.put_u32(3, if of_source { 1 } else { 2 });
        })
    }

    /// Changes a map from the packet path. Where that is not possible, because the map is full, the rule ends here.
    pub(crate) fn dynamic(self, what: Dynamic, map: &str, key: Reg, value: Reg, timeout_s: u32) -> Self {
        self.expression("dynset", |w| {
            w.put_str(1, map);
            w.put_u32(3, what as u32);
            w.put_u32(4, key.number());
            w.put_u32(5, value.number());
            if timeout_s != 0 {
                w.put_u64(6, u64::from(timeout_s) * 1000);
            }
        })
    }

    /// Translates the destination to an address and a port in registers.
    pub(crate) fn translate(self, family: u8, address: Reg, port: Reg) -> Self {
        self.expression("nat", |w| {
            w.put_u32(1, 1);
            w.put_u32(2, u32::from(family));
            w.put_u32(3, address.number());
            w.put_u32(5, port.number());
        })
    }

    /// Translates the source to the outgoing device's address, with ports that outsiders can't foresee.
    pub(crate) fn masquerade(self) -> Self {
        // NF_NAT_RANGE_PROTO_RANDOM_FULLY
        self.expression("masq", |w| w.put_u32(1, 0x10))
    }

    /// Answers no and drops.
    pub(crate) fn refuse(self, how: Refusal) -> Self {
        self.expression("reject", |w| match how {
            Refusal::Reset => {
                w.put_u32(1, 1);
                w.put(2, &[0]);
            }
            Refusal::PortUnreachable => {
                w.put_u32(1, 2);
                w.put(2, &[1]);
            }
        })
    }

    /// Ends in a verdict.
    pub(crate) fn then(self, what: Verdict<'_>) -> Self {
        self.expression("immediate", |w| {
            w.put_u32(1, 0);
            verdict(w, 2, what);
        })
    }
}
