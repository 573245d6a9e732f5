//! The table's plain data to map bytes and back. Invariant: decoding what was encoded gives the same value, and what
//! no encoder writes decodes to `None`.

use crate::service::{
    BackendAddr, BackendId, FrontendEntry, FrontendKey, FrontendKind, FrontendPolicy, Member, Proto,
    Scheduler, ServiceId, SlotWrite,
};
use ipnetwork::IpNetwork;
use sheave_ebpf_abi::{
    Address, Backend, Frontend, Frontend4Key, Frontend6Key, MemberKey, PROTO_SCTP, PROTO_TCP, PROTO_UDP,
    RangeKey, Slot, frontend_flag, member_flag,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

fn words(addr: Ipv6Addr) -> [u32; 4] {
    let o = addr.octets();
    let word = |at: usize| u32::from_ne_bytes([o[at], o[at + 1], o[at + 2], o[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

fn from_words(words: [u32; 4]) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (part, word) in octets.chunks_exact_mut(4).zip(words) {
        part.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets)
}

pub(super) fn address(addr: IpAddr) -> Address {
    match addr {
        IpAddr::V4(addr) => Address::v4(u32::from_ne_bytes(addr.octets())),
        IpAddr::V6(addr) => Address::v6(words(addr)),
    }
}

pub(super) fn from_address(address: &Address) -> IpAddr {
    match address.as_v4() {
        Some(word) => Ipv4Addr::from(word.to_ne_bytes()).into(),
        None => from_words(address.words).into(),
    }
}

fn proto(proto: Proto) -> u8 {
    match proto {
        Proto::Tcp => PROTO_TCP,
        Proto::Udp => PROTO_UDP,
        Proto::Sctp => PROTO_SCTP,
    }
}

fn from_proto(number: u8) -> Option<Proto> {
    match number {
        PROTO_TCP => Some(Proto::Tcp),
        PROTO_UDP => Some(Proto::Udp),
        PROTO_SCTP => Some(Proto::Sctp),
        _ => None,
    }
}

/// A frontend key in the layout of its family.
pub(super) enum Key {
    V4(Frontend4Key),
    V6(Frontend6Key),
}

pub(super) fn key(key: &FrontendKey) -> Key {
    let (port, proto) = (key.port.to_be(), proto(key.proto));
    match key.addr {
        IpAddr::V4(addr) => {
            Key::V4(Frontend4Key { addr: u32::from_ne_bytes(addr.octets()), port, proto, pad: 0 })
        }
        IpAddr::V6(addr) => Key::V6(Frontend6Key { addr: words(addr), port, proto, pad: 0 }),
    }
}

pub(super) fn from_key4(key: &Frontend4Key) -> Option<FrontendKey> {
    let addr = Ipv4Addr::from(key.addr.to_ne_bytes()).into();
    Some(FrontendKey { addr, port: u16::from_be(key.port), proto: from_proto(key.proto)? })
}

pub(super) fn from_key6(key: &Frontend6Key) -> Option<FrontendKey> {
    let addr = from_words(key.addr).into();
    Some(FrontendKey { addr, port: u16::from_be(key.port), proto: from_proto(key.proto)? })
}

const KINDS: [(FrontendKind, u32); 5] = [
    (FrontendKind::ClusterIp, 0),
    (FrontendKind::NodePort, frontend_flag::NODE_PORT),
    (FrontendKind::LoadBalancer, frontend_flag::LOAD_BALANCER),
    (FrontendKind::ExternalIp, frontend_flag::EXTERNAL_IP),
    (FrontendKind::HostPort, frontend_flag::HOST_PORT),
];

pub(super) fn frontend(entry: &FrontendEntry) -> Frontend {
    let mut flags = KINDS.iter().find(|(kind, _)| *kind == entry.policy.kind).map_or(0, |(_, flag)| *flag);
    for (set, flag) in [
        (entry.policy.source_ranges, frontend_flag::SOURCE_RANGES),
        (entry.policy.dsr, frontend_flag::DSR),
        (entry.policy.internal_local, frontend_flag::INTERNAL_LOCAL),
        (entry.policy.external_local, frontend_flag::EXTERNAL_LOCAL),
    ] {
        if set {
            flags |= flag;
        }
    }
    Frontend {
        service: entry.service,
        base: entry.base,
        local_ready: entry.counts[0],
        remote_ready: entry.counts[1],
        local_terminating: entry.counts[2],
        remote_terminating: entry.counts[3],
        flags,
        affinity_timeout_s: entry.policy.affinity_timeout_s,
        maglev: entry.maglev,
        local_only: entry.local_only,
        pad: 0,
    }
}

/// The scheduler comes back as [`Scheduler::Maglev`] where there is a table; the kernel knows no others.
pub(super) fn from_frontend(value: &Frontend) -> FrontendEntry {
    let has = |flag| value.flags & flag != 0;
    FrontendEntry {
        service: value.service,
        base: value.base,
        counts: [value.local_ready, value.remote_ready, value.local_terminating, value.remote_terminating],
        local_only: value.local_only,
        maglev: value.maglev,
        policy: FrontendPolicy {
            kind: KINDS
                .iter()
                .rev()
                .find(|(_, flag)| has(*flag))
                .map_or(FrontendKind::ClusterIp, |(kind, _)| *kind),
            internal_local: has(frontend_flag::INTERNAL_LOCAL),
            external_local: has(frontend_flag::EXTERNAL_LOCAL),
            affinity_timeout_s: value.affinity_timeout_s,
            source_ranges: has(frontend_flag::SOURCE_RANGES),
            dsr: has(frontend_flag::DSR),
            scheduler: if value.maglev == 0 { Scheduler::Default } else { Scheduler::Maglev },
        },
    }
}

pub(super) fn member_key((service, backend): (ServiceId, BackendId)) -> MemberKey {
    MemberKey { service, backend }
}

pub(super) fn member(member: Member) -> u32 {
    [
        (member.local, member_flag::LOCAL),
        (member.ready, member_flag::READY),
        (member.cluster, member_flag::CLUSTER),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .fold(0, |flags, (_, flag)| flags | flag)
}

pub(super) fn from_member(key: &MemberKey, flags: u32) -> ((ServiceId, BackendId), Member) {
    let member = Member {
        local: flags & member_flag::LOCAL != 0,
        ready: flags & member_flag::READY != 0,
        cluster: flags & member_flag::CLUSTER != 0,
    };
    ((key.service, key.backend), member)
}

/// Bits of a range key before the address.
const RANGE_SERVICE_BITS: u32 = 32;
/// Bits of an IPv4-mapped address before the IPv4 address.
const MAPPED_BITS: u32 = 96;

pub(super) fn range_key(service: ServiceId, range: &IpNetwork) -> RangeKey {
    let mapped = if range.is_ipv4() { MAPPED_BITS } else { 0 };
    let prefix_len = RANGE_SERVICE_BITS + mapped + u32::from(range.prefix());
    RangeKey { prefix_len, service, addr: address(range.network()) }
}

pub(super) fn from_range_key(key: &RangeKey) -> Option<(ServiceId, IpNetwork)> {
    let addr = from_address(&key.addr);
    let mapped = if addr.is_ipv4() { MAPPED_BITS } else { 0 };
    let prefix = key.prefix_len.checked_sub(RANGE_SERVICE_BITS + mapped)?;
    Some((key.service, IpNetwork::new(addr, u8::try_from(prefix).ok()?).ok()?))
}

pub(super) fn backend(id: BackendId, at: &BackendAddr) -> Backend {
    Backend { addr: address(at.addr), id, port: at.port.to_be(), proto: proto(at.proto), flags: 0 }
}

/// `None` for a row that has none.
pub(super) fn from_backend(value: &Backend) -> Option<BackendAddr> {
    Some(BackendAddr {
        addr: from_address(&value.addr),
        port: u16::from_be(value.port),
        proto: from_proto(value.proto)?,
    })
}

/// A slot with its index.
pub(super) fn slot(write: &SlotWrite) -> (u32, Slot) {
    (write.index, Slot { backend: write.backend, service: write.service })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_comes_back() {
        for addr in ["10.96.0.1", "0.0.0.0", "fd00:96::1", "::"] {
            for proto in [Proto::Tcp, Proto::Udp] {
                let addr: IpAddr = addr.parse().unwrap();
                let wanted = FrontendKey { addr, port: 30_080, proto };
                let found = match key(&wanted) {
                    Key::V4(key) => from_key4(&key),
                    Key::V6(key) => from_key6(&key),
                };
                assert_eq!(found, Some(wanted));
                let at = BackendAddr { addr, port: 8080, proto };
                assert_eq!(from_backend(&backend(7, &at)), Some(at));
                assert_eq!(from_address(&address(addr)), addr);
            }
        }
        for bits in 0..16 {
            for (kind, _) in KINDS {
                let policy = FrontendPolicy {
                    kind,
                    internal_local: bits & 1 != 0,
                    external_local: bits & 2 != 0,
                    affinity_timeout_s: 10_800,
                    source_ranges: bits & 4 != 0,
                    dsr: bits & 8 != 0,
                    scheduler: Scheduler::Maglev,
                };
                let counts = [1, 2, 3, 4];
                let entry = FrontendEntry { service: 9, base: 40, counts, local_only: 1, maglev: 3, policy };
                assert_eq!(from_frontend(&frontend(&entry)), entry);
            }
        }
        for bits in 0..8 {
            let held = Member { local: bits & 1 != 0, ready: bits & 2 != 0, cluster: bits & 4 != 0 };
            assert_eq!(from_member(&member_key((3, 4)), member(held)), ((3, 4), held));
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.7/32", "fd00::/8", "::/0"] {
            let range: IpNetwork = text.parse().unwrap();
            assert_eq!(from_range_key(&range_key(5, &range)), Some((5, range)), "{text}");
        }
    }

    #[test]
    fn bytes_are_those_of_the_wire() {
        let Key::V4(key) = key(&FrontendKey { addr: [10, 1, 2, 3].into(), port: 0x1234, proto: Proto::Udp })
        else {
            panic!("an IPv4 key");
        };
        use sheave_ebpf_abi::Plain as _;
        assert_eq!(key.as_bytes(), [10, 1, 2, 3, 0x12, 0x34, 17, 0]);
    }

    #[test]
    fn an_unknown_protocol_is_nothing() {
        assert_eq!(from_key4(&Frontend4Key { addr: 1, port: 1, proto: 133, pad: 0 }), None);
    }
}
