//! What the table looks like. Invariant: pure; its rules never depend on what is wanted: all that comes and goes is
//! an element of a set or map, so that a packet meets as many rules with no host port as with a thousand.
//!
//! Translation of host ports comes after that of services (-100): a port of a service wins. What leaves with the
//! node's address is decided after services have.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::ranges::{Span, spans};
use super::{Desired, Frontend, Masquerade, TABLE, TABLE_FAMILY, Target};
use crate::network::NODE_LINK_PREFIX;
use crate::network::netlink::nft::{
    Base, Data, Element, IPV4, IPV6, NOTE_BYTES_MAX, OUTPUT, POSTROUTING, PREROUTING, Set, Transaction, Type,
    Value, Verdict, set_flag,
};
use crate::network::netlink::nft_expr::{Is, Reg, Rule, ct, meta};

/// Before connection tracking: what a pod sends to a loopback address is dropped as it came.
const GUARD_PRIORITY: i32 = -300;
const TRANSLATE_PRIORITY: i32 = -90;
const MASQUERADE_PRIORITY: i32 = 110;
/// `RTN_LOCAL`.
const LOCAL: u32 = 2;

/// What differs between the families.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) v4: bool,
    family: u8,
    /// Address, protocol and port → a pod's address and port.
    pub(super) ports: &'static str,
    /// Protocol and port on every address of the node → the same.
    pub(super) any_ports: &'static str,
    /// Addresses that host ports lead to, twice: who talks to himself.
    hairpins: &'static str,
    /// Whose packets leave with the node's address.
    pub(super) from: &'static str,
    /// To where they do not.
    pub(super) except: &'static str,
    translate: &'static str,
    source_at: u32,
    target_at: u32,
    bytes: u32,
}

/// Both families' names.
pub(super) const FAMILIES: [Names; 2] = [
    Names {
        v4: true,
        family: IPV4,
        ports: "hostports4",
        any_ports: "anyports4",
        hairpins: "hairpins4",
        from: "pods4",
        except: "unmasqueraded4",
        translate: "translate4",
        source_at: 12,
        target_at: 16,
        bytes: 4,
    },
    Names {
        v4: false,
        family: IPV6,
        ports: "hostports6",
        any_ports: "anyports6",
        hairpins: "hairpins6",
        from: "pods6",
        except: "unmasqueraded6",
        translate: "translate6",
        source_at: 8,
        target_at: 24,
        bytes: 16,
    },
];

impl Names {
    fn of(addr: IpAddr) -> &'static Self {
        &FAMILIES[usize::from(addr.is_ipv6())]
    }

    fn sets(&self) -> [Set; 5] {
        const FRONTEND4: &[Type] = &[Type::Ip4, Type::Proto, Type::Port];
        const FRONTEND6: &[Type] = &[Type::Ip6, Type::Proto, Type::Port];
        let set = |name, key, data, flags| Set { name, key, data, flags, size: 0 };
        let (frontend, target, pair, one): (&[Type], &[Type], &[Type], &[Type]) = if self.v4 {
            (FRONTEND4, &[Type::Ip4, Type::Port], &[Type::Ip4, Type::Ip4], &[Type::Ip4])
        } else {
            (FRONTEND6, &[Type::Ip6, Type::Port], &[Type::Ip6, Type::Ip6], &[Type::Ip6])
        };
        [
            set(self.ports, frontend, Data::Values(target), 0),
            set(self.any_ports, &[Type::Proto, Type::Port], Data::Values(target), 0),
            set(self.hairpins, pair, Data::None, 0),
            set(self.from, one, Data::None, set_flag::INTERVAL),
            set(self.except, one, Data::None, set_flag::INTERVAL),
        ]
    }

    fn after(&self, at: Reg) -> Reg {
        Reg(at.0 + (self.bytes / 4) as u8)
    }

    /// Rules that translate destinations: of ports of one address first, then of those that the node has on all of its
    /// own.
    fn translating(&self, tx: &mut Transaction<'_>) {
        let after = self.after(Reg(0));
        let exact = Rule::new().network(self.target_at, self.bytes, Reg(0));
        let exact = exact.meta(meta::L4PROTO, after).transport(2, 2, Reg(after.0 + 1));
        let exact = exact.mapped(self.ports, Reg(0), Reg(8));
        tx.add_rule(self.translate, &exact.translate(self.family, Reg(8), self.after(Reg(8))));
        let any = Rule::new().address_kind(false, Reg(0)).compare(Reg(0), Is::Equal, &LOCAL.to_ne_bytes());
        let any = if self.v4 {
            any
        } else {
            // What comes from `::1` gets no further than the node: a refusal is better than silence.
            any.network(self.target_at, self.bytes, Reg(0)).compare(
                Reg(0),
                Is::Other,
                &std::net::Ipv6Addr::LOCALHOST.octets(),
            )
        };
        let any = any.meta(meta::L4PROTO, Reg(0)).transport(2, 2, Reg(1));
        let any = any.mapped(self.any_ports, Reg(0), Reg(8));
        tx.add_rule(self.translate, &any.translate(self.family, Reg(8), self.after(Reg(8))));
    }

    /// Rules that translate sources.
    fn masquerading(&self, tx: &mut Transaction<'_>) {
        let ours = || {
            let rule = self.matching().ct(ct::STATUS, false, Reg(0));
            let rule = rule.mask(Reg(0), &ct::TRANSLATED.to_ne_bytes(), Reg(0));
            rule.compare(Reg(0), Is::Other, &[0; 4])
        };
        let self_talk = ours().network(self.source_at, self.bytes, Reg(0));
        let self_talk = self_talk.network(self.target_at, self.bytes, self.after(Reg(0)));
        tx.add_rule("postrouting", &self_talk.contained(self.hairpins, Reg(0), true).masquerade());
        if self.v4 {
            let to_pod = ours().meta(meta::OUT_NAME, Reg(0));
            let to_pod = to_pod.compare(Reg(0), Is::Equal, NODE_LINK_PREFIX.as_bytes());
            let loopback = to_pod.network(self.source_at, 1, Reg(0)).compare(Reg(0), Is::Equal, &[127]);
            tx.add_rule("postrouting", &loopback.masquerade());
        }
        let leaving = self.matching().network(self.source_at, self.bytes, Reg(0));
        let leaving = leaving.contained(self.from, Reg(0), true);
        let leaving = leaving.network(self.target_at, self.bytes, Reg(0));
        tx.add_rule("postrouting", &leaving.contained(self.except, Reg(0), false).masquerade());
    }

    fn matching(&self) -> Rule {
        Rule::new().meta(meta::NFPROTO, Reg(0)).compare(Reg(0), Is::Equal, &[self.family])
    }
}

/// A transaction on the table.
pub(super) fn transaction() -> Transaction<'static> {
    Transaction::new(TABLE_FAMILY, TABLE)
}

/// Writes the whole table, which must not be there, into a transaction.
pub(super) fn create(tx: &mut Transaction<'_>, desired: &Desired) {
    tx.add_table();
    let sets = FAMILIES.iter().flat_map(Names::sets);
    for (id, set) in sets.enumerate() {
        tx.add_set(&set, id as u32 + 1);
    }
    let base = |kind, hook, priority| Some(Base { kind, hook, priority });
    tx.add_chain("guard", base("filter", PREROUTING, GUARD_PRIORITY));
    tx.add_chain("prerouting", base("nat", PREROUTING, TRANSLATE_PRIORITY));
    tx.add_chain("output", base("nat", OUTPUT, TRANSLATE_PRIORITY));
    tx.add_chain("postrouting", base("nat", POSTROUTING, MASQUERADE_PRIORITY));
    // Links of pods let packets with loopback addresses through, for who comes to a host port by 127.0.0.1; so what a
    // pod sends there must not get further.
    let [v4, _] = &FAMILIES;
    let guarded = v4.matching().meta(meta::IN_NAME, Reg(0));
    let guarded = guarded.compare(Reg(0), Is::Equal, NODE_LINK_PREFIX.as_bytes());
    let guarded = guarded.network(v4.target_at, 1, Reg(0)).compare(Reg(0), Is::Equal, &[127]);
    tx.add_rule("guard", &guarded.then(Verdict::Drop));
    for names in &FAMILIES {
        tx.add_chain(names.translate, None);
        names.translating(tx);
        for chain in ["prerouting", "output"] {
            tx.add_rule(chain, &names.matching().then(Verdict::Goto(names.translate)));
        }
        names.masquerading(tx);
    }
    for (frontend, target) in &desired.ports {
        add_port(tx, frontend, target);
    }
    hairpins(desired).into_iter().for_each(|ip| add_hairpin(tx, ip));
    if let Some(masquerade) = desired.leaving() {
        for (set, span) in ranges(&masquerade) {
            add_range(tx, set, span);
        }
    }
}

/// Elements that lead from one wanted state to another that masquerades the same.
pub(super) fn change(tx: &mut Transaction<'_>, old: &Desired, new: &Desired) {
    let (hairpins_old, hairpins_new) = (hairpins(old), hairpins(new));
    for (frontend, _) in old.ports.iter().filter(|(key, target)| new.ports.get(key) != Some(target)) {
        let (set, key) = port_key(frontend);
        tx.delete_element(set, Element { key: &key, end: None, value: Value::None });
    }
    for (frontend, target) in new.ports.iter().filter(|(key, target)| old.ports.get(key) != Some(target)) {
        add_port(tx, frontend, target);
    }
    for ip in hairpins_old.difference(&hairpins_new) {
        let key = twice(*ip);
        tx.delete_element(Names::of(*ip).hairpins, Element { key: &key, end: None, value: Value::None });
    }
    hairpins_new.difference(&hairpins_old).for_each(|ip| add_hairpin(tx, *ip));
}

fn hairpins(desired: &Desired) -> BTreeSet<IpAddr> {
    desired.ports.values().map(|target| target.ip).collect()
}

fn add_hairpin(tx: &mut Transaction<'_>, ip: IpAddr) {
    let key = twice(ip);
    tx.add_element(Names::of(ip).hairpins, Element { key: &key, end: None, value: Value::None });
}

fn add_port(tx: &mut Transaction<'_>, frontend: &Frontend, target: &Target) {
    let (set, key) = port_key(frontend);
    let mut value = octets(target.ip);
    value.extend_from_slice(&port(target.port));
    let element = Element { key: &key, end: None, value: Value::Bytes(&value) };
    tx.add_noted_element(set, element, &target.owner);
}

/// Map and key of a host port.
fn port_key(frontend: &Frontend) -> (&'static str, Vec<u8>) {
    let names = Names::of(frontend.ip);
    let (set, mut key) = if frontend.ip.is_unspecified() {
        (names.any_ports, Vec::new())
    } else {
        (names.ports, octets(frontend.ip))
    };
    key.extend_from_slice(&[frontend.protocol, 0, 0, 0]);
    key.extend_from_slice(&port(frontend.port));
    (set, key)
}

/// A host port as its map shows it; `any` for the map that has no addresses.
pub(super) fn port_of(
    names: &Names,
    any: bool,
    key: &[u8],
    value: &[u8],
    note: String,
) -> Option<(Frontend, Target)> {
    let (ip, rest) = if any {
        (address(&[0; 16][..names.bytes as usize])?, key)
    } else {
        (address(key.get(..names.bytes as usize)?)?, key.get(names.bytes as usize..)?)
    };
    let [protocol, _, _, _, high, low, ..] = *rest else { return None };
    let to = address(value.get(..names.bytes as usize)?)?;
    let [to_high, to_low, ..] = *value.get(names.bytes as usize..)? else { return None };
    let frontend = Frontend { ip, protocol, port: u16::from_be_bytes([high, low]) };
    Some((frontend, Target { ip: to, port: u16::from_be_bytes([to_high, to_low]), owner: note }))
}

/// Keys of the elements that a set of ranges must have.
pub(super) fn range_keys(masquerade: &Masquerade, set: &str) -> BTreeSet<(Vec<u8>, bool)> {
    let spans = ranges(masquerade).into_iter().filter(|(name, _)| *name == set);
    let keys =
        |(first, after): Span| [Some((octets(first), false)), after.map(|after| (octets(after), true))];
    spans.flat_map(|(_, span)| keys(span)).flatten().collect()
}

fn ranges(masquerade: &Masquerade) -> Vec<(&'static str, Span)> {
    let of = |names: &'static Names| {
        let from = spans(&masquerade.from, &masquerade.spared, names.v4);
        let from = from.into_iter().map(|span| (names.from, span));
        from.chain(
            spans(&masquerade.except, &BTreeSet::new(), names.v4)
                .into_iter()
                .map(|span| (names.except, span)),
        )
    };
    FAMILIES.iter().flat_map(of).collect()
}

fn add_range(tx: &mut Transaction<'_>, set: &'static str, (first, after): Span) {
    tx.add_element(set, Element { key: &octets(first), end: None, value: Value::None });
    if let Some(after) = after {
        tx.add_element(set, Element { key: &octets(after), end: None, value: Value::RangeEnd });
    }
}

/// Who has a host port, as it is noted beside it: the id itself, or of a long one its beginning and a hash.
pub(super) fn label(id: &str) -> String {
    if id.len() <= NOTE_BYTES_MAX {
        return id.to_owned();
    }
    // FNV-1a; ids are names of attachments, and nobody gains by making two of them alike.
    let fold = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325, fold);
    let kept = (0..=NOTE_BYTES_MAX - 17).rev().find(|at| id.is_char_boundary(*at)).unwrap_or(0);
    format!("{}~{hash:016x}", &id[..kept])
}

fn twice(ip: IpAddr) -> Vec<u8> {
    let mut bytes = octets(ip);
    bytes.extend_from_within(..);
    bytes
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

fn port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for (ip, to) in [
            ("192.0.2.1", "10.0.0.2"),
            ("0.0.0.0", "10.0.0.2"),
            ("2001:db8::1", "fd00::2"),
            ("::", "fd00::2"),
        ] {
            let (ip, to): (IpAddr, IpAddr) = (ip.parse().unwrap(), to.parse().unwrap());
            let frontend = Frontend { ip, protocol: 17, port: 0x1234 };
            let target = Target { ip: to, port: 0x5678, owner: "net/a/eth0".to_owned() };
            let (set, key) = port_key(&frontend);
            let mut value = octets(to);
            value.extend_from_slice(&port(target.port));
            let names = Names::of(ip);
            let any = set == names.any_ports;
            assert_eq!(any, ip.is_unspecified());
            let read = port_of(names, any, &key, &value, target.owner.clone());
            assert_eq!(read, Some((frontend, target)));
            assert_eq!(port_of(names, any, &key[..3], &value, String::new()), None);
        }
    }

    #[test]
    fn long_names_stay_distinct() {
        let (a, b) = (format!("{}a", "ä".repeat(100)), format!("{}b", "ä".repeat(100)));
        assert_eq!(label("net/abc/eth0"), "net/abc/eth0");
        assert_ne!(label(&a), label(&b));
        assert!(label(&a).len() <= NOTE_BYTES_MAX);
    }
}
